"""What conftest.py promises to every other test."""

import os
import socket
from pathlib import Path

import pytest
from conftest import NetworkBlocked

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
