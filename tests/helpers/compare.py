"""How the networks of bas are held against their references (tools/reference makes both sides)."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tools.reference import cases as reference
from tools.reference.measure import condense, fill

STORED = load_file(reference.REFERENCE / "networks.safetensors")


def assert_agree(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Outputs within 1e-5, gradients within 1e-4 of their size; where the exact gradient is 0, noise is allowed."""
    assert ours.keys() == theirs.keys()
    floor = 1e-6 * max((v.abs().max().item() for k, v in theirs.items() if k.startswith("grad.")), default=0.0)
    for key, value in theirs.items():
        if key == "grad.params":  # rows of (projection, norm)
            allowed = 1e-4 * value[:, 1:] + floor
        elif key.startswith("grad."):
            allowed = 1e-4 * value.abs().max() + floor
        else:
            allowed = 1e-5
        error = (ours[key] - value).abs()
        assert (error <= allowed).all(), f"{key}: off by {error.max():.1e}"


def assert_equals_stored(name: str) -> None:
    """The network against the numbers in tests/reference."""
    prefix = f"{name}/"
    stored = {key.removeprefix(prefix): value for key, value in STORED.items() if key.startswith(prefix)}
    assert_agree(condense(reference.ours(name)), stored)


def assert_equals_live(name: str) -> None:
    """The network against diffusers or transformers here and now, every parameter's name and gradient included."""
    if not name.startswith("text"):
        pytest.importorskip("diffusers", reason="diffusers is not installed: the stored references stand in for it")
    assert_agree(reference.ours(name), reference.theirs(name))


def cases(*prefixes: str) -> pytest.MarkDecorator:
    """Parametrise a test over the reference cases whose names start with these words."""
    names = [name for name in reference.CASES if name.startswith(prefixes)]
    assert names
    return pytest.mark.parametrize("name", names)


def filled(name: str) -> torch.nn.Module:
    """The network of a case with its fixed weights."""
    return fill(reference.CASES[name].ours())
