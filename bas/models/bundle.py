"""A text-to-image model in one piece: ModelSpec describes it, Models holds its networks too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bas.config import GUIDANCE, Part
from bas.errors import InputError
from bas.models.config import UNetConfig, VAEConfig
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.schedulers import NoiseSchedule

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

COMPONENTS = ("unet", "vae", "text_encoder")
TEXT_FIELDS = (  # of the text encoder's config.json, beside the rows of its embedding
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim"),
)


@dataclass(frozen=True)
class ModelSpec:
    """A model without its networks: enough to check a request before any weight is read."""

    unet: UNetConfig
    vae: VAEConfig
    text_encoder: dict[str, Any]  # its config.json
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    handles: tuple[str, ...] = ()  # its learnt concepts, as `<asset0>`
    source: Path | None = None  # where it was read from
    guidance_scale: float = GUIDANCE  # for images where no other is asked for
    adapted_tokens: tuple[tuple[int, int], ...] = ()  # ids of tokens with adapters of their own, and their ranks

    @property
    def size_multiple(self) -> int:
        """Pixels: sides of which this is a factor have grids that the UNet halves without rounding, as in training."""
        return self.vae.factor * 2 ** (self.unet.levels - 1)

    def check_side(self, flag: str, side: int) -> None:
        """Raise InputError for a side of images, in pixels, that is not one of whole latents."""
        if side < self.vae.factor or side % self.vae.factor:
            raise InputError(f"{flag} {side}: this model takes multiples of {self.vae.factor} pixels")

    def grids(self, h: int, w: int) -> list[tuple[int, int]]:
        """The (rows, columns) of the UNet's levels for latents of this size: halved and rounded up.

        Raises InputError for latents that are so small that a normalization would see a single value.
        """
        grids = [(h, w)]
        for _ in range(self.unet.levels - 1):
            grids.append(((grids[-1][0] + 1) // 2, (grids[-1][1] + 1) // 2))
        normalized = [
            (width, self.unet.norm_num_groups, grid)
            for width, grid in zip(self.unet.block_out_channels, grids, strict=True)
        ]
        normalized.append((self.vae.block_out_channels[-1], self.vae.norm_num_groups, (h, w)))
        if any(width // groups * rows * columns < 2 for width, groups, (rows, columns) in normalized):
            size = f"{w * self.vae.factor}x{h * self.vae.factor}"
            raise InputError(f"images of {size} pixels are too small for this model: ask for larger ones")
        return grids

    @property
    def resolution(self) -> int:
        """Pixels: the side of the square images that the model was trained on."""
        return self.unet.sample_size * self.vae.factor

    @property
    def unet_size(self) -> int:
        """The number of the UNet's weights."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in UNet(self.unet).parameters())


@dataclass(repr=False)
class Models:
    """A whole text-to-image model, ready to use."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    handles: tuple[str, ...] = ()  # its learnt concepts, as `<asset0>`
    source: Path | None = None  # where it was read from
    guidance_scale: float = GUIDANCE  # for images where no other is asked for

    def __repr__(self) -> str:
        sizes = {name: sum(p.numel() for p in getattr(self, name).parameters()) for name in COMPONENTS}
        parts = ", ".join(f"{name} of {size:,} weights" for name, size in sizes.items())
        return f"<Models from {self.source}: {parts}; handles: {' '.join(self.handles) or 'none'}>"

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Models:
        """Move or convert all three networks, in place. Raises InputError for weights beyond the range of `dtype`."""
        for name in COMPONENTS:
            network: nn.Module = getattr(self, name)
            for key, weight in network.named_parameters() if dtype else ():
                if weight.dtype != dtype and not is_finite(weight.detach().to(dtype)):
                    raise InputError(f"{name} {key} holds values beyond the range of {dtype}: keep fp32, or take bf16")
            nn.Module.to(network, device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.unet.conv_in.weight.device

    @property
    def spec(self) -> ModelSpec:
        """The description of these networks, as they are now."""
        fields = {name: getattr(self.text_encoder.config, name) for name in TEXT_FIELDS}
        rows = sum(len(rows) for rows in self.text_encoder.get_input_embeddings().parameters())
        text = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **fields, "vocab_size": rows}
        own = self.tokenizer, self.schedule, self.handles, self.source, self.guidance_scale
        return ModelSpec(self.unet.config, self.vae.config, text, *own)

    @property
    def size_multiple(self) -> int:
        """Pixels: sides of which this is a factor have grids that the UNet halves without rounding, as in training."""
        return self.spec.size_multiple

    @property
    def resolution(self) -> int:
        """Pixels: the side of the square images that the model was trained on."""
        return self.spec.resolution


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite numbers."""
    if not tensor.numel():
        return True
    low_and_high = torch.stack(tensor.aminmax())  # one pass without a temporary; not-a-number propagates
    return bool(low_and_high.isfinite().all())


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's, and not one of the base model's weights."""
    return ".lora_A." in name or ".lora_B." in name


def weight_groups(models: Models) -> dict[Part, dict[str, nn.Parameter]]:
    """The groups of the networks' weights that a phase can name in `Phase.trains`, by name. Groups overlap."""
    unet = {f"unet.{name}": p for name, p in models.unet.named_parameters()}
    text = {f"text_encoder.{name}": p for name, p in models.text_encoder.named_parameters()}
    own = {name: p for name, p in unet.items() if not is_adapter(name)}
    cross = {name: p for name, p in own.items() if ".attn2." in name}
    adapters = {name: p for name, p in unet.items() if is_adapter(name)}
    values = {name: p for name, p in cross.items() if ".to_v." in name}
    return {
        "unet": own,
        "cross_attention": cross,
        "cross_attention_kv": {name: p for name, p in cross.items() if ".to_k." in name or name in values},
        "cross_attention_v": values,
        "unet_lora": adapters,
        "unet_token": adapters,
        "text_encoder": {name: p for name, p in text.items() if not is_adapter(name) and "token_embedding" not in name},
        "text_encoder_lora": {name: p for name, p in text.items() if is_adapter(name)},
    }
