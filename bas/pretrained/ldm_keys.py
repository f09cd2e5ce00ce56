"""Names of the original single-file layout (CompVis, Stability AI) and of diffusers, in tables for both directions.

A table maps our module path to the original one; the rest of a key (`weight`, `bias`) stays. Tables are made from the
model's configuration, for any number of levels and layers. Four things differ in shape too: the VAE's attention has
1x1 convolutions, and open_clip's text encoder (of SD 2, and the second of SDXL) fuses query, key and value, names its
position table without `.weight`, and has its projection transposed.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from bas.models.config import UNetConfig, VAEConfig

Table = dict[str, str]  # our module path -> the original one

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."  # SD 1: OpenAI's text encoder with transformers' names
OPEN_CLIP = "cond_stage_model.model."  # SD 2: open_clip's ViT-H
OPEN_CLIP_2 = "conditioner.embedders.1.model."  # SDXL: open_clip's ViT-bigG, beside the text encoder of SD 1
OPEN_CLIP_LAYERS = 23  # SD 2 reads the output of the last layer but one of 24

# Keys of the networks' parts that are no weights of theirs: the losses and running averages of training, the image
# half of CLIP.
UNUSED_PREFIXES = (
    *(f"{VAE}{name}" for name in ("loss.", "model_ema.", "ema.", "discriminator.")),
    *(f"{CLIP}{name}" for name in ("vision_model.", "visual_projection.")),
    f"{OPEN_CLIP}visual.",
    f"{OPEN_CLIP_2}visual.",
)
POSITION_IDS = ".position_ids"  # ends the name of a table 0, 1, 2, ..., which some programs save
UNUSED = {
    *(f"{CLIP}logit_scale", f"{CLIP}text_projection.weight"),
    *(f"{OPEN_CLIP}{name}" for name in ("logit_scale", "text_projection", "attn_mask")),
    *(f"{OPEN_CLIP_2}{name}" for name in ("logit_scale", "attn_mask")),
}
# What programs are known to leave outside of all networks: running averages, the noise schedule, the state of a
# training, the embeddings of its tokens, counters and markers.
OUTSIDE_PREFIXES = (
    *("model_ema.", "ema.", "optimizer_states.", "lr_schedulers.", "callbacks.", "loops.", "embedding_manager."),
    *("hyper_parameters", "hparams_name", "datamodule_hyper", "denoiser.", "loss_fn.", "sampler.", "edm_"),
    *("alphas_cumprod", "sqrt_", "log_one_minus_alphas", "posterior_", "lvlb_weights"),
)
OUTSIDE = {
    *("betas", "model.betas", "logvar", "scale_factor", "logit_scale", "v_pred", "ztsnr", "__index_timestep_zero__"),
    *("global_step", "epoch", "iteration", "step", "pytorch-lightning_version"),
    *("cond_stage_model.logit_scale", "cond_stage_model.text_projection"),
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
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


# --- The tables ---------------------------------------------------------------------------------------------------


def unet_table(config: UNetConfig) -> Table:
    """Return the UNet's names. The original numbers the stages of all levels in one row: `input_blocks.N.M`."""
    table = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
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
        place = 2 if config.up_depths(level) else 1
        table[f"{ours}.upsamplers.0.conv"] = f"output_blocks.{stage - 1}.{place}.conv"
    return table


def vae_table(config: VAEConfig) -> Table:
    """Return the VAE's names. The original counts decoder levels from the finest, diffusers in execution order."""
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
    """Return the names of open_clip's text encoder, without its fused attention inputs and its position table."""
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


def new_vae_name(name: str) -> str:
    """Rename the VAE's attention layers of files from before diffusers 0.18."""
    head, _, rest = name.partition(".attentions.0.")
    layer, _, kind = rest.rpartition(".")
    return f"{head}.attentions.0.{OLD_VAE_ATTENTION[layer]}.{kind}" if layer in OLD_VAE_ATTENTION else name


def inverse(table: Table) -> Table:
    """Return the table in the other direction."""
    return {theirs: ours for ours, theirs in table.items()}


# --- Whole files --------------------------------------------------------------------------------------------------


