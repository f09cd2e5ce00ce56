"""Numbers that every machine draws alike, and what a network makes of them: its outputs and gradients by name."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Named = dict[str, Tensor]


def uniform(name: str, *shape: int) -> Tensor:
    """Values in [-sqrt(3), sqrt(3)), so of variance 1, that depend on the name and nothing else. -> float32"""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy((math.sqrt(3) * (2 * unit - 1)).astype(np.float32)).reshape(shape)


def fill(module: nn.Module) -> nn.Module:
    """Set every parameter from its name: matrices keep the variance of their input, norms stay near 1."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            values = uniform(name.removeprefix("text_model."), *parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(values * (parameter.shape[0] / parameter.numel()) ** 0.5)
            else:
                parameter.copy_(0.1 * values + name.endswith("weight"))
    return module


@dataclass
class Case:
    """One network of bas, its counterpart, and what to feed both. Runners return their outputs by name."""

    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    inputs: dict[str, tuple[int, ...] | Tensor]  # a shape is drawn, a tensor is taken as it is
    run_ours: Callable[..., Tensor | Named] = lambda module, *inputs: module(*inputs)
    run_theirs: Callable[..., Tensor | Named] = lambda module, *inputs: module(*inputs)


def measure(name: str, module: nn.Module, run: Callable[..., Tensor | Named], case: Case) -> Named:
    """Outputs and gradients of one network: `out.*`, `grad.<input>` and `grad.param.<parameter>`.

    The gradients are those of the outputs' inner products with fixed random tensors.
    """
    fill(module)
    inputs = {
        key: value if isinstance(value, Tensor) else uniform(f"{name}.{key}", *value).requires_grad_()
        for key, value in case.inputs.items()
    }
    outputs = run(module, *inputs.values())
    outputs = outputs if isinstance(outputs, dict) else {"sample": outputs}
    loss = sum(
        (output * uniform(f"{name}.direction.{key}", *output.shape)).sum() / output.numel() ** 0.5
        for key, output in outputs.items()
    )
    parameters = {key.removeprefix("text_model."): value for key, value in module.named_parameters()}
    leaves = {f"grad.{key}": value for key, value in inputs.items() if value.requires_grad}
    leaves |= {f"grad.param.{key}": parameters[key] for key in sorted(parameters)}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    outputs = {f"out.{key}": value.detach() for key, value in outputs.items()}
    return outputs | dict(zip(leaves, grads, strict=True))


def condense(measured: Named) -> Named:
    """The same with each parameter's gradient reduced to two numbers: its projection on a fixed direction, its norm."""
    kept = {key: value for key, value in measured.items() if not key.startswith("grad.param.")}
    rows = [
        torch.stack([(value * uniform(key, *value.shape)).sum(), value.norm()])
        for key, value in measured.items()
        if key.startswith("grad.param.")
    ]
    return kept | {"grad.params": torch.stack(rows)} if rows else kept
