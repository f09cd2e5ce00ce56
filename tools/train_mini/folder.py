"""The miniature as a diffusers folder: training starts from one and ends in one."""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTextModel

from bas.errors import InputError
from bas.io.json_files import write_json
from bas.models.bundle import Models
from bas.models.unet import UNet
from bas.pretrained.folder import MODEL_INDEX, load
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose
from tools.train_mini.clip import load_clip
from tools.train_mini.codec import Scaling, measure_scaling, to_latents, to_tensor
from tools.train_mini.decoder import load_vae, save_decoder
from tools.train_mini.files import save_weights, write_scaling
from tools.train_mini.fit import load_newest
from tools.train_mini.recipe import SCHEDULE, SEED, Recipe
from tools.train_mini.text import load_text_encoder, save_text_encoder


def start_from(recipe: Recipe, run: Path, folder: Path, stage: str) -> None:
    """Put a miniature's parts into a new run folder, to train on, but not what `stage` makes anew: CLIP, text encoder.

    A miniature of other latents lends its UNet all the same: `translate` turns its first and last layers. InputError
    where the run folder holds a run already that started from nothing.
    """
    if (run / "unet_start.safetensors").exists():
        return
    if (run / "clip.safetensors").exists():
        raise InputError(f"{run} holds a run from nothing: name a new --run_dir")
    models = load(folder, "cpu")
    run.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    scaling = measure_scaling()
    write_scaling(run, scaling)
    if models.vae.config.latent_channels == recipe.vae.latent_channels:
        save_decoder(models.vae, run / "decoder_start.safetensors")
    else:
        models.unet = translate(models, recipe, scaling)
    if stage != "clip":
        save_weights(CLIPModel.from_pretrained(folder / "clip"), run / "clip.safetensors")
    if stage not in ("clip", "text"):
        save_text_encoder(CLIPTextModel.from_pretrained(folder / "text_encoder"), run / "text.safetensors")
    save_weights(models.unet, run / "unet_start.safetensors")


@torch.no_grad()
def translate(models: Models, recipe: Recipe, scaling: Scaling) -> UNet:
    """A UNet of the recipe that reads and writes the set latents, with everything else from a UNet of other latents.

    Least squares over 400 scenes gives a matrix from new latents to old ones and one back; the first and the last
    convolution are multiplied by them.
    """
    images = to_tensor(np.stack([draw(compose(np.random.default_rng((SEED, 3, i))))[0] for i in range(400)]))
    old = models.vae.config.scaling_factor * models.vae.encode(images).mean
    old, new = (z.permute(0, 2, 3, 1).flatten(0, 2) for z in (old, to_latents(images, scaling)))
    to_old: Tensor = torch.linalg.lstsq(new, old).solution.T
    to_new: Tensor = torch.linalg.lstsq(old, new).solution.T
    state = models.unet.state_dict()
    state["conv_in.weight"] = torch.einsum("cohw,on->cnhw", state["conv_in.weight"], to_old)
    state["conv_out.weight"] = torch.einsum("no,ochw->nchw", to_new, state["conv_out.weight"])
    state["conv_out.bias"] = to_new @ state["conv_out.bias"]
    unet = UNet(recipe.unet)
    unet.load_state_dict(state)
    return unet


def newest_unet(recipe: Recipe, run: Path) -> UNet:
    """A run's newest UNet. InputError where there is none yet."""
    unet = UNet(recipe.unet)
    if not load_newest("unet", unet, run):
        raise InputError(f"{run} has no UNet yet: run the stage unet first")
    return unet


def export(recipe: Recipe, run: Path, folder: Path) -> None:
    """Write the diffusers folder and, in its folder `clip`, both encoders of CLIP."""
    vae, unet = load_vae(recipe, run), newest_unet(recipe, run)
    (clip, _), (text_encoder, _) = (read(recipe, run, torch.device("cpu")) for read in (load_clip, load_text_encoder))
    save_weights(unet, folder / "unet/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "unet/config.json", recipe.unet.to_json())
    save_weights(vae, folder / "vae/diffusion_pytorch_model.safetensors", torch.float16)
    write_json(folder / "vae/config.json", recipe.vae.to_json())
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULE.to_json())

    text_encoder.save_pretrained(folder / "text_encoder")
    clip.save_pretrained(folder / "clip")
    side, half = recipe.resolution, [0.5] * 3  # images enter in [-1, 1]
    prepare = CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=half, image_std=half
    )
    prepare.save_pretrained(folder / "clip")
    for part in ("tokenizer", "clip"):
        shutil.copytree(run / "tokenizer", folder / part, dirs_exist_ok=True)
    write_json(folder / "model_index.json", MODEL_INDEX)
