"""Triton kernels for what a UNet does between its matrix products: GroupNorm with SiLU, and the gate of GEGLU.

Each does in one launch what its plain twin in `bas.models` does in several, and keeps less for the backward pass: the
twins are the reference in tests and what runs without `--fused_kernels`. Statistics and sums are float32. GroupNorm
reads its input more than once: three times forward (mean, spread, result), twice backward (sums, gradient).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from bas.models.attention import GEGLU
from bas.models.layers import ResnetBlock
from bas.models.unet import UNet

BLOCK = 1024  # numbers that a program handles at once


def install(unet: UNet) -> None:
    """Let the blocks of this UNet use the kernels."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock):
            module.norm_silu = norm_silu
        elif isinstance(module, GEGLU):
            module.gate = gate


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """silu(norm(x)). (b, c, h, w) -> (b, c, h, w)"""
    return NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def gate(both: Tensor) -> Tensor:
    """value * gelu(gates), the exact GELU, of the two halves of each row. (b, n, 2d) -> (b, n, d)"""
    return Gate.apply(both)


# --- GroupNorm and SiLU ---------------------------------------------------------------------------------------------


@triton.jit
def normalise(x, weight, bias, y, means, rstds, channels, groups, cells, eps, BLOCK: tl.constexpr):
    """A program for each group of each sample, whose (channels / groups) x cells numbers lie side by side."""
    program = tl.program_id(0).to(tl.int64)
    size, first = (channels // groups) * cells, (program % groups) * (channels // groups)
    total, squares = 0.0, 0.0
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(x + program * size + i, mask=i < size, other=0.0).to(tl.float32))
    mean = total / size
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        away = tl.load(x + program * size + i, mask=i < size, other=0.0).to(tl.float32) - mean
        squares += tl.sum(tl.where(i < size, away * away, 0.0))
    rstd = 1.0 / tl.sqrt(squares / size + eps)
    tl.store(means + program, mean)
    tl.store(rstds + program, rstd)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside, channel = i < size, first + i // cells
        normal = (tl.load(x + program * size + i, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        affine = normal * scale + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + program * size + i, affine * tl.sigmoid(affine), mask=inside)


@triton.jit
def normalise_backward(
    dy, x, weight, bias, means, rstds, dx, dweights, dbiases, channels, groups, cells, BLOCK: tl.constexpr
):
    """Gradients of the group's numbers, and what this sample adds to those of its channels' weights and biases."""
    program = tl.program_id(0).to(tl.int64)
    width = channels // groups
    size, first = width * cells, (program % groups) * width
    sample = program // groups
    mean, rstd = tl.load(means + program), tl.load(rstds + program)
    along, across = 0.0, 0.0  # sums over the group of the normal's gradient, plain and times the normal
    for c in range(0, width):
        scale = tl.load(weight + first + c).to(tl.float32)
        shift = tl.load(bias + first + c).to(tl.float32)
        dscale, dshift = 0.0, 0.0
        for start in range(0, cells, BLOCK):
            i = start + tl.arange(0, BLOCK)
            place = program * size + c * cells + i
            normal = (tl.load(x + place, mask=i < cells, other=0.0).to(tl.float32) - mean) * rstd
            affine = normal * scale + shift
            s = tl.sigmoid(affine)
            given = tl.load(dy + place, mask=i < cells, other=0.0).to(tl.float32)
            daffine = given * s * (1.0 + affine * (1.0 - s))  # 0 outside, because dy is
            dscale += tl.sum(daffine * normal)
            dshift += tl.sum(daffine)
        tl.store(dweights + sample * channels + first + c, dscale)
        tl.store(dbiases + sample * channels + first + c, dshift)
        along += dshift * scale
        across += dscale * scale
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside, channel = i < size, first + i // cells
        place = program * size + i
        normal = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        scale = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        affine = normal * scale + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(affine)
        dnormal = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32) * s * (1.0 + affine * (1.0 - s)) * scale
        tl.store(dx + place, rstd * (dnormal - along / size - normal * across / size), mask=inside)


class NormSilu(torch.autograd.Function):
    """Keeps its input and two numbers a group; the plain twin keeps the normalised tensor as well."""

    @staticmethod
    def forward(context, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """x: (b, c, h, w) -> (b, c, h, w)"""
        x = x.contiguous()
        b, c, h, w = x.shape
        y = torch.empty_like(x)
        means, rstds = (torch.empty(b * groups, device=x.device, dtype=torch.float32) for _ in range(2))
        normalise[(b * groups,)](x, weight, bias, y, means, rstds, c, groups, h * w, eps, BLOCK=BLOCK)
        context.save_for_backward(x, weight, bias, means, rstds)
        context.groups = groups
        return y

    @staticmethod
    def backward(context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dy: (b, c, h, w)"""
        x, weight, bias, means, rstds = context.saved_tensors
        b, c, h, w = x.shape
        dx = torch.empty_like(x)
        dweights, dbiases = (torch.empty(b, c, device=x.device, dtype=torch.float32) for _ in range(2))
        normalise_backward[(b * context.groups,)](
            *(dy.contiguous(), x, weight, bias, means, rstds, dx, dweights, dbiases),
            *(c, context.groups, h * w),
            BLOCK=BLOCK,
        )
        _, weight_trains, bias_trains, *_ = context.needs_input_grad
        dweight = dweights.sum(0).to(weight.dtype) if weight_trains else None
        dbias = dbiases.sum(0).to(bias.dtype) if bias_trains else None
        return dx, dweight, dbias, None, None


# --- The gate of GEGLU ------------------------------------------------------------------------------------------------


@triton.jit
def gated(both, y, numbers, width, BLOCK: tl.constexpr):
    """y = value * gelu(gates); a row of `both` is `width` values, then `width` gates."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, place = i < numbers, i + (i // width) * width
    value = tl.load(both + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(both + place + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + i, value * 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476)), mask=inside)


@triton.jit
def gated_backward(dy, both, dboth, numbers, width, BLOCK: tl.constexpr):
    """gelu'(g) = Phi(g) + g phi(g), with the normal distribution's Phi and phi."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, place = i < numbers, i + (i // width) * width
    d = tl.load(dy + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(both + place, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(both + place + width, mask=inside, other=0.0).to(tl.float32)
    cumulative = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * g * g)
    tl.store(dboth + place, d * g * cumulative, mask=inside)
    tl.store(dboth + place + width, d * value * (cumulative + g * density), mask=inside)


class Gate(torch.autograd.Function):
    """Keeps its input; the plain twin keeps gelu(gates) as well."""

    @staticmethod
    def forward(context, both: Tensor) -> Tensor:
        """both: (b, n, 2d) -> (b, n, d)"""
        both = both.contiguous()
        width = both.shape[-1] // 2
        y = both.new_empty(*both.shape[:-1], width)
        gated[(triton.cdiv(y.numel(), BLOCK),)](both, y, y.numel(), width, BLOCK=BLOCK)
        context.save_for_backward(both)
        return y

    @staticmethod
    def backward(context, dy: Tensor) -> Tensor:
        """dy: (b, n, d) -> (b, n, 2d)"""
        (both,) = context.saved_tensors
        dboth = torch.empty_like(both)
        gated_backward[(triton.cdiv(dy.numel(), BLOCK),)](
            dy.contiguous(), both, dboth, dy.numel(), dy.shape[-1], BLOCK=BLOCK
        )
        return dboth
