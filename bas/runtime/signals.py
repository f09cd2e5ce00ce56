"""Signals that stop a training: it finishes its step, saves, and ends with the exit code 128 + signal."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

# Ctrl+C, the request of job schedulers before they kill, a lost terminal. Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(Exception):
    """A signal stopped the run after its state was saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def continued_by(how: str) -> Iterator[None]:
    """Within the block, the message of a run that a signal stopped ends with how it goes on."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(f"{stop}; {how}", stop.exit_code - 128) from None


class Interrupts:
    """Within the block, the first signal is recorded in `asked`; a second one ends the process at once.

    The second one damages nothing, because files are written as a whole or not at all. Only the main thread receives
    signals; in another thread the block does nothing. A signal that is ignored, as under nohup, stays ignored.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.record) for number in handled}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def record(self, number: int, frame: object) -> None:
        """Handle the first signal."""
        self.asked = signal.Signals(number)
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        log.warning("%s: stopping after this step; send it again to stop at once", self.asked.name)
