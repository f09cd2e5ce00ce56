"""The Triton kernels against their plain twins, forward and backward, through Triton's interpreter on the CPU."""

import pytest
import torch

from bas.models import attention, layers
from bas.models.unet import UNet
from tests.helpers.tiny import UNET, WIDTH, refused

triton = pytest.importorskip("triton", reason="triton, an extra, is not installed: it comes with PyTorch for CUDA")
kernels = pytest.importorskip("bas.models.kernels")
pytestmark = pytest.mark.skipif(
    isinstance(kernels.normalise, triton.runtime.JITFunction),
    reason="TRITON_INTERPRET is not 1: conftest.py sets it where there is no GPU",
)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(2, 8, 5, 7), (1, 12, 40, 30), (3, 8, 2, 1)])
def test_norm_silu(shape, dtype, tolerance):
    """Blocks that end within a row of cells, groups larger than a block, groups of four numbers."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(shape, generator=generator) + 2).to(dtype).requires_grad_(True)
    norm = torch.nn.GroupNorm(4, shape[1], eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
        norm.bias.uniform_(-1, 1, generator=generator)
    weights = [x, norm.weight, norm.bias]
    given = torch.randn(shape, generator=generator).to(dtype)
    ours, theirs = kernels.norm_silu(norm, x), layers.norm_silu(norm, x)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    found, expected = (torch.autograd.grad(y, weights, given) for y in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


def test_a_frozen_norm_gets_no_gradient_and_its_input_does():
    """As in phase 1, where the gradient only passes through on its way to the handles."""
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    norm = torch.nn.GroupNorm(2, 4).requires_grad_(False)
    y = kernels.norm_silu(norm, x)
    given = torch.ones_like(y)
    dx, *others = kernels.NormSilu.backward(y.grad_fn, given)
    (expected,) = torch.autograd.grad(layers.norm_silu(norm, x), x, given)
    torch.testing.assert_close(dx, expected, atol=1e-5, rtol=1e-5)
    assert others == [None] * 4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(2, 7, 2 * 33), (1, 3, 2 * 1500)])
def test_gate(shape, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    both = (2 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_(True)
    ours, theirs = kernels.gate(both), attention.gate(both)
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    given = torch.randn(ours.shape, generator=generator).to(dtype)
    found, expected = (torch.autograd.grad(y, both, given)[0] for y in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_a_unet_with_the_kernels_has_the_same_gradients():
    """All residual blocks and gates use them, and the UNet's names stay."""
    torch.manual_seed(0)
    unet = UNet(UNET)
    keys, weights = list(unet.state_dict()), list(unet.parameters())
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, WIDTH)

    def gradients() -> list[torch.Tensor]:
        return torch.autograd.grad(unet(latents, torch.tensor([500]), context).sample.square().mean(), weights)

    plain = gradients()
    kernels.install(unet)
    fused = gradients()
    assert list(unet.state_dict()) == keys
    for ours, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)
    blocks = [m for m in unet.modules() if isinstance(m, (layers.ResnetBlock, attention.GEGLU))]
    assert all({"norm_silu": kernels.norm_silu, "gate": kernels.gate}.items() & vars(m).items() for m in blocks)


def test_without_a_gpu_the_flag_is_refused(bench, tmp_path):
    from bas.training.setup import check_input

    with refused("--fused_kernels needs a CUDA device"):
        check_input(bench.config(tmp_path / "run", device="cpu", fused_kernels=True))
