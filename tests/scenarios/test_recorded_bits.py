"""Stable Diffusion 1 and 2 compute what they computed before the code read other families, to the bit."""

import json

import pytest

from tests.helpers.recorded_bits import RECORDED, SAMPLED, UNETS, network, one_thread, processor, sampled, trained

KNOWN = json.loads(RECORDED.read_text())
WORK = {
    **{name: lambda name=name: network(name) for name in UNETS},
    **{f"sampled-{family}": lambda family=family: sampled(family) for family in SAMPLED},
    "trained": trained,
}
HERE = processor()


@pytest.mark.skipif(HERE != KNOWN["recorded with"], reason=f"recorded with {KNOWN['recorded with']}, this is {HERE}")
@pytest.mark.parametrize("work", WORK)
def test_the_bits_are_those_recorded(work):
    """Outputs, maps, gradients, latents, and every file of a trained model. On other processors sums round apart."""
    with one_thread():
        found = WORK[work]()
    assert found == {name: KNOWN["sha256"][name] for name in found}
