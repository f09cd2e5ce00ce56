"""LoRA files: written for other programs, and read from them.

A file adds to each of its layers' weights the change scale x up down (Change) or a whole difference (Difference). The
scale is strength x alpha / rank, or the strength where alpha is missing, as in every other reader.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from bas.errors import InputError, RunError
from bas.io.files import not_a_file
from bas.io.json_files import read_json
from bas.io.run_files import TUNED_FORMAT
from bas.io.tensors import read_tensors, write_tensors
from bas.models.adapters import Change, Difference, is_change_of
from bas.models.bundle import is_finite
from bas.models.config import UNetConfig
from bas.pretrained.embedding_files import EMBEDDING_KEYS
from bas.pretrained.ldm_keys import rename, unet_table
from bas.pretrained.loading import Parts, name_of
from bas.pretrained.lora_names import (
    FOREIGN_METHODS,
    KOHYA,
    KOHYA_XL,
    OF_SDXL,
    find_place,
    foreign_kind,
    is_behind_last,
    is_text_reader,
    kohya_name,
    peft_name,
    split_role,
)
from bas.pretrained.unsupported import LORA, other_kind

log = logging.getLogger(__name__)

Adapters = Mapping[str, Mapping[str, Change | Difference]]  # by component, then by the layer's path


# --- Writing ------------------------------------------------------------------------------------------------------


def kohya_tensors(adapters: Adapters, xl: UNetConfig | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a kohya file in float32, and the part of its metadata that describes them.

    xl: the configuration of SDXL's UNet, whose layers have their original names there.

    All layers of a network have one alpha: diffusers applies the commonest one to all. What differs is folded into B.
    """
    tensors: dict[str, Tensor] = {}
    ranks, alphas, kernels, original = set(), set(), set(), unet_table(xl) if xl else None
    for component, layers in adapters.items():
        alpha = common_alpha(layers)
        for layer, change in layers.items():
            name = kohya_name(component, layer, original)
            if isinstance(change, Difference):
                tensors[f"{name}.diff"] = change.delta()
                continue
            rank = len(change.down)
            tensors[f"{name}.lora_down.weight"] = change.down.float()
            tensors[f"{name}.lora_up.weight"] = folded(change.up, change.scale * rank / alpha)
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
            if change.down[0, 0].numel() > 1:
                kernels.add((rank, alpha))
            ranks.add(rank)
            alphas.add(alpha)
    described = {name: str(min(of)) if len(of) == 1 else "Dynamic" for name, of in (("dim", ranks), ("alpha", alphas))}
    network = {"ss_network_module": "networks.lora"}
    if len(kernels) == 1:
        network["ss_network_args"] = json.dumps(dict(zip(("conv_dim", "conv_alpha"), *kernels, strict=True)))
    return tensors, network | ({f"ss_network_{name}": text for name, text in described.items()} if ranks else {})


def common_alpha(layers: Mapping[str, Change | Difference]) -> float:
    """Return a network's alpha: that of its largest adapter, in bf16, which every precision of a file expresses."""
    adapters = [change for change in layers.values() if isinstance(change, Change)]
    largest = max(adapters, key=lambda change: len(change.down), default=None)
    if largest is None or not largest.scale:
        return 1.0
    return abs(float(torch.tensor(largest.scale * len(largest.down)).bfloat16())) or 1.0


def folded(up: Tensor, factor: float) -> Tensor:
    """Return an adapter's second matrix in float32, multiplied by a factor."""
    return up.float() if factor == 1 else up.float() * factor


