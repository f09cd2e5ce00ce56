"""PNG files without the notes and colour profiles that are too long for Pillow to unpack."""

import zlib
from io import BytesIO
from pathlib import Path
from typing import IO

from bas.errors import InputError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # bas applies no profile, and of the notes only the orientation
LONGEST = 2**20  # bytes of one note, unpacked: Pillow raises above it, since a bomb could stand there
ALL_NOTES = 2**25  # bytes of all notes together; Pillow raises above 2**26
MAX_CHUNKS = 2**18  # of one file: the largest image has 300 MB in chunks of 8 kB or more


def without_long_notes(path: Path) -> Path | IO[bytes]:
    """Return the path itself or, for a file with notes that Pillow does not unpack, the content without them.

    Raises InputError for a file of more chunks than an image has.
    """
    with path.open("rb") as file:
        if file.read(8) != SIGNATURE:
            return path
        long, total, chunks = [], 0, 0
        while len(head := file.read(8)) == 8:
            begin, length, kind = file.tell() - 8, int.from_bytes(head[:4]), head[4:]
            if (chunks := chunks + 1) > MAX_CHUNKS:
                raise InputError(f"{path} holds more than {MAX_CHUNKS} PNG chunks: it is damaged, save it again")
            if kind in NOTES:
                size = unpacked_size(kind, file.read(length)) if total <= ALL_NOTES else 0
                total += min(size, LONGEST)
                if size > LONGEST or total > ALL_NOTES:
                    long.append((begin, begin + 12 + length))
            file.seek(begin + 12 + length)  # behind the chunk's checksum
        if not long:
            return path
        file.seek(0)
        data = file.read()
    kept, at = [], 0
    for begin, end in long:
        kept.append(data[at:begin])
        at = end
    return BytesIO(b"".join([*kept, data[at:]]))


def unpacked_size(kind: bytes, content: bytes) -> int:
    """Count the bytes of a note, at most LONGEST + 1 of a compressed one."""
    _, _, text = content.partition(b"\0")  # behind the keyword
    packed = kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and text[:1] != b"\0")
    if kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]  # behind the language and the translated keyword
    elif packed:
        text = text[1:]  # behind the method of compression
    if not packed:
        return len(text)
    try:
        return len(zlib.decompressobj().decompress(text, LONGEST + 1))
    except zlib.error:  # Pillow leaves it out
        return 0
