"""Masks from every usual kind of file, each read by one stated rule; docs/masks.md has them in a table.

A scene folder holds exactly one source: mask0.png, mask1.png, ...; cutout0.png, cutout1.png, ...; labels.png;
regions.json; coco.json; or masks.npy. Coordinates count pixels of the upright picture from its top left corner, so
that whole numbers lie between pixels, and a pixel is inside a shape when its centre is.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bas.errors import InputError
from bas.io.files import read_content
from bas.io.images import MAX_PIXELS, has_alpha, open_image, read_mask

log = logging.getLogger(__name__)

NUMBERED = re.compile(r"(mask|cutout)(0|[1-9][0-9]*)\.png")
NEARLY = re.compile(r"(mask|cutout)[ _-]?(\d+)\.(png|jpe?g|webp|bmp|tiff?)", re.IGNORECASE)
MAX_LABELS = 64  # a map with more values than that was smoothed, or saved with loss
FARTHEST = 1e9  # pixels: no picture reaches there


@dataclass(frozen=True)
class FoundMask:
    """One concept's mask as its source has it."""

    name: str  # where it stands, for messages: "mask0.png", "labels.png value 3"
    values: np.ndarray  # (H, W) float32 in [0, 1], at the source's own size
    handle: str | None = None  # as the source names it, if it does
    word: str | None = None


def list_sources(folder: Path) -> list[list[Path]]:
    """The files of every mask source in a folder, in the order of their numbers. Raises InputError for a gap."""
    numbered: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir():
        if found := read_number(path):
            kind, number = found
            numbered.setdefault(kind, {})[number] = path
    for kind, files in numbered.items():
        missing = [f"{kind}{i}.png" for i in range(max(files) + 1) if i not in files]
        if missing:
            last, lacked = f"{kind}{max(files)}.png", ", ".join(missing[:5])
            first = "" if 0 in files else "; numbers begin with 0"
            raise InputError(f"{folder} has {kind}s up to {last} but lacks {lacked}{first}")
    sources = [[files[i] for i in range(len(files))] for _, files in sorted(numbered.items(), reverse=True)]
    return sources + [[folder / name] for name in READERS if (folder / name).is_file()]


def read_number(path: Path) -> tuple[str, int] | None:
    """("mask", 3) for mask3.png, None for another file. Raises InputError for what was meant so, as mask03.jpg."""
    if match := NUMBERED.fullmatch(path.name):
        return match[1], int(match[2])
    if match := NEARLY.fullmatch(path.name):
        raise InputError(f"{path} would not be read: name it {match[1].lower()}{int(match[2])}.png")
    return None


def find_source(folder: Path) -> list[Path]:
    """The files of a scene folder's one mask source. Raises InputError for none, for two, or for a gap in numbers."""
    sources = list_sources(folder)
    if not sources:
        raise InputError(f"{folder} has no mask0.png: give one mask per concept, white where the concept is")
    if len(sources) > 1:
        names = " and ".join(files[0].name for files in sources)
        raise InputError(f"{folder} has masks from {len(sources)} sources, {names}: keep one")
    return sources[0]


def read_source(files: list[Path], size: tuple[int, int]) -> list[FoundMask]:
    """The masks in the files that `find_source` found. size: (W, H) of the picture, which shapes are drawn at."""
    if files[0].name in READERS:
        return READERS[files[0].name](files[0], size)
    read = read_mask if files[0].name.startswith("mask") else read_cutout
    return [FoundMask(path.name, read(path)) for path in files]


# --- Pictures and arrays ------------------------------------------------------------------------------------------


def read_cutout(path: Path) -> np.ndarray:
    """The alpha channel of a cut-out as its mask, (H, W) float32 in [0, 1]; the colours are not read."""
    picture = open_image(path)
    if not has_alpha(picture):
        raise InputError(f"{path} has no alpha channel: a cut-out is transparent where the concept is not")
    return np.asarray(picture.convert("RGBA").getchannel("A"), dtype=np.float32) / 255


