"""The private names of PyTorch and its neighbours that bas uses: all are listed, and each does what bas needs of it.

A private name can go with any release. The list keeps them few; the checks tell at once which release changed one.
"""

import ast
from functools import reduce
from pathlib import Path

import torch
from torch import _dynamo  # noqa: F401

import bas

PACKAGE = Path(bas.__file__).parent
LIBRARIES = {"torch", "transformers", "tokenizers", "safetensors", "PIL", "numpy", "einops", "huggingface_hub"}
KNOWN = {
    "torch._dynamo.config": "models/compile.py",
    "torch._foreach_copy_": "training/master_weights.py",
}


def chain(node: ast.AST) -> list[str]:
    """The names of a.b.c, or nothing where an expression stands at its beginning."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def is_private(names: list[str]) -> bool:
    """Whether one of the names begins with one underscore."""
    return any(name.startswith("_") and not name.startswith("__") for name in names)


def private_names(source: str) -> set[str]:
    """The private names of libraries that a source file imports or reads."""
    tree, aliases, found = ast.parse(source), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(name.name, name.asname or name.name.split(".")[0]) for name in node.names]
            aliases |= {alias: name if "." not in name else alias for name, alias in imported}
            found |= {name for name, _ in imported if is_private(name.split("."))}
        elif isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
            found |= {full for name in node.names if is_private((full := f"{node.module}.{name.name}").split("."))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (names := chain(node)) and names[0] in aliases:
            full = [*aliases[names[0]].split("."), *names[1:]]
            first = next((i for i, name in enumerate(full) if is_private([name])), None)
            if first is not None:
                found.add(".".join(full[: first + 2]))
    longest = {name for name in found if not any(longer.startswith(f"{name}.") for longer in found)}
    return {name for name in longest if name.split(".")[0] in LIBRARIES}


def test_the_search_finds_private_names():
    source = (
        "import torch\nimport numpy as np\nfrom torch._inductor import config\ntorch._foreach_add_([], [])\nnp._core.x"
    )
    wanted = {"torch._inductor.config", "torch._foreach_add_", "numpy._core.x"}
    assert private_names(source) == wanted
    assert private_names("import torch\ntorch.__version__\nself._x") == set()


def test_every_private_name_is_listed():
    found = {
        name: str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for name in private_names(path.read_text(encoding="utf-8"))
    }
    assert found == KNOWN


def test_the_names_are_there():
    for name in KNOWN:
        reduce(getattr, name.split(".")[1:], torch)


def test_foreach_copy_rounds_into_the_first_list():
    targets = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1)]
    torch._foreach_copy_(targets, [torch.tensor([1.0, 1.001953125]), torch.tensor([3.0])])
    assert [target.tolist() for target in targets] == [[1.0, 1.0], [3.0]]
    assert targets[0].dtype == torch.bfloat16


def test_dynamo_has_the_two_limits_of_shapes():
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        assert isinstance(getattr(torch._dynamo.config, limit), int)
