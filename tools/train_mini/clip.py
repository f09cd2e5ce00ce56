"""The stage of the miniature's CLIP: an image encoder, and the text encoder that the UNet reads."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from bas.runtime.device import native_bf16
from tools.mini_world.captions import describe
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose
from tools.train_mini.codec import to_tensor
from tools.train_mini.fit import fit
from tools.train_mini.recipe import SEED, TEXT_LENGTH, Recipe
from tools.train_mini.tokenizer import tokenize

HELD_OUT = 512  # scenes


def clip_config(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Two encoders of one width; the text encoder has CLIP's 77 positions."""
    encoder = {
        "hidden_size": recipe.text_width,
        "intermediate_size": 4 * recipe.text_width,
        "num_hidden_layers": recipe.text_layers,
        "num_attention_heads": 4,
        "projection_dim": recipe.text_width,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": recipe.resolution, "patch_size": recipe.patch}
    return CLIPConfig(text_config=encoder | text, vision_config=encoder | vision, projection_dim=recipe.text_width)


def train_clip(recipe: Recipe, run: Path, device: torch.device) -> None:
    """Fit both encoders so that an image agrees with its own caption and with no other of the batch.

    Contrastive loss of Radford et al. 2021, section 2.3.
    """
    if (run / "clip.safetensors").exists():
        return
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    clip, stage = CLIPModel(clip_config(recipe, tokenizer)).to(device), recipe.clip

    def pairs(rng: np.random.Generator, count: int, complete: bool) -> tuple[Tensor, Tensor]:
        """Images of fresh scenes, and the token ids of their captions, reworded or complete."""
        layouts = [compose(rng) for _ in range(count)]
        images = np.stack([draw(layout, recipe.resolution)[0] for layout in layouts])
        return to_tensor(images), tokenize(tokenizer, [describe(x, None if complete else rng) for x in layouts])

    def similarity(images: Tensor, ids: Tensor) -> Tensor:
        """Cosines of images against captions, (b, b)."""
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
            seen = clip.visual_projection(clip.vision_model(images.to(device)).pooler_output)
            told = clip.text_projection(clip.text_model(ids.to(device)).pooler_output)
        return F.normalize(seen.float(), dim=-1) @ F.normalize(told.float(), dim=-1).T

    def draw_batch(step: int) -> tuple[Tensor, Tensor]:
        return pairs(np.random.default_rng((SEED, stage.number, step)), stage.batch, complete=False)

    def loss_of(clip: nn.Module, batch: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        logits = similarity(*batch) * clip.logit_scale.exp().clamp(max=100)
        target = torch.arange(len(logits), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"matched": (logits.argmax(1) == target).float().mean()}

    fit("clip", clip, draw_batch, loss_of, stage, run)
    with torch.no_grad():
        cosines = similarity(*pairs(np.random.default_rng((SEED, stage.number)), HELD_OUT, complete=True))
    matched = (cosines.argmax(1).cpu() == torch.arange(HELD_OUT)).float().mean()
    print(f"clip: {100 * matched:.1f} % of {HELD_OUT} held-out scenes find their own caption among all {HELD_OUT}")


def load_clip(recipe: Recipe, run: Path, device: torch.device) -> tuple[CLIPModel, CLIPTokenizer]:
    """Both trained encoders and their tokenizer. FileNotFoundError where there are none yet."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    clip = CLIPModel(clip_config(recipe, tokenizer))
    clip.load_state_dict(load_file(run / "clip.safetensors"))
    return clip.to(device).eval().requires_grad_(False), tokenizer
