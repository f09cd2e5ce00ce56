"""The building blocks of the UNet and the VAE against diffusers: outputs within 1e-5, gradients within 1e-4."""

import pytest
import torch

from bas.models.layers import Downsample, timestep_embedding
from tests.helpers.compare import STORED, assert_equals_live, assert_equals_stored, cases
from tools.reference.layers import SINUSOID_TIMESTEPS, SINUSOIDS, sinusoids

layers = cases("time-embedding", "resnet", "downsample", "upsample", "feed-forward")


@layers
def test_layer_equals_stored_reference(name):
    assert_equals_stored(name)


@layers
def test_layer_equals_diffusers(name):
    assert_equals_live(name)


@pytest.mark.parametrize(("dim", "cosines_first", "shift"), SINUSOIDS)
def test_time_features_equal_stored_reference(dim, cosines_first, shift):
    ours = timestep_embedding(SINUSOID_TIMESTEPS, dim, cosines_first, shift)
    assert_within_rounding(ours, STORED[f"sinusoid.{dim}.{cosines_first}.{shift}"])


def assert_within_rounding(features: torch.Tensor, stored: torch.Tensor) -> None:
    """Within 1e-6 and the rounding of the angle: a frequency is known to 2^-24, so late timesteps show the processor
    that the stored numbers come from."""
    allowed = 1e-6 + SINUSOID_TIMESTEPS[:, None] * 2.0**-24
    assert ((features - stored).abs() <= allowed).all()


def test_time_features_equal_diffusers():
    pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to recompute the reference with")
    live = sinusoids()
    for dim, cosines_first, shift in SINUSOIDS:
        key = f"sinusoid.{dim}.{cosines_first}.{shift}"
        ours = timestep_embedding(SINUSOID_TIMESTEPS, dim, cosines_first, shift)
        torch.testing.assert_close(ours, live[key], atol=1e-6, rtol=0)
        assert_within_rounding(live[key], STORED[key])


def test_time_features_by_hand():
    """t = 0 gives cosines of 1 and sines of 0; the first frequency is 1 radian a step, whatever the width."""
    zero, one = timestep_embedding(torch.tensor([0, 1]), 4)
    assert zero.tolist() == [1, 1, 0, 0]
    assert one[0].item() == pytest.approx(0.5403023, abs=1e-6)
    assert one[2].item() == pytest.approx(0.8414710, abs=1e-6)
    assert one[3].item() == pytest.approx(0.01, abs=1e-6)  # second of two frequencies: 10000^(-1/2)


def test_downsampling_pads_where_each_network_needs_it():
    """With a kernel that picks its upper left cell, padding all around shifts the image by one; the VAE's doesn't."""
    x = torch.arange(16.0).view(1, 1, 4, 4)
    for pad_all_around, expected in ((True, [[0, 0], [0, 5]]), (False, [[0, 2], [8, 10]])):
        layer = Downsample(1, pad_all_around)
        torch.nn.init.zeros_(layer.conv.weight)
        torch.nn.init.zeros_(layer.conv.bias)
        layer.conv.weight.data[0, 0, 0, 0] = 1
        assert layer(x)[0, 0].tolist() == expected
