"""The warnings that one request of the page causes, among those of all threads."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hearing() -> Iterator[list[str]]:
    """A list that gathers the warnings of this thread: the page shows them where they belong."""
    lines, mine = [], threading.get_ident()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == mine:
                lines.append(record.getMessage())

    listener, log = Listener(logging.WARNING), logging.getLogger("bas")
    log.addHandler(listener)
    try:
        yield lines
    finally:
        log.removeHandler(listener)
