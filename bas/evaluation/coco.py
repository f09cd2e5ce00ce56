"""The paper's data set from a COCO annotation file (Break-A-Scene, appendix): squares with distinct, large concepts.

The paper says what a scene has: a square of a COCO image with at least two segments of distinct "things" classes, each
at least 15 % of it, and six classes dropped. It does not say which square, nor which images its fifty were. Here the
square is as high or as wide as the image, the best of nine positions along its longer side (`choose_square`), and
images come in an order given by hashes of the seed and their ids, so that one seed means the same scenes anywhere.
"""

import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from bas.config import CocoConfig
from bas.data.mask_formats import FoundMask, entries
from bas.data.mask_shapes import check_annotation, segmentation_mask
from bas.data.scene_folder import warn_if_turned
from bas.errors import InputError, check_positive
from bas.io.images import MAX_PIXELS, read_image, read_orientation, save_image
from bas.io.json_files import read_content, write_json

log = logging.getLogger(__name__)

PLACES = 9  # of the square, at even distances along the longer side, both ends among them
ROUNDING = 0.9  # a stated area may be so much smaller than the pixels drawn
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Segment:
    """One concept of a scene."""

    annotation: int | str | None  # its id
    word: str  # its class
    mask: np.ndarray  # (s, s) bool, within the square

    @property
    def share(self) -> float:
        """The share of the square that it covers."""
        return float(self.mask.mean())


@dataclass(frozen=True)
class Choice:
    """One scene: an image, the square (left, top, right, bottom) to crop, and its concepts, largest first."""

    row: dict[str, Any]  # its row among the file's images
    box: tuple[int, int, int, int]
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Annotations:
    """The content of a COCO file, by id."""

    path: Path
    images: dict[str, dict]
    words: dict[str, str]  # names of the "things" classes that are not dropped, by category id
    by_image: dict[str, list[dict]]  # annotations without crowds


def read_annotations(path: Path, dropped: tuple[str, ...]) -> Annotations:
    """Read an annotation file without its crowds, stuff and dropped classes. Raises InputError for another format."""
    content = read_content(path, math.inf)  # annotations of thousands of images
    words = {
        str(row.get("id")): row["name"]
        for row in entries(content, "categories", path)
        if isinstance(row.get("name"), str) and row.get("isthing", 1) and row["name"] not in dropped
    }
    images = {}
    for i, row in enumerate(entries(content, "images", path)):
        sides = [check_positive(f"{path} image {i}: {name}", row.get(name), MAX_PIXELS) for name in ("width", "height")]
        if sides[0] * sides[1] > MAX_PIXELS or not isinstance(row.get("file_name"), str):
            raise InputError(f"{path} image {i} has no file_name, or more than 100 megapixels")
        name = PurePath(row["file_name"])
        if name.is_absolute() or ".." in name.parts:
            raise InputError(f"{path} image {i}: {row['file_name']!r:.60} leads out of the folder of images")
        images[str(row.get("id"))] = row
    by_image: dict[str, list[dict]] = {}
    for row in entries(content, "annotations", path):
        if str(row.get("category_id")) in words and not row.get("iscrowd"):
            by_image.setdefault(str(row.get("image_id")), []).append(row)
    if unknown := by_image.keys() - images.keys():
        raise InputError(f"{path} annotates image {min(unknown)}, which is not among its images")
    return Annotations(path, images, words, by_image)


def choose_scenes(annotations: Annotations, config: CocoConfig) -> list[Choice]:
    """Choose the first scenes that keep the rules, in the seed's order. Raises InputError where there is none."""
    order = sorted(annotations.by_image, key=lambda image: hashlib.sha256(f"{config.seed}:{image}".encode()).digest())
    chosen: list[Choice] = []
    for image in order:
        if len(chosen) == config.scenes:
            break
        if choice := choose_square(annotations, image, config):
            chosen.append(choice)
    if not chosen:
        raise InputError(f"{annotations.path} has no image that keeps the rules: lower --min_share or --min_things")
    if len(chosen) < config.scenes:
        log.warning("%s has only %d scenes that keep the rules", annotations.path, len(chosen))
    return chosen


