"""Image files that cameras and programs fill with more than an image."""

import struct
import time
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from bas.errors import InputError
from bas.io.images import image_size, open_image, read_image, read_mask, read_orientation
from bas.io.png import LONGEST, unpacked_size, without_long_notes
from tests.helpers.tiny import refused

LONG = 5 * 2**20  # bytes: Pillow unpacks one megabyte
PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*before: bytes, after: tuple[bytes, ...] = (), pixels: np.ndarray = PIXELS) -> bytes:
    """A PNG file with these chunks behind its header, or behind its pixels."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    data = buffer.getvalue()
    header, pixel, end = data[:33], data[33:-12], data[-12:]
    return b"".join([header, *before, pixel, *after, end])


def packed(size: int) -> bytes:
    return zlib.compress(bytes(range(97, 123)) * (size // 26 + 1))


NOTES = {
    "profile": lambda: chunk(b"iCCP", b"profile\0\0" + packed(LONG)),
    "note": lambda: chunk(b"zTXt", b"Comment\0\0" + packed(LONG)),
    "international note": lambda: chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed(LONG)),
    "bomb": lambda: chunk(b"zTXt", b"Comment\0\0" + packed(300 * 2**20)),
    "plain note": lambda: chunk(b"tEXt", b"Comment\0" + b"a" * 70 * 2**20),
    "many notes": lambda: chunk(b"tEXt", b"Comment\0" + b"a" * 900_000) * 80,
}


@pytest.fixture(params=NOTES, scope="module")
def note(request) -> bytes:
    """Each of the notes, of up to 72 MB, made once and only here."""
    return NOTES[request.param]()


@pytest.mark.parametrize("place", ["before", "after"])
def test_long_notes_and_profiles_are_left_out(note, place, tmp_path):
    path = tmp_path / "img.png"
    path.write_bytes(png(note) if place == "before" else png(after=(note,)))
    with pytest.raises(ValueError, match=r"MAX_TEXT|Too much memory"):
        Image.open(path).load()  # what it is about
    assert np.array_equal(np.asarray(read_image(path)), PIXELS)
    assert image_size(path) == (6, 4)


def test_short_notes_stay_and_long_ones_go(tmp_path):
    path = tmp_path / "img.png"
    short = PngImagePlugin.PngInfo()
    short.add_text("bas", '{"seed": 1}', zip=True)
    Image.fromarray(PIXELS).save(path, pnginfo=short)
    assert without_long_notes(path) == path
    data = path.read_bytes()
    path.write_bytes(data[:33] + NOTES["note"]() + data[33:])
    assert open_image(path).info.keys() >= {"bas"}
    assert open_image(path).info["bas"] == '{"seed": 1}'


def test_the_orientation_is_read_beside_a_long_profile(tmp_path):
    path, exif = tmp_path / "img.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(path, exif=exif)
    data = path.read_bytes()
    path.write_bytes(data[:33] + NOTES["profile"]() + data[33:])
    assert read_orientation(path) == 6
    assert np.array_equal(np.asarray(read_image(path)), np.rot90(PIXELS, -1))


def test_a_mask_with_a_long_note_is_read(tmp_path):
    path, values = tmp_path / "mask0.png", np.array([[0, 255], [255, 0]], np.uint8)
    path.write_bytes(png(NOTES["note"](), pixels=values))
    assert np.array_equal(read_mask(path), values)


def test_the_size_of_a_note_is_its_own_or_just_beyond_the_limit():
    assert unpacked_size(b"tEXt", b"Comment\0abc") == 3
    assert unpacked_size(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 1000)) == 1000
    assert unpacked_size(b"iTXt", b"k\0\0\0en\0k\0abcd") == 4
    assert unpacked_size(b"iTXt", b"k\0\1\0en\0k\0" + zlib.compress(b"a" * 50)) == 50
    assert unpacked_size(b"iCCP", b"p\0\0" + packed(LONG)) == LONGEST + 1
    assert unpacked_size(b"zTXt", b"Comment\0\0damaged") == 0
    assert unpacked_size(b"zTXt", b"") == 0


def test_a_png_of_very_many_chunks_is_refused_in_little_time(tmp_path):
    """Pillow would go through each of them."""
    path = tmp_path / "img.png"
    path.write_bytes(png(chunk(b"teSt", b"") * 300_000))
    start = time.process_time()
    with pytest.raises(InputError, match="holds more than 262144 PNG chunks: it is damaged, save it again"):
        open_image(path)
    assert time.process_time() - start < 5
    path.write_bytes(png(chunk(b"teSt", b"") * 1000))
    assert np.array_equal(np.asarray(read_image(path)), PIXELS)


def test_notes_beyond_the_limit_are_not_unpacked(tmp_path, monkeypatch):
    path, unpacked = tmp_path / "img.png", []
    path.write_bytes(png(chunk(b"zTXt", b"Comment\0\0" + packed(900_000)) * 200))
    monkeypatch.setattr("bas.io.png.unpacked_size", lambda *note: unpacked.append(note) or unpacked_size(*note))
    assert np.array_equal(np.asarray(read_image(path)), PIXELS)
    assert len(unpacked) == 38  # of 900 kB each: the first above 32 MB ends it


def test_the_pages_of_a_tiff_are_not_counted(tmp_path):
    """Pillow takes the square of their number in time: hours for the 200,000 pages of a small file."""
    path, first = tmp_path / "img.tiff", BytesIO()
    Image.fromarray(PIXELS).save(first, format="TIFF")
    data = bytearray(first.getvalue())
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    following, entries = at + 2 + 12 * count, bytes(data[at : at + 2 + 12 * count])
    struct.pack_into("<I", data, following, len(data))
    for i in range(100_000):
        data += entries + struct.pack("<I", (len(data) + len(entries) + 4) * (i < 99_999))
    path.write_bytes(data)
    start = time.process_time()
    with pytest.raises(InputError, match="holds several frames: save the one you mean as a still image"):
        open_image(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("end", [8, 12, 40, 60])
def test_a_cut_off_file_is_still_refused(end, tmp_path):
    path = tmp_path / "img.png"
    path.write_bytes(png(NOTES["note"]())[:end])
    with refused(f"{path} is not a readable PNG"):
        read_image(path)
