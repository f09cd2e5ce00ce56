"""A folder as a zip file, written while it is sent."""

import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

PART = 2**20  # bytes read at once


class Pipe:
    """A file that is only written to; what was written is taken out in between."""

    def __init__(self):
        self.parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        """Keep what is written."""
        self.parts.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing waits here."""

    def take(self) -> bytes:
        """Return all that was written since the last time."""
        data, self.parts = b"".join(self.parts), []
        return data


def zipped(folder: Path, paths: list[Path]) -> Iterator[bytes]:
    """Yield the parts of a zip of these files, named from the folder's parent on. It is not compressed."""
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as target:  # type: ignore[arg-type]
        for path in paths:
            entry = zipfile.ZipInfo.from_file(path, path.relative_to(folder.parent))
            with path.open("rb") as source, target.open(entry, "w", force_zip64=True) as sink:
                while part := source.read(PART):
                    sink.write(part)
                    yield pipe.take()
            yield pipe.take()
    yield pipe.take()


def files_below(folder: Path, leave_out: set[str]) -> list[Path]:
    """Return the ordinary files of a folder, without hidden ones, links, and the folders to leave out."""
    found = []
    for place, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith(".") and name not in leave_out)
        paths = [Path(place) / name for name in sorted(files) if not name.startswith(".")]
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    return found
