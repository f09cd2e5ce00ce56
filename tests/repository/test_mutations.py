"""The list of guards is up to date: each stands in the sources as its row says, and its test is there.

That the tests fail without them is seen by `python -m tests.helpers.mutations`, which takes minutes.
"""

import ast

import pytest

from tests.helpers.guards import GUARDS
from tests.helpers.mutations import ROOT, Guard, verdict


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.what)
def test_a_guard_stands_where_its_row_says(guard):
    assert (ROOT / "bas" / guard.file).read_text(encoding="utf-8").count(guard.text) == 1
    assert guard.instead != guard.text
    file, name = guard.test.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_guards_are_many_and_different():
    assert len({guard.what for guard in GUARDS}) == len({guard.text for guard in GUARDS}) == len(GUARDS) >= 20


def test_a_guard_that_no_test_misses_is_told(tmp_path):
    """On a tree of one line and one test, which looks at the first guard alone."""
    for name in ("bas", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "bas" / "a.py").write_text("guarded = True\nbeside = True\n")
    (tmp_path / "tests" / "test_a.py").write_text(
        "from pathlib import Path\n\n"
        "def test_it():\n    assert Path('bas/a.py').read_text().startswith('guarded = True')\n"
    )

    def outcome(text: str, test: str) -> str:
        return verdict(tmp_path, Guard("", "a.py", text, "mutated", f"test_a.py::{test}"))

    assert outcome("guarded = True", "test_it") == "caught"
    assert outcome("beside = True", "test_it") == "NOT CAUGHT"
    assert outcome("guarded = True", "test_none").startswith("NO TEST RAN")
    assert outcome("True", "test_it").startswith("NOT THERE ONCE")
    assert (tmp_path / "bas" / "a.py").read_text() == "guarded = True\nbeside = True\n"
