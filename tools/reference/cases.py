"""Every network that is held against diffusers or transformers, and the numbers of either side."""

from pathlib import Path

from tools.reference.attention import ATTENTION
from tools.reference.layers import LAYERS
from tools.reference.measure import Case, Named, measure
from tools.reference.models import MODELS

REFERENCE = Path(__file__).parents[2] / "tests" / "reference"
CASES: dict[str, Case] = LAYERS | ATTENTION | MODELS


def ours(name: str) -> Named:
    """Measure bas."""
    return measure(name, CASES[name].ours(), CASES[name].run_ours, CASES[name])


def theirs(name: str) -> Named:
    """Measure diffusers or transformers."""
    return measure(name, CASES[name].theirs(), CASES[name].run_theirs, CASES[name])
