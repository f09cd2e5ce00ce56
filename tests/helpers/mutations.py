"""Takes guards out one at a time, in a copy of the tree, and sees a test fail for each: a guard without one is none.

python -m tests.helpers.mutations            # all guards; prints a table and the count
python -m tests.helpers.mutations disk       # those whose description holds a word
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.guards import GUARDS, Guard

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("bas", "tests", "tools", "pyproject.toml", "setup.py", "README.md")
LINKED = ("weights",)  # large, and only read
LONGEST = 900  # seconds for one test


def copy_tree(target: Path) -> None:
    """All that the tests read."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target / name)
    for name in LINKED:
        (target / name).symlink_to(ROOT / name)


def run_tests(tree: Path, *tests: str) -> int | None:
    """pytest's exit code: 0 all passed, 1 some failed, others that none ran; None where it did not end."""
    words = [sys.executable, "-B", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    # Processes that a test starts import the copy as well, not an installed bas.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        paths = [f"tests/{test}" for test in tests]
        done = subprocess.run(
            [*words, *paths], cwd=tree, env=environment, capture_output=True, check=False, timeout=LONGEST * len(tests)
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def verdict(tree: Path, guard: Guard) -> str:
    """Take the guard out, run its test, and put it back."""
    path = tree / "bas" / guard.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(guard.text) != 1:
        return f"NOT THERE ONCE: {guard.text.strip()!r}"
    path.write_text(whole.replace(guard.text, guard.instead), encoding="utf-8")
    try:
        code = run_tests(tree, guard.test)
    finally:
        path.write_text(whole, encoding="utf-8")
    return {0: "NOT CAUGHT", 1: "caught", None: "DID NOT END"}.get(code, f"NO TEST RAN (pytest: {code})")


def main(words: list[str]) -> int:
    guards = [guard for guard in GUARDS if all(word in guard.what for word in words)]
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        if code := run_tests(tree, *sorted({guard.test for guard in guards})):
            print(f"the tests fail with all guards in their places (pytest: {code}): nothing can be told")
            return 1
        for guard in guards:
            outcome = verdict(tree, guard)
            caught += outcome == "caught"
            print(f"{guard.what:55s} {guard.file:20s} {outcome}", flush=True)
    print(f"{len(guards)} guards taken out, {caught} of them missed by a test that fails")
    return int(caught < len(guards))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
