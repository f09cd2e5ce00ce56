"""One small randomly initialised model of each family, built on the spot, and ways to spoil it on disk."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from bas.errors import InputError
from bas.models.bundle import Models
from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import build_text_encoder, load_tokenizer
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.pretrained.folder import load
from bas.pretrained.single_file import clip_tokenizer
from bas.schedulers import NoiseSchedule
from tests.helpers.tiny import tokenizer


def small_tokenizer(pad_token: str) -> CLIPTokenizer:
    """The tests' small tokenizer with the padding of its family."""
    with TemporaryDirectory() as folder:
        tokenizer(Path(folder))
        config = Path(folder, "tokenizer_config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token": pad_token}))
        return load_tokenizer(Path(folder))


FAMILIES = ("sd1", "sd2", "sd2-v")
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


# SDXL: no attention on the finest level, several blocks in a transformer, pooled text and sizes. 64 pixels.
UNET_XL = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    attention_head_dim=(1, 1, 1),
    transformer_layers_per_block=(1, 1, 2),
    cross_attention_dim=64 + 128,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=96 + 6 * 8,
)
VAE_XL = VAEConfig(
    block_out_channels=(32, 32, 32, 32),
    layers_per_block=1,
    sample_size=64,
    scaling_factor=0.13025,
    force_upcast=True,
)
TEXT_XL = {  # of the second text encoder; `!` pads
    **{"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"hidden_act": "gelu", "projection_dim": 96, "pad_token_id": 0},
}


def tiny(family: str, whole_vocabulary: bool = False, seed: int = 0) -> Models:
    """A model of the family "sd1", "sd2", "sd2-v" or "sdxl"; with CLIP's own vocabulary if `whole_vocabulary`."""
    sd2, velocity = family in ("sd2", "sd2-v"), family == "sd2-v"
    pad_token = "!" if sd2 else "<|endoftext|>"
    words = clip_tokenizer(sd2) if whole_vocabulary else small_tokenizer(pad_token)
    unet = UNetConfig(
        sample_size=96 if velocity else 64,
        block_out_channels=(32, 64, 128) if sd2 else (32, 64, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(1, 1, 2) if sd2 else 8,
        cross_attention_dim=64,
        use_linear_projection=sd2,
    )
    vae = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, sample_size=8 * unet.sample_size)
    if family == "sdxl":
        unet, vae = UNET_XL, VAE_XL
    text = {
        "vocab_size": len(words),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "max_position_embeddings": 77,
        "hidden_act": "gelu" if sd2 else "quick_gelu",
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    schedule = NoiseSchedule(prediction_type="v_prediction" if velocity else "epsilon", steps_offset=1)
    second = text | TEXT_XL if family == "sdxl" else None
    if second:
        schedule = replace(schedule, set_alpha_to_one=True, timestep_spacing="leading")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = [UNet(unet), VAE(vae), build_text_encoder(text)]
        networks += [build_text_encoder(second, projection=True)] if second else []
        for network in networks:
            for parameter in network.parameters():  # biases and norms too, so that a lost one shows
                parameter.data.add_(0.02 * torch.randn_like(parameter))
    models = Models(*(network.eval() for network in networks[:3]), words, schedule)
    return replace(models, text_encoder_2=networks[3].eval(), zeros_for_empty=True) if second else models


def change_json(path: Path, **changes) -> None:
    """Replace entries of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, change) -> None:
    """Rewrite a .safetensors file after `change` worked on the dict of its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt"})


def refusal(path: Path) -> str:
    """The message with which `path` is refused: one line."""
    with pytest.raises(InputError) as error:
        load(path)
    assert "\n" not in str(error.value)
    return str(error.value)
