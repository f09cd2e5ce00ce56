"""The UNet's attention layers. Cross-attention can return its probabilities, which the attention loss reads (eq. 2).

The probabilities are an output like any other: gradients flow through them, without hooks. Where the caller does not
ask for them, `attend` takes the faster way for the device, the precision and the size.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, heads x d) -> (b, heads, n, d)"""
    return rearrange(x, "b n (heads d) -> b heads n d", heads=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(b, heads, n, d) -> (b, n, heads x d)"""
    return rearrange(x, "b heads n d -> b n (heads d)")


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


class SelfAttention(nn.Module):
    """Attention of every cell of the grid to every other."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)"""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out(merge_heads(attend(q, k, v)))


class CrossAttention(nn.Module):
    """Attention of every cell of the grid to the tokens of the prompt."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(
        self, x: Tensor, context: Tensor, with_probs: bool = False, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x: (b, n, dim), context: (b, k, context_dim) -> out (b, n, dim), probs (b, heads, n, k) float32 or None

        hide: (b, n, k) bool, True for a token that a cell may not look at; some token must be left to each cell.
        """
        q = split_heads(self.to_q(x), self.heads)
        k = split_heads(self.to_k(context), self.heads)
        v = split_heads(self.to_v(context), self.heads)
        if not with_probs:
            return self.to_out(merge_heads(attend(q, k, v, hide))), None
        # Scaled before the product: after it, SD 2.1's logits overflow fp16.
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if hide is not None:
            logits = logits.masked_fill(hide[:, None], -math.inf)
        probs = logits.float().softmax(dim=-1)
        return self.to_out(merge_heads(probs.to(v.dtype) @ v)), probs


class GEGLU(nn.Module):
    """A linear layer, one half of whose output gates the other: value * GELU(gate) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, hidden)"""
        value, gates = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gates)


class FeedForward(nn.Module):
    """The feed-forward network, four times as wide inside. Index 1 of `net` is the checkpoint's dropout."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, dim) -> (b, n, dim)"""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with its own norm and skip connection."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = SelfAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(
        self, x: Tensor, context: Tensor, with_probs: bool = False, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x: (b, n, dim), context: (b, k, context_dim) -> (b, n, dim), probs (b, heads, n, k) or None

        hide: (b, n, k) bool or None, as in `CrossAttention`.
        """
        x = x + self.attn1(self.norm1(x))
        out, probs = self.attn2(self.norm2(x), context, with_probs, hide)
        x = x + out
        return x + self.ff(self.norm3(x)), probs


class SpatialTransformer(nn.Module):
    """A transformer block over the cells of a grid. SD 1 projects in and out by 1x1 convolutions, SD 2 linearly."""

    def __init__(self, channels: int, context_dim: int, heads: int, groups: int, linear_projection: bool):
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(
        self, x: Tensor, context: Tensor, with_probs: bool = False, hide: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x: (b, c, h, w), context: (b, k, context_dim) -> (b, c, h, w), probs (b, heads, h, w, k) or None

        hide: (b, h x w, k) bool or None, as in `CrossAttention`.
        """
        skip, h = x, x.shape[-2]
        x = self.norm(x)
        if self.linear_projection:
            x = self.proj_in(rearrange(x, "b c h w -> b (h w) c"))
        else:
            x = rearrange(self.proj_in(x), "b c h w -> b (h w) c")
        x, probs = self.transformer_blocks[0](x, context, with_probs, hide)
        if self.linear_projection:
            x = rearrange(self.proj_out(x), "b (h w) c -> b c h w", h=h)
        else:
            x = self.proj_out(rearrange(x, "b (h w) c -> b c h w", h=h))
        if probs is not None:
            probs = rearrange(probs, "b heads (h w) k -> b heads h w k", h=h)
        return x + skip, probs
