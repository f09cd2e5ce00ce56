"""The names of adapters in files: kohya's, PEFT's and the older ones of diffusers.

Every reader names a layer by its path in diffusers' networks: `down_blocks.0.attentions.0.proj_in`. kohya's files write
it as `lora_unet_down_blocks_0_attentions_0_proj_in`, PEFT's as `unet.down_blocks.0.attentions.0.proj_in`. kohya's files
for SDXL name the UNet's layers as the original code does: `lora_unet_input_blocks_4_1_proj_in`. So do ComfyUI's for all
families: `diffusion_model.input_blocks.4.1.proj_in`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from bas.pretrained.ldm_keys import Table, rename

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
KOHYA_XL = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
KOHYA_READ = {prefix: component for names in (KOHYA, KOHYA_XL) for component, prefix in names.items()}
KOHYA_READ["lycoris_"] = "unet"  # the prefix of LyCORIS's own wrapper
ORIGINAL = "diffusion_model."  # the UNet's in files of ComfyUI, whose layers have their original names, with dots
OF_SDXL = ("lora_te2_", "text_encoder_2.")  # parts of names in files for SDXL alone
ROLES = {  # how a name ends: what the tensor is
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
    ".diff": "diff",
    ".diff_b": "diff of the bias",
}
TRANSFORMER = "a LoRA for a diffusion transformer, such as Flux or Stable Diffusion 3"
FOREIGN = (  # a part of a name: the kind of file that has it
    ("hada_w", "a LoHa"),
    ("lokr_", "a LoKr"),
    ("dora_scale", "a DoRA"),
    ("lora_magnitude_vector", "a DoRA"),
    ("boft_", "a BOFT"),
    ("oft_", "an OFT"),
    ("on_input", "an IA3"),
    (".ia3_l", "an IA3"),
    (".b1.weight", "a GLoRA"),
    ("vera_lambda", "a VeRA"),
    (".w_norm", "a LyCORIS with norms"),
    (".b_norm", "a LyCORIS with norms"),
    ("_custom_diffusion", "a file of Custom Diffusion's scripts"),
    ("lora_controlnet", "a ControlNet LoRA"),
    ("double_blocks", "a LoRA for Flux"),
    ("single_transformer_blocks", "a LoRA for Flux"),
    ("joint_", "a LoRA for Stable Diffusion 3"),
    ("lora_prior_unet_", "a LoRA for Stable Cascade"),
    ("transformer.transformer_blocks.", TRANSFORMER),
    ("lora_te3_", TRANSFORMER),
    ("lora_unet_blocks_", TRANSFORMER),
    ("diffusion_model.blocks.", TRANSFORMER),
    (":up", "a LoRA of cloneofsimo's scripts"),
)
FOREIGN_METHODS = {"use_dora": "a DoRA"}  # settings in PEFT's metadata
OWN_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")  # PEFT saves the adapter's name between, `default` or another
OLD_ATTENTION = re.compile(r"(.*\.attn[12])(?:\.processor)?\.(to_[qkv]|to_out)$")  # of diffusers before 0.22
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # of text, before 0.17

TEXT_LAYER = re.compile(r"(encoder[._]layers[._])[0-9]{1,4}([._])")


class Place(NamedTuple):
    """Where a tensor of a file belongs."""

    component: str  # "unet", "text_encoder" or "text_encoder_2"
    layer: str  # its path, without `text_model.`
    role: str  # one of ROLES


def kohya_name(component: str, layer: str, original: Table | None = None) -> str:
    """Return the layer's name in a kohya file. original: the UNet's `unet_table`, for SDXL."""
    path = layer if component == "unet" else f"text_model.{layer}"
    if original is not None and component == "unet":
        path = str(rename(layer, original))
    return (KOHYA if original is None else KOHYA_XL)[component] + path.replace(".", "_")


def peft_name(component: str, layer: str) -> str:
    """Return the layer's name in a PEFT file."""
    return f"{component}.{layer}" if component == "unet" else f"{component}.text_model.{layer}"


def foreign_kind(names: Iterable[str]) -> str | None:
    """Return the kind of a file that bas does not read, by the names of its tensors."""
    listed = list(names)
    return next((kind for part, kind in FOREIGN if any(part in name for name in listed)), None)


def split_role(name: str) -> tuple[str, str] | None:
    """Split a tensor's name into its layer, as the file spells it, and its role, one of ROLES. None for other names."""
    name = OWN_NAME.sub(r".\1.weight", name.replace("base_model.model.", ""))
    ending = next((ending for ending in sorted(ROLES, key=len, reverse=True) if name.endswith(ending)), None)
    return None if ending is None else (name.removesuffix(ending), ROLES[ending])


def is_text_reader(layer: str, role: str) -> bool:
    """Return whether a tensor reads the text: its last side then has the text's width, as in keys and values."""
    return role in ("down", "diff") and re.search(r"attn2[._](processor[._])?to_[kv]$", layer) is not None


def find_place(name: str, layers: dict[str, dict[str, str]]) -> Place | None:
    """Return where a tensor belongs, None if its name means nothing here.

    layers: by component, the layers' paths by the names that kohya's files have for them, without prefix.
    """
    if (found := split_role(name)) is None:
        return None
    layer, role = found
    if layer.startswith(ORIGINAL):
        path = layers["unet"].get(layer.removeprefix(ORIGINAL).replace(".", "_"))
        return Place("unet", path, role) if path else None
    for prefix, component in KOHYA_READ.items():
        if layer.startswith(prefix):
            path = layers.get(component, {}).get(layer.removeprefix(prefix).removeprefix("text_model_"))
            return Place(component, path, role) if path else None
    component, _, path = layer.partition(".")
    # PEFT's own files, and the oldest of diffusers, are of one network and do not name it.
    candidates = {component: path} if component in layers else dict.fromkeys(layers, layer)
    for component, path in candidates.items():
        path = _new_name(path.removeprefix("text_model."))
        if path in layers[component].values():
            return Place(component, path, role)
    return None


def is_behind_last(name: str, layers: dict[str, dict[str, str]]) -> bool:
    """Return whether a tensor without a place changes a layer of a text encoder behind the last one that is in use."""
    first = TEXT_LAYER.sub(r"\g<1>0\g<2>", name)
    return first != name and find_place(first, layers) is not None


def _new_name(path: str) -> str:
    """Return the path of a layer today, from that in an old file of diffusers."""
    if old := OLD_ATTENTION.match(path):
        return f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
    head, _, last = path.rpartition(".")
    return f"{head}.{OLD_TEXT[last]}" if head.endswith(".self_attn") and last in OLD_TEXT else path
