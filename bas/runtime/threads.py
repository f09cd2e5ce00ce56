"""The threads on which PyTorch computes on a CPU."""

import logging
import os
import time
from pathlib import Path

import torch

log = logging.getLogger(__name__)

STATISTICS = Path("/proc/stat")  # of Linux: what each core did since the start, in ticks
IDLE = (3, 4)  # of its kinds: idle, waiting for the disk. Work at low priority counts: it may have a fair share
WATCHED = 0.5  # seconds


def use_idle_cores() -> None:
    """Let PyTorch compute on as many threads as there are idle cores, at least one, if these are fewer. Log that.

    Threads wait for each other, so a core that does other work delays all. The order of sums depends on the number of
    threads: use this only for work that need not repeat bit for bit.
    """
    idle, before = idle_cores(), torch.get_num_threads()
    if idle is not None and (threads := max(1, round(idle))) < before:
        torch.set_num_threads(threads)
        log.info("%.1f cores are idle: PyTorch computes on %d of %d threads", idle, threads, before)


def idle_cores() -> float | None:
    """Count the cores of this process that do no other work, over half a second. None if the system does not say."""
    try:
        before = read_ticks()
    except (OSError, AttributeError):  # not Linux
        return None
    time.sleep(WATCHED)
    passed = {core: [b - a for a, b in zip(before[core], ticks, strict=True)] for core, ticks in read_ticks().items()}
    return sum(sum(ticks[kind] for kind in IDLE) / max(1, sum(ticks)) for ticks in passed.values())


def read_ticks() -> dict[str, list[int]]:
    """Read the ticks of each kind for each core that this process may use."""
    usable = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    rows = [line.split() for line in STATISTICS.read_text(encoding="ascii").splitlines()]
    return {name: [int(value) for value in values] for name, *values in rows if name in usable}
