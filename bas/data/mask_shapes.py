"""Polygons and COCO run lengths: as masks, and checked against what their file says of them.

Coordinates count pixels of the upright image from its top left corner. Whole numbers lie between pixels, and a pixel
is inside a shape when its centre is.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from bas.errors import InputError
from bas.io.images import MAX_PIXELS

FARTHEST = 1e9  # pixels: beyond any image
MAX_POINTS = 100_000  # of one polygon
BOX_TOLERANCE = 0.05  # of a side, between a drawn mask and its stated box: tools round differently
AREA_TOLERANCE = 0.1


# --- Masks --------------------------------------------------------------------------------------------------------


def segmentation_mask(segmentation: Any, size: tuple[int, int], name: str) -> np.ndarray:
    """Return a COCO segmentation as a mask: the union of polygons, or run lengths in one of two forms. -> (H, W) bool

    size: (W, H) that polygons are rasterised at; run lengths state their own. Raises InputError for another form.
    """
    if isinstance(segmentation, dict):
        w, h = runs_size(segmentation, name)
        return decode_runs(segmentation.get("counts"), h, w, name)
    mask = np.zeros(size[::-1], dtype=bool)
    for points in polygons(segmentation, name):
        mask |= rasterise_polygon(points, size)
    return mask


def polygons(segmentation: Any, name: str) -> list[np.ndarray]:
    """Return the corners of a COCO segmentation's polygons, (n, 2) each. One polygon may come without a list."""
    if not isinstance(segmentation, list) or not segmentation:
        raise InputError(f"{name} has no segmentation: expected polygons or run lengths")
    if any(isinstance(part, dict) for part in segmentation):
        raise InputError(f"{name} has a list of objects as segmentation: give polygons, or run lengths without a list")
    if all(isinstance(part, list) and len(part) == 2 for part in segmentation):  # no polygon has two numbers
        return [read_points(segmentation, name)]
    alone = all(isinstance(value, (int, float)) for value in segmentation)
    return [read_points(points, name, flat=True) for points in ([segmentation] if alone else segmentation)]


