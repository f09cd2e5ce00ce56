"""The stage of the miniature's CLIP: an image tower, and the text tower that the UNet reads."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tools.mini_world.captions import describe
from tools.train_mini.fit import fit
from tools.train_mini.presets import SEED, TEXT_LENGTH, Preset
from tools.train_mini.tokenizer import tokenize
from tools.train_mini.world import load_world, to_tensor


def clip_config(preset: Preset, tokenizer) -> CLIPConfig:
    """Two towers of one width; the text tower has CLIP's 77 positions."""
    tower = {
        "hidden_size": preset.text_width,
        "intermediate_size": 4 * preset.text_width,
        "num_hidden_layers": preset.text_layers,
        "num_attention_heads": 4,
        "projection_dim": preset.text_width,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": preset.resolution, "patch_size": preset.patch}
    return CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=preset.text_width)


def train_clip(preset: Preset, run: Path, device) -> None:
    """Fit both towers so that a picture and its caption agree, and none of the other pairs of the batch."""
    if (run / "clip.safetensors").exists():
        return
    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    clip, recipe = CLIPModel(clip_config(preset, tokenizer)).to(device), preset.clip_recipe
    images, layouts = load_world(run)
    held_out = len(images) - 512

    def pairs(chosen, rng):
        """Pictures, and token ids of captions worded with `rng`, or complete without it."""
        captions = [describe(layouts[k], rng) for k in chosen]
        return images[chosen], tokenize(tokenizer, captions, 40)  # causal: the tokens after the end change nothing

    def similarity(pictures, ids):
        """Cosines (b, b) of pictures against captions."""
        x, ids = to_tensor(pictures, device), ids.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            seen = clip.visual_projection(clip.vision_model(x).pooler_output)
            told = clip.text_projection(clip.text_model(ids).pooler_output)
        return F.normalize(seen.float(), dim=-1) @ F.normalize(told.float(), dim=-1).T

    def draw(i):
        rng = np.random.default_rng((SEED, i))
        return pairs(np.sort(rng.choice(held_out, recipe.batch, replace=False)), rng)

    def loss_of(clip, batch):
        logits = similarity(*batch) * clip.logit_scale.exp().clamp(max=100)
        target = torch.arange(len(logits), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"matched": (logits.argmax(1) == target).float().mean()}

    fit("clip", clip, draw, loss_of, recipe, run)
    with torch.no_grad():
        cosines = similarity(*pairs(np.arange(held_out, len(images)), None))
    matched = (cosines.argmax(1).cpu() == torch.arange(512)).float().mean()
    print(f"clip: {100 * matched:.1f} % of 512 held-out scenes find their own complete caption among all 512")


def load_clip(preset: Preset, run: Path, device) -> tuple[CLIPModel, CLIPTokenizer]:
    """Both trained towers and their tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    clip = CLIPModel(clip_config(preset, tokenizer))
    clip.load_state_dict(load_file(run / "clip.safetensors"))
    return clip.to(device).requires_grad_(False), tokenizer
