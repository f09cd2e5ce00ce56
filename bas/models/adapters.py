"""Low-rank adapters (LoRA, Hu et al. 2021): a layer computes y = W x + s B(A x), and only A and B train.

An adapted layer is the layer itself with A and B beside its weight, under the names of PEFT's files: `to_k.weight`,
`to_k.lora_A.weight`, `to_k.lora_B.weight`. B begins at zero, so an untrained adapter changes no bit.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bas.config import TrainConfig
from bas.models.bundle import Models, is_unread
from bas.models.text import mark_tokens
from bas.presets import LORA_TARGETS

# Layers outside the transformers that have adapters with --conv_rank. The 3x3 convolutions have that rank,
# time_emb_proj and conv_shortcut have that of the linear layers, as in kohya's scripts.
CONVOLUTIONS = r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)|(downsamplers|upsamplers)\.0\.conv"


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter. It shares weight and bias with the layer that it takes the place of."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Linear(layer.in_features, rank, bias=False, device="meta")
        self.lora_B = nn.Linear(rank, layer.out_features, bias=False, device="meta")
        self.scale = scale
        start(self, generator)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        return add_product(super().forward(input), self.lora_A(input), self.lora_B.weight, self.scale)


class AdaptedConv2d(nn.Conv2d):
    """A convolution with an adapter. A has the layer's kernel, stride and padding; B is a 1x1 convolution."""

    def __init__(self, layer: nn.Conv2d, rank: int, scale: float, generator: torch.Generator):
        shape = (layer.kernel_size, layer.stride, layer.padding)
        super().__init__(layer.in_channels, layer.out_channels, *shape, device="meta")  # pyright: ignore[reportArgumentType]
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A = nn.Conv2d(layer.in_channels, rank, *shape, bias=False, device="meta")  # pyright: ignore[reportArgumentType]
        self.lora_B = nn.Conv2d(rank, layer.out_channels, 1, bias=False, device="meta")
        self.scale = scale
        start(self, generator)

    def forward(self, input: Tensor) -> Tensor:
        """(b, in, h, w) -> (b, out, h', w')"""
        return super().forward(input) + self.lora_B(self.scale * self.lora_A(input))  # scaled where it is small


class TokenLinear(AdaptedLinear):
    """Keys or values of cross-attention with an adapter for each handle, which acts at the handle's own token alone.

    Behind the features of each token's state stand N marks, from `encode_ids`: 1 at the token of handle i, else 0. So
    y = W x + s sum_i mark_i B_i(A_i x), and a token without a mark has the bits of the base. ConceptSplit (arXiv
    2510.04668) adapts values so, TARA (arXiv 2508.08812) keys and values.
    """

    def __init__(self, layer: nn.Linear, ranks: Sequence[int], scale: float, generator: torch.Generator):
        super().__init__(layer, sum(ranks), scale, generator)
        self.ranks = tuple(ranks)  # by handle: its rows of A and columns of B

    def forward(self, input: Tensor) -> Tensor:
        """(..., in + N) -> (..., out)"""
        states, marks = input[..., : self.in_features], input[..., self.in_features :]
        each = [marks[..., i : i + 1].expand(*marks.shape[:-1], rank) for i, rank in enumerate(self.ranks)]
        low = self.lora_A(states) * torch.cat(each, dim=-1)
        return add_product(nn.Linear.forward(self, states), low, self.lora_B.weight, self.scale)


Adapted = AdaptedLinear | AdaptedConv2d


def add_product(base: Tensor, low: Tensor, up: Tensor, scale: float) -> Tensor:
    """base + scale low up^T in one product, without a tensor of the base's size for each operation.

    base: (..., out). low: (..., r). up: (out, r).
    """
    return torch.addmm(base.flatten(0, -2), low.flatten(0, -2), up.t(), alpha=scale).view(base.shape)


def start(layer: Adapted, generator: torch.Generator) -> None:
    """Give an adapter its first values beside the layer's weight: A as kohya and PEFT draw it, B zero."""
    place = layer.weight.device
    down = torch.empty(layer.lora_A.weight.shape, device="meta" if place.type == "meta" else "cpu")
    nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
    layer.lora_A.weight = nn.Parameter(down.to(place))
    layer.lora_B.weight = nn.Parameter(torch.zeros(layer.lora_B.weight.shape, device=place))


def add_adapters(models: Models, config: TrainConfig, handles: int) -> None:
    """Give the networks the adapters that the phases of a training name, in place. Their values depend on the seed.

    handles: how many the training adds; it comes before `add_handles`.
    """
    parts = {part for phase in config.phases for part in phase.trains}
    generator = torch.Generator().manual_seed(config.seed)
    unet, text = LORA_TARGETS[config.lora_targets]
    if "unet_lora" in parts:
        adapt(models.unet, unet, config.rank, config.rank, config.adapter_scale, generator)
        if config.conv_rank:
            adapt(models.unet, CONVOLUTIONS, config.rank, config.conv_rank, config.adapter_scale, generator)
    if "unet_token" in parts:
        begin = len(models.tokenizer)
        adapt_tokens(models, dict.fromkeys(range(begin, begin + handles), config.rank), config.adapter_scale, generator)
    if "text_encoder_lora" in parts:
        for component, network in models.text_networks.items():
            unread = {name for name, _ in network.named_modules() if is_unread(models, f"{component}.{name}")}
            adapt(network, text, config.rank, config.rank, config.adapter_scale, generator, unread)