def peft_tensors(adapters: Adapters, _xl: UNetConfig | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a PEFT file in float32, scales folded into B, and the metadata that PEFT's readers take.

    Its names are the same for SDXL.
    """
    tensors: dict[str, Tensor] = {}
    texts: dict[str, object] = {}
    for component, layers in adapters.items():
        ranks: dict[str, int] = {}
        for layer, change in layers.items():
            if isinstance(change, Difference):
                raise InputError("this format holds adapters, not differences of whole weights: give it a --rank")
            name, rank = peft_name(component, layer), len(change.down)
            tensors[f"{name}.lora_A.weight"] = change.down.float()
            tensors[f"{name}.lora_B.weight"] = folded(change.up, change.scale)
            ranks[layer] = rank  # without `text_model.`: PEFT compares ends, and transformers 5 has no such module
        if ranks:
            commonest = max(ranks.values(), key=list(ranks.values()).count)
            others = {name: rank for name, rank in ranks.items() if rank != commonest}
            texts |= {
                f"{component}.r": commonest,
                f"{component}.lora_alpha": commonest,
                f"{component}.target_modules": sorted(ranks),
                f"{component}.rank_pattern": others,
                f"{component}.alpha_pattern": others,
            }
    return tensors, {"lora_adapter_metadata": json.dumps(texts, sort_keys=True)}


FORMATS = {"kohya": kohya_tensors, "peft": peft_tensors}


def bundled(rows: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of embeddings inside a LoRA file, as A1111 reads them.

    rows: (n, d) for each text encoder, by name, which has no dot.
    """
    keys = {1: ("string_to_param.*",), 2: EMBEDDING_KEYS}
    return {
        f"bundle_emb.{name}.{key}": row
        for name, own in rows.items()
        for key, row in zip(keys[len(own)], own, strict=True)
    }


def write_lora(
    path: Path,
    adapters: Adapters,
    form: str,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    extra: Mapping[str, Tensor] = MappingProxyType({}),
    xl: UNetConfig | None = None,
) -> None:
    """Write a LoRA file, with further tensors in it. xl: the configuration of the UNet, for SDXL

    RunError for values that are beyond the range of `dtype` or not finite.
    """
    tensors, texts = FORMATS[form](adapters, xl)
    tensors |= extra
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise RunError(f"{len(broken)} tensors are beyond the range of {name_of(dtype)} or not finite ({broken[0]})")
    write_tensors(path, tensors, {**metadata, **texts})


def as_lora(change: Change | Difference, rank: int) -> Change:
    """Return the adapter of this rank that is nearest to a change of a weight, by its singular values, in float32."""
    u, values, v = change.svd()
    root = values[:rank].sqrt()
    down, up = (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()
    kernel = change.shape[2:]  # of a convolution: the whole of it is A's
    return Change(down.view(-1, *change.shape[1:]), up.view(*up.shape, *(1 for _ in kernel)), 1.0)


# --- Reading ------------------------------------------------------------------------------------------------------


PEFT_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of folders by PEFT and diffusers
PEFT_CONFIG = "adapter_config.json"  # beside the first: its alpha


def lora_file(path: Path) -> Path:
    """Return the file of a LoRA: the path itself, or in a folder that PEFT or diffusers wrote the file there."""
    if not path.is_dir():
        return path
    if not holds_lora(path):
        raise InputError(f"{path} is a folder without {' or '.join(PEFT_FILES)}: name the .safetensors file of a LoRA")
    return next(path / name for name in PEFT_FILES if (path / name).is_file())


def holds_lora(folder: Path) -> bool:
    """Return whether a folder holds a LoRA as PEFT or diffusers writes it."""
    return any((folder / name).is_file() for name in PEFT_FILES)


def peft_config(path: Path) -> Path | None:
    """Return the settings that PEFT writes beside a LoRA file; None for other files."""
    beside = path.with_name(PEFT_CONFIG)
    return beside if path.name == PEFT_FILES[0] and beside.is_file() else None


def read_lora(path: Path, parts: Parts, strength: float) -> Adapters:
    """Read a LoRA of any known format for the model of `parts`.

    Raises InputError for another kind of file, for a model of another family, and for a tensor without a place.
    Embeddings that are bundled in the file are left out with a warning, and so are layers of the text encoder behind
    the last one that the model uses.
    """
    if not path.is_file():
        raise not_a_file(path)
    tensors, texts = read_tensors(path)
    if bundled := sorted({name.split(".")[1] for name in tensors if name.startswith("bundle_emb.")}):
        log.warning("%s also holds the embeddings %s, which are not read from there", path, ", ".join(bundled))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("bundle_emb.")}
    if problem := _unread(path, tensors, texts):
        raise InputError(problem[1])
    if (other := other_kind(tensors)) and other[0] != LORA:
        raise InputError(f"{path} is {other[0]}: {other[1]}")
    layers, scales = layers_of(parts), read_scales(path, texts)
    behind = [name for name in tensors if find_place(name, layers) is None and is_behind_last(name, layers)]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in {*behind}}
    found: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        place = find_place(name, layers)
        if place is None:
            raise InputError(
                f"{path} holds {name}, for which this model has no place: {_stranger(name, tensors, parts)}"
            )
        if place.role != "alpha" and not tensor.is_floating_point():
            raise InputError(f"{path}: {name} holds {name_of(tensor.dtype)}, not weights: give a LoRA in fp32 or fp16")
        if not is_finite(tensor.float()):
            raise InputError(f"{path}: {name} holds values that are not finite numbers: download it again")
        if place.role in found[place.component, place.layer]:
            raise InputError(f"{path} holds the {place.role} of {place.layer} twice, once as {name}: save it again")
        found[place.component, place.layer][place.role] = tensor
    if not found:
        raise InputError(f"{path} holds no LoRA")
    _check_stated_family(path, tensors, texts, parts)
    adapters: dict[str, dict[str, Change | Difference]] = defaultdict(dict)
    for (component, layer), roles in found.items():
        weight = parts.tensors[component][f"{layer}.weight"]
        adapters[component][layer] = _change(path, layer, roles, weight, strength, scales.get(component))
    if behind:
        line = "%s also changes layers of text behind the last one in use, which are left out: %d tensors, %s first"
        log.warning(line, path, len(behind), behind[0])
    return adapters


