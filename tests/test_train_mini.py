"""The training of the miniature, one step of the smallest networks at a time."""

import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_mini
from mini_world_drawing import draw
from mini_world_layouts import compose
from safetensors.torch import load_file
from train_mini_clip import clip_config
from train_mini_files import save_weights, write_json
from train_mini_folder import export
from train_mini_presets import PRESETS, Preset, Recipe
from train_mini_unet import Denoiser
from train_mini_world import load_world, make_world
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from bas.models.config import UNetConfig, VAEConfig
from bas.models.unet import UNet
from bas.models.vae import VAE

MINI = Path(__file__).parents[1] / "weights" / "mini"
ONE_STEP = Recipe(minutes=1e-9, batch=2, lr=1e-2, ema=0.9)
SCENES = 4
SMALLEST = Preset(
    resolution=16,
    scenes=SCENES,
    vae=VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16),
    vae_recipe=ONE_STEP,
    text_width=16,
    text_layers=1,
    patch=8,
    clip_recipe=ONE_STEP,
    unet=UNetConfig(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    ),
    unet_recipe=ONE_STEP,
    decoder_recipe=ONE_STEP,
    towers_recipe=ONE_STEP,
)


def new_clip(run: Path) -> CLIPModel:
    """Both towers as drawn, for the run's tokenizer."""
    return CLIPModel(clip_config(SMALLEST, CLIPTokenizer.from_pretrained(run / "tokenizer")))


@pytest.fixture
def run(tmp_path):
    """A run folder in which every stage before the UNet's is done."""
    shutil.copytree(MINI / "tokenizer", tmp_path / "tokenizer")
    layouts = [compose(np.random.default_rng(seed)) for seed in range(SCENES)]
    (tmp_path / "layouts.pkl").write_bytes(pickle.dumps(layouts))
    np.save(tmp_path / "images.npy", np.zeros((SCENES, 16, 16, 3), dtype=np.uint8))
    torch.save(torch.ones(SCENES, 2, 4, 8, 8, dtype=torch.float16), tmp_path / "latents.pt")
    torch.save(torch.zeros(SCENES, 8, 8, dtype=torch.float16), tmp_path / "objects.pt")
    write_json(tmp_path / "vae.json", SMALLEST.vae.to_json())
    save_weights(VAE(SMALLEST.vae), tmp_path / "vae.safetensors")
    clip = new_clip(tmp_path)
    save_weights(clip, tmp_path / "clip.safetensors")
    save_weights(Denoiser(UNet(SMALLEST.unet), clip.text_model), tmp_path / "unet_start.safetensors")
    return tmp_path


def train_unet(run, monkeypatch, *flags) -> tuple[set[str], set[str]]:
    """One step of the stage by its command. -> names of the tensors that moved, and of those that did not"""
    monkeypatch.setitem(PRESETS, "cpu", SMALLEST)
    monkeypatch.setattr(train_mini, "fast_attention", lambda device: None)  # it sets switches of the whole process
    monkeypatch.setattr(sys, "argv", ["train_mini.py", "unet", "--run_dir", str(run), *flags])
    train_mini.main()
    before, after = load_file(run / "unet_start.safetensors"), load_file(run / "unet.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    return moved, before.keys() - moved


def test_the_world_is_drawn_once_with_what_things_cover(tmp_path):
    make_world(SMALLEST, tmp_path)
    images, layouts = load_world(tmp_path)
    covers = np.load(tmp_path / "covers.npy")
    assert len(images) == len(layouts) == len(covers) == SCENES
    for image, layout, cover in zip(images, layouts, covers, strict=True):
        wanted, masks = draw(layout, SMALLEST.resolution)
        assert (image == wanted).all()
        assert np.abs(cover / 255 - masks.sum(0)).max() <= 0.5 / 255 + 1e-6
    assert covers.max() == 255


def test_the_text_tower_trains_along_with_the_unet(run, monkeypatch):
    moved, _ = train_unet(run, monkeypatch)
    assert {name.split(".")[0] for name in moved} == {"unet", "text_model"}


def test_a_frozen_text_tower_stays_while_the_unet_moves(run, monkeypatch):
    moved, stayed = train_unet(run, monkeypatch, "--freeze_text")
    assert {name.split(".")[0] for name in moved} == {"unet"}
    assert any(name.startswith("text_model.") for name in stayed)


def test_an_unfinished_unet_is_exported_with_its_frozen_text_tower(run, tmp_path):
    denoiser = Denoiser(UNet(SMALLEST.unet), new_clip(run).text_model)
    average = [torch.full_like(p, 0.5) for p in denoiser.unet.parameters()]
    torch.save({"module": denoiser.state_dict(), "average": average}, run / "unet.ckpt")
    export(SMALLEST, run, tmp_path / "mini")
    written = load_file(tmp_path / "mini/unet/diffusion_pytorch_model.safetensors")
    assert all((value == 0.5).all() for value in written.values())
    text = CLIPTextModel.from_pretrained(tmp_path / "mini/text_encoder").state_dict()
    assert all(torch.equal(value, text[name]) for name, value in denoiser.text_model.state_dict().items())


def test_the_gpu_preset_is_ten_minutes_of_budget():
    preset = PRESETS["gpu"]
    recipes = [getattr(preset, f"{stage}_recipe") for stage in ("vae", "clip", "unet", "decoder", "towers")]
    assert sum(recipe.minutes for recipe in recipes) == 10
    assert preset.unet_recipe.minutes == max(recipe.minutes for recipe in recipes)
