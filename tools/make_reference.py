"""Reference numbers for the tests: each network of bas, and what diffusers and transformers compute in its place.

    python tools/make_reference.py            writes tests/reference/networks.safetensors and schedulers.safetensors
    python tools/make_reference.py --check    recomputes them and says how far they are from the files

Weights and inputs are drawn from PCG64's raw bits under the name of each tensor. NumPy guarantees those bits for all
versions, so the files hold results only. diffusers is imported where a function needs it: the tests run without it too.
"""

import argparse
from pathlib import Path

from make_reference_attention import ATTENTION
from make_reference_layers import LAYERS, sinusoids
from make_reference_measure import Case, Named, condense, measure
from make_reference_models import MODELS
from make_reference_schedulers import schedules
from safetensors.torch import load_file, save_file

REFERENCE = Path(__file__).parent.parent / "tests" / "reference"
CASES: dict[str, Case] = LAYERS | ATTENTION | MODELS


def ours(name: str) -> Named:
    """Measure bas."""
    return measure(name, CASES[name].ours(), CASES[name].run_ours, CASES[name])


def theirs(name: str) -> Named:
    """Measure diffusers or transformers."""
    return measure(name, CASES[name].theirs(), CASES[name].run_theirs, CASES[name])


def networks() -> Named:
    """Everything that networks.safetensors holds."""
    return sinusoids() | {f"{name}/{key}": value for name in CASES for key, value in condense(theirs(name)).items()}


FILES = {"networks": networks, "schedulers": schedules}


def main() -> None:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    check = parser.parse_args().check
    for name, make in FILES.items():
        path, values = REFERENCE / f"{name}.safetensors", make()
        values = {key: value.contiguous() for key, value in values.items()}
        if not check:
            REFERENCE.mkdir(parents=True, exist_ok=True)
            save_file(values, path)
            print(f"{path}: {len(values)} tensors, {path.stat().st_size / 1e6:.1f} MB")
            continue
        stored = load_file(path)
        if stored.keys() != values.keys():
            raise SystemExit(f"{path}: other tensors than {parser.prog} makes")
        worst = max((stored[key] - value).abs().max().item() for key, value in values.items())
        print(f"{path}: {len(values)} tensors, largest difference {worst:.1e}")


if __name__ == "__main__":
    main()