def _unread(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the kind of a file that bas does not read, though its names are like a LoRA's, and the error about it."""
    if texts.get("bas") == TUNED_FORMAT:
        kind = "a part of a small run"
        return kind, f"{path} is {kind}: name the folder of the run as the model, or `bas export` it to a LoRA"
    kind = foreign_kind(tensors)
    return (kind, f"{path} is {kind}, {UNREAD}") if kind else None


def _stranger(name: str, tensors: Mapping[str, Tensor], parts: Parts) -> str:
    """Return what a tensor without a place in a model is."""
    if split_role(name) is None:
        return "it is not a part of a LoRA that bas knows"
    if text_widths(tensors) == {parts.spec.unet.cross_attention_dim}:
        return "it is a LoRA for a model with other layers"
    return f"it is a LoRA for {family_of(tensors) or 'another model'}"


def _check_stated_family(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str], parts: Parts) -> None:
    """Raise InputError where the metadata names another family and no tensor's shape tells it."""
    own = FAMILIES[2048] if parts.spec.text_encoder_2 is not None else parts.spec.family
    others = {*FAMILIES.values()} - {own}
    if own == FAMILIES[2048] and any(name.startswith(KOHYA["text_encoder"]) for name in tensors):
        raise InputError(
            f"{path} is a LoRA for Stable Diffusion 1 or 2 by its names: this model is {own}, give one for it"
        )
    if not text_widths(tensors) and (stated := stated_family(texts)) in others:
        raise InputError(f"{path} is a LoRA for {stated} by its metadata, this model is {own}: give a LoRA for it")


def layers_of(parts: Parts) -> dict[str, dict[str, str]]:
    """By component, the paths of the layers with a weight, by the names that kohya's files have for them."""
    found, original = {}, unet_table(parts.spec.unet)
    for component in ("unet", *parts.spec.text_encoders):
        paths = [
            name.removesuffix(".weight")
            for name, tensor in parts.tensors[component].items()
            if name.endswith(".weight") and tensor.ndim in (2, 4) and not name.startswith("embeddings.")
        ]
        found[component] = {path.replace(".", "_"): path for path in paths}
        if component == "unet":
            found[component] |= {str(rename(path, original)).replace(".", "_"): path for path in paths}
    return found


