"""References of convolutions, resampling and time: the layers of bas beside those of diffusers."""

import torch
from torch import nn

from bas.models import layers
from tools.reference.measure import Case, Named


def diffusers_resnet(c_in: int, c_out: int, time_dim: int | None, groups: int, eps: float) -> nn.Module:
    from diffusers.models.resnet import ResnetBlock2D

    return ResnetBlock2D(in_channels=c_in, out_channels=c_out, temb_channels=time_dim, groups=groups, eps=eps)


def diffusers_resample(kind: str, channels: int, **options) -> nn.Module:
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.upsampling import Upsample2D

    return {"down": Downsample2D, "up": Upsample2D}[kind](channels, use_conv=True, **options)


def diffusers_time_embedding(features: int, dim: int) -> nn.Module:
    from diffusers.models.embeddings import TimestepEmbedding

    return TimestepEmbedding(features, dim)


# (features, cosines first, frequency shift)
SINUSOIDS = ((16, True, 0), (16, False, 0), (15, True, 1), (320, True, 0))
SINUSOID_TIMESTEPS = torch.tensor([0, 1, 20, 499, 981, 999])


def sinusoids() -> Named:
    """diffusers' time features."""
    from diffusers.models.embeddings import get_timestep_embedding

    return {
        f"sinusoid.{dim}.{flip}.{shift}": get_timestep_embedding(SINUSOID_TIMESTEPS, dim, flip, shift)
        for dim, flip, shift in SINUSOIDS
    }


LAYERS: dict[str, Case] = {
    "time-embedding": Case(
        lambda: layers.TimeEmbedding(16, 64), lambda: diffusers_time_embedding(16, 64), {"features": (3, 16)}
    ),
    "resnet": Case(
        lambda: layers.ResnetBlock(16, 16, 24, 4, 1e-5),
        lambda: diffusers_resnet(16, 16, 24, 4, 1e-5),
        {"x": (2, 16, 6, 5), "time": (2, 24)},
    ),
    "resnet-shortcut": Case(
        lambda: layers.ResnetBlock(16, 24, 24, 8, 1e-5),
        lambda: diffusers_resnet(16, 24, 24, 8, 1e-5),
        {"x": (2, 16, 6, 5), "time": (2, 24)},
    ),
    "resnet-without-time": Case(
        lambda: layers.ResnetBlock(8, 12, None, 4, 1e-6),
        lambda: diffusers_resnet(8, 12, None, 4, 1e-6),
        {"x": (2, 8, 6, 5)},
        run_theirs=lambda module, x: module(x, None),
    ),
    "downsample-unet": Case(
        lambda: layers.Downsample(8, pad_all_around=True),
        lambda: diffusers_resample("down", 8, padding=1, name="op"),
        {"x": (2, 8, 6, 10)},
    ),
    "downsample-vae": Case(
        lambda: layers.Downsample(8, pad_all_around=False),
        lambda: diffusers_resample("down", 8, padding=0, name="op"),
        {"x": (2, 8, 6, 10)},
    ),
    "upsample": Case(lambda: layers.Upsample(8), lambda: diffusers_resample("up", 8), {"x": (2, 8, 3, 5)}),
}
