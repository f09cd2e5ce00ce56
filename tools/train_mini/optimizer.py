"""The optimizer of the miniature's training: Muon for kernels and matrices, AdamW for the rest."""

from math import sqrt

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon

from bas.runtime.device import native_bf16


class Float32Muon(Muon):
    """PyTorch's Muon with its products in float32; it has them in bf16, which some processors only emulate.

    Where bf16 is emulated, a step of the miniature's UNet spends three fifths of its time in these products. Parameters
    and gradients are matrices, with Nesterov's momentum, and the learning rate matches AdamW's root mean square.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every matrix against its orthogonalised momentum."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalise(
                    matrix.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"], group["ns_steps"]
                )
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * sqrt(max(matrix.shape)) * group["lr"])


def orthogonalise(matrix: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Bring all singular values of a matrix near 1 by Newton-Schulz iterations (Jordan et al. 2024), in float32."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Optimizer:
    """Steps every trainable parameter of a module (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Muon orthogonalises the momentum of a matrix; a kernel (out, in, h, w) counts as a matrix (out, in x h x w).
    Parameters with one of `adamw_only` in their name, and vectors, stay with AdamW.
    """

    def __init__(self, module: nn.Module, lr: float, lr_matrices: float, adamw_only: tuple[str, ...]):
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        large = {n for n, p in named.items() if p.ndim > 1 and not any(word in n for word in adamw_only)}
        self.parameters = list(named.values())
        self.kernels = [p for n, p in named.items() if n in large]
        self.matrices = [nn.Parameter(p.data.flatten(1)) for p in self.kernels]  # views: they share the kernels' memory
        others = [p for n, p in named.items() if n not in large]
        self.lr, self.lr_matrices = lr, lr_matrices
        self.adamw = AdamW(others, lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        self.muon = None
        if self.matrices:
            kind = Muon if native_bf16(self.matrices[0].device) else Float32Muon
            self.muon = kind(
                self.matrices, lr_matrices, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
            )

    def step(self, factor: float) -> None:
        """Clip the joint gradient norm at 1, step with the learning rates times `factor`, drop the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.param_groups[0]["lr"] = factor * self.lr
        self.adamw.step()
        if self.muon:
            for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
                matrix.grad = kernel.grad.flatten(1)
            self.muon.param_groups[0]["lr"] = factor * self.lr_matrices
            self.muon.step()
            self.muon.zero_grad()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        """The state of both optimizers."""
        return {"adam": self.adamw.state_dict()} | ({"muon": self.muon.state_dict()} if self.muon else {})

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.adamw.load_state_dict(state["adam"])
        if self.muon:
            self.muon.load_state_dict(state["muon"])