def from_original(
    tensors: dict[str, Tensor], unet: UNetConfig, vae: VAEConfig, layers_2: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Return a single file's tensors by component, under the names of bas. An unknown key of one keeps its own name.

    What belongs to no component is left out: `strangers` names it.

    layers_2: of SDXL's second text encoder; 0 where there is none.
    """
    sections = [
        ("unet", UNET, inverse(unet_table(unet))),
        ("vae", VAE, inverse(vae_table(vae))),
        ("text_encoder", OPEN_CLIP, inverse(open_clip_table(OPEN_CLIP_LAYERS))),
    ]
    if layers_2:
        sections.append(("text_encoder_2", OPEN_CLIP_2, inverse(open_clip_table(layers_2))))
    layers = {OPEN_CLIP: OPEN_CLIP_LAYERS, OPEN_CLIP_2: layers_2}
    ours: dict[str, dict[str, Tensor]] = {component: {} for component, _, _ in sections}
    for key, tensor in tensors.items():
        component, prefix, table = next((s for s in sections if key.startswith(s[1])), ("", "", {}))
        if key in UNUSED or key.startswith(UNUSED_PREFIXES) or key.endswith(POSITION_IDS):
            continue
        rest = key.removeprefix(prefix)
        if key.startswith(CLIP):
            ours["text_encoder"][key.removeprefix(CLIP).removeprefix("text_model.")] = tensor
        elif prefix in layers and (special := _from_open_clip(rest, tensor, layers[prefix])) is not None:
            ours[component] |= special
        elif component:
            ours[component][rename(rest, table) or key] = tensor
    return ours


def strangers(tensors: Iterable[str]) -> list[str]:
    """Return the names of tensors that belong to no network, and that no program is known to leave behind."""
    known = (UNET, VAE, CLIP, OPEN_CLIP, OPEN_CLIP_2, *UNUSED_PREFIXES, *OUTSIDE_PREFIXES)
    return [key for key in tensors if not (key.startswith(known) or key in OUTSIDE or key.endswith(POSITION_IDS))]


def to_original(
    ours: dict[str, dict[str, Tensor]], unet: UNetConfig, vae: VAEConfig, open_clip: bool
) -> dict[str, Tensor]:
    """Return a single file's tensors from those of the components; the first text encoder as in SD 2 if `open_clip`."""
    unet_names, vae_names = unet_table(unet), vae_table(vae)
    tensors = {f"{UNET}{rename(key, unet_names)}": tensor for key, tensor in ours["unet"].items()}
    for key, tensor in ours["vae"].items():
        is_projection = ".attentions." in key and tensor.ndim == 2
        tensors[f"{VAE}{rename(key, vae_names)}"] = tensor[:, :, None, None] if is_projection else tensor
    if open_clip:
        text = _to_open_clip(ours["text_encoder"], OPEN_CLIP)
        return tensors | text | _unused_of_open_clip(text)
    tensors |= {f"{CLIP}text_model.{key}": tensor for key, tensor in ours["text_encoder"].items()}
    return tensors | _to_open_clip(ours.get("text_encoder_2", {}), OPEN_CLIP_2)


def _unused_of_open_clip(text: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what strict readers need and SD 2 does not use: a 24th layer, a copy of the 23rd, and a projection."""
    last, further = (f"{OPEN_CLIP}transformer.resblocks.{OPEN_CLIP_LAYERS - behind}." for behind in (1, 0))
    copies = {key.replace(last, further): tensor.clone() for key, tensor in text.items() if key.startswith(last)}
    if not copies:
        return {}
    norm = text[f"{OPEN_CLIP}ln_final.weight"]
    unused = {"text_projection": norm.new_ones(len(norm), len(norm)), "logit_scale": norm.new_ones(())}
    return copies | {f"{OPEN_CLIP}{name}": tensor for name, tensor in unused.items()}


def _from_open_clip(key: str, tensor: Tensor, layers: int) -> dict[str, Tensor] | None:
    """Return the keys of open_clip's text encoder beyond its table: position table, projection, fused (3d, ...) inputs.

    Those of layers that the model does not use are left out.
    """
    if key == "positional_embedding":
        return {"embeddings.position_embedding.weight": tensor}
    if key == "text_projection":
        return {"text_projection.weight": tensor.T}
    layer = re.match(r"transformer\.resblocks\.([0-9]{1,4})\.(attn\.in_proj_(weight|bias)$)?", key)
    if layer and int(layer[1]) >= layers:
        return {}
    if layer and layer[2] and len(tensor) % 3 == 0:
        attention = f"encoder.layers.{layer[1]}.self_attn"
        return {f"{attention}.{x}_proj.{layer[3]}": part for x, part in zip("qkv", tensor.chunk(3), strict=True)}
    return None


def _to_open_clip(ours: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a text encoder under open_clip's names."""
    numbers = [int(layer[1]) for key in ours if (layer := re.match(r"encoder\.layers\.(\d+)\.", key))]
    table, theirs = open_clip_table(max(numbers, default=-1) + 1), {}
    for key, tensor in ours.items():
        if key == "embeddings.position_embedding.weight":
            theirs["positional_embedding"] = tensor
        elif key == "text_projection.weight":
            theirs["text_projection"] = tensor.T.contiguous()
        elif query := re.fullmatch(r"(encoder\.layers\.(\d+)\.self_attn\.)q_proj\.(weight|bias)", key):
            fused = torch.cat([ours[f"{query[1]}{x}_proj.{query[3]}"] for x in "qkv"])
            theirs[f"transformer.resblocks.{query[2]}.attn.in_proj_{query[3]}"] = fused
        elif not re.search(r"\.[kv]_proj\.", key):
            theirs[str(rename(key, table))] = tensor
    return {prefix + key: tensor for key, tensor in theirs.items()}
