"""PyTorch computes on the cores that nobody else needs; files play the system's statistics."""

import os

import pytest
import torch

from bas.runtime import threads

QUIET, BUSY, NICE = (10, 0, 0, 90), (95, 0, 5, 0), (0, 80, 0, 20)  # ticks: user, low priority, system, idle


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that sets what the cores did while they were watched; this process may use all but the last."""
    path = tmp_path / "stat"
    monkeypatch.setattr(threads, "STATISTICS", path)

    def write(*cores, times):
        total = [sum(values) for values in zip(*cores, strict=True)]
        rows = {"cpu": total} | {f"cpu{i}": ticks for i, ticks in enumerate(cores)}
        lines = [f"{name} {' '.join(str(1000 + times * value) for value in (*row, 0))}" for name, row in rows.items()]
        path.write_text("\n".join([*lines, "intr 5 0", "ctxt 7"]))

    def watch(*cores):
        monkeypatch.setattr(threads.time, "sleep", lambda seconds: write(*cores, times=2))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(cores) - 1)), raising=False)
        write(*cores, times=1)

    return watch


@pytest.mark.parametrize(
    ("cores", "before", "expected"),
    [
        ((QUIET, QUIET, BUSY), 2, 2),  # the last core is not this process's own
        ((BUSY, QUIET, QUIET), 2, 1),
        ((BUSY, BUSY, QUIET), 2, 1),
        ((QUIET, NICE, QUIET), 2, 1),  # what has a low priority may have a share of its own
        ((BUSY, QUIET, QUIET, QUIET, QUIET), 4, 3),
        ((QUIET, QUIET, QUIET, QUIET, QUIET), 2, 2),  # never more than before
    ],
)
def test_threads_are_as_many_as_cores_are_idle(machine, monkeypatch, caplog, cores, before, expected):
    asked = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: before)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    machine(*cores)
    with caplog.at_level("INFO"):
        threads.use_idle_cores()
    assert asked == [expected] * (expected < before)
    assert [f"on {expected} of {before} threads" in line for line in caplog.messages] == [True] * len(asked)


def test_without_statistics_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "STATISTICS", tmp_path / "nothing")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: pytest.fail("changed"))
    assert threads.idle_cores() is None
    threads.use_idle_cores()