def _change(
    path: Path, layer: str, roles: dict[str, Tensor], weight: Tensor, strength: float, scale: "PeftScale | None"
) -> Change | Difference:
    """Return the change of one layer's weight. InputError unless its tensors are complete and of the right shapes."""
    if "diff of the bias" in roles:
        raise InputError(f"{path} changes the bias of {layer}, which bas does not read: give a LoRA without it")
    if "diff" in roles:
        if roles.keys() != {"diff"} or not is_change_of(roles["diff"].shape, weight):
            raise InputError(f"{path}: the difference of {layer} does not fit the model's {list(weight.shape)}")
        return Difference(roles["diff"], strength)
    if missing := {"down", "up"} - roles.keys():
        raise InputError(f"{path}: {layer} has no {min(missing)} matrix; copy or download the file again")
    down, up = roles["down"], roles["up"]
    if down.ndim < 2 or up.ndim < 2 or not len(down):
        raise InputError(f"{path}: the matrices of {layer} are {list(down.shape)} and {list(up.shape)}: it is damaged")
    rank = len(down)
    if "mid" in roles:  # Tucker: A reads 1x1, mid has the kernel
        if roles["mid"].ndim != 4 or roles["mid"].shape[:2] != (up.shape[1], rank):
            raise InputError(f"{path}: the matrices of {layer} do not fit each other")
        down = torch.einsum("mnhw,ni->mihw", roles["mid"].float(), down.float().flatten(1))
    if up.shape[1] != len(down) or up[0].numel() != len(down) or not is_change_of((len(up), *down.shape[1:]), weight):
        raise InputError(
            f"{path}: {layer} has an input of {down.shape[1]} and an output of {len(up)}, the model's is "
            f"{list(weight.shape)}: it is a LoRA for {FAMILIES.get(down.shape[1], 'another model')}"
        )
    if "alpha" in roles:
        if roles["alpha"].numel() != 1:
            raise InputError(f"{path}: the alpha of {layer} is {list(roles['alpha'].shape)}, not one number")
        return Change(down, up, strength * float(roles["alpha"]) / rank)
    return Change(down, up, strength * (scale.of(layer, rank) if scale else 1.0))


UNREAD = "which bas does not read: give a LoRA for Stable Diffusion 1.x, 2.x or XL"
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by the width of the text
STATED = {  # how a value of ss_base_model_version or modelspec.architecture begins: the family
    **dict.fromkeys(("sd_v1", "sd_1", "stable-diffusion-v1"), FAMILIES[768]),
    **dict.fromkeys(("sd_v2", "sd_2", "stable-diffusion-v2"), FAMILIES[1024]),
    **dict.fromkeys(("sdxl", "stable-diffusion-xl"), FAMILIES[2048]),
}


def text_widths(tensors: Mapping[str, Tensor]) -> set[int]:
    """Return the widths of the text that the layers of a LoRA read; empty where none of them reads it."""
    roles = {name: split_role(name) for name in tensors}
    readers = [tensors[name] for name, found in roles.items() if found and is_text_reader(*found)]
    return {tensor.shape[1] for tensor in readers if tensor.ndim > 1}


def family_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the family of a LoRA file's model, by its text encoders and the width of the text; None if unknown."""
    if any(part in name for part in OF_SDXL for name in tensors):
        return FAMILIES[2048]
    widths = text_widths(tensors)
    return ", ".join(sorted(FAMILIES.get(width, f"a model with text of width {width}") for width in widths)) or None


def stated_family(texts: Mapping[str, str]) -> str | None:
    """Return the family of models that a LoRA's metadata names, as it stands there if bas does not know it."""
    if texts.get("ss_v2") == "True":
        return FAMILIES[1024]
    stated = texts.get("ss_base_model_version") or texts.get("modelspec.architecture", "").partition("/")[0]
    return next((family for begin, family in STATED.items() if stated.lower().startswith(begin)), stated) or None


