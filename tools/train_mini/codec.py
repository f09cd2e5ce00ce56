"""The miniature's latents: set by hand, not learnt. Each 4x4 cell keeps its four 2x2 mean colours in a Haar basis.

Twelve numbers for each cell describe any drawing without guessing. `haar` computes them; `set_encoder` writes weights
into Stable Diffusion's own encoder layers that compute the same to 0.1 %. Only the decoder is trained.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bas.models.vae import VAE
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose
from tools.train_mini.recipe import SEED

SIGNS = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # of the four means of a cell, row by row
DEVIATIONS = torch.tensor([1.0] * 3 + [0.45] * 6 + [0.32] * 3)  # of the latents: mean colour, differences, mixed ones
CONSTANT = 20.0  # beside two latents in each group of the last norm: it divides by a number that is known to 0.1 %
NOISE = 0.03  # standard deviation of the posterior


class Scaling(NamedTuple):
    """latents = (haar(image) - mean) * factor, channel by channel, so that they have the wanted deviations."""

    mean: Tensor  # (12,)
    factor: Tensor  # (12,)


def haar(images: Tensor) -> Tensor:
    """2x2 mean colours of 4x4 cells in a Haar basis. (b, 3, H, W) in [-1, 1] -> (b, 12, H/4, W/4), unscaled"""
    means = F.avg_pool2d(images, 2)
    corners = means[..., ::2, ::2], means[..., ::2, 1::2], means[..., 1::2, ::2], means[..., 1::2, 1::2]
    return torch.cat([sum(s * x for s, x in zip(signs, corners, strict=True)) for signs in SIGNS], dim=1) / 4


def to_latents(images: Tensor, scaling: Scaling) -> Tensor:
    """The mean of the posterior. (b, 3, H, W) in [-1, 1] -> (b, 12, H/4, W/4)"""
    return (haar(images) - scaling.mean[:, None, None]) * scaling.factor[:, None, None]


def measure_scaling(scenes: int = 2000) -> Scaling:
    """Mean and factor of each channel over so many training scenes of 64x64."""
    layouts = (compose(np.random.default_rng((SEED, 1, i))) for i in range(scenes))
    numbers = torch.cat([haar(to_tensor(draw(layout)[0][None])) for layout in layouts])
    mean, deviation = numbers.mean(dim=(0, 2, 3)), numbers.std(dim=(0, 2, 3))
    mean[3:] = 0  # differences have no preferred sign
    common = deviation.view(4, 3).square().mean(dim=1).sqrt().repeat_interleave(3)
    return Scaling(mean, DEVIATIONS / common)


@torch.no_grad()
def set_encoder(vae: VAE, scaling: Scaling) -> None:
    """Write the weights of `vae.encoder` and `vae.quant_conv`, in place, so that they compute `to_latents`.

    The residual branches are 0, so the layers before the last norm are linear. The two strided convolutions take 2x2
    means and then the Haar transform. The last norm would divide by what it sees: each latent x is written as the pair
    x, -x beside the constants B, -B, so its group has mean 0 and a deviation that hardly depends on x. SiLU turns the
    pair into x again: silu(x) - silu(-x) = x.
    """
    encoder, channels = vae.encoder, vae.config.latent_channels
    first, second, last = encoder.down_blocks
    for parameter in encoder.parameters():
        parameter.zero_()
    for module in encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.fill_(1)
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1
        first.downsamplers[0].conv.weight[c, c, :2, :2] = 0.25
        second.resnets[0].conv_shortcut.weight[c, c] = 1
        for k, signs in enumerate(SIGNS):
            second.downsamplers[0].conv.weight[3 * k + c, c, :2, :2] = torch.tensor(signs).view(2, 2) / 4
    norm, shortcut = encoder.conv_norm_out, last.resnets[0].conv_shortcut
    width = norm.num_channels // norm.num_groups
    held = (width - 2) // 2  # latents in a group, beside the constants
    for group in range(-(-channels // held)):
        begin, kept = group * width, range(group * held, min((group + 1) * held, channels))
        for k in kept:
            place = begin + 2 * (k - kept.start)
            for c, sign in ((place, 1), (place + 1, -1)):
                shortcut.weight[c, k] = sign * scaling.factor[k]
                shortcut.bias[c] = -sign * scaling.factor[k] * scaling.mean[k]
                encoder.conv_out.weight[k, c, 1, 1] = sign
        shortcut.bias[begin + 2 * held], shortcut.bias[begin + 2 * held + 1] = CONSTANT, -CONSTANT
        squares = 2 * DEVIATIONS[kept].square().sum() + 2 * CONSTANT**2
        norm.weight[begin : begin + width] = (squares / width).sqrt()
    encoder.conv_out.bias[channels:] = 2 * math.log(NOISE)
    torch.nn.init.eye_(vae.quant_conv.weight.view(2 * channels, 2 * channels))
    vae.quant_conv.bias.zero_()


def to_tensor(images: np.ndarray) -> Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
