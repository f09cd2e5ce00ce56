"""Names of the original single-file layout (CompVis, Stability AI) and of diffusers, in tables for both directions.

A table maps our module path to the original one; the rest of a key (`weight`, `bias`) stays. Tables are made from the
model's configuration, for any number of levels and layers. Three things differ in shape too: the VAE's attention has
1x1 convolutions, and SD 2's text encoder (open_clip) fuses query, key and value and names its position table without
`.weight`.
"""

import re

import torch
from torch import Tensor

from bas.models.config import UNetConfig, VAEConfig

Table = dict[str, str]  # our module path -> the original one

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."  # SD 1: OpenAI's text encoder with transformers' names
OPEN_CLIP = "cond_stage_model.model."  # SD 2: open_clip's ViT-H
OPEN_CLIP_LAYERS = 23  # SD 2 reads the output of the last layer but one of 24

# Keys of the networks' parts that are no weights of theirs: the losses and running averages of training, the image
# half of CLIP. What lies outside of all networks, such as the noise schedule, a step count or a marker, is none either.
UNUSED_PREFIXES = (
    *(f"{VAE}{name}" for name in ("loss.", "model_ema.", "ema.", "discriminator.")),
    *(f"{CLIP}{name}" for name in ("vision_model.", "visual_projection.")),
    f"{OPEN_CLIP}visual.",
)
UNUSED = {
    *(f"{CLIP}text_model.embeddings.position_ids", f"{CLIP}embeddings.position_ids"),
    *(f"{CLIP}logit_scale", f"{CLIP}text_projection.weight"),
    *(f"{OPEN_CLIP}{name}" for name in ("logit_scale", "text_projection", "attn_mask")),
}

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}  # its other layers carry our names
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


# --- The tables ---------------------------------------------------------------------------------------------------


