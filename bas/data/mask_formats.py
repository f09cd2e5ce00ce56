"""The mask sources of a scene folder, each read by one stated rule; docs/masks.md has them in a table.

A scene folder holds exactly one source: mask0.png, mask1.png, ...; cutout0.png, cutout1.png, ...; labels.png;
regions.json; coco.json; or masks.npy. Masks are read one at a time, after their number and size are checked.
"""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bas.data.mask_exports import other_file, unread_masks
from bas.data.mask_shapes import (
    check_annotation,
    check_units,
    polygons,
    rasterise_polygon,
    read_numbers,
    read_points,
    read_size,
    runs_size,
    segmentation_mask,
)
from bas.errors import InputError, did_you_mean
from bas.io.files import MAX_BYTES, human_size
from bas.io.images import (
    MAX_PIXELS,
    STRIP,
    from_inside,
    has_alpha,
    image_size,
    open_image,
    read_mask,
    read_orientation,
    to_array,
    to_levels,
)
from bas.io.json_files import read_content

log = logging.getLogger(__name__)

NUMBERED = re.compile(r"(mask|cutout)(0|[1-9][0-9]*)\.png")
NEARLY = re.compile(r"(mask|cutout)[ _-]?(\d+)\.(png|jpe?g|jfif|webp|bmp|tiff?|gif|avif|heic|heif)", re.IGNORECASE)
COPY = re.compile(r"(mask|cutout)[ _-]?\d+[\W_].*\.(png|jpe?g|webp|bmp|tiff?|gif)", re.IGNORECASE)  # mask0 (1).png
NAMES = ("handle", "word")  # of a concept, in scene.json and regions.json
MEANT = {"name", "label", "title", "category", "class", "token"}  # what other tools call these
MAX_MASKS = 64  # of one scene; a label map with more values was smoothed, or saved with loss
MAX_TOTAL = 200_000_000  # pixels of all masks together, 200 MB
UNDECIDED = (224, 224, 192)  # colour of the border that PASCAL VOC leaves undecided, palette entry 255
MAX_CLASSES = 64  # label maps whose other values are below that number classes, and 255 is none


@dataclass(frozen=True)
class FoundMask:
    """One concept's mask in its source. Nothing is rasterised or decoded before `values` is asked for."""

    name: str  # its place, for messages: "mask0.png", "labels.png value 3"
    read: Callable[[], np.ndarray]
    handle: str | None = None  # as the source names it, if it does
    word: str | None = None
    sized: bool = True  # whether the source states its own size
    file: Path | None = None  # the image file that it stands in, if it does

    @property
    def oriented(self) -> bool:
        """Whether the source states by an EXIF tag which way is up."""
        return self.file is not None and read_orientation(self.file) is not None

    @property
    def values(self) -> np.ndarray:
        """(H, W) uint8, 255 inside, at the source's own size."""
        return self.read()


# --- Sources ------------------------------------------------------------------------------------------------------


def list_sources(folder: Path) -> list[list[Path]]:
    """Return the files of every mask source in a folder, in the order of their numbers. Raises InputError for a gap."""
    numbered: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir():
        if found := read_number(path):
            kind, number = found
            numbered.setdefault(kind, {})[number] = path
    for kind, files in numbered.items():
        last = max(files)
        if len(files) <= last:
            missing = list(islice((f"{kind}{i}.png" for i in range(last) if i not in files), 5))
            first = "" if 0 in files else "; numbers begin with 0"
            raise InputError(f"{folder} has {kind}s up to {kind}{last}.png but lacks {', '.join(missing)}{first}")
    sources = [[files[i] for i in range(len(files))] for _, files in sorted(numbered.items(), reverse=True)]
    return sources + [[folder / name] for name in READERS if os.path.lexists(folder / name)]


def read_number(path: Path) -> tuple[str, int] | None:
    """("mask", 3) for mask3.png, None for another file. Raises InputError for what was meant so, as mask03.jpg."""
    if match := NUMBERED.fullmatch(path.name):
        return match[1], int(match[2])
    if match := NEARLY.fullmatch(path.name):
        raise InputError(f"{path} would not be read: name it {match[1].lower()}{int(match[2])}.png")
    return None


def mask_file(folder: Path) -> Path | None:
    """Return a file that makes a folder a scene: of any mask source, or misspelt so. None where there is none."""
    names = {*READERS, "scene.json"}
    paths = sorted(folder.iterdir())
    return next((p for p in paths if NEARLY.fullmatch(p.name) or p.name.lower() in names), None)


