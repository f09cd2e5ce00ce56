"""A text-to-image model in one piece: ModelSpec describes it, Models holds its networks too."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bas.errors import InputError
from bas.models.config import UNetConfig, VAEConfig
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.presets import GUIDANCE, Part
from bas.schedulers import NoiseSchedule

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from bas.models.text import TextEncoder

COMPONENTS = ("unet", "vae", "text_encoder")  # the networks of every model
TEXT_ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}  # SDXL has both
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
    text_encoder_2: dict[str, Any] | None = None  # SDXL's second, its config.json
    zeros_for_empty: bool = False  # whether an empty negative prompt is zeros, not the states of an empty text
    training: Any = None  # what its bas.json says of training, unchecked: a model that is saved keeps it

    @property
    def text_encoders(self) -> dict[str, dict[str, Any]]:
        """The config.json of each text encoder, by component."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder, **second}

    @property
    def family(self) -> str:
        """The family of Stable Diffusion, in words."""
        if self.text_encoder_2 is not None:
            return "Stable Diffusion XL"
        return f"Stable Diffusion {2 if self.text_encoder.get('hidden_act') == 'gelu' else 1}"

    def dtype_of(self, component: str, dtype: torch.dtype) -> torch.dtype:
        """Return the precision of a network in a model of precision `dtype`: SDXL's VAE overflows in 16 bits.

        `force_upcast` of its configuration is false if the VAE was made for 16 bits.
        """
        upcast = component == "vae" and self.text_encoder_2 is not None and self.vae.force_upcast is not False
        return torch.float32 if upcast and dtype.itemsize < torch.float32.itemsize else dtype

    @property
    def size_multiple(self) -> int:
        """Pixels: sides of which this is a factor have grids that the UNet halves without rounding, as in training."""
        return self.vae.factor * 2 ** (self.unet.levels - 1)

    def check_side(self, flag: str, side: int) -> None:
        """Raise InputError for a side of images, in pixels, that is not one of whole latents."""
        if side < self.vae.factor or side % self.vae.factor:
            raise InputError(f"{flag} {side}: this model takes multiples of {self.vae.factor} pixels")

    def grids(self, h: int, w: int) -> list[tuple[int, int]]:
        """Return the (rows, columns) of the UNet's levels for latents of this size: halved and rounded up.

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
        return count_weights(self.unet)


@cache
def count_weights(config: UNetConfig) -> int:
    """Return the number of weights of a UNet of this configuration, which is built once, on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet(config).parameters())


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
    text_encoder_2: CLIPTextModelWithProjection | None = None  # SDXL's second
    zeros_for_empty: bool = False  # whether an empty negative prompt is zeros, not the states of an empty text
    training: Any = None  # what its bas.json says of training, unchecked: a model that is saved keeps it

    def __repr__(self) -> str:
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in self.networks.items()}
        parts = ", ".join(f"{name} of {size:,} weights" for name, size in sizes.items())
        return f"<Models from {self.source}: {parts}; handles: {' '.join(self.handles) or 'none'}>"

    @property
    def text_networks(self) -> dict[str, TextEncoder]:
        """The text encoders by component, in the order of their states: one, or SDXL's two."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder, **second}

    @property
    def text_encoders(self) -> tuple[TextEncoder, ...]:
        """The text encoders without their names."""
        return tuple(self.text_networks.values())

    @property
    def networks(self) -> dict[str, nn.Module]:
        """All networks by component."""
        return {"unet": self.unet, "vae": self.vae, **self.text_networks}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Models:
        """Move or convert all networks, in place, each as `ModelSpec.dtype_of` says.

        Raises InputError for weights beyond the range of `dtype`.
        """
        for name, network in self.networks.items():
            wanted = dtype and self.spec.dtype_of(name, dtype)
            for key, weight in network.named_parameters() if wanted else ():
                if weight.dtype != wanted and not is_finite(weight.detach().to(wanted)):
                    raise InputError(f"{name} {key} holds values beyond the range of {wanted}: keep fp32, or take bf16")
            network.to(device=device, dtype=wanted)
        return self

    def vae_arithmetic(self) -> AbstractContextManager:
        """Within the block the VAE computes in float32 also under autocast, where 16 bits would overflow."""
        alone = self.spec.dtype_of("vae", torch.float16) == torch.float32
        return torch.autocast(self.device.type, enabled=False) if alone else nullcontext()

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.unet.conv_in.weight.device

    @property
    def spec(self) -> ModelSpec:
        """The description of these networks, as they are now."""
        texts = [_describe(network, name) for name, network in self.text_networks.items()]
        own = self.tokenizer, self.schedule, self.handles, self.source, self.guidance_scale
        second = {"text_encoder_2": texts[1] if len(texts) > 1 else None, "zeros_for_empty": self.zeros_for_empty}
        return ModelSpec(self.unet.config, self.vae.config, texts[0], *own, **second, training=self.training)

    @property
    def size_multiple(self) -> int:
        """Pixels: sides of which this is a factor have grids that the UNet halves without rounding, as in training."""
        return self.spec.size_multiple

    @property
    def resolution(self) -> int:
        """Pixels: the side of the square images that the model was trained on."""
        return self.spec.resolution


def _describe(text_encoder: nn.Module, component: str) -> dict[str, Any]:
    """Return the config.json of a text encoder as it is now, handles among its rows."""
    network = cast("TextEncoder", text_encoder)
    fields = {name: getattr(network.config, name) for name in TEXT_FIELDS}
    rows = sum(len(rows) for rows in network.get_input_embeddings().parameters())
    return {"architectures": [TEXT_ENCODERS[component]], "model_type": "clip_text_model", **fields, "vocab_size": rows}


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite numbers."""
    if not tensor.numel():
        return True
    low_and_high = torch.stack(tensor.aminmax())  # one pass without a temporary; not-a-number propagates
    return bool(low_and_high.isfinite().all())


def is_adapter(name: str) -> bool:
    """Return whether a parameter of this name is an adapter's, and not one of the base model's weights."""
    return ".lora_A." in name or ".lora_B." in name


def is_unread(models: Models, name: str) -> bool:
    """Return whether nothing reads the output of this part: the last layer of SDXL's first text encoder."""
    if len(models.text_encoders) == 1:
        return False
    last = models.text_encoder.config.num_hidden_layers - 1
    unread = rf"text_encoder\.(text_model\.)?(encoder\.layers\.{last}|final_layer_norm)(\.|$)"
    return re.match(unread, name) is not None


def weight_groups(models: Models) -> dict[Part, dict[str, nn.Parameter]]:
    """Return the groups of the networks' weights that a phase can name in `Phase.trains`, by name. Groups overlap."""
    unet = {f"unet.{name}": p for name, p in models.unet.named_parameters()}
    text = {
        f"{component}.{name}": p
        for component, network in models.text_networks.items()
        for name, p in network.named_parameters()
    }
    text = {name: p for name, p in text.items() if not is_unread(models, name)}
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
