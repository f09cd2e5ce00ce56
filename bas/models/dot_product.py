"""Scaled dot-product attention without its probabilities, by the faster way for the device, precision and size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU in bf16, PyTorch's fused attention has a slow backward pass. Spelt out, forward and backward took 0.67 of its
# time for 24 x 2 heads of 256 queries and keys, 0.37 for 77 keys, 0.18 for 64 queries and keys. Forward alone, and for
# larger sizes, fused is as fast or faster. `python -m tools.bench.attention` measures it.
MOST_SCORES = 2**23  # batch x heads x queries x keys that may be kept for the backward pass: 16 MB in bf16
SCORES_AT_ONCE = 2**22  # of those, computed together: 8 MB


def attend(q: Tensor, k: Tensor, v: Tensor, hide: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1). q: (b, heads, n, d); k, v: (b, heads, m, d) -> as q

    hide: (b, n, m) bool, True for a key that a query may not look at; some key must be left to each query.
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if not trains or q.device.type != "cpu" or q.dtype != torch.bfloat16 or scores > MOST_SCORES:
        return F.scaled_dot_product_attention(q, k, v, None if hide is None else ~hide[:, None])
    parts = math.ceil(scores / SCORES_AT_ONCE)
    if parts == 1:
        return _attend_openly(q, k, v, hide)
    length = math.ceil(q.shape[2] / parts)
    queries = q.split(length, dim=2)
    hidden = [None] * len(queries) if hide is None else hide.split(length, dim=1)
    return torch.cat([_attend_openly(chunk, k, v, h) for chunk, h in zip(queries, hidden, strict=True)], dim=2)


def _attend_openly(q: Tensor, k: Tensor, v: Tensor, hide: Tensor | None) -> Tensor:
    """`attend` as matrix products; the softmax computes in float32 and returns bf16, so nothing larger is stored."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if hide is not None:
        scores = scores.masked_fill(hide[:, None], -math.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v
