"""The UNet's attention layers. Cross-attention can return its probabilities, which the attention loss reads (eq. 2).

The probabilities are an output like any other: gradients flow through them, without hooks. Where the caller does not
ask for them, `attend` (dot_product.py) takes the faster way for the device, the precision and the size.
"""

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bas.models.dot_product import attend


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, heads x d) -> (b, heads, n, d)"""
    return rearrange(x, "b n (heads d) -> b heads n d", heads=heads)


def merge_heads(x: Tensor) -> Tensor:
    """(b, heads, n, d) -> (b, n, heads x d)"""
    return rearrange(x, "b heads n d -> b n (heads d)")


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
    """Transformer blocks over a grid: one, in SDXL up to ten. SD 1 projects in and out by 1x1 convolutions."""

    def __init__(
        self, channels: int, context_dim: int, heads: int, groups: int, linear_projection: bool, depth: int = 1
    ):
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(
        self, x: Tensor, context: Tensor, with_probs: bool = False, hide: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x: (b, c, h, w), context: (b, k, context_dim) -> (b, c, h, w), each block's probs (b, heads, h, w, k)

        No probs unless `with_probs`. hide: (b, h x w, k) bool or None, as in `CrossAttention`.
        """
        skip, h, maps = x, x.shape[-2], []
        x = self.norm(x)
        if self.linear_projection:
            x = self.proj_in(rearrange(x, "b c h w -> b (h w) c"))
        else:
            x = rearrange(self.proj_in(x), "b c h w -> b (h w) c")
        for block in self.transformer_blocks:
            x, probs = block(x, context, with_probs, hide)
            if probs is not None:
                maps.append(rearrange(probs, "b heads (h w) k -> b heads h w k", h=h))
        if self.linear_projection:
            x = rearrange(self.proj_out(x), "b (h w) c -> b c h w", h=h)
        else:
            x = self.proj_out(rearrange(x, "b (h w) c -> b c h w", h=h))
        return x + skip, maps
