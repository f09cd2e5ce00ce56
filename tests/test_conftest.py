"""What conftest.py promises to every other test."""

import os
import socket
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import NetworkBlocked, pytest_collection_modifyitems, pytest_report_header

from bas.checkpoint import cache_dir


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


def test_the_seed_of_a_random_order_is_told():
    assert pytest_report_header(SimpleNamespace(getoption=lambda name: 7)) == "order: --random_order 7"
    assert pytest_report_header(SimpleNamespace(getoption=lambda name: None)) is None
