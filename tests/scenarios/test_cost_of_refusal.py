"""What a refusal costs: no hostile input takes a gigabyte or 20 seconds before it, each in a process of its own.

The process has imported what reads a scene or a model: what it then holds more counts, and what the imports alone take.
"""

import json
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from PIL import Image

from bas.config import TrainConfig
from bas.data.scene import Scene
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.pretrained.folder import build_on_meta
from bas.pretrained.loading import check_keys
from bas.runtime.memory import peak_bytes
from bas.training.resume import scene_state
from tests.data.test_scene_folder import BOMBS
from tests.helpers.families import change_json
from tests.helpers.kills import child
from tests.helpers.tiny import write_model, write_scene

SIDE = 9_990  # just below 100 megapixels
LARGE = {"size": [SIDE, SIDE], "counts": [5, SIDE * SIDE // 2, SIDE * SIDE - 5 - SIDE * SIDE // 2]}
IMPORTS = 185_000_000  # bytes of a process that has imported what reads a scene


def measured(read: Callable[[Path], object], folder: Path) -> tuple[str, int, float]:
    """The message of a refusal, with the memory in bytes and the CPU seconds that a process takes for it."""
    with TemporaryDirectory() as place:
        result = Path(place, "result.json")
        assert child(report, read, folder, result) == 0, "it was killed"
        return tuple(json.loads(result.read_text()))


def report(read: Callable[[Path], object], folder: Path, result: Path) -> None:
    """Read the folder in this process, and write down what that took."""
    start, before, message = time.process_time(), peak_bytes(), "accepted"
    try:
        read(folder)
    except InputError as error:
        message = str(error)
    except BaseException as error:
        message = f"{type(error).__name__}: {error}"
    result.write_text(json.dumps((message, IMPORTS + peak_bytes() - before, time.process_time() - start)))


def read_scene(folder: Path) -> Scene:
    """What every command that reads a scene begins with."""
    return load_scene(TrainConfig(instance_data_dir=str(folder)))


def read_scene_for_training(folder: Path) -> None:
    """Read a scene, hash it for a resume, and bring it to the size of the model."""
    scene = read_scene(folder)
    scene_state(scene)
    scene.tensors(512, 64)


def read_model(folder: Path) -> None:
    """Build a model without its weights, and compare the names of its tensors."""
    models, tensors = build_on_meta(folder)
    check_keys(models.unet, tensors["unet"], "the UNet")


def png(width: int, height: int, depth: int, colour: int, pixel: bytes, before: bytes = b"") -> bytes:
    """A PNG file of one colour, with further chunks before its pixels.

    Its rows are compressed once: after a full flush the same bytes stand for the same rows again.
    """
    row = b"\0" + pixel * width
    once, last = zlib.compressobj(1, wbits=-15), zlib.compressobj(1, wbits=-15)
    body = (once.compress(row) + once.flush(zlib.Z_FULL_FLUSH)) * (height - 1) + last.compress(row) + last.flush()
    checksum = 1
    for _ in range(height):
        checksum = zlib.adler32(row, checksum)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    pixels = chunk(b"IDAT", b"\x78\x01" + body + struct.pack(">I", checksum))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def pages(count: int) -> bytes:
    """A TIFF file of so many pages, all with the same pixels."""
    first = BytesIO()
    Image.new("L", (8, 8)).save(first, format="TIFF")
    data = bytearray(first.getvalue())
    (at,) = struct.unpack_from("<I", data, 4)
    (fields,) = struct.unpack_from("<H", data, at)
    entries = bytes(data[at : at + 2 + 12 * fields])
    struct.pack_into("<I", data, at + len(entries), len(data))
    for i in range(count):
        data += entries + struct.pack("<I", (len(data) + len(entries) + 4) * (i < count - 1))
    return bytes(data)


def array(shape: str, kind: str, size: int) -> bytes:
    """An .npy file of zeros, of so many bytes at most."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header + bytes(size)


# --- Scenes -----------------------------------------------------------------------------------------------------------

SCENES: dict[str, tuple[str, Callable[[], bytes], str]] = {  # a file of a scene, its content, the message
    **{f"text: {name}": (file, lambda text=text: text().encode(), said) for name, (file, text, said) in BOMBS.items()},
    "RLE of 100 megapixels": (
        "coco.json",
        lambda: json.dumps({"annotations": [{"segmentation": LARGE}, {"segmentation": LARGE, "area": 5}]}).encode(),
        "its area is 5: export it again",
    ),
    "transparent mask": ("mask0.png", lambda: png(SIDE, SIDE, 8, 6, b"\1\2\3\4"), "is nearly black"),
    "transparent mask of 16 bits": (
        "mask0.png",
        lambda: png(SIDE, SIDE, 16, 6, b"\1\2\3\4\5\6\7\0"),
        "is nearly black",
    ),
    "labels in colour": ("labels.png", lambda: png(SIDE, SIDE, 8, 2, b"\0\0\0"), "every pixel is 0, the background"),
    "labels of 16 bits": ("labels.png", lambda: png(SIDE, SIDE, 16, 0, b"\0\0"), "every pixel is 0, the background"),
    "a million empty notes": (
        "mask0.png",
        lambda: png(32, 32, 8, 0, b"\0", chunk(b"tEXt", b"") * 1_000_000),
        "holds more than 262144 PNG chunks",
    ),
    "2000 notes of a megabyte": (
        "mask0.png",
        lambda: png(32, 32, 8, 0, b"\0", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 9))) * 2000),
        "is black all over",
    ),
    "a note of 256 MB": (
        "mask0.png",
        lambda: png(32, 32, 8, 0, b"\0", chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28)))),
        "is black all over",
    ),
    "a TIFF of 60,000 pages": ("mask0.png", lambda: pages(60_000), "holds several frames"),
    "an array of 40 GB": ("masks.npy", lambda: array("(1, 100000, 100000)", "<f4", 0), "is not a readable .npy array"),
    "an array in brackets": ("masks.npy", lambda: array("(" * 30_000, "<f4", 0), "is not a readable .npy array"),
    "a million concepts": (
        "regions.json",
        lambda: json.dumps({"concepts": [{}] * 1_000_000}).encode(),
        "has 1000000 masks: keep those",
    ),
    "brackets": ("coco.json", lambda: b"[" * 10_000_000, "it is nested too deeply"),
}


@pytest.mark.parametrize("name", SCENES)
def test_a_scene(name, tmp_path):
    file, content, said = SCENES[name]
    folder = write_scene(tmp_path, concepts=0)
    (folder / file).write_bytes(content())
    check(read_scene, folder, said)


def test_a_transparent_image(tmp_path):
    (tmp_path / "img.png").write_bytes(png(SIDE, SIDE, 8, 6, b"\1\2\3\4"))
    Image.new("L", (32, 32)).save(tmp_path / "mask0.png")
    check(read_scene, tmp_path, "mask0.png is black all over")


def test_extra_images_are_counted_before_they_are_decoded(tmp_path):
    folder = write_scene(tmp_path, concepts=1)
    for i in range(1, 4):
        (folder / str(i)).mkdir()
        (folder / f"{i}/img.png").write_bytes(png(SIDE, SIDE, 8, 0, b"\0"))
        shutil.copy(folder / "mask0.png", folder / str(i))
    said = "has 3 extra images with 598 megapixels, masks included, bas reads 400: make them smaller, or keep fewer"
    message, peak, _ = measured(read_scene, folder)
    assert said in message
    assert peak < 4e8


def test_a_scene_that_is_read(tmp_path):
    """An image and its two masks take less than 9 bytes a pixel together.

    They are read, compared, hashed for a resume and brought to the size of the model.
    """
    side = SIDE // 2
    (tmp_path / "img.png").write_bytes(png(side, side, 8, 2, b"\1\2\3"))
    for i, box in enumerate([(9, 9, side // 3, side // 3), (side // 2, 9, side - 9, side // 2)]):
        mask = Image.new("L", (side, side))
        mask.paste(255, box)
        mask.save(tmp_path / f"mask{i}.png", compress_level=1)

    message, peak, _ = measured(read_scene_for_training, tmp_path)
    assert message == "accepted"
    assert peak - IMPORTS < 9 * side * side


# --- Models -----------------------------------------------------------------------------------------------------------


def many(count: int) -> list[str]:
    return [f"<t{i}>" for i in range(count)]


def write(file: str, content: Callable[[], object]) -> Callable[[Path], object]:
    """What writes a file of a model. Its content is made then: it is large, and other tests should not carry it."""
    return lambda model: (model / file).write_text(json.dumps(content()))


def added() -> dict[str, int]:
    return {name: i for i, name in enumerate(many(100_000), start=10_000)}


WIDE = {"block_out_channels": [8192] * 8, "layers_per_block": 16, "norm_num_groups": 1, "attention_head_dim": 1}
WIDE |= {"down_block_types": ["CrossAttnDownBlock2D"] * 8, "up_block_types": ["CrossAttnUpBlock2D"] * 8}
DEEP = {"hidden_size": 8192, "intermediate_size": 32_768, "num_hidden_layers": 100, "num_attention_heads": 1}
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "special tokens": (
        write("tokenizer/special_tokens_map.json", lambda: {"additional_special_tokens": many(100_000)}),
        "adds 100000 tokens: bas reads up to 1000",
    ),
    "special tokens within": (
        write("tokenizer/tokenizer_config.json", lambda: {"extra_special_tokens": {"more": many(100_000)}}),
        "tokenizer cannot be used",
    ),
    "added tokens": (write("tokenizer/added_tokens.json", added), "adds 100000 tokens: bas reads up to 1000"),
    "a decoder of added tokens": (
        write(
            "tokenizer/tokenizer_config.json",
            lambda: {"added_tokens_decoder": {i: {"content": t} for t, i in added().items()}},
        ),
        "adds 100000 tokens: bas reads up to 1000",
    ),
    "merges": (lambda m: (m / "tokenizer/merges.txt").write_text("a b\n" * 4_000_000), "tokenizer"),
    "a vocabulary of 900,000": (
        write("tokenizer/vocab.json", lambda: {str(i): i for i in range(900_000)}),
        "tokenizer",
    ),
    "a wide UNet": (lambda m: change_json(m / "unet/config.json", **WIDE), "does not hold the weights"),
    "a deep text encoder": (
        lambda m: change_json(m / "text_encoder/config.json", **DEEP),
        "belong to different models",
    ),
    "brackets": (lambda m: (m / "unet/config.json").write_text('{"a":' * 2_000_000), "it is nested too deeply"),
    "a billion timesteps": (
        lambda m: change_json(m / "scheduler/scheduler_config.json", num_train_timesteps=10**9),
        "expected a whole number from 1 to 100000",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("saved") / "model")


@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, saved, tmp_path):
    spoil, said = MODELS[name]
    shutil.copytree(saved, tmp_path / "m")
    spoil(tmp_path / "m")
    check(read_model, tmp_path / "m", said)


def check(read: Callable[[Path], object], folder: Path, said: str) -> None:
    """The refusal says this, and takes less than a gigabyte and 20 seconds."""
    message, peak, seconds = measured(read, folder)
    assert said in message
    assert peak < 1e9
    assert seconds < 20
