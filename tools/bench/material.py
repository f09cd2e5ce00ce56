"""What both sides of the bench work on: models of random weights, a scene, class images, all as files."""

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bas.config import TrainConfig
from bas.models.adapters import Change, adapted_layers, add_adapters
from bas.models.bundle import Models
from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import build_text_encoder
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.pretrained.folder import build_networks, load, read_spec, save_model
from bas.pretrained.loading import TEXT_PREFIX
from bas.pretrained.lora_files import write_lora
from bas.pretrained.single_file import clip_tokenizer
from bas.schedulers import NoiseSchedule

OFFICIAL = Path(__file__).parents[2] / "tests" / "reference" / "official"
WORDS = ("creature", "bowl", "stone")  # one token each, in CLIP's vocabulary and in the small model's

SD21_UNET = UNetConfig(attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)
SD21_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
}

# The same at half of its widths, small enough to train all weights on a CPU.
HALF_UNET = replace(SD21_UNET, block_out_channels=(160, 320, 640, 640), cross_attention_dim=512)
HALF_TEXT = SD21_TEXT | {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}

# What each name means, for the reader of the results.
MODELS = {
    "SD 2.1": "full Stable Diffusion 2.1-base: 866 M + 340 M + 84 M random weights",
    "half SD 2.1": "Stable Diffusion 2.1-base with half of the channels in UNet and text encoder; random weights",
    "small SD 2": "UNet of 32, 64, 64, 64 channels with 1, 2, 2, 2 heads, linear projections; VAE of 16, 16, 32, 32; "
    "text encoder of 2 layers, width 32, 542 tokens; 3.2 M random weights",
    "small SD 1": "the same with 8 heads on every level and 1x1 convolutions as projections",
}


@dataclass(frozen=True)
class Material:
    """Where things lie, and the device to work on."""

    model: str
    scene: str
    class_images: str
    words: tuple[str, ...]
    side: int  # pixels
    device: str

    def to_json(self) -> dict:
        """Return what a process of its own needs to know."""
        return asdict(self)


def make_model(name: str, folder: Path) -> Path:
    """One of MODELS as a diffusers folder in float32; returns it."""
    if name == "small SD 2":
        return shutil.copytree(OFFICIAL / "model", folder)
    torch.manual_seed(0)
    if name == "small SD 1":
        models = load(OFFICIAL / "model")
        models.unet = UNet(replace(models.unet.config, attention_head_dim=8, use_linear_projection=False))
    else:
        unet, text = (HALF_UNET, HALF_TEXT) if name == "half SD 2.1" else (SD21_UNET, SD21_TEXT)
        networks = UNet(unet), VAE(VAEConfig()), build_text_encoder(text)
        models = Models(*networks, clip_tokenizer(pad_with_exclamation_mark=True), NoiseSchedule(steps_offset=1))
    save_model(models, folder)
    return folder


def write_adapters(model: Path, path: Path) -> Path:
    """A LoRA file of rank 16 in fp16 for a model, as `bas train --train lora` makes it, of random weights."""
    models, generator = build_networks(read_spec(model)), torch.Generator().manual_seed(0)
    add_adapters(models, TrainConfig(train="lora"), 0)

    def drawn(weight: torch.Tensor) -> torch.Tensor:
        return 0.01 * torch.randn(weight.shape, generator=generator)

    adapters = {
        part: {
            name.removeprefix(TEXT_PREFIX): Change(drawn(layer.lora_A.weight), drawn(layer.lora_B.weight), 1.0)
            for name, layer in adapted_layers(network)
        }
        for part, network in {"unet": models.unet, **models.text_networks}.items()
    }
    write_lora(path, adapters, "kohya", torch.float16, {})
    return path


def make_scene(folder: Path, side: int, concepts: int | None = None) -> Path:
    """The official example at `side` pixels; with `concepts`, that many rectangles as masks instead of its own."""
    folder.mkdir(parents=True)
    Image.open(OFFICIAL / "scene" / "img.jpg").convert("RGB").resize((side, side)).save(folder / "img.png")
    if concepts is None:
        masks = [Image.open(path).resize((side, side)) for path in sorted((OFFICIAL / "scene").glob("mask*.png"))]
    else:
        masks = []
        for i in range(concepts):  # four columns, two rows
            left, top = i % 4 * side // 4, i // 4 * side // 2
            mask = np.zeros((side, side), np.uint8)
            mask[top : top + side // 2, left : left + side // 4] = 255
            masks.append(Image.fromarray(mask))
    for i, mask in enumerate(masks):
        mask.save(folder / f"mask{i}.png")
    return folder


def make_class_images(folder: Path, side: int, count: int = 4) -> Path:
    """The official recording's four class images in turns, `count` files of `side` pixels, as JPEG."""
    folder.mkdir(parents=True)
    paths = sorted((OFFICIAL / "class_images").glob("*.*g"))
    images = [Image.open(path).convert("RGB").resize((side, side)) for path in paths]
    for i in range(count):
        images[i % len(images)].save(folder / f"class{i}.jpg")
    return folder


def make_material(folder: Path, model: Path, side: int, device: str, concepts: int | None = None) -> Material:
    """A scene and class images for a model that is there already."""
    folder.mkdir(parents=True)
    scene, images = make_scene(folder / "scene", side, concepts), make_class_images(folder / "class_images", side)
    words = tuple(WORDS[i % len(WORDS)] for i in range(concepts or len(WORDS)))
    return Material(str(model), str(scene), str(images), words, side, device)
