"""The denoising UNet of Stable Diffusion (Rombach et al. 2022, section 3.3; SDXL: Podell et al. 2023), from its config.

Cross-attention probabilities are ordinary outputs: `unet(z_t, t, context, return_maps=(16, 16)).maps`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bas.models.attention import SpatialTransformer
from bas.models.config import MID_BLOCKS, UNetConfig
from bas.models.layers import Downsample, ResnetBlock, TimeEmbedding, Upsample, timestep_embedding, uncropped


class AttentionMap(NamedTuple):
    """The probabilities of one cross-attention layer, and its place in the UNet."""

    place: str  # "down", "mid" or "up"
    probs: Tensor  # (b, heads, h, w, k) float32; each cell's k values sum to 1
    layer: str = ""  # the layer's name in the UNet, as "up_blocks.1.attentions.0"


class UNetOutput(NamedTuple):
    """The output of the UNet."""

    sample: Tensor  # (b, c, h, w): the predicted noise, or velocity for v-prediction models
    maps: list[AttentionMap]  # those asked for, in execution order


# Which maps to return: False none, True all, (h, w) those of the layers on a grid of h rows and w columns.
ReturnMaps = bool | tuple[int, int]

# By grid (h, w), which tokens the cells of a layer there may not look at: (b, h x w, k) bool. Other grids see all.
Hide = dict[tuple[int, int], Tensor]


class Stage(nn.Module):
    """The shared part of down, middle and up blocks: residual blocks, each with or without a transformer behind it."""

    place: str
    gradient_checkpointing = False
    name = ""  # in the UNet
    resnets: nn.ModuleList
    attentions: nn.ModuleList

    def __init__(self, config: UNetConfig, level: int, widths: list[tuple[int, int]], depths: tuple[int, ...]):
        super().__init__()
        channels, heads = config.block_out_channels[level], config.heads[level]
        time_dim = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in, c_out, time_dim, config.norm_num_groups, config.norm_eps) for c_in, c_out in widths
        )
        self.attentions = nn.ModuleList(
            SpatialTransformer(
                channels,
                config.cross_attention_dim,
                heads,
                config.norm_num_groups,
                config.use_linear_projection,
                depth,
            )
            for depth in depths
        )

    def run(self, module: nn.Module, *args):
        """Call a module; with gradient checkpointing it is recomputed in the backward pass, its maps included."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)  # no layer is random
        return module(*args)

    def attend(
        self,
        i: int,
        x: Tensor,
        context: Tensor,
        return_maps: ReturnMaps,
        maps: list[AttentionMap],
        hide: Hide | None,
    ) -> Tensor:
        """Run transformer i, if the stage has one, and append its blocks' maps to `maps`, if they were asked for."""
        if i >= len(self.attentions):
            return x
        grid = (x.shape[-2], x.shape[-1])
        with_probs = return_maps if isinstance(return_maps, bool) else grid == tuple(return_maps)
        x, probs = self.run(self.attentions[i], x, context, with_probs, hide.get(grid) if hide else None)
        layer = f"{self.name}.attentions.{i}"
        names = [layer] if len(probs) == 1 else [f"{layer}.transformer_blocks.{j}" for j in range(len(probs))]
        maps += [AttentionMap(self.place, each, name) for each, name in zip(probs, names, strict=True)]
        return x


class DownBlock(Stage):
    """Residual blocks with transformers (without on SD's lowest level), then half the grid."""

    place = "down"

    def __init__(self, config: UNetConfig, level: int):
        c_in = config.block_out_channels[max(level - 1, 0)]
        c_out = config.block_out_channels[level]
        widths = [(c_in, c_out)] + [(c_out, c_out)] * (config.layers_per_block - 1)
        super().__init__(config, level, widths, config.down_depths(level))
        last = level == config.levels - 1
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out, pad_all_around=True)])

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, return_maps: ReturnMaps, hide: Hide | None = None
    ) -> tuple[Tensor, list[Tensor], list[AttentionMap]]:
        """(b, c_in, h, w) -> (b, c_out, h/2, w/2), the skip connections for the up block, the maps"""
        skips, maps = [], []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, time)
            x = self.attend(i, x, context, return_maps, maps, hide)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips, maps


class MidBlock(Stage):
    """Residual block, transformer, residual block on the smallest grid; in small models the first alone, or nothing."""

    place = "mid"

    def __init__(self, config: UNetConfig):
        channels = config.block_out_channels[-1]
        widths = [(channels, channels)] * MID_BLOCKS[config.mid_block_type]
        super().__init__(config, config.levels - 1, widths, config.mid_depths)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor, return_maps: ReturnMaps, hide: Hide | None = None
    ) -> tuple[Tensor, list[AttentionMap]]:
        """(b, c, h, w) -> (b, c, h, w), the maps"""
        maps: list[AttentionMap] = []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, x, time)
            x = self.attend(i, x, context, return_maps, maps, hide)
        return x, maps


