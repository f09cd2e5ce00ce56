"""Original single files (CompVis, Stability AI): UNet, VAE and text encoders in one .safetensors, no configuration.

The shapes tell the widths, levels, layers and depths. The family tells the rest: SD 1 has OpenAI's text encoder and 8
heads everywhere, SD 2 has open_clip's, heads of 64 features, and linear projections in its transformers, SDXL has both
text encoders and otherwise what SD 2 has.
"""

from __future__ import annotations

import logging
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from dataclasses import replace
from functools import cache
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bas.errors import InputError
from bas.io.json_files import read_json
from bas.io.tensors import read_tensors, write_tensors
from bas.models.bundle import Models, ModelSpec
from bas.models.config import SIZES, UNetConfig, VAEConfig
from bas.models.text import load_tokenizer
from bas.presets import GUIDANCE
from bas.pretrained.ldm_keys import (
    CLIP,
    OPEN_CLIP,
    OPEN_CLIP_2,
    OPEN_CLIP_LAYERS,
    UNET,
    VAE,
    from_original,
    strangers,
    to_original,
)
from bas.pretrained.loading import Parts, unwrap_keys
from bas.pretrained.unsupported import WHOLE_MODEL, check_channels, check_complete
from bas.schedulers import NoiseSchedule

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

log = logging.getLogger(__name__)

CLIP_VOCABULARY = Path(__file__).parent / "clip_vocabulary"
SDXL_SCALING = 0.13025  # of its latents
SD_STEPS_OFFSET = 1  # of every Stable Diffusion's scheduler, and of diffusers' pipeline whatever the file says
EMBEDDER, EMBEDDER_2 = "conditioner.embedders.0.", "conditioner.embedders.1."  # in Stability AI's later code
TEXT_DEPTHS = {768: 12, 1024: OPEN_CLIP_LAYERS, 1280: 32}  # of the published text encoders, as read, by their widths
FAMILY_WIDTHS = {768: False, 1024: True}  # of the published text encoders: whether it is SD 2's
MAX_YAML_BYTES = 2**20
INEXPRESSIBLE = "the single-file layout cannot express this model's {}: save a folder instead"
PARAMETERIZATION = re.compile(r"""^[^#\n]*\bparameterization["']?\s*:\s*["']?(\w+)""", re.MULTILINE)

# ModelSpec, a convention for the metadata of .safetensors files, and its names of prediction types.
SPEC = "modelspec."
SPEC_PREDICTION: dict[str, str] = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}

# The rule of other tools, such as ComfyUI: this bias has a wider spread in v-prediction models of SD 2.
V_PREDICTION_BIAS = "1.transformer_blocks.0.norm1.bias"  # of the last output block
V_PREDICTION_SPREAD = 0.09


class _Shapes:
    """The shapes of a file's matrices and convolutions. Raises InputError for a missing one."""

    def __init__(self, tensors: dict[str, Tensor], path: Path):
        self.tensors, self.path = tensors, path

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise InputError(f"{self.path} lacks {name}: it is damaged, download it again")
        shape = tuple(self.tensors[name].shape)
        if len(shape) < 2:
            raise InputError(f"{self.path}: {name} is {list(shape)}, not a matrix: it is damaged, download it again")
        return shape

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def count(self, pattern: str) -> int:
        """Return how many of the names pattern.format(0), pattern.format(1), ... there are before the first gap."""
        return sum(1 for _ in takewhile(lambda i: pattern.format(i) in self.tensors, count()))


