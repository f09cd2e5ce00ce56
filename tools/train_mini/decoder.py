"""The stage of the miniature's decoder: it draws what the set latents say. The encoder is never trained."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bas.errors import InputError
from bas.models.vae import VAE
from bas.runtime.device import native_bf16
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose
from tools.mini_world.random_drawings import random_drawing
from tools.train_mini.codec import Scaling, measure_scaling, set_encoder, to_latents, to_tensor
from tools.train_mini.files import read_scaling, save_weights, write_scaling
from tools.train_mini.fit import fit, load_newest
from tools.train_mini.recipe import SEED, Recipe, Stage

ROUGH = 0.6  # share of the goal after which latents get more noise, so that the decoder forgives the UNet's errors
VALIDATION = 64  # images


class LatentDecoder(nn.Module):
    """What is trained of the VAE: the decoder behind its 1x1 convolution, which stays the identity."""

    def __init__(self, vae: VAE):
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        channels = vae.config.latent_channels
        nn.init.eye_(self.post_quant_conv.weight.data.view(channels, channels))
        nn.init.zeros_(self.post_quant_conv.bias)
        self.post_quant_conv.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, 3, H, W)"""
        return self.decoder(self.post_quant_conv(latents))


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def draw_images(rng, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Half random drawings, half training scenes. -> images (b, 3, size, size), cover (b, 1, size, size) in 0..1"""
    images, covers = [], []
    for i in range(count):
        if i % 2:
            image, cover = random_drawing(rng, size)
        else:
            image, masks = draw(compose(rng), size)
            cover = masks.sum(axis=0, initial=0.0)
        images.append(image)
        covers.append(cover)
    return to_tensor(np.stack(images)), torch.from_numpy(np.stack(covers))[:, None].float()


def reconstruction_loss(decoded: Tensor, images: Tensor, cover: Tensor) -> Tensor:
    """L1 + 4 x L2 + 0.5 x L1 of edges; objects count four times. decoded, images (b, 3, H, W), cover (b, 1, H, W)"""
    weight, error = 1 + 3 * cover, decoded - images
    outline = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(images), strict=True))
    return (weight * error.abs()).mean() + 4 * (weight * error.square()).mean() + 0.5 * outline


def psnr(decoded: Tensor, images: Tensor) -> Tensor:
    """Mean over images of the peak signal-to-noise ratio in dB."""
    error = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4
    return (-10 * error.log10()).mean()


def noise_level(stage: Stage, step: int, generator: torch.Generator) -> float:
    """Standard deviation of the noise on the latents: the posterior's, later up to 0.15."""
    if step * stage.batch < ROUGH * stage.goal:
        return 0.03
    return 0.03 + 0.12 * float(torch.rand((), generator=generator))


def train_decoder(recipe: Recipe, run: Path, device: torch.device) -> None:
    """Measure the scaling of the latents, then fit the decoder from run/decoder_start.safetensors or from nothing."""
    if not (run / "scaling.json").exists():
        write_scaling(run, measure_scaling())
    if (run / "decoder.safetensors").exists():
        return
    torch.manual_seed(SEED)
    stage, scaling = recipe.decoder, Scaling(*(t.to(device) for t in read_scaling(run)))
    module = LatentDecoder(VAE(recipe.vae))
    if (run / "decoder_start.safetensors").exists():
        module.load_state_dict(load_file(run / "decoder_start.safetensors"))
    module.to(device)

    def draw_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
        rng, generator = np.random.default_rng((SEED, stage.number, step)), torch.Generator().manual_seed(step)
        images, cover = draw_images(rng, stage.batch, recipe.resolution)
        side = recipe.resolution // recipe.vae.factor
        noise = torch.randn(len(images), recipe.vae.latent_channels, side, side, generator=generator)
        return images, cover, noise_level(stage, step, generator) * noise

    def loss_of(module: nn.Module, batch: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        images, cover, noise = (tensor.to(device) for tensor in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=native_bf16(device)):
            decoded = module(to_latents(images, scaling) + noise).float()
        return reconstruction_loss(decoded, images, cover), {"psnr": psnr(decoded.detach(), images)}

    def validate() -> float:
        images, cover = draw_images(np.random.default_rng((SEED, stage.number)), VALIDATION, recipe.resolution)
        batches = zip(images.split(16), cover.split(16), strict=True)
        losses = [loss_of(module, (x, c, torch.zeros(())))[0].item() for x, c in batches]
        return sum(losses) / len(losses)

    fit("decoder", module, draw_batch, loss_of, stage, run, validate)


def load_vae(recipe: Recipe, run: Path) -> VAE:
    """The autoencoder of a run: the set encoder and its newest decoder. InputError where there is none yet."""
    vae = VAE(recipe.vae)
    set_encoder(vae, read_scaling(run))
    if not load_newest("decoder", LatentDecoder(vae), run):
        raise InputError(f"{run} has no decoder yet: run the stage decoder first")
    return vae.requires_grad_(False)


def save_decoder(vae: VAE, path: Path) -> None:
    """Write what `LatentDecoder` trains of a VAE."""
    save_weights(LatentDecoder(vae), path)
