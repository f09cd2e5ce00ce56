"""The autoencoder of Stable Diffusion (Rombach et al. 2022, section 3.1): images to latents and back."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bas.models.config import VAEConfig
from bas.models.dot_product import attend
from bas.models.layers import Downsample, ResnetBlock, Upsample

NORM_EPS = 1e-6


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents, before the scaling factor."""

    mean: Tensor  # (b, c, h, w)
    logvar: Tensor  # (b, c, h, w), clamped to [-30, 20]

    @property
    def deviation(self) -> Tensor:
        """The standard deviation, (b, c, h, w)."""
        return (0.5 * self.logvar).exp()

    def sample(self, noise: Tensor) -> Tensor:
        """Return a sample of the posterior, from standard normal noise (b, c, h, w)."""
        return self.mean + self.deviation * noise


class SpatialAttention(nn.Module):
    """Single-head self-attention over the cells of the middle grid."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)"""
        cells = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        out = self.to_out(attend(self.to_q(cells), self.to_k(cells), self.to_v(cells)))
        return x + rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[-2])


class MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, None, groups, NORM_EPS) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)"""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class CoderBlock(nn.Module):
    """Residual blocks on one grid, then another grid: `downsamplers` in the encoder, `upsamplers` in the decoder."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resample: nn.Module | None):
        super().__init__()
        widths = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(width, c_out, None, groups, NORM_EPS) for width in widths)
        self.downsamplers = nn.ModuleList([resample] if isinstance(resample, Downsample) else [])
        self.upsamplers = nn.ModuleList([resample] if isinstance(resample, Upsample) else [])

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, h, w) -> (b, c_out, h', w')"""
        for module in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = module(x)
        return x


class Encoder(nn.Module):
    """Images to the parameters of the posterior."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        inputs = (channels[0], *channels[:-1])
        self.down_blocks = nn.ModuleList(
            CoderBlock(
                c_in,
                c_out,
                config.layers_per_block,
                groups,
                Downsample(c_out, pad_all_around=False) if i < len(channels) - 1 else None,
            )
            for i, (c_in, c_out) in enumerate(zip(inputs, channels, strict=True))
        )
        self.mid_block = MidBlock(channels[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, 2 x latent channels, H/factor, W/factor)"""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents to images."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        inputs = (channels[0], *channels[:-1])
        self.up_blocks = nn.ModuleList(
            CoderBlock(
                c_in,
                c_out,
                config.layers_per_block + 1,
                groups,
                Upsample(c_out) if i < len(channels) - 1 else None,
            )
            for i, (c_in, c_out) in enumerate(zip(inputs, channels, strict=True))
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(b, latent channels, h, w) -> (b, 3, factor x h, factor x w)"""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Encoder and decoder. Their latents are unscaled; the diffusion model uses them times `config.scaling_factor`."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> Posterior:
        """images: (b, 3, H, W) in [-1, 1] -> posterior over latents (b, c, H/factor, W/factor)"""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return Posterior(mean, torch.clamp(logvar, -30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """latents: (b, c, h, w), unscaled -> images (b, 3, factor x h, factor x w), about [-1, 1]"""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, images: Tensor) -> Tensor:
        """Decode the posterior's mean: (b, 3, H, W) -> (b, 3, H, W)"""
        return self.decode(self.encode(images).mean)
