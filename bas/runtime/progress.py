"""A progress line: redrawn on a terminal, a new line every ten seconds in a log file."""

import sys
import time
from contextlib import suppress
from typing import TextIO


def clock(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Counts the steps of one stage and prints its speed and the time left."""

    def __init__(self, stage: str, total: int, done: int = 0, unit: str = "steps", stream: TextIO | None = None):
        self.stage, self.total, self.first, self.unit = stage, total, done, unit
        self.stream = stream or sys.stderr  # None in a process without streams, such as a service
        self.live = self.stream is not None and not self.stream.closed and self.stream.isatty()
        self.began = self.printed = time.monotonic()

    def due(self) -> bool:
        """Whether the last line is older than half a second on a terminal, ten in a log file."""
        return time.monotonic() - self.printed >= (0.5 if self.live else 10)

    def show(self, done: int, values: dict[str, float] | None = None) -> None:
        """Print the state after `done` of `total` steps, with named values."""
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
        self.write("  ".join([*parts, f"{speed:.2f} {self.unit}/s", f"{left} left"]), finished)

    def write(self, line: str, finished: bool) -> None:
        """Print one line, over the one before on a terminal."""
        if self.stream is None:
            return
        with suppress(OSError, ValueError):  # the reader or the terminal is gone, the stream closed; the work goes on
            self.stream.write(f"\r{line}\033[K" if self.live else f"{line}\n")
            if self.live and finished:
                self.stream.write("\n")
            self.stream.flush()


class ImageProgress(Progress):
    """Counts the denoising steps of images and prints how many images are done, the step, and the time left.

    In a log file a job of less than ten seconds prints no line.
    """

    def __init__(self, images: int, steps: int, stream: TextIO | None = None, stage: str = "images", done: int = 0):
        super().__init__(stage, (images - done) * steps, stream=stream)
        self.images, self.steps, self.done = images, steps, done
        self.counted = self.at = 0

    def step(self, images: int) -> None:
        """Count one denoising step of a batch of that many images."""
        first, self.counted, self.at = not self.counted, self.counted + images, self.at + 1
        at, saved = self.at, self.at == self.steps
        if saved:
            self.done, self.at = self.done + images, 0
        if not (self.due() or (self.live and (first or saved))):
            return
        self.printed = time.monotonic()
        left = clock((self.total - self.counted) * (self.printed - self.began) / self.counted)
        line = f"{self.stage} {self.done}/{self.images}  step {at}/{self.steps}  {left} left"
        self.write(line, finished=saved)  # saved images are printed next