class UpBlock(Stage):
    """Residual blocks, each with one skip connection from the down block and a transformer, then twice the grid."""

    place = "up"

    def __init__(self, config: UNetConfig, level: int):
        channels, layers = config.block_out_channels, config.layers_per_block
        below = channels[min(level + 1, config.levels - 1)]  # width of the level that feeds this one
        skips = [channels[level]] * layers + [channels[max(level - 1, 0)]]
        inputs = [below] + [channels[level]] * layers
        widths = [(x + skip, channels[level]) for x, skip in zip(inputs, skips, strict=True)]
        super().__init__(config, level, widths, config.up_depths(level))
        self.upsamplers = nn.ModuleList([Upsample(channels[level])] if level > 0 else [])

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: Tensor,
        return_maps: ReturnMaps,
        size: tuple[int, int] | None = None,
        hide: Hide | None = None,
    ) -> tuple[Tensor, list[AttentionMap]]:
        """(b, c_in, h, w) and the skip connections of this level, used from the last -> (b, c_out, 2h, 2w), the maps

        size: rows and columns of the level above, where they are odd and so not twice those of this level.
        """
        maps: list[AttentionMap] = []
        for i, resnet in enumerate(self.resnets):
            x = self.run(resnet, torch.cat([x, skips[-1 - i]], dim=1), time)
            x = self.attend(i, x, context, return_maps, maps, hide)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x, maps


class UNet(nn.Module):
    """The network that predicts the noise (or velocity) in latents from the timestep and the prompt's token states."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width = config.block_out_channels[0]
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.time_embedding = TimeEmbedding(width, 4 * width)
        added = config.projection_class_embeddings_input_dim
        self.add_embedding = TimeEmbedding(added, 4 * width) if added else None
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(config.levels))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(config.levels)))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)
        for name, module in self.named_modules():
            if isinstance(module, Stage):
                module.name = name

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor | int,
        context: Tensor,
        return_maps: ReturnMaps = False,
        hide: Hide | None = None,
        pooled: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> UNetOutput:
        """latents: (b, c, h, w); timesteps: (b,) or one; context: (b, k, d); for SDXL pooled: (b, p), sizes: (b, 6).

        Returns the prediction (b, c, h, w) in the precision of the weights, and the attention maps that `return_maps`
        asks for: True for all, (h, w) for those of the layers on that grid, which may be none. `hide` says by grid
        which tokens the cells may not look at. `sizes` are, in pixels, height and width of the original image, top and
        left of its crop, height and width of the image to make; by default those of the latents, uncropped.
        """
        timesteps = torch.as_tensor(timesteps, device=latents.device).expand(len(latents))
        dtype = self.conv_in.weight.dtype
        time = self.time_embedding(self.sinusoids(timesteps, self.conv_in.out_channels).to(dtype))
        if self.add_embedding is not None:
            assert pooled is not None, "SDXL needs the pooled text too"
            sizes = uncropped(latents) if sizes is None else sizes
            features = self.sinusoids(sizes.flatten(), self.config.addition_time_embed_dim or 0)
            time = time + self.add_embedding(torch.cat([pooled.to(dtype), features.view(len(sizes), -1).to(dtype)], 1))
        x = self.conv_in(latents.to(dtype))
        skips, maps = [x], []
        for block in self.down_blocks:
            x, block_skips, block_maps = block(x, time, context, return_maps, hide)
            skips += block_skips
            maps += block_maps
        x, block_maps = self.mid_block(x, time, context, return_maps, hide)
        maps += block_maps
        taken = self.config.layers_per_block + 1  # skip connections of an up block
        for block in self.up_blocks:
            used, skips = skips[-taken:], skips[:-taken]
            above = tuple(skips[-1].shape[-2:]) if skips else None
            size = above if above != tuple(2 * side for side in x.shape[-2:]) else None
            x, block_maps = block(x, used, time, context, return_maps, size, hide)
            maps += block_maps
        return UNetOutput(self.conv_out(F.silu(self.conv_norm_out(x))), maps)

    def sinusoids(self, numbers: Tensor, dim: int) -> Tensor:
        """Return the sinusoidal features of timesteps, or of sizes in pixels. numbers: (n,) -> (n, dim) float32"""
        return timestep_embedding(numbers, dim, self.config.flip_sin_to_cos, self.config.freq_shift)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep only the input of each residual block and transformer for the backward pass, and recompute the rest."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.gradient_checkpointing = on