def rasterise_polygon(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels whose centres lie inside a polygon by the even-odd rule. points: (n, 2) of x, y -> (H, W) bool

    An edge that crosses a row of centres flips every pixel to its right, and a pixel that is flipped an odd number of
    times is inside. A centre on an edge counts as right of it, so polygons that share an edge share no pixel.
    """
    w, h = size
    ends = np.roll(points, -1, axis=0)
    tops, bottoms = (
        np.clip(np.ceil(limit(points[:, 1], ends[:, 1]) - 0.5), 0, h).astype(int) for limit in (np.minimum, np.maximum)
    )
    flips = np.zeros((h, w + 1), dtype=bool)
    for i in np.flatnonzero(tops < bottoms):  # edges that cross rows of centres
        (x0, y0), (x1, y1) = points[i], ends[i]
        rows = np.arange(tops[i], bottoms[i])
        crossing = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        flips[rows, np.clip(np.ceil(crossing - 0.5), 0, w).astype(int)] ^= True
    return np.logical_xor.accumulate(flips[:, :w], axis=1)


def decode_runs(counts: Any, h: int, w: int, name: str, by_rows: bool = False) -> np.ndarray:
    """COCO's run lengths: pixels outside, inside, outside, ... down the columns, left to right. -> (h, w) bool

    counts: numbers, or COCO's compressed string. by_rows: along the rows instead, as other tools write them.
    """
    if isinstance(counts, str) and counts.startswith(("b'", 'b"')):
        raise InputError(f"{name}: its counts are Python bytes written as text: write counts.decode() into the file")
    runs = unpack_counts(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(_is_count(run) for run in runs):
        raise InputError(f"{name}: its counts are not run lengths: expected whole numbers, or COCO's compressed string")
    numbers = [int(run) for run in runs]
    if sum(numbers) != h * w:
        raise InputError(f"{name}: the run lengths add up to {sum(numbers)}, not to {h}x{w} pixels")
    flat = np.repeat(np.arange(len(numbers)) % 2 == 1, numbers)
    return flat.reshape(h, w) if by_rows else flat.reshape(w, h).T


def _is_count(run: Any) -> bool:
    """Return whether a run length is a whole number, maybe written as 7.0; true and false are pixels, not lengths."""
    return isinstance(run, (int, float)) and not isinstance(run, bool) and run >= 0 and run == run // 1


def unpack_counts(text: str) -> list[int] | None:
    """Return the run lengths in COCO's compressed string, None where it is broken.

    Six bits per character, from "0" on: five of the number, lowest first, and one for "goes on"; the number's highest
    bit is its sign. From the fourth run on, the string holds the difference to the run before the last.
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


# --- Checks -------------------------------------------------------------------------------------------------------


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the bounding box of a mask (H, W) bool: left, top, right, bottom. All 0 for an empty mask."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def contradiction(mask: np.ndarray, annotation: dict) -> str | None:
    """Return what a COCO annotation's own bbox or area says against its mask, (H, W) bool. None where they agree."""
    found, stated = mask_box(mask), _finite(annotation.get("bbox"), (4,))
    if stated is not None and (stated[2:] > 0).all():
        x, y, w, h = stated.tolist()
        if not _boxes_agree(found, (x, y, x + w, y + h)) and not _boxes_agree(found, (x, y, w, h)):  # or as corners
            return f"its mask lies in {list(found)}, but its bbox is {annotation['bbox']}"
    area = annotation.get("area")
    if not isinstance(area, (int, float)) or isinstance(area, bool) or not 0 < area < FARTHEST**2:
        return None
    drawn, (left, top, right, bottom) = int(mask.sum()), found
    of_box = (right - left) * (bottom - top)  # which some exports write as the area
    edge = right - left + bottom - top  # pixels that one rule counts as inside and another does not
    if any(abs(known - area) <= AREA_TOLERANCE * area + edge for known in (drawn, of_box)):
        return None
    return f"its mask holds {drawn} pixels, but its area is {area:g}"


def _boxes_agree(found: tuple[int, ...], stated: tuple[float, ...]) -> bool:
    """Return whether two boxes of left, top, right, bottom are equal up to rounding."""
    reach = max(2.0, BOX_TOLERANCE * max(stated[2] - stated[0], stated[3] - stated[1]))
    return all(abs(a - b) <= reach for a, b in zip(found, stated, strict=True))


def check_annotation(mask: np.ndarray, annotation: dict, name: str) -> str | None:
    """Compare a mask (H, W) bool with the bbox and area of its COCO annotation. -> a warning about polygons, or None

    Raises InputError for run lengths that contradict them, with the reading that would agree.
    """
    problem = contradiction(mask, annotation)
    segmentation = annotation.get("segmentation")
    if not problem or not isinstance(segmentation, dict):
        return f"{name}: {problem}: were they made for another size of the image?" if problem else None
    reading = next(
        (how for other, how in _other_readings(segmentation, name) if not contradiction(other, annotation)), ""
    )
    raise InputError(f"{name}: {problem}: {reading or 'export it again'}")


def _other_readings(segmentation: dict, name: str) -> Iterator[tuple[np.ndarray, str]]:
    """Masks that run lengths would give if they were written by other rules, each with what is to be changed."""
    w, h = runs_size(segmentation, name)
    for rows, columns in dict.fromkeys([(h, w), (w, h)]):
        for by_rows in (False, True):
            mask = decode_runs(segmentation.get("counts"), rows, columns, name, by_rows)
            hints = []
            if (rows, columns) != (h, w):
                hints.append(f"its size is [width, height], write [{rows}, {columns}]")
            if by_rows:
                hints.append("its run lengths go along the rows, COCO's go down the columns")
            if hints:
                yield mask, " and ".join(hints)
            yield (
                ~mask,
                " and ".join([*hints, "its run lengths are inverted, begin them with the pixels outside (0 if none)"]),
            )


def check_units(points: np.ndarray, size: tuple[int, int], name: str) -> str | None:
    """Tell pixels from fractions and percent. points: (n, 2), all of a file; size: (W, H) -> a warning, or None

    Raises InputError for coordinates that are fractions of the sides, as YOLO has them, or percent, as Label Studio.
    """
    w, h = size
    low, high = points.min(), points.max()
    broken = bool((points != np.round(points)).any())
    if low >= 0 and high <= 1 and min(size) > 2:
        raise InputError(f"{name} gives fractions of the sides, not pixels: multiply x by {w} and y by {h}")
    if low >= 0 and high <= 100 and min(size) > 150:
        if broken:
            raise InputError(
                f"{name} gives percent of the sides, not pixels: multiply x by {w / 100:g} and y by {h / 100:g}"
            )
        return f"{name} has no coordinate above 100, and the image is {w}x{h}: give pixels, not percent"
    margin = 1 + 0.02 * np.array(size)
    if (points < -margin).any() or (points > size + margin).any():
        return f"{name} reaches beyond the image of {w}x{h}: what lies outside is cut off"
    return None


# --- Values -------------------------------------------------------------------------------------------------------


def read_points(values: Any, name: str, flat: bool = False) -> np.ndarray:
    """Read the corners of a polygon, (n, 2) float64 with n >= 3, or raise InputError. flat: as x0, y0, x1, y1, ..."""
    count = len(values) // (2 if flat else 1) if isinstance(values, list) else 0
    if count > MAX_POINTS:
        raise InputError(f"{name} has {count} points: simplify it to {MAX_POINTS} or fewer")
    points = _finite(values, (-1, 2), flat)
    if points is None or len(points) < 3:
        raise InputError(f"{name}: {json.dumps(values)[:60]} is not three points [x, y] or more")
    return _near(points, values, name)


def read_numbers(values: Any, count: int, name: str) -> np.ndarray:
    """`count` finite numbers, as float64. Or an InputError."""
    numbers = _finite(values, (count,))
    if numbers is None:
        raise InputError(f"{name}: {json.dumps(values)[:60]} is not {count} numbers")
    return _near(numbers, values, name)


def read_size(width: Any, height: Any, name: str) -> tuple[int, int]:
    """Read the stated size of an image, (W, H). InputError for one that bas would not read."""
    w, h = (int(side) for side in read_numbers([width, height], 2, name))
    if w < 1 or h < 1 or w * h > MAX_PIXELS:
        raise InputError(f"{name} is {w}x{h} pixels: expected sides of 1 or more, and at most 100 megapixels")
    return w, h


def runs_size(segmentation: dict, name: str) -> tuple[int, int]:
    """Return the size that COCO run lengths state, as (W, H). InputError as `read_size`."""
    rows, columns = read_numbers(segmentation.get("size"), 2, name)
    return read_size(columns, rows, name)


def _finite(values: Any, shape: tuple[int, ...], flat: bool = False) -> np.ndarray | None:
    """Finite numbers of this shape, of which the first side may be -1 for any. None for other values."""
    try:
        array = np.array(values, dtype=np.float64)
        array = array.reshape(shape) if flat else array
    except (ValueError, TypeError, OverflowError):
        return None
    fits = array.ndim == len(shape) and all(side in (-1, n) for side, n in zip(shape, array.shape, strict=True))
    return array if fits and np.isfinite(array).all() else None


def _near(array: np.ndarray, values: Any, name: str) -> np.ndarray:
    """Return the array. InputError if it lies beyond any image."""
    if np.abs(array).max() > FARTHEST:
        raise InputError(f"{name}: {json.dumps(values)[:60]} lies beyond any image: give pixels")
    return array