def unet_table(config: UNetConfig) -> Table:
    """The UNet's names. The original numbers the stages of all levels in one row: `input_blocks.N.M`."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        **_within("mid_block.resnets.0", "middle_block.0", UNET_RESNET),
        "mid_block.attentions.0": "middle_block.1",
        **_within("mid_block.resnets.1", "middle_block.2", UNET_RESNET),
    }
    stage = 1
    for level in range(config.levels):
        ours = f"down_blocks.{level}"
        for i in range(config.layers_per_block):
            table |= _within(f"{ours}.resnets.{i}", f"input_blocks.{stage}.0", UNET_RESNET)
            table[f"{ours}.attentions.{i}"] = f"input_blocks.{stage}.1"
            stage += 1
        table[f"{ours}.downsamplers.0.conv"] = f"input_blocks.{stage}.0.op"
        stage += 1
    stage = 0
    for position, level in enumerate(reversed(range(config.levels))):
        ours = f"up_blocks.{position}"
        for i in range(config.layers_per_block + 1):
            table |= _within(f"{ours}.resnets.{i}", f"output_blocks.{stage}.0", UNET_RESNET)
            table[f"{ours}.attentions.{i}"] = f"output_blocks.{stage}.1"
            stage += 1
        # The upsampler follows the level's last layers in their own list: behind the transformer, where there is one.
        place = 2 if config.up_has_attention(level) else 1
        table[f"{ours}.upsamplers.0.conv"] = f"output_blocks.{stage - 1}.{place}.conv"
    return table


def vae_table(config: VAEConfig) -> Table:
    """The VAE's names. The original counts the decoder's levels from the finest, diffusers in execution order."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    levels = len(config.block_out_channels)
    for coder in ("encoder", "decoder"):
        table |= {
            f"{coder}.conv_in": f"{coder}.conv_in",
            f"{coder}.conv_norm_out": f"{coder}.norm_out",
            f"{coder}.conv_out": f"{coder}.conv_out",
            **_within(f"{coder}.mid_block.attentions.0", f"{coder}.mid.attn_1", VAE_ATTENTION),
        }
        for i in range(2):
            table |= _resnet(f"{coder}.mid_block.resnets.{i}", f"{coder}.mid.block_{i + 1}")
    for level in range(levels):
        ours, theirs = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        for i in range(config.layers_per_block):
            table |= _resnet(f"{ours}.resnets.{i}", f"{theirs}.block.{i}")
        table[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
        ours, theirs = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        for i in range(config.layers_per_block + 1):
            table |= _resnet(f"{ours}.resnets.{i}", f"{theirs}.block.{i}")
        table[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    return table


def open_clip_table(layers: int) -> Table:
    """The names of SD 2's text encoder, without its fused attention inputs and its position table."""
    table = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for i in range(layers):
        table |= _within(f"encoder.layers.{i}", f"transformer.resblocks.{i}", OPEN_CLIP_LAYER)
    return table


def _within(ours: str, theirs: str, table: Table) -> Table:
    return {f"{ours}.{name}": f"{theirs}.{original}" for name, original in table.items()}


def _resnet(ours: str, theirs: str) -> Table:
    return {ours: theirs, **_within(ours, theirs, VAE_RESNET)}


def rename(key: str, table: Table) -> str | None:
    """Rename a key by its longest beginning in the table; None for a key without one."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        renamed = table.get(".".join(parts[:length]))
        if renamed is not None:
            return ".".join([renamed, *parts[length:]])
    return None


def inverse(table: Table) -> Table:
    """The table in the other direction."""
    return {theirs: ours for ours, theirs in table.items()}


# --- Whole files --------------------------------------------------------------------------------------------------


def from_original(tensors: dict[str, Tensor], unet: UNetConfig, vae: VAEConfig) -> dict[str, dict[str, Tensor]]:
    """A single file's tensors by component, under the names of bas. An unknown key of a network keeps its own name."""
    sections = (
        ("unet", UNET, inverse(unet_table(unet))),
        ("vae", VAE, inverse(vae_table(vae))),
        ("text_encoder", OPEN_CLIP, inverse(open_clip_table(OPEN_CLIP_LAYERS))),
    )
    ours: dict[str, dict[str, Tensor]] = {component: {} for component, _, _ in sections}
    for key, tensor in tensors.items():
        component, prefix, table = next((s for s in sections if key.startswith(s[1])), ("", "", {}))
        if key in UNUSED or key.startswith(UNUSED_PREFIXES):
            continue
        if key.startswith(CLIP):
            ours["text_encoder"][key.removeprefix(CLIP).removeprefix("text_model.")] = tensor
        elif prefix == OPEN_CLIP and (special := _from_open_clip(key.removeprefix(prefix), tensor)) is not None:
            ours[component] |= special
        elif component:
            ours[component][rename(key.removeprefix(prefix), table) or key] = tensor
    return ours


def to_original(
    ours: dict[str, dict[str, Tensor]], unet: UNetConfig, vae: VAEConfig, open_clip: bool
) -> dict[str, Tensor]:
    """The tensors of a single file, from those of the components; the text encoder as in SD 2 if `open_clip`."""
    unet_names, vae_names = unet_table(unet), vae_table(vae)
    tensors = {f"{UNET}{rename(key, unet_names)}": tensor for key, tensor in ours["unet"].items()}
    for key, tensor in ours["vae"].items():
        is_projection = ".attentions." in key and tensor.ndim == 2
        tensors[f"{VAE}{rename(key, vae_names)}"] = tensor[:, :, None, None] if is_projection else tensor
    if open_clip:
        text = _to_open_clip(ours["text_encoder"])
        text |= _unused_of_open_clip(text)
        return tensors | {OPEN_CLIP + key: tensor for key, tensor in text.items()}
    return tensors | {f"{CLIP}text_model.{key}": tensor for key, tensor in ours["text_encoder"].items()}


def _unused_of_open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """What strict readers look for and SD 2 does not use: a 24th layer, here the 23rd again, and a projection."""
    last, further = (f"transformer.resblocks.{OPEN_CLIP_LAYERS - behind}." for behind in (1, 0))
    copies = {key.replace(last, further): tensor.clone() for key, tensor in text.items() if key.startswith(last)}
    if not copies:
        return {}
    norm = text["ln_final.weight"]
    return copies | {"text_projection": norm.new_ones(len(norm), len(norm)), "logit_scale": norm.new_ones(())}


def _from_open_clip(key: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """The keys of SD 2's text encoder beyond its table: position table, unused last layer, fused (3d, ...) inputs."""
    if key == "positional_embedding":
        return {"embeddings.position_embedding.weight": tensor}
    layer = re.match(r"transformer\.resblocks\.([0-9]{1,4})\.(attn\.in_proj_(weight|bias)$)?", key)
    if layer and int(layer[1]) >= OPEN_CLIP_LAYERS:
        return {}
    if layer and layer[2] and len(tensor) % 3 == 0:
        attention = f"encoder.layers.{layer[1]}.self_attn"
        return {f"{attention}.{x}_proj.{layer[3]}": part for x, part in zip("qkv", tensor.chunk(3), strict=True)}
    return None


def _to_open_clip(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD 2's text encoder under open_clip's names, without the unused last layer."""
    table, theirs = open_clip_table(OPEN_CLIP_LAYERS), {}
    for key, tensor in ours.items():
        if key == "embeddings.position_embedding.weight":
            theirs["positional_embedding"] = tensor
        elif query := re.fullmatch(r"(encoder\.layers\.(\d+)\.self_attn\.)q_proj\.(weight|bias)", key):
            fused = torch.cat([ours[f"{query[1]}{x}_proj.{query[3]}"] for x in "qkv"])
            theirs[f"transformer.resblocks.{query[2]}.attn.in_proj_{query[3]}"] = fused
        elif not re.search(r"\.[kv]_proj\.", key):
            theirs[str(rename(key, table))] = tensor
    return theirs
