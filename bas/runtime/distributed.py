"""Work shared among processes: which part of it is this one's, told by the environment that torchrun sets.

The parts are fixed by position, so nothing is negotiated; the processes speak to each other only at the end.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
from torch.distributed.rendezvous import rendezvous

from bas.errors import InputError, RunError

log = logging.getLogger(__name__)

T = TypeVar("T")
Gather = Callable[[list], list]
PATIENCE = timedelta(days=7)  # how long a process that is done waits for the others


@dataclass(frozen=True)
class Ranks:
    """This process among `world`: its number over all machines, and on its own machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """RANK, WORLD_SIZE and LOCAL_RANK; one process alone where they are not set. InputError for nonsense."""
        names = {"rank": ("RANK", 0), "world": ("WORLD_SIZE", 1), "local": ("LOCAL_RANK", 0)}
        values = {}
        for field, (variable, default) in names.items():
            text = os.environ.get(variable, str(default))
            if not text.isdecimal():
                raise InputError(f"the environment says {variable}={text!r}: expected a whole number")
            values[field] = int(text)
        if not values["rank"] < values["world"]:
            raise InputError(f"the environment says RANK={values['rank']} of WORLD_SIZE={values['world']}")
        return cls(**values)

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def part(self, items: list[T]) -> list[T]:
        """This process's share: every `world`-th item, from its own number on."""
        return items[self.rank :: self.world]

    def device(self, name: str | None) -> str | None:
        """The device asked for; where that is any GPU and processes share a machine's, the one of this process."""
        if name not in (None, "cuda") or self.world == 1 or not torch.cuda.is_available():
            return name
        device = f"cuda:{self.local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        return device

    def conclude(self, failed: list[list[str]], total: int, what: str) -> None:
        """End a command of whose work these items, a name and an error each, failed: the first process lists them.

        RunError if any did; in the other processes SystemExit, for one line is enough.
        """
        if failed and not self.first:
            sys.exit(1)
        for name, error in failed:
            log.error("%s: %s", name, error)
        if failed:
            raise RunError(f"{len(failed)} of {total} {what} failed; the same command tries them again")

    @contextmanager
    def connected(self) -> Iterator[Gather]:
        """Within the block the processes reach each other; it yields the function that gathers their lists.

        That waits for the last process and returns all their lists, of what JSON can hold, as one, in their order. Each
        process calls it as often as the others. They meet in torchrun's store alone: a process group would keep threads
        that outlive the work.
        """
        if self.world == 1:
            yield list
            return
        store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
        calls = count()

        def gather(mine: list) -> list:
            call = f"bas: call {next(calls)}"
            store.set(f"{call}, part {self.rank}", json.dumps(mine))
            parts = [json.loads(store.get(f"{call}, part {rank}")) for rank in range(self.world)]
            store.set(f"{call}, read by {self.rank}", "")
            if self.first:  # the store may live in this process: it stays until all have read
                store.wait([f"{call}, read by {rank}" for rank in range(self.world)])
            return [item for part in parts for item in part]

        yield gather


def announce(line: str) -> None:
    """One line on standard output, in one write: the lines of several processes do not run into each other."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
