"""Masks on their way between page and server: squares of 256x256 pixels, of which only those with something are sent.

b"BT1\\0", then width, height and the number of squares as uint32; for each its column and row as uint16, a length as
uint32, and so many bytes of raw deflate. All numbers are little-endian. A length of 0 is a square without a mask, a
length of 1 one that the mask fills. Squares at the right and at the bottom are whole; what lies outside is left out.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from bas.errors import InputError

SIDE = 256
MAGIC = b"BT1\0"
HEAD, ROW = struct.Struct("<4sIII"), struct.Struct("<HHI")


def pack(mask: np.ndarray) -> bytes:
    """Return the squares of a mask (H, W), uint8, that hold something."""
    height, width = mask.shape
    rows = []
    for y in range(0, height, SIDE):
        for x in range(0, width, SIDE):
            part = mask[y : y + SIDE, x : x + SIDE]
            if not part.any():
                continue
            square = np.zeros((SIDE, SIDE), np.uint8)
            square[: part.shape[0], : part.shape[1]] = part
            packer = zlib.compressobj(6, zlib.DEFLATED, -15)
            data = packer.compress(square.tobytes()) + packer.flush()
            rows.append(ROW.pack(x // SIDE, y // SIDE, len(data)) + data)
    return HEAD.pack(MAGIC, width, height, len(rows)) + b"".join(rows)


def unpack(data: bytes, size: tuple[int, int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield the squares of a message: column, row, and (256, 256) uint8. size: (W, H) that the mask must have.

    Everything is checked before a square is inflated, which gives 64 KiB at most. InputError for what is not as above.
    """
    width, height = size
    if len(data) < HEAD.size or HEAD.unpack_from(data)[:3] != (MAGIC, width, height):
        raise InputError(f"the mask is not one of {width}x{height} pixels: load the page again")
    across, down = -(-width // SIDE), -(-height // SIDE)
    count, at = HEAD.unpack_from(data)[3], HEAD.size
    if count > across * down:
        raise InputError("the mask has more squares than the image")
    for _ in range(count):
        if at + ROW.size > len(data):
            raise InputError("the mask is cut off")
        column, row, length = ROW.unpack_from(data, at)
        at += ROW.size
        if column >= across or row >= down or at + length > len(data):
            raise InputError("a square of the mask lies outside the image")
        yield column, row, _square(data[at : at + length])
        at += length
    if at != len(data):
        raise InputError("the mask is followed by something else")


def _square(data: bytes) -> np.ndarray:
    if len(data) < 2:
        return np.full((SIDE, SIDE), 255 * len(data), np.uint8)
    try:
        inflater = zlib.decompressobj(-15)
        values = inflater.decompress(data, SIDE * SIDE + 1)
    except zlib.error:
        values = b""
    if len(values) != SIDE * SIDE:
        raise InputError("a square of the mask is damaged")
    return np.frombuffer(values, np.uint8).reshape(SIDE, SIDE)


def lay(mask: np.ndarray, squares: Iterator[tuple[int, int, np.ndarray]]) -> None:
    """Put squares into a mask (H, W), in place."""
    for column, row, square in squares:
        part = mask[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        part[:] = square[: part.shape[0], : part.shape[1]]
