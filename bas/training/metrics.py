"""The metrics of a run: one JSON line per optimizer step in RUN/metrics.jsonl."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bas.io.files import naming


@dataclass(frozen=True)
class Row:
    """One step's numbers on their way from the device to the host."""

    head: dict[str, str | int | float]  # phase, step, learning rate
    names: tuple[str, ...]
    numbers: Tensor  # on the host; not valid before `arrived`
    arrived: torch.cuda.Event | None

    def read(self) -> dict:
        """Wait for the numbers and return the line's content. Work queued later on the device does not delay it."""
        if self.arrived:
            self.arrived.synchronize()
        return self.head | dict(zip(self.names, self.numbers.tolist(), strict=True))


class MetricsLog:
    """Collects the numbers of each step and appends them to a file.

    The copies to the host run beside the device's work, so no step waits for them.
    """

    def __init__(self, path: Path, length: int = 0):
        """Open `path` and cut it to `length` bytes: what follows belongs to steps that are done again."""
        self.path = path
        self.pending: list[Row] = []
        with path.open("ab") as file:
            file.truncate(min(length, path.stat().st_size))

    def add(self, phase: str, step: int, lr: float, values: dict[str, Tensor]) -> None:
        """Add the row of one step. values: 0-dim tensors by name"""
        numbers, arrived = torch.stack([value.detach().float() for value in values.values()]), None
        if numbers.is_cuda:
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(Row({"phase": phase, "step": step, "lr": lr}, tuple(values), numbers, arrived))

    def latest(self) -> dict | None:
        """Return the newest row whose numbers are on the host: on a GPU, which runs ahead, that of the step before."""
        lag = 2 if self.pending and self.pending[-1].arrived else 1
        return self.pending[-lag].read() if len(self.pending) >= lag else None

    def flush(self) -> list[dict]:
        """Append all pending rows to the file and return them, oldest first."""
        rows = [row.read() for row in self.pending]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.pending = []
        return rows

    @property
    def length(self) -> int:
        """Bytes on disk: a checkpoint stores it, and a resumed run cuts the file back to it."""
        return self.path.stat().st_size
