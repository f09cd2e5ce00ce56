"""Stable Diffusion 1 and 2 compute what they computed before the code read other families, to the bit."""

import pytest

from tests.helpers.recorded_bits import SAMPLED, UNETS, network, one_thread, processor, records, sampled, trained

WORK = {
    **{name: lambda name=name: network(name) for name in UNETS},
    **{f"sampled-{family}": lambda family=family: sampled(family) for family in SAMPLED},
    "trained": trained,
}
HERE = processor()
KNOWN = {
    name: digest for record in records() if record["recorded with"] == HERE for name, digest in record["sha256"].items()
}


@pytest.mark.skipif(not KNOWN, reason=f"recorded on other processors than this, {HERE}")
@pytest.mark.parametrize("work", WORK)
def test_the_bits_are_those_recorded(work):
    """Outputs, maps, gradients, latents, and every file of a trained model. On other processors sums round apart."""
    with one_thread():
        found = WORK[work]()
    assert found == {name: KNOWN[name] for name in found}
