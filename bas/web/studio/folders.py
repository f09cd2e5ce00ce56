"""The files of a scene folder in one upload: a line that says so, their paths and sizes as JSON, then their bytes.

No path is trusted: a name is a plain one, alone or in a folder of an extra image (1, 2, ...). What bas does not read in
a scene is left out.
"""

import json
import re
from pathlib import Path

from bas.errors import InputError
from bas.io.images import SUFFIXES
from bas.web.studio.refusal import Refusal

FOLDER = b"bas scene\n"
MOST = 256  # files
PLAIN = re.compile(r"(?:[0-9]{1,4}/)?([\w()-][\w .()-]{0,99})")
READ = (*SUFFIXES, ".json", ".npy")
ADVICE = "a scene is a folder with img.jpg and mask0.png, mask1.png, ...; of photographs, drop the files alone"


def unpack_folder(data: bytes, folder: Path) -> None:
    """Write the files that a scene can have into a folder. InputError if it is not a scene, Refusal for wrong paths."""
    head, _, rest = data.removeprefix(FOLDER).partition(b"\n")
    rows = read_rows(head, len(rest))
    if len(rows) > MOST:
        raise InputError(f"{folder} holds more than {MOST} files: {ADVICE}")
    if not any(Path(name).stem.lower() == "img" for name, _ in rows):
        raise InputError(f"{folder} has no image named img.jpg, img.png, ...: {ADVICE}")
    start = 0
    for name, size in rows:
        if (match := PLAIN.fullmatch(name)) and Path(match[1]).suffix.lower() in READ:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(rest[start : start + size])
        start += size


def read_rows(head: bytes, total: int) -> list[tuple[str, int]]:
    """Paths and sizes of the files. Refusal for anything else, and for sizes that are not those of the bytes."""
    try:
        rows = [(name, size) for name, size in json.loads(head)]
    except (ValueError, TypeError, RecursionError):
        rows = []
    named = rows and all(type(name) is str and type(size) is int and size >= 0 for name, size in rows)
    if not named or sum(size for _, size in rows) != total or len({name for name, _ in rows}) != len(rows):
        raise Refusal(400, "the files of the folder are not as announced", "bad")
    return rows
