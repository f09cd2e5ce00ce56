"""The one-way order of the package's imports, read from the sources, and what a command does not wait for."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import bas
from tests.helpers.tiny import Bench

ROOT = Path(bas.__file__).parent
MODULES = {
    "bas." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}

# Rooms and single files, floor by floor: each may import from itself and from the floors below it.
FLOORS = (
    ("cli",),
    ("evaluation",),
    ("web",),
    ("training",),
    ("sampling",),
    ("data",),
    ("pretrained", "losses"),
    ("models",),
    ("io",),
    ("runtime", "config", "schedulers"),
    ("presets",),
    ("errors",),
    ("other_tools",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
# For tests and tools alone, or not used on purpose.
NEVER = {"diffusers", "accelerate", "torchvision", "tools", "tests", "pytest"}


def imports(path: Path, inside_functions: bool) -> set[str]:
    """Every module that a source file imports; `from bas import x` counts as bas.x where that is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if inside_functions else outside_functions(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            both = {f"{node.module}.{name.name}" for name in node.names}
            found |= (both & MODULES.keys()) or {node.module}
    return found


def outside_functions(tree: ast.AST) -> list[ast.AST]:
    """The nodes that run when the module is imported."""
    kept, stack = [], [tree]
    while stack:
        node = stack.pop()
        kept.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack += ast.iter_child_nodes(node)
    return kept


def room_of(module: str) -> str:
    """The room, or the single file, that stands directly in bas."""
    return module.split(".")[1]


def test_the_package_was_found():
    assert {"bas.config", "bas.training.loop", "bas.models.unet"} <= MODULES.keys()


def test_every_file_has_a_floor():
    assert {room_of(module) for module in MODULES} <= FLOOR.keys()


def test_a_file_imports_only_from_its_own_room_or_a_lower_one():
    """Inside functions too."""
    wrong = {
        (module, name)
        for module, path in MODULES.items()
        for name in imports(path, inside_functions=True)
        if name.startswith("bas.")
        and room_of(name) != room_of(module)
        and FLOOR[room_of(name)] <= FLOOR[room_of(module)]
    }
    assert sorted(wrong) == []


def test_bas_runs_without_the_libraries_of_tests_and_tools():
    """Inside functions too: diffusers is for tests and for tools/ alone."""
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in sorted(ROOT.rglob("*.py"))
        for name in imports(path, inside_functions=True)
        if name.split(".")[0] in NEVER
    }
    assert found == set()


def test_no_circle():
    """Following imports from any module never leads back to it."""
    below = {module: imports(path, inside_functions=False) & MODULES.keys() for module, path in MODULES.items()}
    done = set()
    while ready := {module for module in below.keys() - done if below[module] <= done}:
        done |= ready
    assert done == below.keys(), f"these import each other in a circle: {sorted(below.keys() - done)}"


# What only the text encoder and the trained steps need: several times as long to import as the rest of bas.
HEAVY = ("transformers.modeling_utils", "transformers.models.clip.modeling_clip", "scipy", "sympy", "torch._dynamo")
HEAVY += ("tensorboard",)  # which only --report_to needs
STAGES = """
import json, sys
import torch

heavy, mistakes = json.loads(sys.argv[1])
heavy = set(heavy) - sys.modules.keys()  # without what PyTorch itself brings along
from bas import load, sample, train
import bas.cli.commands.train
from bas.cli.entry import main

stages = {"imports": sorted(heavy & sys.modules.keys())}
for name, arguments in mistakes.items():
    assert main(arguments) == 2
    stages[name] = sorted(heavy & sys.modules.keys())
print(json.dumps(stages))
"""


def test_wrong_input_does_not_wait_for_the_code_of_networks(tmp_path):
    """In a fresh interpreter: importing bas, and what `bas train` and `bas sample` say before weights are read."""
    bench = Bench(tmp_path)
    black = shutil.copytree(bench.scene, tmp_path / "black")
    Image.new("L", (32, 32), 0).save(black / "mask1.png")
    train = ["train", "--weights", str(bench.model), "--output_dir", str(tmp_path / "run")]
    mistakes = {
        "mask1.png is black": [*train, str(black)],
        "unknown handle <toy>": ["sample", str(bench.model), "--prompt", "bowl " * 99, "<toy>"],
        "--resolution 33": [*train, str(bench.scene), "--resolution", "33"],
    }
    command = [sys.executable, "-c", STAGES, json.dumps([HEAVY, mistakes])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    black_mask, too_long, handle, size = done.stderr.splitlines()  # and none of transformers' own about the length
    assert all(name in line for name, line in zip(mistakes, (black_mask, handle, size), strict=True))
    assert "bas: the prompt is too long" in too_long
    assert json.loads(done.stdout) == {stage: [] for stage in ("imports", *mistakes)}


def test_what_the_package_offers_is_listed():
    """For those who ask a shell to complete `bas.`, though nothing is imported before it is used."""
    assert {*bas.__all__} <= {*dir(bas)}
    assert all(getattr(bas, name).__name__ == name for name in bas.__all__)


def test_no_function_of_the_package_has_the_name_of_a_module():
    """Importing such a module would take the function's place."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ROOT.rglob("*.py")}
    rooms = {name.removesuffix(".__init__") for name in names}
    assert "training" in rooms
    assert not rooms & {*bas.__all__}


REPLACED = """
import importlib, json, sys
import pytest

import bas

for name in bas.__all__:
    setattr(bas, name, name)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert [getattr(bas, name) for name in bas.__all__] == bas.__all__
from bas import train
assert train == "train"
del bas.train
assert callable(bas.train)
"""


def test_what_is_put_in_place_of_a_function_stays(tmp_path):
    """`bas.train = x`, before and after every module of bas is imported; and it can be taken back."""
    command = [sys.executable, "-c", REPLACED, json.dumps(sorted(MODULES))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["passive", "2000"]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", "None"]),
        ({"GOMP_SPINCOUNT": "7"}, ["passive", "7"]),
    ],
)
def test_idle_threads_sleep_unless_the_user_has_said_otherwise(given, expected):
    """The policy is set before PyTorch is imported, which reads it once; a value of the user's stays."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = f"import os, sys, bas; print(*map(os.environ.get, {names}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [*expected, "False"]
