"""The standard streams of a command: closed ones, other encodings, and what happens when one cannot be written."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from bas.errors import printable

UNREAD = 141  # 128 + SIGPIPE


class Stream:
    """A standard stream that keeps the error of a write, as that of a full disk, so that the work goes on.

    Standard output raises when its reader has ended, because nobody waits for the work any more.
    """

    def __init__(self, stream: TextIO, raises: type[OSError] | tuple[()] = ()):
        self.stream, self.raises = stream, raises
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        """Take all else from the stream itself."""
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, and count it as written in any case."""
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        self._try(self.stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            self.error = self.error or error
            if isinstance(error, self.raises):
                raise

    def end(self) -> None:
        """Flush here, not when Python ends: there a failure is answered with a trace and an exit code of its own."""
        with suppress(OSError):
            self.flush()
        if self.error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())  # what is left to print has no reader


@contextmanager
def standard_streams() -> Iterator[Stream]:
    """Replace the standard streams within the block, and yield standard output. Closed ones become the null device.

    Without this the next file that is opened takes the number of a closed stream, and receives what is printed to it.
    Output escapes what its encoding cannot express.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  it stays open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # of a file that became a terminal since it was opened
                stream.reconfigure(errors="backslashreplace")
    output, messages = Stream(sys.stdout, raises=BrokenPipeError), Stream(sys.stderr)
    sys.stdout, sys.stderr = cast(TextIO, output), cast(TextIO, messages)
    try:
        yield output
    finally:
        output.end()
        messages.end()
        sys.stdout, sys.stderr = before


def print_error(message: object, before: str = "") -> None:
    """Print one line on standard error."""
    print(f"{before}bas: {printable(str(message))}", file=sys.stderr)
