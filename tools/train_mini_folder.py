"""The miniature as a diffusers folder: training starts from one and ends in one."""

import copy
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from train_mini_clip import load_clip
from train_mini_files import save_weights, write_json
from train_mini_presets import SCHEDULE, Preset
from train_mini_unet import Denoiser
from train_mini_vae import load_vae
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextModel

from bas.checkpoint import load
from bas.models.unet import UNet


def adopt(preset: Preset, run: Path, folder: Path) -> None:
    """Start from a miniature in a diffusers folder: its tokenizer, VAE and towers stay, its UNet trains on."""
    shutil.copytree(folder / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    shutil.copy(folder / "vae/config.json", run / "vae.json")
    models = load(folder, "cpu")
    clip = CLIPModel.from_pretrained(folder / "clip")
    denoiser = Denoiser(UNet(preset.unet), clip.text_model)
    save_weights(models.vae, run / "vae.safetensors")
    save_weights(clip, run / "clip.safetensors")
    denoiser.unet.load_state_dict(models.unet.state_dict())
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    denoiser.text_model.load_state_dict(text_encoder.state_dict())
    save_weights(denoiser, run / "unet_start.safetensors")


def export(preset: Preset, run: Path, folder: Path) -> None:
    """Write the diffusers folder and, beside it, both CLIP towers; of an unfinished UNet, its average so far."""
    vae, (clip, _) = load_vae(preset, run, "cpu"), load_clip(preset, run, "cpu")
    denoiser = Denoiser(UNet(preset.unet), copy.deepcopy(clip.text_model))
    if (run / "unet.safetensors").exists():
        denoiser.load_state_dict(load_file(run / "unet.safetensors"))
    else:
        state = torch.load(run / "unet.ckpt", weights_only=True)
        denoiser.load_state_dict(state["module"])
        for p, mean in zip(denoiser.parameters(), state["average"], strict=False):  # none of a frozen text tower
            p.data.copy_(mean)
    save_weights(denoiser.unet, folder / "unet/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "unet/config.json", preset.unet.to_json())
    save_weights(vae, folder / "vae/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "vae/config.json", vae.config.to_json())
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULE.to_json())

    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(denoiser.text_model.state_dict())
    text_encoder.save_pretrained(folder / "text_encoder")
    clip.save_pretrained(folder / "clip")
    side, half = preset.vae.sample_size, [0.5] * 3  # pictures enter in [-1, 1]
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=half, image_std=half
    )
    prepare.save_pretrained(folder / "clip")
    for place in ("tokenizer", "clip"):
        shutil.copytree(run / "tokenizer", folder / place, dirs_exist_ok=True)
    modules = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    flags = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.20.0", "requires_safety_checker": False}
    write_json(folder / "model_index.json", flags | modules)
