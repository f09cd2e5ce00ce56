"""The stage of the miniature's UNet."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bas.models.unet import UNet
from bas.runtime.device import native_bf16
from bas.schedulers import add_noise, training_target
from tools.mini_world.captions import describe
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose
from tools.train_mini.codec import NOISE, to_latents, to_tensor
from tools.train_mini.files import read_scaling
from tools.train_mini.fit import fit
from tools.train_mini.recipe import SCHEDULE, SEED, Recipe
from tools.train_mini.text import load_text_encoder
from tools.train_mini.tokenizer import tokenize

EMPTY = 0.1  # share of empty captions, for guidance
TIMES = (0, 300, 600, 800, 1000)  # The log tells the loss of each range of timesteps.
VALIDATION = 192  # scenes


def train_unet(recipe: Recipe, run: Path, device: torch.device) -> None:
    """Fit the UNet to predict v from latents, timestep and caption, on fresh scenes.

    Three choices spend a small budget well. v rather than noise (Salimans and Ho 2022): noise asks next to nothing of
    the network where the image is still to be decided, and shapes are decided there. Timesteps with little noise are
    drawn rarely (the idea of min-SNR weights, Hang et al. 2023, as a density). Cells with objects count three times.
    The text encoder stays as it is, as in Stable Diffusion.
    """
    if (run / "unet.safetensors").exists():
        return
    torch.manual_seed(SEED)
    stage, scaling = recipe.denoiser, read_scaling(run)
    text_encoder, tokenizer = load_text_encoder(recipe, run, device)
    unet = UNet(recipe.unet)
    if (run / "unet_start.safetensors").exists():
        unet.load_state_dict(load_file(run / "unet_start.safetensors"))
    unet.to(device)
    signal_to_noise = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    density = (1 + signal_to_noise).clamp(max=5) / (1 + signal_to_noise)

    def draw_scenes(rng: np.random.Generator, count: int, generator: torch.Generator, t: Tensor) -> tuple:
        layouts = [compose(rng) for _ in range(count)]
        drawn = [draw(layout, recipe.resolution) for layout in layouts]
        captions = [describe(layout, rng) if rng.random() > EMPTY else "" for layout in layouts]
        cover = torch.from_numpy(np.stack([masks.sum(axis=0, initial=0.0) for _, masks in drawn])).float()
        cells = F.avg_pool2d(cover[:, None], recipe.vae.factor)[:, 0]
        z0 = to_latents(to_tensor(np.stack([image for image, _ in drawn])), scaling)
        z0 = z0 + NOISE * torch.randn(z0.shape, generator=generator)
        eps = torch.randn(z0.shape, generator=generator)
        target = training_target(SCHEDULE, z0, eps, t)
        return add_noise(SCHEDULE, z0, eps, t), t, tokenize(tokenizer, captions), target, 1 + 2 * cells

    def draw_batch(step: int) -> tuple:
        generator = torch.Generator().manual_seed(step)
        t = torch.multinomial(density, stage.batch, replacement=True, generator=generator)
        return draw_scenes(np.random.default_rng((SEED, stage.number, step)), stage.batch, generator, t)

    def loss_of(unet: nn.Module, batch: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        z, t, ids, target, weight = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
            with torch.no_grad():
                context = text_encoder(ids).last_hidden_state
            predicted = unet(z, t, context).sample
        error = weight * (predicted.float() - target).square().mean(dim=1)
        each = error.detach().sum(dim=(1, 2)) / weight.sum(dim=(1, 2))
        ranges = ((low, (low <= t) & (t < high)) for low, high in pairwise(TIMES))
        return error.sum() / weight.sum(), {f"t{low}": each[inside].mean() for low, inside in ranges if inside.any()}

    held_out = draw_scenes(
        np.random.default_rng((SEED, stage.number)),
        VALIDATION,
        torch.Generator().manual_seed(SEED),
        torch.arange(VALIDATION) * SCHEDULE.num_train_timesteps // VALIDATION,
    )

    def validate() -> float:
        batches = zip(*(tensor.split(48) for tensor in held_out), strict=True)
        losses = [loss_of(unet, batch)[0].item() for batch in batches]
        return sum(losses) / len(losses)

    fit("unet", unet, draw_batch, loss_of, stage, run, validate)
