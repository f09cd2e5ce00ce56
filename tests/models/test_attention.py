"""Attention against diffusers, and the probabilities that cross-attention hands out."""

import pytest
import torch
import torch.nn.functional as F

from bas.models.attention import CrossAttention, SelfAttention
from tests.helpers.compare import assert_equals_live, assert_equals_stored, cases, filled
from tools.reference.measure import uniform

attention = cases("self-attention", "cross-attention", "transformer-block", "spatial-transformer")


@attention
def test_attention_equals_stored_reference(name):
    """Outputs, probabilities and gradients; diffusers' probabilities come from Attention.get_attention_scores."""
    assert_equals_stored(name)


@attention
def test_attention_equals_diffusers(name):
    assert_equals_live(name)


@pytest.mark.parametrize("name", ["cross-attention", "transformer-block"])
def test_fused_and_open_path_agree(name):
    """Asking for the probabilities changes how the output is computed, not the output or its gradients."""
    module = filled(name)
    x, context = uniform("x", 2, 15, 24).requires_grad_(), uniform("context", 2, 7, 10).requires_grad_()
    fused, nothing = module(x, context)
    open_, probs = module(x, context, with_probs=True)
    assert nothing is None
    assert probs.shape == (2, 3, 15, 7)
    torch.testing.assert_close(fused, open_, atol=2e-6, rtol=0)
    leaves = (x, context, *module.parameters())
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (fused, open_)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=0)


def test_probabilities_by_hand():
    """Two tokens whose keys differ by ln 3 in the logit share a query's attention 3 : 1, after scaling by 1/sqrt(d)."""
    layer = CrossAttention(dim=4, context_dim=1, heads=1)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.eye_(layer.to_q.weight)
    layer.to_k.weight.data[0, 0] = 1.0
    query = torch.tensor([[[2.0, 0, 0, 0]]])  # the logit of a key k is 2 k / sqrt(4)
    context = torch.tensor([[[torch.tensor(3.0).log().item()], [0.0]]])
    _, probs = layer(query, context, with_probs=True)
    torch.testing.assert_close(probs, torch.tensor([[[[0.75, 0.25]]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probabilities_are_float32_and_sum_to_one(dtype):
    module = filled("cross-attention").to(dtype)
    out, probs = module(uniform("x", 2, 15, 24).to(dtype), uniform("c", 2, 7, 10).to(dtype), with_probs=True)
    assert out.dtype == dtype
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 15), atol=1e-6, rtol=0)


def test_logits_that_overflow_half_precision_stay_finite():
    """SD 2.1 in fp16: q . k exceeds 65504 although q . k / sqrt(d) does not; the query is scaled before the product."""
    layer = CrossAttention(dim=64, context_dim=64, heads=1).half()
    for project in (layer.to_q, layer.to_k, layer.to_v):
        torch.nn.init.eye_(project.weight)
    x = torch.full((1, 2, 64), 40.0, dtype=torch.float16)  # q . k = 64 * 40 * 40 = 102400
    out, probs = layer(x, x, with_probs=True)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(probs, torch.full((1, 1, 2, 2), 0.5))


def test_self_attention_never_builds_the_matrix(monkeypatch):
    """No operation returns anything near n x n numbers, and the fused kernel is what runs."""
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k))
    layer = SelfAttention(8, 1)
    with torch.no_grad():
        largest = max(t.numel() for t in _tensors_made(layer, torch.zeros(1, 512, 8)))
    assert calls == [1]
    assert largest <= 8 * 512 * 8


def _tensors_made(module, *inputs):
    """Every tensor that an operation returns while the module runs."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            return result

    with Watch():
        module(*inputs)
    return made
