"""Weights that compute at 16 bits, and the float32 masters behind them that the optimizer steps and the run saves.

A step of 1e-6 is far below what bf16 can hold of a weight: it would round away. So the networks compute with rounded
copies, half as large and fast to multiply, while gradients add up, clip and step in float32 (Micikevicius et al. 2018).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Exact = dict[nn.Parameter, Tensor]  # the float32 values of each weight that was lowered


def cast_weights(networks: Iterable[nn.Module], dtype: torch.dtype) -> Exact:
    """Round the weights of these networks to 16 bits, in place. -> their exact values, in the host's memory"""
    exact = {}
    for network in networks:
        for parameter in network.parameters():
            exact[parameter] = parameter.detach().cpu()
            parameter.data = parameter.detach().to(dtype)
    return exact


def restore_weights(exact: Exact) -> None:
    """Give lowered weights their exact values back, as far as they have come, in place."""
    for parameter, value in exact.items():
        parameter.data = value.to(parameter.device)
    exact.clear()


class MasterWeights:
    """What the optimizer sees of the weights that get a gradient: float32 masters, or where there are none themselves.

    With no lowered weight all methods but `release` do nothing: the loop is the same in every precision.
    """

    def __init__(self, weights: dict[str, nn.Parameter], exact: Exact):
        self.weights = weights
        self.named = {}
        for name, weight in weights.items():
            if weight in exact:
                exact[weight] = exact[weight].to(weight.device)  # from now on the master itself
                self.named[name] = nn.Parameter(exact[weight])
            else:
                self.named[name] = weight
        self.pairs = [(weights[name], master) for name, master in self.named.items() if master is not weights[name]]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is clipped and stepped, in the order of the weights."""
        return list(self.named.values())

    def collect_gradients(self) -> None:
        """Add the gradient of one backward pass to that of the masters, one weight at a time to keep memory flat."""
        for weight, master in self.pairs:
            if weight.grad is not None:
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters, after a step, into the weights that compute."""
        if self.pairs:
            weights, masters = zip(*self.pairs, strict=True)
            torch._foreach_copy_(weights, masters)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters:
            parameter.grad = None
