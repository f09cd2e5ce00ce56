"""Reference numbers for the tests: each network of bas, and what diffusers and transformers compute in its place.

    python -m tools.reference            writes tests/reference/networks.safetensors and schedulers.safetensors
    python -m tools.reference --check    recomputes them and says how far they are from the files

Weights and inputs are drawn from PCG64's raw bits under the name of each tensor. NumPy guarantees those bits for all
versions, so the files hold results only. diffusers is imported where a function needs it: the tests run without it too.
"""

import argparse

from safetensors.torch import load_file, save_file

from tools.command_line import run as run_tool
from tools.reference.cases import CASES, REFERENCE, theirs
from tools.reference.layers import sinusoids
from tools.reference.measure import Named, condense
from tools.reference.schedulers import schedules


def networks() -> Named:
    """Everything that networks.safetensors holds."""
    return sinusoids() | {f"{name}/{key}": value for name in CASES for key, value in condense(theirs(name)).items()}


FILES = {"networks": networks, "schedulers": schedules}


def main() -> None:
    """Write the files, or check them."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    run_tool(main)
