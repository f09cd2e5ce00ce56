"""References of attention: the blocks of bas beside those of diffusers, with the probabilities that both compute."""

import torch
from torch import Tensor, nn

from bas.models import attention
from bas.models.vae import SpatialAttention
from tools.reference.measure import Case, Named


def diffusers_attention(dim: int, context_dim: int | None, heads: int) -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(dim, context_dim, heads=heads, dim_head=dim // heads)


def diffusers_vae_attention(channels: int, groups: int) -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return Attention(
        channels,
        heads=1,
        dim_head=channels,
        eps=1e-6,
        norm_num_groups=groups,
        residual_connection=True,
        bias=True,
        _from_deprecated_attn_block=True,
    )


def diffusers_feed_forward(dim: int) -> nn.Module:
    from diffusers.models.attention import FeedForward

    return FeedForward(dim, activation_fn="geglu")


def diffusers_transformer_block(dim: int, context_dim: int, heads: int) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(dim, heads, dim // heads, cross_attention_dim=context_dim)


def diffusers_spatial_transformer(
    channels: int, context_dim: int, heads: int, groups: int, linear: bool, depth: int
) -> nn.Module:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return Transformer2DModel(
        heads,
        channels // heads,
        in_channels=channels,
        norm_num_groups=groups,
        cross_attention_dim=context_dim,
        use_linear_projection=linear,
        num_layers=depth,
    )


class Recorder:
    """An attention processor for diffusers that computes cross-attention openly and keeps the probabilities."""

    def __init__(self, place: str, kept: list[tuple[str, Tensor]]):
        self.place, self.kept = place, kept

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, **_) -> Tensor:
        """(b, n, dim), (b, k, context_dim) -> (b, n, dim)"""
        query, key, value = (
            attn.head_to_batch_dim(project(x))
            for project, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        probs = attn.get_attention_scores(query, key)
        self.kept.append((self.place, probs.unflatten(0, (len(hidden_states), attn.heads))))
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(probs, value))))


def record(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Put a Recorder into every cross-attention of a diffusers network. -> the list it fills, in execution order"""
    kept: list[tuple[str, Tensor]] = []
    for name, child in module.named_modules():
        if name.endswith("attn2") or name == "":
            place = name.split("_")[0]  # down_blocks..., mid_block..., up_blocks...
            if hasattr(child, "set_processor"):
                child.set_processor(Recorder(place, kept))
    return kept


def run_cross_attention(module: nn.Module, x: Tensor, context: Tensor) -> Named:
    """diffusers' cross-attention with its probabilities."""
    kept = record(module)
    out = module(x, context)
    return {"sample": out, "probs": kept[0][1]}


def run_transformer_block(module: nn.Module, x: Tensor, context: Tensor) -> Named:
    """diffusers' transformer block with its cross-attention's probabilities."""
    kept = record(module)
    out = module(x, encoder_hidden_states=context)
    return {"sample": out, "probs": kept[0][1]}


def run_spatial_transformer(module: nn.Module, x: Tensor, context: Tensor) -> Named:
    """diffusers' spatial transformer, its probabilities laid out over the grid."""
    kept = record(module)
    out = module(x, encoder_hidden_states=context).sample
    return {"sample": out} | _by_block([probs.unflatten(2, x.shape[-2:]) for _, probs in kept])


def run_our_spatial_transformer(module: nn.Module, x: Tensor, context: Tensor) -> Named:
    """That of bas."""
    out, probs = module(x, context, with_probs=True)
    return {"sample": out} | _by_block(probs)


def _by_block(probs: list[Tensor]) -> Named:
    """Probabilities by the block that computed them: probs, probs1, probs2, ..."""
    return {f"probs{i or ''}": each for i, each in enumerate(probs)}


def with_probs(module: nn.Module, *inputs: Tensor) -> Named:
    """A layer of bas that returns (out, probs)."""
    out, probs = module(*inputs, with_probs=True)
    return {"sample": out, "probs": probs}


ATTENTION: dict[str, Case] = {
    "feed-forward": Case(lambda: attention.FeedForward(16), lambda: diffusers_feed_forward(16), {"x": (2, 7, 16)}),
    "self-attention": Case(
        lambda: attention.SelfAttention(24, 3),
        lambda: diffusers_attention(24, None, 3),
        {"x": (2, 15, 24)},
    ),
    "cross-attention": Case(
        lambda: attention.CrossAttention(24, 10, 3),
        lambda: diffusers_attention(24, 10, 3),
        {"x": (2, 15, 24), "context": (2, 7, 10)},
        with_probs,
        run_cross_attention,
    ),
    "transformer-block": Case(
        lambda: attention.TransformerBlock(24, 10, 3),
        lambda: diffusers_transformer_block(24, 10, 3),
        {"x": (2, 15, 24), "context": (2, 7, 10)},
        with_probs,
        run_transformer_block,
    ),
    **{
        f"spatial-transformer-{name}": Case(
            lambda linear=linear, depth=depth: attention.SpatialTransformer(24, 10, 3, 4, linear, depth),
            lambda linear=linear, depth=depth: diffusers_spatial_transformer(24, 10, 3, 4, linear, depth),
            {"x": (2, 24, 3, 5), "context": (2, 7, 10)},
            run_our_spatial_transformer,
            run_spatial_transformer,
        )
        for name, linear, depth in (("sd1", False, 1), ("sd2", True, 1), ("sdxl", True, 3))
    },
    "vae-attention": Case(
        lambda: SpatialAttention(16, 4), lambda: diffusers_vae_attention(16, 4), {"x": (2, 16, 3, 5)}
    ),
}
