"""What the tests of adapter files share."""

from pathlib import Path

import pytest

from tests.helpers.cases import some_fast


@pytest.fixture(scope="module", params=some_fast(("sd1", "sd2"), "sd1"))  # SDXL has the linear projections of SD 2
def base(request, tmp_path_factory) -> Path:
    """A tiny base of each family."""
    from tests.helpers.small_runs import write_base  # not above: the home folder must be the tests' own first

    return write_base(tmp_path_factory.mktemp(request.param) / "base", request.param)


@pytest.fixture(scope="module")
def run(base) -> Path:
    """A small run with adapters of two ranks on every kind of layer."""
    from tests.helpers.small_runs import LORA, write_small_run

    return write_small_run(base.parent / "run", base, **LORA)
