"""Attention against diffusers, and the probabilities that cross-attention hands out."""

import pytest
import torch
import torch.nn.functional as F

from bas.models import dot_product as layers
from bas.models.attention import CrossAttention, SelfAttention, TransformerBlock
from bas.models.dot_product import attend
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


@pytest.mark.parametrize("with_probs", [False, True])
def test_a_hidden_token_is_as_one_that_is_not_there(with_probs):
    """Hidden from all cells: output and gradients as without it. Hidden from none: exactly as without the mask."""
    module = filled("cross-attention")
    x, context = uniform("x", 2, 15, 24).requires_grad_(), uniform("context", 2, 7, 10)
    hide = torch.zeros(2, 15, 7, dtype=torch.bool)
    plain, _ = module(x, context, with_probs)
    assert torch.equal(module(x, context, with_probs, hide)[0], plain)
    hide[..., 3] = True
    out, probs = module(x, context, with_probs, hide)
    expected, _ = module(x, context[:, [0, 1, 2, 4, 5, 6]], with_probs)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    ours, theirs = (torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)
    if probs is not None:
        assert (probs[..., 3] == 0).all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 15), atol=1e-6, rtol=0)


def test_each_cell_and_each_sample_has_its_own_hidden_tokens():
    module, hide = filled("cross-attention"), torch.zeros(2, 15, 7, dtype=torch.bool)
    hide[1, 4, 2] = True
    x, context = uniform("x", 2, 15, 24), uniform("context", 2, 7, 10)
    for with_probs in (False, True):
        changed = (module(x, context, with_probs, hide)[0] != module(x, context, with_probs)[0]).any(dim=-1)
        assert changed.nonzero().tolist() == [[1, 4]]


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


# --- The way of computing it ------------------------------------------------------------------------------------------


@pytest.fixture
def ways(monkeypatch):
    """The names of the ways that `attend` takes, in order; the matrix products once for each chunk."""
    taken, fused, openly = [], layers.F.scaled_dot_product_attention, layers._attend_openly
    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", lambda *x: (taken.append("fused"), fused(*x))[1])
    monkeypatch.setattr(layers, "_attend_openly", lambda *x: (taken.append("openly"), openly(*x))[1])
    return taken


def heads_of(n: int, m: int, dtype: torch.dtype, trains: bool) -> list[torch.Tensor]:
    """Queries of n cells and keys and values of m, for two samples and two heads of 8 features."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 2, count, 8) for count in (n, m, m))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_(trains) for s in shapes]


@pytest.mark.parametrize(
    ("dtype", "trains", "most", "way"),
    [
        (torch.bfloat16, True, 2**24, "openly"),
        (torch.bfloat16, False, 2**24, "fused"),  # forward alone, fused is faster
        (torch.bfloat16, True, 2 * 2 * 16 * 77 - 1, "fused"),  # more than may be kept
        (torch.float32, True, 2**24, "fused"),
        (torch.float32, False, 2**24, "fused"),
    ],
)
def test_only_training_in_bf16_on_a_cpu_is_spelt_out(dtype, trains, most, way, ways, monkeypatch):
    monkeypatch.setattr(layers, "MOST_SCORES", most)
    q, k, v = heads_of(16, 77, dtype, trains)
    out = attend(q, k, v)
    assert (ways, out.shape, out.dtype) == ([way], q.shape, dtype)
    with torch.no_grad():
        attend(q, k, v)
    assert ways == [way, "fused"]


def test_the_device_decides_too(ways):
    """Tensors without values, as --dry_run counts with, take the fused way of a GPU."""
    attend(*(x.to("meta") for x in heads_of(16, 77, torch.bfloat16, True)))
    assert ways == ["fused"]


def test_in_float32_nothing_changes():
    """Bit for bit, gradients too."""
    inputs = heads_of(64, 77, torch.float32, True)
    outputs = [attend(*inputs), layers.F.scaled_dot_product_attention(*inputs)]
    assert torch.equal(*outputs)
    ours, theirs = (torch.autograd.grad(out.square().sum(), inputs) for out in outputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("at_once", "chunks"), [(2**22, 1), (2 * 2 * 60 * 77, 1), (2 * 2 * 30 * 77, 2), (1000, 15)])
@pytest.mark.parametrize("m", [77, 60])
def test_spelt_out_equals_fused_within_bf16_in_any_number_of_chunks(at_once, chunks, m, ways, monkeypatch):
    """Output and gradients, by their norms, against float32; no chunk computes more scores than is stated."""
    monkeypatch.setattr(layers, "SCORES_AT_ONCE", at_once)
    exact = heads_of(60, m, torch.float32, True)
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    out, expected = attend(*half), layers.F.scaled_dot_product_attention(*exact)
    assert len(ways) - 1 == -(-60 // -(-60 // -(-2 * 2 * 60 * m // at_once)))
    if m == 77:
        assert len(ways) - 1 == chunks
    results = [out, *torch.autograd.grad(out.float().square().sum(), half)]
    references = [expected, *torch.autograd.grad(expected.square().sum(), exact)]
    for ours, theirs, most in zip(results, references, (0.01, 0.02, 0.02, 0.01), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < most * theirs.norm()


@pytest.mark.parametrize("at_once", [2**22, 1000])
def test_hidden_keys_are_the_same_in_both_ways_and_in_chunks(at_once, ways, monkeypatch):
    """A random half of the keys hidden from each query, all but the first: within bf16 of the fused way in float32."""
    monkeypatch.setattr(layers, "SCORES_AT_ONCE", at_once)
    hide = torch.rand(2, 60, 77, generator=torch.Generator().manual_seed(0)) < 0.5
    hide[..., 0] = False
    exact = heads_of(60, 77, torch.float32, True)
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    out, expected = attend(*half, hide), attend(*exact, hide)
    assert ways.count("openly") == (1 if at_once > 10_000 else 15)
    assert ways[-1] == "fused"
    assert (out.float() - expected).norm() < 0.01 * expected.norm()
    assert (out.float() - attend(*exact)).norm() > 0.1 * expected.norm()


def test_layers_train_in_bf16_autocast_by_the_open_way(ways):
    """Both kinds of attention, once each; with probabilities asked for, cross-attention needs neither way."""
    block = TransformerBlock(dim=16, context_dim=8, heads=2)
    x, context = torch.randn(2, 64, 16), torch.randn(2, 77, 8)
    with torch.autocast("cpu", torch.bfloat16):
        block(x, context)[0].float().sum().backward()
    assert ways == ["openly"] * 2
    assert all(p.grad.isfinite().all() for p in block.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        block(x, context, with_probs=True)
    assert ways == ["openly"] * 3
