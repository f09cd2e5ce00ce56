"""What is read from a file or a folder again only when that has changed."""

import time
from collections.abc import Callable
from functools import lru_cache, wraps
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
SETTLED = 2 * 10**9  # nanoseconds after which another change gives another time, on any disk


def while_unchanged(read: Callable[[Path], Found]) -> Callable[[Path], Found]:
    """Keep what a function reads as long as its path has the same time and size.

    A folder's time changes with its entries.
    """

    @lru_cache(maxsize=4096)
    def kept(path: Path, _changed: int, _size: int) -> Found:
        return read(path)

    @wraps(read)
    def ask(path: Path) -> Found:
        stat = path.stat()
        if time.time_ns() - stat.st_mtime_ns < SETTLED:
            return read(path)
        return kept(path, stat.st_mtime_ns, stat.st_size)

    return ask
