"""The sizes of the miniature and how each of its stages trains, as data."""

from dataclasses import dataclass

from bas.models.config import UNetConfig, VAEConfig
from bas.schedulers import NoiseSchedule

SEED = 2306  # Stages draw scene i from (SEED, number of the stage, i).
TEXT_LENGTH = 77  # positions of the text encoder, as in CLIP
SCHEDULE = NoiseSchedule(steps_offset=1, prediction_type="v_prediction")  # Stable Diffusion 2.1's
AVERAGES = (0.999, 0.9998)  # decays of the two averaged copies of the weights


@dataclass(frozen=True)
class Stage:
    """How one stage trains. The learning rate warms up over 100 steps, stays, and falls to 0 over `cooldown`."""

    number: int  # separates its random numbers from those of other stages
    batch: int
    goal: int  # samples after which it ends
    cooldown: int  # of these, the last samples over which the learning rate falls to 0
    seen: int = 0  # samples that the weights it starts from were trained with; fresh scenes follow after them
    lr: float = 1e-3  # of AdamW
    lr_matrices: float = 2e-3  # of Muon
    adamw_only: tuple[str, ...] = ("",)  # parameters with one of these in their name stay with AdamW; "" is in each


@dataclass(frozen=True)
class Recipe:
    """A miniature: the sizes of its networks and its stages."""

    vae: VAEConfig
    unet: UNetConfig
    text_width: int
    text_layers: int
    patch: int  # pixels a side, of CLIP's image encoder
    clip: Stage
    text: Stage
    decoder: Stage
    denoiser: Stage

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.vae.sample_size


MINIATURE = Recipe(
    vae=VAEConfig(
        latent_channels=12,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        sample_size=64,
        scaling_factor=1.0,
    ),
    unet=UNetConfig(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=128,
        norm_num_groups=16,
    ),
    text_width=128,
    text_layers=3,
    patch=8,
    clip=Stage(number=5, batch=256, goal=500_000, cooldown=250_000),
    text=Stage(number=6, batch=96, goal=60_000, cooldown=30_000, lr=5e-4),
    decoder=Stage(number=4, batch=8, goal=100_000, cooldown=20_000, adamw_only=("conv_in", "conv_out")),
    denoiser=Stage(
        number=2,
        batch=48,
        goal=3_600_000,
        cooldown=600_000,
        adamw_only=("conv_in", "conv_out", "time_embedding"),
    ),
)