def find_source(folder: Path) -> list[Path]:
    """Find the files of a scene folder's one mask source. InputError for none, for two, or for a gap in numbers."""
    sources = list_sources(folder)
    if not sources:
        advice = unread_masks(folder) or other_file(folder) or "give one mask per concept, white where the concept is"
        raise InputError(f"{folder} has no mask0.png: {advice}")
    if len(sources) > 1:
        names = " and ".join(files[0].name for files in sources)
        raise InputError(f"{folder} has masks from {len(sources)} sources, {names}: keep one")
    for path in sorted(folder.iterdir()):
        if COPY.fullmatch(path.name) and not read_number(path) and not path.name.startswith("."):
            log.warning("%s is not read: masks are named mask0.png, mask1.png, ... and nothing else", path)
    return sources[0]


def read_source(files: list[Path], size: tuple[int, int]) -> list[FoundMask]:
    """Read the masks in the files that `find_source` found. size: (W, H) of the image, which shapes are rasterised at.

    Raises InputError for more masks, or larger ones, than a scene can hold.
    """
    if files[0].name in READERS:
        found = READERS[files[0].name](files[0], size)
    else:
        read = read_mask if files[0].name.startswith("mask") else read_cutout
        check_total(str(files[0].parent), len(files), max(map(image_size, files), key=lambda size: size[0] * size[1]))
        found = [mask_in_file(path, read) for path in files]
    check_total(str(files[0].parent), len(found), size)
    return found


def mask_in_file(path: Path, read: Callable[[Path], np.ndarray] = read_mask) -> FoundMask:
    """Return the one mask of an image file."""
    return FoundMask(path.name, partial(read, path), file=path)


def check_total(name: str, count: int, size: tuple[int, int]) -> None:
    """Raise InputError for more masks than a scene takes, or for more pixels than fit in memory. size: (W, H)"""
    w, h = size
    if count > MAX_MASKS:
        raise InputError(f"{name} has {count} masks: keep those of the concepts, {MAX_MASKS} at most")
    if count * w * h > MAX_TOTAL:
        limit = f"more than {MAX_TOTAL // 1_000_000} megapixels together"
        raise InputError(f"{name} has {count} masks of {w}x{h} pixels, {limit}: make them smaller, or keep fewer")


# --- Images and arrays --------------------------------------------------------------------------------------------


def read_cutout(path: Path) -> np.ndarray:
    """Read the alpha channel of a cut-out as its mask, (H, W) uint8. Its colours are not read."""
    image = open_image(path)
    if not has_alpha(image):
        raise InputError(f"{path} has no alpha channel: a cut-out is transparent where the concept is not")
    return to_array(image.convert("RGBA").getchannel("A"))


