"""Work shared among processes: which part of it is this one's, told by the environment that torchrun sets.

The parts are fixed by position, so nothing is negotiated; the processes speak to each other only at the end.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from bas.config import InputError

T = TypeVar("T")
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
        """The device asked for; when none is and processes share a machine's GPUs, the one of this process."""
        if name is not None or self.world == 1 or not torch.cuda.is_available():
            return name
        device = f"cuda:{self.local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
        return device

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Within the block `gather` works. One process alone needs no network."""
        if self.world == 1:
            yield
            return
        dist.init_process_group("gloo", timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def gather(self, mine: list[T]) -> list[T]:
        """The lists of all processes as one, in their order; waits for the last of them."""
        if self.world == 1:
            return mine
        lists: list = [None] * self.world
        dist.all_gather_object(lists, mine)
        return [item for part in lists for item in part]


def announce(line: str) -> None:
    """One line on standard output, in one write: the lines of several processes do not run into each other."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
