"""What every test runs under: no network, a home folder of its own, and one thread for each process."""

import gc
import os
import random
import shutil
import socket
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

# Before PyTorch is imported: its threads are counted then. Workers run side by side, and inherit this from the process
# that starts them: with more than one thread each they wait for each other's cores, five times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HOME_VARIABLES = ("HOME", "BAS_CACHE", "HF_HOME")
LONGEST = {"test_page", "test_jobs", "test_simulated_gpu", "test_multi_scene", "test_dry_run", "test_kills"}
MOST_WORKERS = 8  # more would wait for the longest module, each with a PyTorch of its own in memory


def pytest_addoption(parser):
    """Flags to show that no test needs another to run before it, and what the tests say of each promise."""
    parser.addoption("--promises", action="store_true", help="end with the table of promises: cases tried, cases held")
    parser.addoption("--random_order", type=int, metavar="SEED", help="shuffle the modules, and the tests within each")


def pytest_xdist_auto_num_workers(config):
    """A worker for each core, up to eight, for the whole suite or a folder; none for single files or tests."""
    named = [str(arg).split("::")[0] for arg in config.args]
    return 0 if named and all(arg.endswith(".py") for arg in named) else min(MOST_WORKERS, os.cpu_count() or 1)


def pytest_report_header(config):
    """The seed, to repeat an order."""
    seed = config.getoption("random_order")
    return None if seed is None else f"order: --random_order {seed}"


def pytest_terminal_summary(terminalreporter, config):
    """The table of promises, as --promises asks. A test that could not be set up has not held."""
    if config.getoption("promises"):
        from tests.helpers.promises import table

        stats = terminalreporter.stats
        ran = {kind: stats.get(kind, []) for kind in ("passed", "failed", "error")}
        outcomes = {report.nodeid: kind for kind, reports in ran.items() for report in reports}
        terminalreporter.section("promises")
        for line in table(outcomes):
            terminalreporter.write_line(line)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Shuffle, as --random_order asks; else the longest modules (LONGEST) first, so that parallel workers end together.

    A module's tests stay together: what they share is made once.
    """
    seed = config.getoption("random_order")
    if seed is None:
        items.sort(key=lambda item: item.path.stem not in LONGEST)
    else:
        order = random.Random(seed)
        place = {path: order.random() for path in sorted({item.path for item in items})}
        items.sort(key=lambda item: (place[item.path], order.random()))


def pytest_configure(config):
    """Point home and cache folders at a fresh one before any test module, and what it imports, reads them."""
    gc.set_threshold(100_000, 20, 50)  # PyTorch's own objects are looked through too often else: a sixth of the time
    home = tempfile.mkdtemp(prefix="bas-tests-")
    os.environ.update(dict.fromkeys(HOME_VARIABLES, home))
    os.environ["BAS_CACHE"] = os.path.join(home, "bas-cache")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


def pytest_unconfigure():
    """Let the process end without a look through all its objects, which takes seconds."""
    gc.freeze()


class NetworkBlocked(RuntimeError):
    """A test tried to reach the network."""


@contextmanager
def blocked_network():
    """Any connection or name look-up fails at once, with an error that no code under test takes for its own."""

    def guard(original):
        def connect(self, address, *args):
            if self.family == getattr(socket, "AF_UNIX", None):
                return original(self, address, *args)
            raise NetworkBlocked(f"a test tried to connect to {address}")

        return connect

    def look_up(host, *args, **kwargs):
        raise NetworkBlocked(f"a test tried to look up {host}")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guard(getattr(socket.socket, name)))
        for name in ("getaddrinfo", "gethostbyname"):
            patch.setattr(socket, name, look_up)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_network_in_fixtures():
    """Holds while fixtures of whole modules are made."""
    with blocked_network():
        yield


@pytest.fixture(autouse=True)
def no_network():
    """The same once more for each test: other plugins that guard sockets restore them after every test."""
    with blocked_network():
        yield


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Nothing here survives a power cut, so no file is flushed to the disk: a large part of a short training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    """The tiny model, a scene and class images, shared by all tests: read only."""
    from tests.helpers.tiny import Bench

    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="session")
def whole(bench, tmp_path_factory) -> dict[str, str]:
    """The hashes of the standard run of 3 + 3 steps: what every run must end with that was disturbed."""
    import bas
    from tests.helpers.tiny import file_hashes

    return file_hashes(bas.train(bench.config(tmp_path_factory.mktemp("whole") / "run")))


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A tiny SD 1 folder that tests must not change."""
    from bas.pretrained.folder import save_model
    from tests.helpers.families import (
        tiny,  # not above: bas may be imported only once the home folder is the tests' own
    )

    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(tiny("sd1"), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of that folder, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
