"""Parameters of which some are tried by the ordinary tests, and all with -m "slow or not slow"."""

from collections.abc import Iterable

import pytest


def some_fast(values: Iterable, *fast) -> list:
    """Parameters for pytest: those in `fast` as they are, the others with the marker slow. A tuple is several."""
    values = list(values)
    assert {*fast} <= {*values}
    parts = {value: value if isinstance(value, tuple) else (value,) for value in values}
    return [value if value in fast else pytest.param(*parts[value], marks=pytest.mark.slow) for value in values]
