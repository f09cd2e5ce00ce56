"""docs/reading.md and docs/families.md name functions and tests, and the way to the loss: all of it is there."""

import ast
import re
from itertools import pairwise
from pathlib import Path

from bas.cli.entry import COMMANDS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
FAMILIES = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`([\w/]+\.py):(\w+)`", TEXT + FAMILIES)
MENTIONED = re.findall(r"`((?:bas|tests|tools)/[\w/]+\.\w+)`", TEXT + FAMILIES)


def names_in(path: str) -> set[str]:
    """The functions, classes and constants of a file."""
    found = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def imported_by(path: str) -> set[tuple[str, str]]:
    """What a file takes from others: (file, name)."""
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {(f"{node.module.replace('.', '/')}.py", alias.name) for node in froms for alias in node.names}


def test_every_row_leads_to_a_function_and_a_test():
    assert len(NAMED) > 60
    assert {f"{path}:{name}" for path, name in NAMED if name not in names_in(path)} == set()
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) > 25
    assert all("`bas/" in row or "the same" in row for row in rows if "?" not in row)


def test_files_are_there():
    assert {path for path in MENTIONED if not (ROOT / path).exists()} == set()


def test_the_way_from_the_command_to_the_loss_and_to_a_save():
    """Each file calls a function of the next: four files from the command to the loss, three more to the disk."""
    section = TEXT.split("## From the command to the loss and to a save")[1].split("\n## ")[0]
    loss, save = (re.findall(r"`([\w/]+\.py):(\w+)`", row) for row in section.splitlines() if row.startswith("| `"))
    assert [len({path for path, _ in way}) for way in (loss, save)] == [4, 4]
    assert save[0][0] in {path for path, _ in loss}
    assert "train" in COMMANDS  # its module is imported by name
    assert loss[1][0] == "bas/cli/commands/train.py"
    for (here, _), (there, name) in (*pairwise(loss[1:]), *pairwise(save)):
        assert here == there or (there, name) in imported_by(here)
