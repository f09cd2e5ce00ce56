"""The one-way order of the package's imports, read from the sources, and what a command does not wait for."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny import Bench

import bas

ROOT = Path(bas.__file__).parent
MODULES = {
    "bas." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}

# What a module, or any module of a package, may import from bas; whoever is missing may import whatever is below it.
MAY_IMPORT = {
    "bas.config": set(),
    "bas.models.config": {"bas.config"},
    "bas.models.layers": {"bas.config"},
    "bas.models.attention": {"bas.config"},
    "bas.models.unet": {"bas.config", "bas.models.config", "bas.models.layers", "bas.models.attention"},
    "bas.models.vae": {"bas.config", "bas.models.config", "bas.models.layers", "bas.models.attention"},
    "bas.models.text": {"bas.config"},
    "bas.losses": {"bas.config", "bas.models.unet"},
    "bas.schedulers": {"bas.config"},
    "bas.scene": {"bas.config", "bas.files", "bas.images", "bas.mask_sources", "bas.models.text"},
}
# The top: nothing but what stands beside it imports these.
ONLY_FROM = {
    "bas.cli": {"bas.__main__"},
    "bas.commands": {"bas.cli", "bas.commands"},
    "bas.finite": {"bas.train", "bas.dry_run"},
    "bas.run": {"bas.train", "bas.finite", "bas.commands", "bas.evaluation", "bas.dry_run", "bas.many"},
    "bas.train": {"bas.commands", "bas.evaluation", "bas.demo", "bas.dry_run", "bas.many"},
}
# For tests and tools alone, or not used on purpose.
TOOLS = {path.stem for path in (Path(__file__).parents[1] / "tools").glob("*.py")}
NEVER = {"diffusers", "accelerate", "torchvision", "tools", "tests", "pytest"} | TOOLS


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


def belongs(module: str, group: str) -> bool:
    """Whether a module is this one or lies within it."""
    return module == group or module.startswith(group + ".")


def test_the_package_was_found():
    assert {"bas.config", "bas.train", "bas.models.unet"} <= MODULES.keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_is_below_it(module):
    everything = imports(MODULES[module], inside_functions=True)
    within = {name for name in everything if belongs(name, "bas")} - {"bas"}
    if module in MAY_IMPORT:
        assert within <= MAY_IMPORT[module]
    for top, users in ONLY_FROM.items():
        if any(belongs(name, top) for name in within):
            assert any(belongs(module, user) for user in users), f"only {users} may import {top}"


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in sorted(ROOT.rglob("*.py"))])
def test_bas_runs_without_the_libraries_of_tests_and_tools(path):
    """Inside functions too: diffusers is for tests and for tools/ alone."""
    assert not {name.split(".")[0] for name in imports(ROOT / path, inside_functions=True)} & NEVER


def test_no_circle():
    """Following imports from any module never leads back to it."""
    below = {module: imports(path, inside_functions=False) & MODULES.keys() for module, path in MODULES.items()}
    done = set()
    while ready := {module for module in below.keys() - done if below[module] <= done}:
        done |= ready
    assert done == below.keys(), f"these import each other in a circle: {sorted(below.keys() - done)}"


# What only the text tower and the trained steps need: several times as long to import as the rest of bas.
HEAVY = ("transformers.modeling_utils", "transformers.models.clip.modeling_clip", "scipy", "sympy", "torch._dynamo")
STAGES = """
import json, sys
import torch

heavy, mistakes = json.loads(sys.argv[1])
heavy = set(heavy) - sys.modules.keys()  # without what PyTorch itself brings along
from bas import load, sample, train
import bas.commands.train
from bas.cli import main

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
    assert {"load", "sample", "train", "train_config", "TrainConfig", "SampleConfig"} <= {*dir(bas)}
