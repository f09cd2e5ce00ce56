"""Ways to make a training go wrong at a chosen step, and to make this machine refuse what it would otherwise allow."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

import pytest
from filelock import FileLock

import bas
from bas.runtime.signals import SIGNALS
from bas.training import loop as training
from tests.helpers.tiny import Bench

NOBODY = 65534  # the user who owns nothing
# Processes that run tests side by side share folders: one would close them while another has them open.
OPENING = FileLock(Path(gettempdir()) / f"bas-tests-opening-{os.getuid()}.lock")


def resume(bench: Bench, run: Path, **changes) -> Path:
    """Go on from the newest checkpoint."""
    return bas.train(bench.config(run, resume_from_checkpoint="latest", **changes))


def before_step(patch: pytest.MonkeyPatch, step: int, act: Callable) -> None:
    """Let `act(models, optimizer)` happen just before this step of the session, counted from 1."""
    original, steps = training.optimizer_step, iter(range(1, 1000))

    def stepping(models, batches, config, state):
        if next(steps) == step:
            act(models, state.optimizer)
        return original(models, batches, config, state)

    patch.setattr(training, "optimizer_step", stepping)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Within the block no file can grow beyond `room` bytes: the kernel refuses to write on, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Within the block anybody may enter a folder: it and all above it are open, as far as its owner owns them."""
    above = [place for place in (folder, *folder.parents) if place.owner() == folder.owner() and place.name]
    with OPENING:
        before = {place: place.stat().st_mode for place in above}
        for place, mode in before.items():
            place.chmod(mode | 0o755)
        try:
            yield
        finally:
            for place, mode in before.items():
                place.chmod(mode)


@contextmanager
def heard() -> Iterator[None]:
    """Within the block no signal that stops a training is ignored, as nohup or a shell's background lets some be."""
    deaf = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    for number in deaf:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in deaf:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Within the block root may read and write no more than anybody else."""
    if os.geteuid():
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