def read_single_file(path: Path, prediction_type: str | None = None) -> Parts:
    """Read a single file in parts. Raises InputError unless it is a whole Stable Diffusion 1.x, 2.x or XL model."""
    tensors, metadata = read_tensors(path)
    tensors = _original_names(tensors, path)
    check_complete(tensors, path)
    shapes = _Shapes(tensors, path)
    latents = shapes(f"{VAE}post_quant_conv.weight")[0]
    check_channels(shapes(f"{UNET}input_blocks.0.0.weight")[1], latents, path)
    if not any(name.startswith(f"{UNET}middle_block.") for name in tensors):
        raise InputError(f"{path} has a UNet without a middle block: give the diffusers folder of the model instead")
    _check_family(shapes)
    prediction_type, reason = _prediction_type(tensors, metadata, prediction_type, path)
    log.info("%s: prediction type %s, %s", path, prediction_type, reason, extra={"once": True})
    if unknown := strangers(tensors):
        line = "%s also holds %d tensors of no known network, which are not read (%s)"
        log.warning(line, path, len(unknown), unknown[0])
    unet, vae, text, second = infer_configs(tensors, metadata, prediction_type, path)
    tokenizer = clip_tokenizer(pad_with_exclamation_mark=_is_sd2(tensors))
    schedule = infer_schedule(tensors, prediction_type)
    if "ztsnr" in tensors and not schedule.rescale_betas_zero_snr:
        log.warning("%s: its marker ztsnr has no effect: zero terminal SNR needs --prediction_type v_prediction", path)
    spec = ModelSpec(unet, vae, text, tokenizer, schedule, source=path)
    if second is None:
        return Parts(spec, from_original(tensors, unet, vae))
    spec = replace(spec, text_encoder_2=second, zeros_for_empty=True)
    return Parts(spec, from_original(tensors, unet, vae, second["num_hidden_layers"]))


def _original_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the keys without wrappers' prefixes; those of the text encoder begin with `cond_stage_model.`"""
    tensors = unwrap_keys(tensors, str(path))
    if not any(name.startswith(EMBEDDER) for name in tensors):
        return tensors
    if any(".label_emb." in name for name in tensors) and not has_second_encoder(tensors):
        refiner = any(name.startswith(f"{EMBEDDER}model.") for name in tensors)
        what = "a Stable Diffusion XL refiner" if refiner else "a Stable Diffusion XL model without both text encoders"
        raise InputError(f"{path} is {what}: {WHOLE_MODEL}")
    return {
        f"cond_stage_model.{name.removeprefix(EMBEDDER)}" if name.startswith(EMBEDDER) else name: tensor
        for name, tensor in tensors.items()
    }


def clip_tokenizer(pad_with_exclamation_mark: bool) -> CLIPTokenizer:
    """Load CLIP's tokenizer from the package. SD 1 pads with the end of text, SD 2 with `!` (id 0)."""
    tokenizer = load_tokenizer(CLIP_VOCABULARY)
    if pad_with_exclamation_mark:
        tokenizer.add_special_tokens({"pad_token": "!"})
    return tokenizer


def has_clip_vocabulary(tokenizer: CLIPTokenizer) -> bool:
    """Return whether a tokenizer numbers all of CLIP's tokens as CLIP does; it may have more."""
    return clip_vocabulary().items() <= tokenizer.get_vocab().items()


@cache
def clip_vocabulary() -> dict[str, int]:
    """CLIP's tokens and their numbers, read once from the package."""
    return read_json(CLIP_VOCABULARY / "vocab.json")


def without_handles(models: Models) -> Models:
    """Return the model with CLIP's own vocabulary: its handles and other added tokens are cut off, in place.

    A model with another vocabulary stays as it is. InputError if a token beyond CLIP's pads.
    """
    if not has_clip_vocabulary(models.tokenizer):
        return models
    if (padding := str(models.tokenizer.pad_token)) not in clip_vocabulary():
        raise InputError(INEXPRESSIBLE.format(f"tokenizer pad_token ({padding})"))
    plain = clip_tokenizer(pad_with_exclamation_mark=False)
    plain.add_special_tokens({"pad_token": padding})
    for text_encoder in models.text_encoders:
        table = text_encoder.get_input_embeddings().get_parameter("weight").detach()[: len(plain)].clone()
        text_encoder.set_input_embeddings(nn.Embedding.from_pretrained(table))
    return replace(models, tokenizer=plain, handles=())


