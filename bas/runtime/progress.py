"""One line that tells how far a run is: redrawn on a terminal, now and then a new line in a log file."""

import sys
import time
from contextlib import suppress
from typing import TextIO


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Counts the steps of one stage and prints speed and time left, measured since the stage began."""

    def __init__(self, stage: str, total: int, done: int = 0, unit: str = "steps", stream: TextIO | None = None):
        self.stage, self.total, self.first, self.unit = stage, total, done, unit
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.began = self.printed = time.monotonic()

    def due(self) -> bool:
        """Whether the last line is old: half a second on a terminal, ten in a log file."""
        return time.monotonic() - self.printed >= (0.5 if self.live else 10)

    def show(self, done: int, values: dict[str, float] | None = None) -> None:
        """Print the state after `done` of `total` steps, with named values beside it."""
        now, finished = time.monotonic(), done >= self.total
        if not self.live and not finished and not self.due():
            return
        self.printed = now
        speed = (done - self.first) / max(now - self.began, 1e-9)
        left = clock((self.total - done) / speed) if speed else "?"
        parts = [
            f"{self.stage} {done}/{self.total}",
            *(f"{name} {value:.4f}" for name, value in (values or {}).items()),
        ]
        line = "  ".join([*parts, f"{speed:.2f} {self.unit}/s", f"{left} left"])
        with suppress(OSError):  # nobody reads on, or the terminal is gone; the work goes on
            self.stream.write(f"\r{line}\033[K" if self.live else f"{line}\n")
            if self.live and finished:
                self.stream.write("\n")
            self.stream.flush()