def read_labels(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """Read a label map: each of its values, palette entries or colours is a concept, in rising order.

    0, the first palette entry and black are the background. 255, the "undecided" of PASCAL VOC, is not a concept
    if the other values number classes or its colour is VOC's.
    """
    image = open_image(path)
    if image.mode in ("LA", "PA", "RGBA"):
        if image.getchannel("A").getextrema() != (255, 255):
            raise InputError(f"{path} has transparent pixels: save the label map without an alpha channel")
        image = image.convert(image.mode[:-1])
    if image.mode not in ("1", "L", "P", "RGB") and not image.mode.startswith("I"):
        raise InputError(f"{path} is an image of mode {image.mode}: a label map is grey, RGB or has a palette")
    image = image.convert("L") if image.mode == "1" else image
    labels, values = to_array(image), label_values(image)
    found = [value for value in values if value not in (0, (0, 0, 0))] if values else []
    if values is None or len(found) > MAX_MASKS:
        number = len(values) - (len(values) > len(found)) if values else f"more than {MAX_MASKS}"
        raise InputError(f"{path} holds {number} labels: was it smoothed, or saved with loss?")
    if (undecided := undecided_value(image, found)) is not None:
        log.warning("%s: %s is read as undecided, not as a concept", path, label_name(undecided))
        found.remove(undecided)
    if len(found) > 1 and len(found) == len(values) - (undecided is not None):
        log.warning("%s has no background, which is 0 or black: each of its values is a concept", path)
    if not found:
        raise InputError(f"{path} holds no label: every pixel is 0, the background")
    check_total(str(path), len(found), image.size)
    return [FoundMask(f"{path.name} {label_name(v)}", partial(_equal, labels, v), file=path) for v in found]


def label_values(image: Image.Image) -> list[Any] | None:
    """Return the values of a label map in rising order, colours as (r, g, b). None where they are far too many."""
    if image.mode.startswith("I"):
        return [int(value) for value in np.unique(to_array(image))]
    colours = image.getcolors(maxcolors=4 * MAX_MASKS)
    return sorted(value for _, value in colours) if colours else None


def undecided_value(image: Image.Image, found: list[Any]) -> Any:
    """Return the value of `found` that means "undecided" by the rule of PASCAL VOC, None where there is none."""
    others = [value for value in found if value not in (255, UNDECIDED)]
    if not others or len(others) == len(found):
        return None
    palette = image.getpalette() if image.mode == "P" else None
    in_voc_colour = image.mode == "RGB" or (palette or [])[3 * 255 : 3 * 256] == list(UNDECIDED)
    return found[-1] if in_voc_colour or max(others) < MAX_CLASSES else None


def label_name(value: Any) -> str:
    """Return a label for messages."""
    return "colour #{:02x}{:02x}{:02x}".format(*value) if isinstance(value, tuple) else f"value {value}"


def _equal(labels: np.ndarray, value: Any) -> np.ndarray:
    """Return where a label map (H, W) or (H, W, 3) has a value, as a mask."""
    if not isinstance(value, tuple):
        return from_inside(labels == value)
    red, green, blue = (labels[..., i] == part for i, part in enumerate(value))
    return from_inside(red & green & blue)


def read_array(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """masks.npy: (N, H, W), or (H, W) for one concept, of bool, of floats in 0..1 or of uint8 in 0..255."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a broken header makes NumPy raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "Python objects" in reason:
            reason = "it holds Python objects: save one array (concepts, rows, columns)"
        raise InputError(f"{path} is not a readable .npy array: {reason}") from error
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or not array.size:
        shape = getattr(array, "shape", "no single array")
        raise InputError(f"{path} is {shape}: expected (concepts, rows, columns)")
    masks = array[None] if array.ndim == 2 else array
    if masks.shape[:2] == size[::-1] and masks.shape[1:] != size[::-1]:
        raise InputError(f"{path} is (rows, columns, concepts): save numpy.moveaxis(masks, -1, 0)")
    if masks.shape[1] * masks.shape[2] > MAX_PIXELS:
        raise InputError(f"{path} is {array.shape}: more than 100 megapixels, make it smaller")
    check_total(str(path), len(masks), masks.shape[:0:-1])
    if array.dtype.kind not in "bf" and array.dtype != np.uint8:
        raise InputError(f"{path} holds {array.dtype}: expected bool, floats in 0..1, or uint8 in 0..255")
    full = 255 if array.dtype == np.uint8 else 1
    if full == 255 and array.max() == 1:
        log.warning("%s holds only the values 0 and 1 of 255: 1 is read as inside", path)
        full = 1
    if not (array.min() >= 0 and array.max() <= full):  # also false for not-a-number
        raise InputError(f"{path} holds values outside 0..1")
    return [FoundMask(f"{path.name}[{i}]", partial(_scaled, mask, full)) for i, mask in enumerate(masks)]


def _scaled(mask: np.ndarray, full: int) -> np.ndarray:
    """Return a mask (H, W) of 0..full as uint8, 255 for full."""
    values, rows = np.empty(mask.shape, np.uint8), max(STRIP // mask.shape[1], 1)
    for top in range(0, len(mask), rows):
        values[top : top + rows] = to_levels(mask[top : top + rows] / np.float32(full))
    return values


# --- Shapes in JSON -----------------------------------------------------------------------------------------------


def read_scene_json(path: Path) -> Any:
    """Read a scene's JSON file. Raises InputError for a file of many images, before it fills the memory."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is {human_size(path.stat().st_size)}: keep what belongs to this scene's image")
    return read_content(path)


def check_keys(concepts: list[dict], known: tuple[str, ...]) -> None:
    """Raise ValueError for a key that is likely one of `known`, misspelt or as other tools call it.

    Other keys are the user's own.
    """
    unnamed = not any(name in concept for concept in concepts for name in NAMES)
    for key in sorted({key for concept in concepts for key in concept} - {*known}):
        near = did_you_mean(key, known)
        if near or (unnamed and key in MEANT):
            raise ValueError(f"unknown {key}{near or '; did you mean handle, or word?'}")


def read_regions(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """regions.json: {"concepts": [{"handle", "word", and "polygon": [[x, y], ...] or "box": [x0, y0, x1, y1]}, ...]}"""
    found, shapes = [], []
    concepts = entries(read_scene_json(path), "concepts", path)
    check_total(str(path), len(concepts), size)
    try:
        check_keys(concepts, (*NAMES, "polygon", "box"))
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    for i, concept in enumerate(concepts):
        name = f"{path} concept {i}"
        if ("polygon" in concept) == ("box" in concept):
            raise InputError(f'{name} needs either "polygon": [[x, y], ...] or "box": [x0, y0, x1, y1]')
        if "box" in concept:
            x0, y0, x1, y1 = read_numbers(concept["box"], 4, name).tolist()
            if x0 >= x1 or y0 >= y1:
                raise InputError(f"{name}: the box {[x0, y0, x1, y1]} is empty: expected x0 < x1 and y0 < y1")
            points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
        else:
            points = read_points(concept["polygon"], name)
        shapes.append(points)
        handle, word = _text(concept, "handle", name), _text(concept, "word", name)
        draw = partial(_rasterised, points, size)
        found.append(FoundMask(f"{path.name} concept {i}", draw, handle, word, sized=False))
    _warn(check_units(np.concatenate(shapes), size, str(path)))
    return found


def _rasterised(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a polygon as a mask."""
    return from_inside(rasterise_polygon(points, size))


def read_coco(path: Path, size: tuple[int, int]) -> list[FoundMask]:
    """coco.json, one image's part of a COCO file: each annotation is a concept, its category the initial word."""
    content = read_scene_json(path)
    annotations = entries(content, "annotations", path)
    images = {str(annotation.get("image_id")) for annotation in annotations}
    if len(images) > 1:
        raise InputError(f"{path} annotates {len(images)} images: keep the annotations of this scene's")
    words: dict[str, str | None] = {}
    for row in entries(content, "categories", path, optional=True):
        number, word = str(row.get("id")), _text(row, "name", str(path))
        if words.setdefault(number, word) != word:
            raise InputError(f"{path} has two categories of the id {number}, {words[number]} and {word}: keep one")
    sized = False
    for row in entries(content, "images", path, optional=True):
        if str(row.get("id")) in images and "width" in row and "height" in row:
            size, sized = read_size(row["width"], row["height"], f"{path} image"), True
    check_total(str(path), len(annotations), size)
    _check_polygons(annotations, size, str(path))
    found = []
    for i, annotation in enumerate(annotations):
        runs = annotation["segmentation"] if isinstance(annotation.get("segmentation"), dict) else None
        if runs:
            check_total(str(path), len(annotations), runs_size(runs, f"{path} annotation {i}"))
        draw = partial(_annotated, annotation, size, f"{path} annotation {i}")
        word = words.get(str(annotation.get("category_id")))
        found.append(FoundMask(f"{path.name} annotation {i}", draw, word=word, sized=sized or bool(runs)))
    return found


def _check_polygons(annotations: list[dict], size: tuple[int, int], name: str) -> None:
    """Check the units of all polygons of a COCO file together."""
    found = [
        points
        for i, annotation in enumerate(annotations)
        if isinstance(annotation.get("segmentation"), list)
        for points in polygons(annotation["segmentation"], f"{name} annotation {i}")
    ]
    if found:
        _warn(check_units(np.concatenate(found), size, name))


def _annotated(annotation: dict, size: tuple[int, int], name: str) -> np.ndarray:
    """Return the mask of a COCO annotation, compared with its own bbox and area."""
    mask = segmentation_mask(annotation.get("segmentation"), size, name)
    _warn(check_annotation(mask, annotation, name))
    return from_inside(mask)


def _warn(message: str | None) -> None:
    if message:
        log.warning("%s", message)


def entries(content: Any, key: str, path: Path, optional: bool = False) -> list[dict]:
    """Return the list of objects under one key of a JSON file's content. An optional one may be missing."""
    rows = content.get(key, [] if optional else None) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not (rows or optional):
        raise InputError(f'{path} is not {{"{key}": [{{...}}, ...]}}')
    return rows


def _text(row: dict, key: str, name: str) -> str | None:
    """Return a text that may be missing."""
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise InputError(f'{name}: "{key}" is {value!r}, not a string')
    return value


READERS: dict[str, Callable[[Path, tuple[int, int]], list[FoundMask]]] = {
    "labels.png": read_labels,
    "regions.json": read_regions,
    "coco.json": read_coco,
    "masks.npy": read_array,
}