@dataclass(frozen=True)
class PeftScale:
    """How PEFT scales the adapters of one network: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""

    alpha: float
    own: Mapping[re.Pattern[str], float]  # of single layers, by the end of their names; the first that matches counts
    by_root: bool

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> "PeftScale":
        """Read the settings of one network. Raises ValueError, TypeError or AttributeError for wrong ones."""
        try:  # regular expressions, by the rule of PEFT's get_pattern_key
            own = {re.compile(rf"(.*\.)?({end})$"): float(a) for end, a in settings.get("alpha_pattern", {}).items()}
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"a pattern of layers is no regular expression: {error}") from None
        alpha = float(settings.get("lora_alpha", 8))  # PEFT's default
        return cls(alpha, own, bool(settings.get("use_rslora", False)))

    def of(self, layer: str, rank: int) -> float:
        """Return the scale of one layer's adapter."""
        names = (layer, f"text_model.{layer}")  # transformers 5 has no such module
        alpha = next((alpha for end, alpha in self.own.items() if any(map(end.match, names))), self.alpha)
        return alpha / (rank**0.5 if self.by_root else rank)


def read_scales(path: Path, texts: Mapping[str, str]) -> dict[str, PeftScale]:
    """Return how the adapters of a PEFT file are scaled, by component: by its metadata, or by the settings beside it.

    InputError for settings that cannot be read, and for those of a method that is no LoRA.
    """
    beside = peft_config(path)
    if path.name == PEFT_FILES[0] and beside is None:
        log.warning("%s has no %s beside it, which holds its alpha: its scale counts as 1", path, PEFT_CONFIG)
    try:
        if beside:
            settings = dict.fromkeys(KOHYA_XL, read_json(beside))
        else:
            whole = json.loads(texts.get("lora_adapter_metadata", "{}")).items()
            settings = {
                part: {name.partition(".")[2]: value for name, value in whole if name.startswith(f"{part}.")}
                for part in KOHYA_XL
            }
        scales = {part: PeftScale.read(own) for part, own in settings.items() if own}
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{beside or path}: the settings of PEFT cannot be read: copy or download it again") from None
    for own in settings.values():
        kind = next((kind for name, kind in FOREIGN_METHODS.items() if own.get(name)), None)
        if (method := own.get("peft_type", "LORA")) != "LORA":
            kind = f"a {method}"
        if kind:
            raise InputError(f"{path} is {kind}, {UNREAD}")
    return scales


# --- Describing ---------------------------------------------------------------------------------------------------


def describe_lora(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, Any]:
    """Describe a LoRA file: its base, ranks, alphas and trigger words, and what bas cannot use of it."""
    if problem := _unread(path, tensors, texts):
        return dict(zip(("what", "problem"), problem, strict=True))
    roles = {name: split_role(name) for name in tensors}
    layers = {found[0] for found in roles.values() if found and found[1] != "alpha"}
    ranks = {
        tensors[name].shape[0] for name, found in roles.items() if found and found[1] == "down" and tensors[name].ndim
    }
    alphas = {
        float(tensors[name])
        for name, found in roles.items()
        if found and found[1] == "alpha" and tensors[name].numel() == 1
    }
    alphas |= {alpha for scale in read_scales(path, texts).values() for alpha in (scale.alpha, *scale.own.values())}
    text = sum(layer.startswith(("lora_te", "text_encoder", "te_")) for layer in layers)
    whole = len({found[0] for found in roles.values() if found and found[1] == "diff"})
    return {
        "for": family_of(tensors) or stated_family(texts),
        "trained on": texts.get("ss_sd_model_name"),
        "base hash": texts.get("bas.base_sha256"),
        "layers": f"{len(layers) - text} of the UNet, {text} of the text encoder",
        "differences": f"of {whole} whole weights" if whole else None,
        "ranks": sorted(ranks),
        "alpha": sorted(alphas) or ("none: the strength counts as it is" if ranks else None),
        "trigger words": trigger_words(texts),
        "not used": sorted(name for name, found in roles.items() if found is None),
    }


def trigger_words(texts: Mapping[str, str]) -> list[str]:
    """Return the words that a LoRA was trained with, as the metadata of kohya's scripts or of ModelSpec lists them."""
    try:
        folders = json.loads(texts.get("ss_tag_frequency", "{}")).values()
        words = [word for folder in folders for word in folder]
    except (ValueError, AttributeError, TypeError, RecursionError):
        words = []
    return words or [word.strip() for word in texts.get("modelspec.trigger_phrase", "").split(",") if word.strip()]
