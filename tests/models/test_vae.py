"""The autoencoder against diffusers: both ways, outputs within 1e-5, gradients within 1e-4."""

import pytest
import torch

from bas.models.config import VAEConfig
from bas.models.vae import Posterior
from tests.helpers.compare import assert_equals_live, assert_equals_stored, cases, filled
from tools.reference.measure import uniform
from tools.reference.models import VAES

networks = cases("vae")


@networks
def test_vae_equals_stored_reference(name):
    assert_equals_stored(name)


@networks
def test_vae_equals_diffusers(name):
    assert_equals_live(name)


def test_posterior_draw_by_hand():
    """mean 1, variance 4 and noise 0.5 give 1 + 2 * 0.5."""
    posterior = Posterior(torch.tensor([1.0]), torch.tensor([4.0]).log())
    assert posterior.sample(torch.tensor([0.5])).item() == pytest.approx(2.0, abs=1e-6)


@pytest.mark.parametrize(("bias", "expected"), [(1000.0, 20.0), (-1000.0, -30.0)])
def test_log_variance_is_clamped(bias, expected):
    """As in the original code: a draw can neither overflow nor lose its gradient to an underflow."""
    vae = filled("vae")
    vae.quant_conv.bias.data[4:] = bias
    assert (vae.encode(uniform("images", 1, 3, 16, 24)).logvar == expected).all()


def test_shapes_follow_the_factor():
    """Oblong images keep their shape; the factor is one halving per level but the last."""
    vae = filled("vae")
    assert VAEConfig.from_json(VAES["vae"]).factor == 4
    with torch.no_grad():
        latents = vae.encode(uniform("images", 1, 3, 16, 24)).mean
        assert latents.shape == (1, 4, 4, 6)
        assert vae(uniform("images", 1, 3, 16, 24)).shape == (1, 3, 16, 24)
        torch.testing.assert_close(vae(uniform("images", 1, 3, 16, 24)), vae.decode(latents))
