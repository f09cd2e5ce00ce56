"""Weights that compute in bf16, and their float32 master weights, which the optimizer steps and the run saves.

A step of 1e-6 is far below the spacing of bf16 numbers around a weight: it would round away. So the networks compute
with rounded copies, half as large and fast to multiply, while gradients are summed, clipped and applied in float32
(Micikevicius et al. 2018, section 3.1).
"""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from bas.errors import InputError
from bas.models.bundle import is_finite

Float32Values = dict[nn.Parameter, Tensor]  # the float32 values of each weight that was cast


def cast_weights(
    networks: Iterable[nn.Module],
    dtype: torch.dtype,
    kept: Collection[nn.Parameter] | None = None,
    device: torch.device | None = None,
) -> Float32Values:
    """Round the weights of these networks to `dtype`, in place. -> their float32 values, in the host's memory

    Each network then moves to `device`. kept: the weights whose values are returned; without it, all. Raises InputError
    for a weight that is beyond the range of `dtype`.
    """
    values = {}
    for network in networks:
        own = {}
        for name, parameter in network.named_parameters():
            if kept is None or parameter in kept:
                own[name] = parameter.detach().cpu()
            parameter.data = parameter.detach().to(dtype)
        network.to(device)
        for name, parameter in network.named_parameters():
            if name in own:
                values[parameter] = own[name]
            if not is_finite(parameter.data):
                raise InputError(f"{name} holds values beyond the range of {dtype}: use --mixed_precision no")
    return values


def restore_weights(values: Float32Values) -> None:
    """Give cast weights their float32 values back, in place: the trained ones where they were trained."""
    for parameter, value in values.items():
        parameter.data = value.to(parameter.device)
    values.clear()


class MasterWeights:
    """The float32 weights that gradients are summed, clipped and applied in.

    A weight that was not cast is its own master, so the loop is the same in every precision.
    """

    def __init__(
        self,
        optimized: Mapping[str, nn.Parameter],
        values: Float32Values,
        with_grad: Mapping[str, nn.Parameter] | None = None,
    ):
        """Build the master weights of the weights that a phase optimizes.

        optimized: the model's weights by name. values: of `cast_weights`; a master shares memory with its value.
        with_grad: weights that get a gradient, which counts when gradients are clipped, but no step.
        """
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # weight of the model, its master
        self.optimized = {name: self._master(weight, values) for name, weight in optimized.items()}
        self.only_clipped = {name: self._master(weight, values) for name, weight in (with_grad or {}).items()}

    def _master(self, weight: nn.Parameter, values: Float32Values) -> nn.Parameter:
        if weight not in values:
            return weight
        values[weight] = values[weight].to(weight.device)
        master = nn.Parameter(values[weight])
        self.pairs.append((weight, master))
        return master

    @property
    def master_params(self) -> list[nn.Parameter]:
        """All parameters whose gradients are clipped, in a fixed order: the optimized ones first."""
        return [*self.optimized.values(), *self.only_clipped.values()]

    def collect_gradients(self) -> None:
        """Add the gradient of one backward pass to the masters', one weight at a time to save memory."""
        for weight, master in self.pairs:
            if weight.grad is not None:
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Copy the master weights into the model's weights, rounded and in place."""
        if self.pairs:
            weights, masters = zip(*self.pairs, strict=True)
            torch._foreach_copy_(weights, masters)  # pyright: ignore[reportPrivateImportUsage]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.master_params:
            parameter.grad = None