def save_single_file(models: Models, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the original layout. Raises InputError for a model that its readers, who see only shapes, would misread."""
    path, parts = Path(path), Parts.of(models, dtype)
    spec = parts.spec
    if len(spec.tokenizer) != len(clip_vocabulary()):
        raise InputError("a single file carries no tokenizer, so no handles and no vocabulary but CLIP's: use a folder")
    if not spec.unet.mid_depths and (spec.unet.mid_block_type is None or spec.text_encoder_2 is None):
        raise InputError(INEXPRESSIBLE.format(f"unet mid_block_type ({spec.unet.mid_block_type})"))
    tensors = to_original(parts.tensors, spec.unet, spec.vae, open_clip=spec.text_encoder["hidden_act"] == "gelu")
    prediction_type = spec.schedule.prediction_type
    if spec.text_encoder_2 is not None:  # other programs know both from these alone
        markers = {"v_pred": prediction_type == "v_prediction", "ztsnr": spec.schedule.rescale_betas_zero_snr}
        tensors |= {name: torch.zeros(0) for name, marked in markers.items() if marked}
    metadata = {
        f"{SPEC}sai_model_spec": "1.0.0",
        f"{SPEC}architecture": architecture(spec),
        f"{SPEC}prediction_type": "v" if prediction_type == "v_prediction" else "epsilon",
        f"{SPEC}resolution": f"{spec.resolution}x{spec.resolution}",
    }
    unet, vae, text, second = infer_configs(tensors, metadata, prediction_type, path)
    schedule = infer_schedule(tensors, prediction_type)
    lost = _differences(spec, unet, vae, text, second, schedule)
    if second is not None and not spec.zeros_for_empty:
        lost.append("force_zeros_for_empty_prompt (False)")
    if lost:
        raise InputError(INEXPRESSIBLE.format(", ".join(lost)))
    for warning in _warnings(spec, schedule):
        log.warning("%s %s", path, warning)
    if spec.text_encoder_2 is not None:
        first = "cond_stage_model."
        tensors = {
            f"{EMBEDDER}{name.removeprefix(first)}" if name.startswith(first) else name: tensor
            for name, tensor in tensors.items()
        }
    write_tensors(path, tensors, metadata)


def architecture(spec: ModelSpec) -> str:
    """Return the name of the architecture in ModelSpec."""
    if spec.text_encoder_2 is not None:
        return "stable-diffusion-xl-v1-base"
    if spec.text_encoder["hidden_act"] != "gelu":
        return "stable-diffusion-v1"
    return "stable-diffusion-v2-768-v" if spec.schedule.prediction_type == "v_prediction" else "stable-diffusion-v2-512"


def original_config(spec: ModelSpec) -> dict:
    """Return an SD 2's configuration in Stability AI's original code, which A1111 reads in a .yaml beside the file.

    Without it A1111 guesses what the model predicts. Its keys and classes are those of v2-inference-v.yaml.
    """
    unet, vae, modules = spec.unet, spec.vae, "ldm.modules"
    first, attends = unet.block_out_channels[0], [bool(unet.down_depths(level)) for level in range(unet.levels)]
    networks = {
        "unet_config": {
            "target": f"{modules}.diffusionmodules.openaimodel.UNetModel",
            "params": {
                **{"use_checkpoint": True, "use_fp16": True, "image_size": 32, "legacy": False},
                **{"in_channels": unet.in_channels, "out_channels": unet.out_channels, "model_channels": first},
                "attention_resolutions": [2**level for level, has in enumerate(attends) if has],
                "num_res_blocks": unet.layers_per_block,
                "channel_mult": [width // first for width in unet.block_out_channels],
                "num_head_channels": 64,
                **{"use_spatial_transformer": True, "use_linear_in_transformer": True, "transformer_depth": 1},
                "context_dim": unet.cross_attention_dim,
            },
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.AutoencoderKL",
            "params": {
                "embed_dim": vae.latent_channels,
                "ddconfig": {
                    **{"double_z": True, "z_channels": vae.latent_channels, "resolution": 256},
                    **{"in_channels": 3, "out_ch": 3, "ch": vae.block_out_channels[0]},
                    "ch_mult": [width // vae.block_out_channels[0] for width in vae.block_out_channels],
                    **{"num_res_blocks": vae.layers_per_block, "attn_resolutions": [], "dropout": 0.0},
                },
                "lossconfig": {"target": "torch.nn.Identity"},
            },
        },
        "cond_stage_config": {
            "target": f"{modules}.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        },
    }
    params = {
        "parameterization": "v" if spec.schedule.prediction_type == "v_prediction" else "eps",
        **{"linear_start": 0.00085, "linear_end": 0.012, "timesteps": spec.schedule.num_train_timesteps},
        **{"image_size": unet.sample_size, "channels": unet.in_channels, "scale_factor": vae.scaling_factor},
        **{"first_stage_key": "jpg", "cond_stage_key": "txt", "cond_stage_trainable": False},
        **{"conditioning_key": "crossattn", "num_timesteps_cond": 1, "log_every_t": 200, "use_ema": False},
    }
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": {**params, **networks}}}


def _differences(
    spec: ModelSpec, unet: UNetConfig, vae: VAEConfig, text: dict, second: dict | None, schedule: NoiseSchedule
) -> list[str]:
    """Return the settings that a reader of the single file would get wrong."""
    given = {
        "unet": _described(replace(spec.unet, attention_head_dim=spec.unet.heads, num_attention_heads=None)),
        "vae": vars(spec.vae),
        "text encoder": spec.text_encoder,
        "second text encoder": spec.text_encoder_2 or {},
        "scheduler": vars(spec.schedule),
    }
    read = {"unet": _described(unet), "vae": vars(vae), "text encoder": text, "scheduler": vars(schedule)}
    read["second text encoder"] = second or {}
    given["tokenizer"] = {"pad_token_id": spec.tokenizer.pad_token_id}
    read["tokenizer"] = {"pad_token_id": text["pad_token_id"]}
    # These do not change the arithmetic, or are in the metadata, or are the user's to choose.
    silent = {"upcast_attention", "projection_dim", "bos_token_id", "eos_token_id"}
    silent |= {"prediction_type", "steps_offset", "timestep_spacing", "alphas_cumprod"}
    silent_of = {"vae": {"sample_size", "force_upcast"}, "text encoder": {"pad_token_id"}}
    return [
        f"{part} {name} ({given[part][name]})"
        for part in given
        for name in read[part].keys() & given[part].keys() - silent - silent_of.get(part, set())
        if given[part][name] != read[part][name]
    ]


def _warnings(spec: ModelSpec, read: NoiseSchedule) -> list[str]:
    """Say what the user has to set again for a single file, and what other programs make of it. read: its schedule"""
    own = []
    if spec.guidance_scale != GUIDANCE:
        own.append(f"guidance scale (--guidance_scale {spec.guidance_scale:g} gives it back)")
    if (spacing := spec.schedule.timestep_spacing) != read.timestep_spacing:
        own.append(f"timestep_spacing {spacing or 'of each sampler'} (no flag gives it back: keep the folder)")
    if spec.training:
        own.append("settings of training (in its bas.json: keep the folder to train on it)")
    warnings = [f"cannot hold the model's own {' and '.join(own)}"] if own else []
    for part, config in spec.text_encoders.items():
        layers, usual = config["num_hidden_layers"], TEXT_DEPTHS.get(config["hidden_size"])
        if usual not in (None, layers):
            line = f"has a {part} of {layers} layers, and other programs build one of {usual}"
            warnings.append(f"{line}: they refuse it or read the text wrongly, use it with bas")
    return warnings


def _described(unet: UNetConfig) -> dict:
    """Return the UNet's settings, with the depth of each transformer, which a config.json can write in several ways."""
    down, up = (tuple(map(depths, range(unet.levels))) for depths in (unet.down_depths, unet.up_depths))
    depths = {"transformer_layers_per_block": (*down, unet.mid_depths), "reverse_transformer_layers_per_block": up}
    return vars(unet) | depths


# --- Configurations from shapes -----------------------------------------------------------------------------------


def _has_open_clip(tensors: dict[str, Tensor]) -> bool:
    """Return whether the text encoder has open_clip's names."""
    return any(name.startswith(OPEN_CLIP) for name in tensors)


def _has_clip(tensors: dict[str, Tensor]) -> bool:
    """Return whether a text encoder has transformers' names; some files leave the inner prefix out."""
    return any(f"{CLIP}{inner}final_layer_norm.weight" in tensors for inner in ("text_model.", ""))


def has_second_encoder(tensors: dict[str, Tensor]) -> bool:
    """Return whether this is SDXL, which has two text encoders."""
    return any(name.startswith(OPEN_CLIP_2) for name in tensors)


def _is_sd2(tensors: dict[str, Tensor]) -> bool:
    """Return whether this is SD 2, whose transformers project linearly; its text encoder may have either names."""
    if has_second_encoder(tensors):
        return False
    projection = tensors.get(f"{UNET}middle_block.1.proj_in.weight")
    return projection.ndim == 2 if projection is not None else _has_open_clip(tensors)


def _check_family(shapes: _Shapes) -> None:
    """Raise InputError when UNet and text encoder are of different families, or the text encoders are two."""
    if has_second_encoder(shapes.tensors):
        return
    sd2, names = _is_sd2(shapes.tensors), _has_open_clip(shapes.tensors)
    width = shapes(f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight")[1]
    unet = f"{shapes.path} has the UNet of Stable Diffusion {2 if sd2 else 1}"
    if names and _has_clip(shapes.tensors):
        raise InputError(
            f"{shapes.path} holds two text encoders, under {OPEN_CLIP} and {CLIP}: save it again with the one it uses"
        )
    if names and not sd2:
        raise InputError(f"{unet} and the text encoder of 2 (open_clip): they belong to different models")
    if FAMILY_WIDTHS.get(width, sd2) != sd2:
        raise InputError(f"{unet}, which reads text of width {width}, as {1 if sd2 else 2} has it: it is damaged")


def infer_configs(
    tensors: dict[str, Tensor], metadata: dict[str, str], prediction_type: str, path: Path
) -> tuple[UNetConfig, VAEConfig, dict, dict | None]:
    """Infer the configurations of UNet, VAE and text encoders from the shapes of a single file."""
    shapes, sd2, sdxl = _Shapes(tensors, path), _is_sd2(tensors), has_second_encoder(tensors)
    said = re.fullmatch(r"(\d{2,5})x\1", metadata.get(f"{SPEC}resolution", ""))
    own = 1024 if sdxl else 768 if sd2 and prediction_type == "v_prediction" else 512
    resolution = int(said[1]) if said else own
    vae = _infer_vae(shapes, resolution)
    if sdxl:
        vae = replace(vae, scaling_factor=SDXL_SCALING, force_upcast=True)
    unet = _infer_unet(shapes, resolution // vae.factor, sd2, sdxl)
    if _has_open_clip(tensors):
        return unet, vae, _infer_open_clip(shapes, OPEN_CLIP, OPEN_CLIP_LAYERS), None
    first = _infer_clip(shapes, sd2)
    if not sdxl:
        return unet, vae, first, None
    second = _infer_open_clip(shapes, OPEN_CLIP_2) | {"projection_dim": shapes(f"{OPEN_CLIP_2}text_projection")[1]}
    return unet, vae, first, second


def infer_schedule(tensors: dict[str, Tensor], prediction_type: str) -> NoiseSchedule:
    """Return the noise schedule of a single file, which holds no more of it than markers."""
    zero_snr = "ztsnr" in tensors and prediction_type == "v_prediction"
    schedule = NoiseSchedule(
        prediction_type=prediction_type, steps_offset=SD_STEPS_OFFSET, rescale_betas_zero_snr=zero_snr
    )
    if not has_second_encoder(tensors):
        return schedule
    return replace(schedule, set_alpha_to_one=True, timestep_spacing="trailing" if zero_snr else "leading")


def _infer_unet(shapes: _Shapes, sample_size: int, sd2: bool, sdxl: bool) -> UNetConfig:
    levels: list[list[str]] = [[]]  # the input blocks with a residual block, level by level
    for stage in count(1):
        block = f"{UNET}input_blocks.{stage}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        elif f"{block}.0.in_layers.2.weight" in shapes:
            levels[-1].append(block)
        else:
            break
    if not all(levels):
        raise InputError(f"{shapes.path} lacks input blocks of its UNet: it is damaged, download it again")
    widths, layers = tuple(shapes(f"{blocks[0]}.0.in_layers.2.weight")[0] for blocks in levels), len(levels[0])
    down = [[_depth(shapes, block) for block in blocks] for blocks in levels]
    attends = [f"{blocks[0]}.1.proj_in.weight" in shapes for blocks in levels]
    config = UNetConfig(
        sample_size=sample_size,
        in_channels=shapes(f"{UNET}input_blocks.0.0.weight")[1],
        out_channels=shapes(f"{UNET}out.2.weight")[0],
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attends)),
        attention_head_dim=tuple(max(width // 64, 1) if sd2 or sdxl else 8 for width in widths),
    )
    if not sdxl:
        middle = f"{UNET}middle_block.1"
        return replace(
            config,
            cross_attention_dim=shapes(f"{middle}.transformer_blocks.0.attn2.to_k.weight")[1],
            use_linear_projection=len(shapes(f"{middle}.proj_in.weight")) == 2,
        )
    blocks = [f"{UNET}output_blocks.{i}" for i in range((layers + 1) * len(levels))]
    up = [[_depth(shapes, block) for block in blocks[i : i + layers + 1]] for i in range(0, len(blocks), layers + 1)]
    middle, depths = _depth(shapes, f"{UNET}middle_block"), tuple(map(_one_or_each, down))
    alike = tuple(map(_one_or_each, reversed(up))) == depths and all(isinstance(depth, int) for depth in depths)
    reads = next(block for block, has in zip(levels, attends, strict=True) if has)[0]
    added = shapes(f"{UNET}label_emb.0.0.weight")[1]
    pooled = shapes(f"{OPEN_CLIP_2}text_projection")[1]
    return replace(
        config,
        cross_attention_dim=shapes(f"{reads}.1.transformer_blocks.0.attn2.to_k.weight")[1],
        use_linear_projection=len(shapes(f"{reads}.1.proj_in.weight")) == 2,
        transformer_layers_per_block=depths,
        reverse_transformer_layers_per_block=None if alike else tuple(map(_one_or_each, up)),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        addition_embed_type="text_time",
        addition_time_embed_dim=(added - pooled) // SIZES,
        projection_class_embeddings_input_dim=added,
    )


def _depth(shapes: _Shapes, block: str) -> int:
    """Return how many transformer blocks the transformer behind a residual block has; 0 where there is none."""
    return shapes.count(f"{block}.1.transformer_blocks.{{}}.attn2.to_k.weight")


def _one_or_each(depths: list[int]) -> int | tuple[int, ...]:
    """Return one number if all transformers of a level have the same depth, 1 without any; else one for each."""
    return max(depths[0], 1) if len(set(depths)) == 1 else tuple(depths)


def _infer_vae(shapes: _Shapes, resolution: int) -> VAEConfig:
    convolution = f"{VAE}encoder.down.{{}}.block.0.conv1.weight"
    levels = shapes.count(convolution)
    return VAEConfig(
        in_channels=shapes(f"{VAE}encoder.conv_in.weight")[1],
        out_channels=shapes(f"{VAE}decoder.conv_out.weight")[0],
        latent_channels=shapes(f"{VAE}post_quant_conv.weight")[0],
        block_out_channels=tuple(shapes(convolution.format(i))[0] for i in range(levels)),
        layers_per_block=shapes.count(f"{VAE}encoder.down.0.block.{{}}.conv1.weight"),
        sample_size=resolution,
    )


def _infer_clip(shapes: _Shapes, sd2: bool) -> dict:
    """Infer a text encoder with transformers' names; some files leave the inner prefix out."""
    inner = "text_model." if f"{CLIP}text_model.final_layer_norm.weight" in shapes else ""
    layer = f"{CLIP}{inner}encoder.layers.{{}}.mlp.fc1.weight"
    return _text_config(
        shapes(f"{CLIP}{inner}embeddings.token_embedding.weight"),
        positions=shapes(f"{CLIP}{inner}embeddings.position_embedding.weight")[0],
        hidden=shapes(layer.format(0))[0],
        layers=min(shapes.count(layer), OPEN_CLIP_LAYERS) if sd2 else shapes.count(layer),
        activation="gelu" if sd2 else "quick_gelu",
    )


def _infer_open_clip(shapes: _Shapes, prefix: str, most: int | None = None) -> dict:
    """Infer open_clip's text encoder, with at most `most` layers: SD 2 does not use the last one."""
    layer = f"{prefix}transformer.resblocks.{{}}.mlp.c_fc.weight"
    return _text_config(
        shapes(f"{prefix}token_embedding.weight"),
        positions=shapes(f"{prefix}positional_embedding")[0],
        hidden=shapes(layer.format(0))[0],
        layers=min(shapes.count(layer), most or shapes.count(layer)),
        activation="gelu",
    )


def _text_config(embedding: tuple[int, ...], positions: int, hidden: int, layers: int, activation: str) -> dict:
    """Return a text encoder's config.json; the token ids are the last two of CLIP's vocabulary."""
    rows, width = embedding[:2]
    return {
        "model_type": "clip_text_model",
        "vocab_size": rows,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": positions,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 0 if activation == "gelu" else 49407,
    }


def _prediction_type(
    tensors: dict[str, Tensor], metadata: dict[str, str], asked_for: str | None, path: Path
) -> tuple[str, str]:
    """Return the prediction type of the UNet, and its source in words."""
    if asked_for:
        return asked_for, "as asked for"
    if (given := metadata.get(f"{SPEC}prediction_type", "").lower().replace("-", "_")) in SPEC_PREDICTION:
        return SPEC_PREDICTION[given], f"from the file's metadata ({given})"
    if "v_pred" in tensors:
        return "v_prediction", "from the file's marker v_pred"
    if (given := _read_parameterization(path.with_suffix(".yaml"))) in SPEC_PREDICTION:
        return SPEC_PREDICTION[given], f"from {path.with_suffix('.yaml').name} (parameterization: {given})"
    if not _is_sd2(tensors):
        family = "XL" if has_second_encoder(tensors) else "1.x"
        return "epsilon", f"as most Stable Diffusion {family}; --prediction_type v_prediction for the others"
    blocks = (re.match(rf"{re.escape(UNET)}output_blocks\.([0-9]{{1,4}})\.", name) for name in tensors)
    last = max((int(block[1]) for block in blocks if block), default=0)
    bias = tensors.get(f"{UNET}output_blocks.{last}.{V_PREDICTION_BIAS}")
    spread = bias.float().std(correction=0).item() if bias is not None else 0.0
    guess: str = "v_prediction" if spread > V_PREDICTION_SPREAD else "epsilon"
    return guess, (
        f"guessed from a bias that spreads by {spread:.3f} (above {V_PREDICTION_SPREAD}: v_prediction); if images are "
        "noise or washed out, use --prediction_type with the other one"
    )


def _read_parameterization(path: Path) -> str | None:
    """Read the parameterization (`v` or `eps`) in the .yaml that original code and web interfaces keep by a model."""
    if not path.is_file() or path.stat().st_size > MAX_YAML_BYTES:
        return None
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8"
    found = PARAMETERIZATION.search(data.decode(encoding, errors="replace"))
    return found[1] if found else None
