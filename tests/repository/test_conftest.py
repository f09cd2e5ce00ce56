"""What conftest.py promises to every other test."""

import ast
import os
import socket
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

from bas.io.files import cache_dir
from tests.conftest import (
    LONGEST,
    NetworkBlocked,
    pytest_collection_modifyitems,
    pytest_report_header,
    pytest_xdist_auto_num_workers,
)
from tests.helpers.promises import PROMISES, table

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("address", [("127.0.0.1", 80), ("203.0.113.1", 443)])
def test_no_connection_leaves_the_machine(address):
    with socket.socket() as plain, pytest.raises(NetworkBlocked):
        plain.connect(address)
    with socket.socket() as plain, pytest.raises(NetworkBlocked):
        plain.connect_ex(address)
    with pytest.raises(NetworkBlocked):
        socket.create_connection(address, timeout=1)


def test_no_name_is_looked_up():
    with pytest.raises(NetworkBlocked):
        socket.getaddrinfo("example.org", 443)


def test_home_and_cache_are_temporary():
    home = Path(os.environ["HOME"])
    assert home.name.startswith("bas-tests-")
    assert home in cache_dir().parents
    assert Path(os.environ["HF_HOME"]) == home


def test_a_random_order_is_repeatable_and_keeps_modules_together():
    def shuffled(seed):
        items = [SimpleNamespace(path=Path(f"test_{module}.py"), name=i) for module in "abc" for i in range(5)]
        pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: seed), items)
        return [(item.path.stem, item.name) for item in items]

    plain, first, second = shuffled(None), shuffled(1), shuffled(2)
    assert plain == sorted(plain)
    assert first == shuffled(1)
    assert sorted(first) == sorted(second) == plain
    assert len({tuple(plain), tuple(first), tuple(second)}) == 3
    assert len([module for module, _ in groupby(first, key=lambda item: item[0])]) == 3
    assert any([i for module, i in first if module == name] != list(range(5)) for name in ("test_a", "test_b"))


def test_the_longest_modules_come_first_in_their_order():
    """Each name is that of a module of its own: a renamed one would lose its place."""
    found = [path for path in sorted(TESTS.rglob("test_*.py")) if path.stem in LONGEST]
    assert sorted(path.stem for path in found) == sorted(LONGEST)
    items = [SimpleNamespace(path=path) for path in (Path("test_a.py"), *found, Path("test_z.py"))]
    pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name: None), items)
    assert [item.path for item in items] == [*found, Path("test_a.py"), Path("test_z.py")]


@pytest.mark.parametrize(
    ("args", "workers"),
    [([], 4), (["tests"], 4), (["tests/io"], 4), (["tests/a.py"], 0), (["tests/a.py::test_b", "tests/c.py"], 0)],
)
def test_single_files_are_run_without_workers(monkeypatch, args, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert pytest_xdist_auto_num_workers(SimpleNamespace(args=args)) == workers
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert pytest_xdist_auto_num_workers(SimpleNamespace(args=args)) == 2 * workers


def test_the_seed_of_a_random_order_is_told():
    assert pytest_report_header(SimpleNamespace(getoption=lambda name: 7)) == "order: --random_order 7"
    assert pytest_report_header(SimpleNamespace(getoption=lambda name: None)) is None


def test_promises_count_what_was_tried_and_what_held():
    outcomes = {
        "tests/pretrained/test_unsupported.py::test_a": "passed",
        "tests/pretrained/test_unsupported.py::test_b[x::y]": "failed",
        "tests/scenarios/test_bad_models.py::test_twenty_thousand_mutated_headers": "passed",
        "tests/models/test_vae.py::test_c": "error",
    }
    counts = {promise.strip(): counted for promise, *counted in (line.rsplit(maxsplit=2) for line in table(outcomes))}
    assert len(counts) == len(PROMISES) + 2
    bad_model = "a bad model is rejected without unpickling and in little memory; the error gives file and reason"
    assert counts[bad_model] == ["2", "1"]
    assert counts["20,000 mutated headers are rejected, or read as what they say"] == ["1", "1"]
    assert counts["all tests that ran"] == ["4", "2"]


def test_every_promise_has_tests():
    """By the names in the sources: renaming tests leaves no promise without one."""
    names = {
        f"tests/{path.relative_to(TESTS).as_posix()}::{node.name}": "passed"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert not [line for line in table(names)[1:] if line.split()[-1] == "0"]
