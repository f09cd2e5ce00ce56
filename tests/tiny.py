"""A whole Stable Diffusion model that fits a test, and scenes to train it on; the same bits on every machine.

Pictures of 32x32 pixels are 16x16 latents; the attention loss reads maps of 4x4.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from make_reference import fill, uniform
from PIL import Image
from transformers import CLIPTokenizer

from bas.checkpoint import Models, load, save_model
from bas.config import TrainConfig, UNetConfig, VAEConfig
from bas.models.text import build_text_encoder, load_tokenizer
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.schedulers import NoiseSchedule

WIDTH = 16  # of the text tower
UNET = UNetConfig(
    sample_size=16,
    block_out_channels=(8, 8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",) * 3,
    up_block_types=("CrossAttnUpBlock2D",) * 3,
    attention_head_dim=2,
    cross_attention_dim=WIDTH,
    norm_num_groups=4,
)
VAE_CONFIG = VAEConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, sample_size=32)
SCHEDULE = NoiseSchedule(steps_offset=1)
WORDS = ("a", "photo", "of", "and", "at", "the", "beach", "creature", "bowl", "stone")  # one token each
SPECIAL = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the letters and WORDS, written to `folder` and read from there."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    merges, tokens = [], [*letters, *(letter + "</w>" for letter in letters)]
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pieces[:2] = [pieces[0] + pieces[1]]
            merge = f"{pieces[0]}"
            if merge not in tokens:
                tokens.append(merge)
    for word in WORDS:
        for end in range(1, len(word)):
            pair = (word[:end], word[end] + "</w>" * (end == len(word) - 1))
            if (line := " ".join(pair)) not in merges:
                merges.append(line)
    vocabulary = {token: i for i, token in enumerate([*tokens, *SPECIAL.values()])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    ending = SPECIAL["eos_token"]
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": ending, "pad_token": ending}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | SPECIAL))
    return load_tokenizer(folder)
