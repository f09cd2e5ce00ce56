"""Signals that ask a training to stop: it finishes its step, saves, and ends with the exit code shells expect."""

import logging
import signal
import threading

log = logging.getLogger(__name__)

# Ctrl+C, a polite end (schedulers send it before they kill), a lost terminal. Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(Exception):
    """A signal ended the run after its state was saved. The message says where to go on."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class Interrupts:
    """Within the block, a first signal is only noted in `asked`; a second one ends the process at once.

    A save is whole or absent (`bas.io.files.replacing`), so the second one harms nothing. Signals reach the main thread
    alone; in any other thread the block does nothing. One that is ignored already, as under nohup, stays ignored.
    """

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self.before = {number: signal.signal(number, self.note) for number in heeded}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        """The handler of a first signal."""
        self.asked = signal.Signals(number)
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        log.warning("%s: stopping after this step; once more to stop at once", self.asked.name)
