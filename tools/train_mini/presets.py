"""The sizes of the miniature and how long each of its stages trains, as data."""

from dataclasses import dataclass

from bas.models.config import UNetConfig, VAEConfig
from bas.schedulers import NoiseSchedule

SEED = 2305  # of every stage; scene i of the training set is drawn from (SEED, i)
TEXT_LENGTH = 77  # positions of the text tower, as in CLIP
SCHEDULE = NoiseSchedule(steps_offset=1, prediction_type="v_prediction")  # Stable Diffusion 2.1's


@dataclass(frozen=True)
class Recipe:
    """How one stage trains."""

    minutes: float  # wall clock, over which the learning rate falls to zero as a cosine
    batch: int
    lr: float
    ema: float  # decay of the averaged weights, which are the ones kept
    workers: int = 1  # threads that each take a batch of their own; on a CPU better than one batch on many threads


@dataclass(frozen=True)
class Preset:
    """A size of the miniature; the stages read everything from here."""

    resolution: int  # pixels a side
    scenes: int  # of the training set
    vae: VAEConfig
    vae_recipe: Recipe
    text_width: int
    text_layers: int
    patch: int  # pixels a side, of CLIP's image tower
    clip_recipe: Recipe
    unet: UNetConfig
    unet_recipe: Recipe
    decoder_recipe: Recipe


PRESETS = {
    "cpu": Preset(
        resolution=64,
        scenes=60_000,
        vae=VAEConfig(block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=16, sample_size=64),
        vae_recipe=Recipe(minutes=30, batch=4, lr=1.5e-3, ema=0.998, workers=2),
        text_width=128,
        text_layers=3,
        patch=8,
        clip_recipe=Recipe(minutes=10, batch=256, lr=1e-3, ema=0.99),
        unet=UNetConfig(
            sample_size=16,
            block_out_channels=(64, 96, 128),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4, 4),
            cross_attention_dim=128,
            norm_num_groups=16,
        ),
        unet_recipe=Recipe(minutes=80, batch=24, lr=1e-3, ema=0.997, workers=2),
        decoder_recipe=Recipe(minutes=8, batch=4, lr=5e-4, ema=0.99, workers=2),
    ),
    "gpu": Preset(
        resolution=256,
        scenes=30_000,
        vae=VAEConfig(block_out_channels=(32, 64, 96, 128), layers_per_block=1, norm_num_groups=16, sample_size=256),
        vae_recipe=Recipe(minutes=2, batch=32, lr=1e-3, ema=0.999),
        text_width=192,
        text_layers=4,
        patch=32,
        clip_recipe=Recipe(minutes=1.5, batch=512, lr=1e-3, ema=0.995),
        unet=UNetConfig(
            sample_size=32,
            block_out_channels=(64, 128, 192),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=192,
            norm_num_groups=32,
        ),
        unet_recipe=Recipe(minutes=5.5, batch=256, lr=1e-3, ema=0.9995),
        decoder_recipe=Recipe(minutes=1, batch=32, lr=5e-4, ema=0.995),
    ),
}  # fmt: skip