def adapt(
    network: nn.Module,
    targets: str,
    rank: int,
    conv_rank: int,
    scale: float,
    generator: torch.Generator,
    left_out: Collection[str] = (),
) -> None:
    """Put adapters beside the layers whose names end as `targets` says, but for those of the names `left_out`.

    conv_rank: of convolutions larger than 1x1.
    """
    ends = re.compile(rf"(.*\.)?({targets})")
    for name, layer in list(network.named_modules()):
        if not ends.fullmatch(name) or name in left_out:
            continue
        if isinstance(layer, nn.Linear):
            replace_layer(network, name, AdaptedLinear(layer, rank, scale, generator))
        elif isinstance(layer, nn.Conv2d):
            own = rank if layer.kernel_size == (1, 1) else conv_rank
            replace_layer(network, name, AdaptedConv2d(layer, own, scale, generator))


def adapt_tokens(models: Models, ranks: Mapping[int, int], scale: float, generator: torch.Generator) -> None:
    """Adapt all keys and values of cross-attention at single tokens. ranks: by token id"""
    ends = re.compile(rf".*\.({LORA_TARGETS['kv'][0]})")
    for name, layer in list(models.unet.named_modules()):
        if ends.fullmatch(name) and isinstance(layer, nn.Linear):
            replace_layer(models.unet, name, TokenLinear(layer, [*ranks.values()], scale, generator))
    mark_tokens(models.text_encoder, tuple(ranks))


def token_ranks(unet: nn.Module) -> tuple[int, ...]:
    """Return the ranks of the adapters at single tokens, by handle; empty for a network without such."""
    return next((layer.ranks for layer in unet.modules() if isinstance(layer, TokenLinear)), ())


def replace_layer(network: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer at the place of this name."""
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, layer.train(network.training))


def adapted_layers(network: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Yield the adapted layers of a network, by name."""
    for name, layer in network.named_modules():
        if isinstance(layer, (AdaptedLinear, AdaptedConv2d)):
            yield name, layer


def remove_adapters(network: nn.Module) -> None:
    """Put plain layers, which share the weights, at the places of the adapted ones."""
    for name, layer in list(adapted_layers(network)):
        if isinstance(layer, AdaptedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
        else:
            shape = (layer.kernel_size, layer.stride, layer.padding)
            plain = nn.Conv2d(layer.in_channels, layer.out_channels, *shape, device="meta")  # pyright: ignore[reportArgumentType]
        plain.weight, plain.bias = layer.weight, layer.bias  # pyright: ignore[reportAttributeAccessIssue]
        replace_layer(network, name, plain)


# --- What an adapter does to a weight -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A change of one weight: scale x up down, the product taken over the rank."""

    down: Tensor  # (r, in) or (r, in, k, k)
    up: Tensor  # (out, r) or (out, r, 1, 1)
    scale: float

    def delta(self) -> Tensor:
        """Return the change itself, in float32: (out, in), or (out, in, k, k) for a convolution."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return product.mul_(self.scale).view(self.shape)

    @property
    def shape(self) -> torch.Size:
        """Of the change: (out, in), or (out, in, k, k)."""
        return torch.Size((len(self.up), *self.down.shape[1:]))

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing, because its scale is 0 or one of its matrices is."""
        return not (self.scale and self.up.float().any() and self.down.float().any())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors and values of the change as a matrix, in float64: (out, r), (r,) and (r, in).

        Computed in products of the size of the rank.
        """
        left, upper = torch.linalg.qr(self.scale * self.up.double().flatten(1))
        right, lower = torch.linalg.qr(self.down.double().flatten(1).T)
        u, values, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
        return left @ u, values, v @ right.T


@dataclass(frozen=True)
class Difference:
    """A change of one weight that is not a product: strength x difference."""

    difference: Tensor  # in the shape of the weight
    strength: float = 1.0

    def delta(self) -> Tensor:
        """Return the change itself, in float32."""
        return self.strength * self.difference.float()

    @property
    def shape(self) -> torch.Size:
        """Of the change, as of the weight."""
        return self.difference.shape

    @property
    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return not (self.strength and self.difference.float().any())

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors and values of the change as a matrix, in float64."""
        return torch.linalg.svd(self.delta().double().flatten(1), full_matrices=False)


def is_change_of(shape: Sequence[int], weight: Tensor) -> bool:
    """Return whether a change of this shape is one of this weight.

    A linear layer may stand as a 1x1 convolution or the other way round, and the inputs of a convolution in one row.
    """

    def sides(shape: Sequence[int]) -> list[int]:
        """Without the kernel of a 1x1 convolution."""
        return [*shape[:2]] if all(side == 1 for side in shape[2:]) else [*shape]

    wanted = sides(weight.shape)
    return sides(shape) in (wanted, [wanted[0], math.prod(wanted[1:])])


Changes = Mapping[str, list[Change | Difference]]  # by the name of the weight


def changed(weight: Tensor, changes: Sequence[Change | Difference]) -> Tensor:
    """Return a weight with its changes added, in float32; itself without any."""
    total = weight
    for change in changes:
        total = change.delta().to(weight.device).view(weight.shape).add_(total)  # no third copy of a large weight
    return total
