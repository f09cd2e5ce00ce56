"""Layers shared by the UNet and the VAE: time embedding, residual block, down- and upsampling.

Attributes have the names of diffusers' checkpoints, so `state_dict()` needs no renaming.
Shapes in the whole package: b batch, c channels, h w rows and columns, n queries, k keys, d features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS_PER_CELL = 8  # image pixels on each side of a latent cell, in every SDXL


def timestep_embedding(timesteps: Tensor, dim: int, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoidal features of the timestep (Ho et al. 2020, after Vaswani et al. 2017, section 3.5).

    timesteps: (b,) in 0..T-1 -> (b, dim) float32. `flip_sin_to_cos` puts the cosines first, as SD does.
    """
    half = dim // 2
    # Product before quotient, as in the original code: the other order moves the angles of late timesteps by 6e-5.
    exponent = -math.log(10000) * torch.arange(half, device=timesteps.device, dtype=torch.float32)
    angles = timesteps.float()[:, None] * torch.exp(exponent / (half - freq_shift))
    pair = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(pair, dim=-1), (0, dim % 2))


def uncropped(latents: Tensor) -> Tensor:
    """Return SDXL's sizes of whole images as large as these latents: (h, w, 0, 0, h, w) in pixels. -> (b, 6)"""
    sizes = torch.zeros(len(latents), 6, device=latents.device)
    sizes[:, 0::4], sizes[:, 1::4] = (
        PIXELS_PER_CELL * side for side in latents.shape[-2:]
    )  # fills: no copy to the GPU
    return sizes


class TimeEmbedding(nn.Module):
    """Two linear layers from the sinusoidal features to the embedding that every residual block receives."""

    def __init__(self, features: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(features, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """(b, features) -> (b, dim)"""
        return self.linear_2(F.silu(self.linear_1(features)))


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions with a skip connection; the time embedding is added between them.

    `time_dim=None` leaves the time embedding out, as the VAE does.
    """

    def __init__(self, c_in: int, c_out: int, time_dim: int | None, groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, c_out) if time_dim else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x: (b, c_in, h, w), time: (b, time_dim) or None -> (b, c_out, h, w)"""
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """A strided convolution that halves the grid. The UNet pads on all sides, the VAE on the right and below only."""

    def __init__(self, channels: int, pad_all_around: bool):
        super().__init__()
        self.pad_all_around = pad_all_around
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1 if pad_all_around else 0)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h/2, w/2), rounded up in the UNet and down in the VAE"""
        return self.conv(x if self.pad_all_around else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to twice the grid, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(b, c, h, w) -> (b, c, 2h, 2w), or the first rows and columns of it, as many as `size` says"""
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.conv(x if size is None else x[..., : size[0], : size[1]])
