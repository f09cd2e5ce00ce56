"""A progress line: redrawn on a terminal, a new line every ten seconds in a log file. Programs can watch it, too."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, TextIO

OFTEN = 0.5  # seconds between two reports to a watcher, and between two lines on a terminal


class Stage(NamedTuple):
    """How far a stage of the work is."""

    name: str
    done: int
    total: int
    unit: str
    left: float | None  # seconds, None before the first step
    values: dict[str, float]


watchers: list[Callable[[Stage], object]] = []  # of all stages in this process


@contextmanager
def watch(watcher: Callable[[Stage], object]) -> Iterator[None]:
    """Within the block, tell `watcher` how far each stage is: at its end, and twice a second at most."""
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)


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
        self.began = self.printed = self.told = time.monotonic()

    def due(self) -> bool:
        """Return whether the last line is older than half a second on a terminal, ten in a log; or a watcher waits."""
        return self._line_is_due() or bool(watchers and time.monotonic() - self.told >= OFTEN)

    def _line_is_due(self) -> bool:
        return time.monotonic() - self.printed >= (OFTEN if self.live else 10)

    def tell(self, done: int, total: int, unit: str, left: float | None, values: dict[str, float]) -> None:
        """Tell the watchers how far the stage is, if that is due."""
        if not watchers or (done < total and time.monotonic() - self.told < OFTEN):
            return
        self.told = time.monotonic()
        for watcher in watchers:
            watcher(Stage(self.stage, done, total, unit, left, values))

    def show(self, done: int, values: dict[str, float] | None = None) -> None:
        """Print the state after `done` of `total` steps, with named values."""
        now, finished = time.monotonic(), done >= self.total
        speed = (done - self.first) / max(now - self.began, 1e-9)
        seconds = (self.total - done) / speed if speed else None
        self.tell(done, self.total, self.unit, seconds, values or {})
        if not self.live and not finished and not self._line_is_due():
            return
        self.printed = now
        left = "?" if seconds is None else clock(seconds)
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
        now = time.monotonic()
        seconds = (self.total - self.counted) * (now - self.began) / self.counted
        self.tell(self.counted, self.total, "steps", seconds, {})
        if not (self._line_is_due() or (self.live and (first or saved))):
            return
        self.printed, left = now, clock(seconds)
        line = f"{self.stage} {self.done}/{self.images}  step {at}/{self.steps}  {left} left"
        self.write(line, finished=saved)  # saved images are printed next
