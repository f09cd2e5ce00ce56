"""A whole Stable Diffusion model of 100,000 weights that trains in a second, and a scene to train it on.

Images of 32x32 pixels are 16x16 latents, and the attention loss reads maps of 4x4. The same bits on every machine.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from bas.config import TrainConfig
from bas.data.batches import TrainingData, prepare
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.models.bundle import Models
from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import add_handles, build_text_encoder, load_tokenizer
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.pretrained.folder import load, save_model
from bas.schedulers import NoiseSchedule
from bas.training.class_images import class_images
from tools.reference.measure import fill

WIDTH = 16  # of the text encoder
UNET = UNetConfig(
    sample_size=16,
    block_out_channels=(8, 8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    cross_attention_dim=WIDTH,
    norm_num_groups=4,
)
AUTOENCODER = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=32)
WORDS = ("a", "photo", "of", "and", "at", "the", "beach", "creature", "bowl", "stone")  # one token each
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows WORDS and spells everything else, written to `folder` and read from there."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters)])
    merges = {}
    for word in WORDS:
        for i in range(1, len(word)):
            pair = word[:i], word[i] + "</w>" * (i == len(word) - 1)
            merges[" ".join(pair)] = tokens["".join(pair)] = None
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate([*tokens, *SPECIAL.values()])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    ending = {"unk_token": SPECIAL["eos_token"], "pad_token": SPECIAL["eos_token"]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **SPECIAL, **ending}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


def write_model(folder: Path, prediction_type: str = "epsilon", unet: UNetConfig = UNET) -> Path:
    """The tiny model as a diffusers folder; returns it."""
    words = tokenizer(folder / "tokenizer")
    text = {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    networks = [fill(network) for network in (UNet(unet), VAE(AUTOENCODER), build_text_encoder(text))]
    save_model(Models(*networks, words, NoiseSchedule(steps_offset=1, prediction_type=prediction_type)), folder)
    return folder


def taught(folder: Path, handles: tuple[str, ...] = ("<asset0>", "<asset1>")) -> Models:
    """The model of a folder with handles that nothing was learnt for: their first rows, drawn from a seed."""
    models = load(folder)
    add_handles(models.text_encoders, models.tokenizer, handles, (None,) * len(handles), seed=0)
    models.handles = handles
    return models


def write_scene(folder: Path, concepts: int = 3, size: tuple[int, int] = (32, 32)) -> Path:
    """A (width, height) image of coloured patches in a row, and for each a mask whose right edge is soft."""
    width, height = size
    folder.mkdir(parents=True, exist_ok=True)
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 90)], axis=-1)
    for i in range(concepts):
        left, right = width * i // concepts, width * (i + 1) // concepts
        mask = np.zeros((height, width), np.uint8)
        mask[height // 8 : height - height // 8, left:right] = 255
        mask[:, right - 1] //= 2
        pixels[mask > 0] = [80 * i, 255 - 60 * i, 40 + 50 * i]
        Image.fromarray(mask).save(folder / f"mask{i}.png")
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "img.png")
    return folder


def write_class_images(folder: Path, count: int = 2, size: tuple[int, int] = (32, 32)) -> Path:
    """Class images that nobody had to generate."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    for i, image in enumerate(noise):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def write_settings(run: Path, **changes) -> Path:
    """The settings.json of a run that bas began in this folder."""
    run.mkdir(parents=True, exist_ok=True)
    metadata = {"config": asdict(TrainConfig(**changes)), "handles": ["<asset0>"], "base": "x", "version": "1"}
    (run / "settings.json").write_text(json.dumps(metadata))
    return run


class Bench:
    """A folder with the model, a scene and class images, and what it takes to train on them."""

    def __init__(self, folder: Path, unet: UNetConfig = UNET):
        self.folder = folder
        self.model = write_model(folder / "model", unet=unet)
        self.scene = write_scene(folder / "scene")
        self.class_images = write_class_images(folder / "class images")

    def config(self, run: Path | str = "run", **changes) -> TrainConfig:
        """A short training: 3 + 3 steps, no preview, no checkpoint, class images that are there."""
        values = {
            "instance_data_dir": str(self.scene),
            "pretrained_model_name_or_path": str(self.model),
            "output_dir": str(run),
            "class_data_dir": str(self.class_images),
            "num_class_images": 2,
            "phase1_train_steps": 3,
            "phase2_train_steps": 3,
            "img_log_steps": 0,
            "checkpointing_steps": 0,
            "device": "cpu",
        }
        return TrainConfig(**values | changes)

    def command(self, run: Path | str, *scenes: str) -> list[str]:
        """The command line of `config(run)`, on its scene or on others."""
        config, defaults = vars(self.config(run)), vars(TrainConfig())
        changed = {name: value for name, value in config.items() if value != defaults[name]}
        own = changed.pop("instance_data_dir")
        return [
            "train",
            *(scenes or [own]),
            *(word for name, value in changed.items() for word in (f"--{name}", str(value))),
        ]

    def prepared(self, config: TrainConfig) -> tuple[Models, TrainingData]:
        """Models with handles and the data of the steps, as `bas.training.setup.setup_run` makes them."""
        models, scene = load(config.pretrained_model_name_or_path), load_scene(config)
        image, masks = scene.tensors(config.resolution or models.resolution, models.size_multiple, config.center_crop)
        prior = None
        if any(phase.prior for phase in config.phases):
            prior, _ = class_images(models, config, "base", tuple(image.shape[-2:]))
        add_handles(models.text_encoders, models.tokenizer, scene.handles, scene.words, config.seed)
        return models, prepare(models, scene, image, masks, config, prior)


WEIGHTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


def file_hashes(run: Path, names: tuple[str, ...] = (*WEIGHTS, "metrics.jsonl")) -> dict[str, str]:
    """sha256 of everything in a run that training decides: the weights, handles among them, and the metrics."""
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The block must raise an InputError of one line that holds all these parts."""
    with pytest.raises(InputError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert message
    for part in parts:
        assert part in message


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's state, to compare with later."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
