"""The miniature as a diffusers folder: training starts from one and ends in one."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextModel

from bas.errors import InputError
from bas.io.files import write_json
from bas.models.unet import UNet
from bas.pretrained.folder import MODEL_INDEX, load
from tools.train_mini.clip import load_clip
from tools.train_mini.files import save_weights
from tools.train_mini.presets import SCHEDULE, Preset
from tools.train_mini.vae import load_vae


def adopt(run: Path, folder: Path, with_clip: bool) -> None:
    """Put a miniature's tokenizer, VAE, UNet and, `with_clip`, CLIP into a new run folder, to go on from.

    A folder that has started from one is left alone; InputError for one that trains from nothing, and for no miniature.
    """
    if (run / "unet_start.safetensors").exists():
        return
    if (run / "vae.safetensors").exists():
        raise InputError(f"{run} holds a run from nothing, with another VAE: name a new --run_dir")
    models = load(folder, "cpu")
    shutil.copytree(folder / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    shutil.copy(folder / "vae/config.json", run / "vae.json")
    save_weights(models.vae, run / "vae.safetensors")
    if with_clip:
        save_weights(CLIPModel.from_pretrained(folder / "clip"), run / "clip.safetensors")
    save_weights(models.unet, run / "unet_start.safetensors")


def unet_of(preset: Preset, run: Path) -> UNet:
    """A run's UNet: the finished one, or the average so far of an unfinished one, or the one that it started from.

    Raises InputError where there is none yet.
    """
    unet = UNet(preset.unet)
    names = "unet.safetensors", "unet.ckpt", "unet_start.safetensors"
    newest = next((run / name for name in names if (run / name).exists()), None)
    if newest is None:
        raise InputError(f"{run} has no UNet yet: run the stage unet first")
    if newest.suffix == ".ckpt":
        state = torch.load(newest, map_location="cpu", weights_only=True)
        for p, mean in zip(unet.parameters(), state["average"], strict=True):
            p.data.copy_(mean)
    else:
        unet.load_state_dict(load_file(newest))
    return unet


def export(preset: Preset, run: Path, folder: Path) -> None:
    """Write the diffusers folder and, beside it, both CLIP towers."""
    vae, (clip, _) = load_vae(preset, run, "cpu"), load_clip(preset, run, "cpu")
    unet = unet_of(preset, run)
    save_weights(unet, folder / "unet/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "unet/config.json", preset.unet.to_json())
    save_weights(vae, folder / "vae/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "vae/config.json", vae.config.to_json())
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULE.to_json())

    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    text_encoder.save_pretrained(folder / "text_encoder")
    clip.save_pretrained(folder / "clip")
    side, half = preset.vae.sample_size, [0.5] * 3  # pictures enter in [-1, 1]
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=half, image_std=half
    )
    prepare.save_pretrained(folder / "clip")
    for place in ("tokenizer", "clip"):
        shutil.copytree(run / "tokenizer", folder / place, dirs_exist_ok=True)
    write_json(folder / "model_index.json", MODEL_INDEX)
