"""Work shared among processes that torchrun starts: each takes the items at its own positions.

The processes exchange data only at the end of the work.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch
from torch.distributed.rendezvous import rendezvous

from bas.errors import InputError, RunError, shown

log = logging.getLogger(__name__)

T = TypeVar("T")
Gather = Callable[[list], list]
PATIENCE = timedelta(days=7)  # how long a process waits for the others at the end


@dataclass(frozen=True)
class Ranks:
    """The number of this process among `world`, over all machines, and on its own machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Read RANK, WORLD_SIZE and LOCAL_RANK, or take one process alone. InputError for values that do not fit."""
        names = {"rank": ("RANK", 0), "world": ("WORLD_SIZE", 1), "local": ("LOCAL_RANK", 0)}
        values = {}
        for field, (variable, default) in names.items():
            text = os.environ.get(variable, str(default))
            if not re.fullmatch("[0-9]{1,9}", text):
                raise InputError(f"the environment says {variable}={shown(text)}: expected a whole number")
            values[field] = int(text)
        if not values["rank"] < values["world"]:
            raise InputError(f"the environment says RANK={values['rank']} of WORLD_SIZE={values['world']}")
        return cls(**values)

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def part(self, items: list[T]) -> list[T]:
        """Return this process's share: every `world`-th item, starting at its own number."""
        return items[self.rank :: self.world]

    def device(self, name: str | None) -> str | None:
        """Return the device to use: the named one, or this process's own GPU where several share a machine."""
        if name not in (None, "cuda") or self.world == 1 or not torch.cuda.is_available():
            return name
        device = f"cuda:{self.local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        return device

    def conclude(self, failed: list[list[str]], total: int, what: str) -> None:
        """End a command some of whose items failed; `failed` holds a name and an error of each.

        The first process lists them and raises RunError; the others raise SystemExit.
        """
        if failed and not self.first:
            sys.exit(1)
        for name, error in failed:
            log.error("%s: %s", name, error)
        if failed:
            raise RunError(f"{len(failed)} of {total} {what} failed; the same command tries them again")

    @contextmanager
    def connected(self) -> Iterator[Gather]:
        """Connect the processes; yields a function that gathers one list of JSON values from each.

        The function waits for all processes and returns their lists, joined by their numbers. Every process
        calls it equally often. It uses torchrun's store: a process group would keep threads after the work.
        InputError where the environment does not say where the store is.
        """
        if self.world == 1:
            yield list
            return
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise InputError(
                f"the environment says WORLD_SIZE={self.world} without {' and '.join(missing)}: start the processes "
                "with torchrun, or unset WORLD_SIZE"
            )
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
    """Print one line in one write, so that lines of several processes are not mixed."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