def choose_square(annotations: Annotations, image: str, config: CocoConfig) -> Choice | None:
    """Choose the square of an image with the most segments that keep the rules; None where too few do.

    Of equals, the one whose segments cover most comes first, then the one nearest to the middle, then the first. Of two
    segments of one class the larger is the concept.
    """
    row = annotations.images[image]
    found = list(large_annotations(annotations, image, config))
    if len({word for _, word in found}) < config.min_things:
        return None
    masks = [(segment.get("id"), word, rasterise_mask(annotations.path, segment, row)) for segment, word in found]
    best, best_rank = None, None
    for box, off_centre in squares(row["width"], row["height"]):
        left, top, right, bottom = box
        largest: dict[str, Segment] = {}
        for identity, word, mask in masks:
            segment = Segment(identity, word, mask[top:bottom, left:right])
            if segment.share >= config.min_share and (word not in largest or segment.share > largest[word].share):
                largest[word] = segment
        segments = sorted(largest.values(), key=lambda segment: -segment.share)[: config.max_things]
        rank = len(segments), round(sum(segment.share for segment in segments), 9), -off_centre
        if len(segments) >= config.min_things and (best_rank is None or rank > best_rank):
            best, best_rank = Choice(row, box, tuple(segments)), rank
    return best


def large_annotations(annotations: Annotations, image: str, config: CocoConfig) -> Iterator[tuple[dict, str]]:
    """Yield an image's annotations that can be large enough by their stated area, each with its class."""
    row = annotations.images[image]
    least = ROUNDING * config.min_share * min(row["width"], row["height"]) ** 2
    for segment in annotations.by_image[image]:
        area = segment.get("area")
        if not isinstance(area, (int, float)) or area >= least:
            yield segment, annotations.words[str(segment["category_id"])]


def rasterise_mask(path: Path, segment: dict, row: dict) -> np.ndarray:
    """Rasterise an annotation's mask, (H, W) bool, at its image's stated size. Raises InputError for another size."""
    name, size = f"{path} annotation {segment.get('id')}", (row["width"], row["height"])
    mask = segmentation_mask(segment.get("segmentation"), size, name)
    check_annotation(mask, segment, name)
    if mask.shape != size[::-1]:
        raise InputError(f"{name} is {mask.shape[1]}x{mask.shape[0]}, its image {size[0]}x{size[1]}")
    return mask


def squares(width: int, height: int) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """Yield the positions of the largest square, (left, top, right, bottom), and how far each is from the middle."""
    side, room = min(width, height), abs(width - height)
    for offset in sorted({round(i * room / (PLACES - 1)) for i in range(PLACES)}):
        left, top = (offset, 0) if width > height else (0, offset)
        yield (left, top, left + side, top + side), abs(2 * offset - room)


def write_scenes(
    annotations: Annotations, chosen: list[Choice], images: Path, folder: Path, config: CocoConfig
) -> Path:
    """Write a scene folder for each, named by its image's id, and the manifest, whose path is returned.

    Raises InputError before anything is written where images are missing, and for one of another size.
    """
    missing = [choice.row["file_name"] for choice in chosen if not (images / choice.row["file_name"]).is_file()]
    if missing:
        raise InputError(f"{images} lacks {len(missing)} of {len(chosen)} images, {missing[0]} first")
    for choice in chosen:
        write_scene(choice, images, folder / scene_name(choice))
    rows = [
        {
            "scene": scene_name(choice),
            "image_id": choice.row["id"],
            "file_name": choice.row["file_name"],
            "square": choice.box,
            "concepts": [
                {"annotation_id": segment.annotation, "word": segment.word, "share": round(segment.share, 4)}
                for segment in choice.segments
            ],
        }
        for choice in chosen
    ]
    write_json(folder / MANIFEST, {"annotations": annotations.path.name, "rules": asdict(config), "scenes": rows})
    return folder / MANIFEST


def scene_name(choice: Choice) -> str:
    """Return the image's id, padded as in COCO's file names."""
    identity = choice.row["id"]
    return f"{identity:012d}" if isinstance(identity, int) else hashlib.sha256(str(identity).encode()).hexdigest()[:12]


def write_scene(choice: Choice, images: Path, folder: Path) -> None:
    """Write img.png, mask0.png, ... and scene.json, whose words are the class names."""
    path = images / choice.row["file_name"]
    image = read_image(path)
    if image.size != (choice.row["width"], choice.row["height"]):
        stated = f"{choice.row['width']}x{choice.row['height']}"
        raise InputError(f"{path} is {image.width}x{image.height}, but annotated at {stated}: it is another image")
    masks = [FoundMask(f"annotation {s.annotation}", s.mask.copy) for s in choice.segments]
    warn_if_turned(path, image.size, read_orientation(path), masks)
    folder.mkdir(parents=True)
    save_image(image.crop(choice.box), folder / "img.png")
    for i, segment in enumerate(choice.segments):
        save_image(Image.fromarray(segment.mask.astype(np.uint8) * 255), folder / f"mask{i}.png")
    concepts = [{"handle": f"<asset{i}>", "word": segment.word} for i, segment in enumerate(choice.segments)]
    write_json(folder / "scene.json", {"concepts": concepts})