def read_labels(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """A label map: each value but 0, palette entry but the first, or colour but black is a concept, in rising order."""
    picture = open_image(path)
    if picture.mode in ("LA", "PA", "RGBA"):
        if picture.getchannel("A").getextrema() != (255, 255):
            raise InputError(f"{path} has transparent pixels: save the label map without an alpha channel")
        picture = picture.convert(picture.mode[:-1])
    labels = np.asarray(picture)
    if labels.ndim == 3 and picture.mode == "RGB":
        labels = labels.astype(np.int64) @ (1 << 16, 1 << 8, 1)
    if labels.ndim != 2 or labels.dtype.kind not in "bui":
        raise InputError(f"{path} is a picture of mode {picture.mode}: a label map is grey, RGB or has a palette")
    found = [int(value) for value in np.unique(labels) if value]
    if not found:
        raise InputError(f"{path} holds no label: every pixel is 0, the background")
    if len(found) > MAX_LABELS:
        raise InputError(f"{path} holds {len(found)} labels: was it smoothed, or saved with loss?")
    name = "colour #{:06x}" if picture.mode == "RGB" else "value {}"
    return [FoundMask(f"{path.name} {name.format(v)}", (labels == v).astype(np.float32)) for v in found]


def read_array(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """masks.npy: (N, H, W), or (H, W) for one concept, of bool, of floats in 0..1 or of uint8 in 0..255."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header makes NumPy raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a readable .npy array: {reason}") from error
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or not array.size:
        shape = getattr(array, "shape", "no single array")
        raise InputError(f"{path} is {shape}: expected (concepts, rows, columns)")
    if array.shape[-1] * array.shape[-2] > MAX_PIXELS or len(array.reshape(-1, *array.shape[-2:])) > MAX_LABELS:
        raise InputError(f"{path} is {array.shape}: too large for the masks of one picture")
    if array.dtype.kind not in "bf" and array.dtype != np.uint8:
        raise InputError(f"{path} holds {array.dtype}: expected bool, floats in 0..1, or uint8 in 0..255")
    masks = np.atleast_3d(array.T).T.astype(np.float32)  # (H, W) -> (1, H, W)
    if array.dtype == np.uint8:
        if masks.max() == 1:
            log.warning("%s holds only the values 0 and 1 of 255: 1 is read as inside", path)
        else:
            masks /= 255
    if not (masks.min() >= 0 and masks.max() <= 1):  # also false for not-a-number
        raise InputError(f"{path} holds values outside 0..1")
    return [FoundMask(f"{path.name}[{i}]", mask) for i, mask in enumerate(masks)]


# --- Shapes in JSON -----------------------------------------------------------------------------------------------


def read_regions(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """regions.json: {"concepts": [{"handle", "word", and "polygon": [[x, y], ...] or "box": [x0, y0, x1, y1]}, ...]}"""
    found = []
    for i, concept in enumerate(entries(read_content(path), "concepts", path)):
        name = f"{path} concept {i}"
        if ("polygon" in concept) == ("box" in concept):
            raise InputError(f'{name} needs either "polygon": [[x, y], ...] or "box": [x0, y0, x1, y1]')
        if "box" in concept:
            x0, y0, x1, y1 = _numbers(concept["box"], (4,), name)
            if x0 >= x1 or y0 >= y1:
                raise InputError(f"{name}: the box {concept['box']} is empty: expected x0 < x1 and y0 < y1")
            points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        else:
            points = _numbers(concept["polygon"], (-1, 2), name)
        mask = rasterise_polygon(points, size).astype(np.float32)
        handle, word = _text(concept, "handle", name), _text(concept, "word", name)
        found.append(FoundMask(f"{path.name} concept {i}", mask, handle, word))
    return found


def read_coco(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """coco.json, one picture's part of a COCO file: each annotation is a concept, its category the initial word."""
    content = read_content(path)
    annotations = entries(content, "annotations", path)
    pictures = {str(annotation.get("image_id")) for annotation in annotations}
    if len(pictures) > 1:
        raise InputError(f"{path} annotates {len(pictures)} pictures: keep the annotations of this scene's")
    words = {
        str(row.get("id")): _text(row, "name", str(path)) for row in entries(content, "categories", path, optional=True)
    }
    for row in entries(content, "images", path, optional=True):
        if str(row.get("id")) in pictures and "width" in row and "height" in row:
            size = _size(row["width"], row["height"], f"{path} image")
    found = []
    for i, annotation in enumerate(annotations):
        mask = segmentation_mask(annotation.get("segmentation"), size, f"{path} annotation {i}").astype(np.float32)
        found.append(FoundMask(f"{path.name} annotation {i}", mask, word=words.get(str(annotation.get("category_id")))))
    return found


def segmentation_mask(shape: Any, size: tuple[int, int], name: str) -> np.ndarray:
    """COCO's three ways to write a mask: polygons, of which the union counts, and two of run lengths. (H, W) bool"""
    if isinstance(shape, dict):
        w, h = _size(*reversed(_numbers(shape.get("size"), (2,), name)), name)
        return decode_runs(shape.get("counts"), h, w, name)
    if not isinstance(shape, list) or not shape:
        raise InputError(f"{name} has no segmentation: expected polygons or run lengths")
    return np.logical_or.reduce(
        [rasterise_polygon(_numbers(points, (-1, 2), name, flat=True), size) for points in shape]
    )


def rasterise_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centres lie inside a polygon by the even-odd rule. points: (n, 2) of x, y -> (H, W) bool

    Each edge that crosses a row of centres flips everything to its right; what was flipped an odd number of times is
    inside. A point on an edge counts as right of it, so polygons that share an edge share no pixel.
    """
    w, h = size
    flips = np.zeros((h, w + 1), dtype=np.int32)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        top, bottom = np.clip(np.ceil(np.array(sorted((y0, y1))) - 0.5), 0, h).astype(int)
        if top < bottom:  # rows whose centres lie between the ends
            crossing = x0 + (np.arange(top, bottom) + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            flips[np.arange(top, bottom), np.clip(np.ceil(crossing - 0.5), 0, w).astype(int)] += 1
    return flips[:, :w].cumsum(axis=1) % 2 == 1


def decode_runs(counts: list[int] | str, h: int, w: int, name: str) -> np.ndarray:
    """COCO's run lengths: pixels outside, inside, outside, ... down the columns, left to right. -> (h, w) bool"""
    runs = unpack_counts(counts) if isinstance(counts, str) else counts
    whole = isinstance(runs, list) and all(isinstance(run, int) and run >= 0 for run in runs)
    if not whole or sum(runs) != h * w:
        raise InputError(f"{name}: the run lengths do not add up to {h}x{w} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(w, h).T


def unpack_counts(text: str) -> list[int] | None:
    """The run lengths in COCO's compressed string, None where it is broken.

    Six bits per character, from "0" on: five of the number, lowest first, and one for "goes on"; the number's highest
    bit is its sign. From the fourth run on, what is stored is the difference to the run before the last.
    """
    runs: list[int] = []
    number = shift = 0
    for code in (ord(character) - 48 for character in text):
        if not 0 <= code < 64 or shift > 60:
            return None
        number |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    return None if shift else runs


def entries(content: Any, key: str, path: Path, optional: bool = False) -> list[dict]:
    """The list of objects under one key of a JSON file's content. An optional one may be missing."""
    rows = content.get(key, [] if optional else None) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not (rows or optional):
        raise InputError(f'{path} is not {{"{key}": [{{...}}, ...]}}')
    return rows


def _numbers(values: Any, shape: tuple[int, ...], name: str, flat: bool = False) -> np.ndarray:
    """Finite numbers of a stated shape, as float64; points may come `flat`, as x0, y0, x1, y1, ..."""
    try:
        array = np.array(values, dtype=np.float64)
        array = array.reshape(shape) if flat else array
    except (ValueError, TypeError, OverflowError):
        array = np.array(np.nan)
    points = len(shape) == 2
    fits = array.ndim == len(shape) and array.shape[1:] == shape[1:] and (points or array.shape == shape)
    if not fits or not np.isfinite(array).all() or (points and len(array) < 3):
        expected = "three points [x, y] or more" if points else f"{shape[0]} numbers"
        raise InputError(f"{name}: {json.dumps(values)[:60]} is not {expected}")
    if np.abs(array).max() > FARTHEST:
        raise InputError(f"{name}: {json.dumps(values)[:60]} lies beyond any picture: give pixels")
    return array


def _size(width: Any, height: Any, name: str) -> tuple[int, int]:
    """The stated size of a picture, (W, H). InputError for one that bas would not read."""
    w, h = (int(side) for side in _numbers([width, height], (2,), name))
    if w < 1 or h < 1 or w * h > MAX_PIXELS:
        raise InputError(f"{name} is {w}x{h} pixels: expected sides of 1 or more, and at most 100 megapixels")
    return w, h


def _text(row: dict, key: str, name: str) -> str | None:
    """A text that may be missing."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f'{name}: "{key}" is {value!r}, not a text')
    return value


READERS: dict[str, Callable[[Path, tuple[int, int]], list[FoundMask]]] = {
    "labels.png": read_labels,
    "regions.json": read_regions,
    "coco.json": read_coco,
    "masks.npy": read_array,
}
