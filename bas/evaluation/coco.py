"""The paper's data set from a COCO annotation file (Break-A-Scene, appendix): squares with distinct, large things.

The paper says what a scene has: a square of a COCO picture with at least two segments of distinct things classes, each
at least 15 % of it, and six classes dropped. It doesn't say which square, nor which pictures its fifty were. Here the
square is as high or as wide as the picture, the best of nine places along its longer side (`choose_square`), and the
pictures come in an order that hashes of the seed and their ids give, so that one seed means the same scenes anywhere.
"""

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from bas.config import CocoConfig
from bas.data.mask_formats import entries
from bas.data.mask_shapes import segmentation_mask
from bas.errors import InputError, check_positive
from bas.io.files import read_content, write_json
from bas.io.images import MAX_PIXELS, read_image, save_image

log = logging.getLogger(__name__)

PLACES = 9  # of the square, at even distances along the longer side, both ends among them
ROUNDING = 0.9  # a stated area may be so much smaller than the pixels drawn
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Thing:
    """One concept of a scene."""

    annotation: int | str  # its id
    word: str  # its class
    mask: np.ndarray  # (s, s) bool, within the square

    @property
    def share(self) -> float:
        """Of the square that it covers."""
        return float(self.mask.mean())


@dataclass(frozen=True)
class Choice:
    """One scene: a picture, the square (left, top, right, bottom) to cut from it, and the concepts, largest first."""

    picture: dict[str, Any]  # its row among the file's images
    box: tuple[int, int, int, int]
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Annotations:
    """What a COCO file says, by id."""

    path: Path
    images: dict[str, dict]
    words: dict[str, str]  # classes of things, those that are not dropped, by category id
    by_image: dict[str, list[dict]]  # annotations of single things


def read_annotations(path: Path, dropped: tuple[str, ...]) -> Annotations:
    """Read an annotation file, without its crowds, stuff and dropped classes. InputError where it isn't COCO's."""
    content = read_content(path)
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
            raise InputError(f"{path} image {i}: {row['file_name']!r:.60} leads out of the folder of the pictures")
        images[str(row.get("id"))] = row
    by_image: dict[str, list[dict]] = {}
    for row in entries(content, "annotations", path):
        if str(row.get("category_id")) in words and not row.get("iscrowd"):
            by_image.setdefault(str(row.get("image_id")), []).append(row)
    if unknown := by_image.keys() - images.keys():
        raise InputError(f"{path} annotates picture {min(unknown)}, which is not among its images")
    return Annotations(path, images, words, by_image)


def choose_scenes(annotations: Annotations, config: CocoConfig) -> list[Choice]:
    """The first scenes that keep the rules, in the seed's order. InputError when there is none, a warning for few."""
    order = sorted(annotations.by_image, key=lambda image: hashlib.sha256(f"{config.seed}:{image}".encode()).digest())
    chosen: list[Choice] = []
    for image in order:
        if len(chosen) == config.scenes:
            break
        if choice := choose_square(annotations, image, config):
            chosen.append(choice)
    if not chosen:
        raise InputError(f"{annotations.path} has no picture that keeps the rules: lower --min_share or --min_things")
    if len(chosen) < config.scenes:
        log.warning("%s has only %d scenes that keep the rules", annotations.path, len(chosen))
    return chosen


def choose_square(annotations: Annotations, image: str, config: CocoConfig) -> Choice | None:
    """The square of a picture with the most things that keep the rules; None where too few do.

    Of equals, the one whose things cover most counts, then the one nearest to the middle, then the first. Of two things
    of one class the larger is the concept.
    """
    row = annotations.images[image]
    found = list(large_things(annotations, image, config))
    if len({word for _, word in found}) < config.min_things:
        return None
    masks = [(thing.get("id"), word, draw_mask(annotations.path, thing, row)) for thing, word in found]
    best, best_rank = None, None
    for box, off_centre in squares(row["width"], row["height"]):
        left, top, right, bottom = box
        largest: dict[str, Thing] = {}
        for identity, word, mask in masks:
            thing = Thing(identity, word, mask[top:bottom, left:right])
            if thing.share >= config.min_share and (word not in largest or thing.share > largest[word].share):
                largest[word] = thing
        things = sorted(largest.values(), key=lambda thing: -thing.share)[: config.max_things]
        rank = len(things), round(sum(thing.share for thing in things), 9), -off_centre
        if len(things) >= config.min_things and (best_rank is None or rank > best_rank):
            best, best_rank = Choice(row, box, tuple(things)), rank
    return best


def large_things(annotations: Annotations, image: str, config: CocoConfig) -> Iterator[tuple[dict, str]]:
    """The annotations of a picture that can be large enough, by their stated area, each with its class."""
    row = annotations.images[image]
    least = ROUNDING * config.min_share * min(row["width"], row["height"]) ** 2
    for thing in annotations.by_image[image]:
        area = thing.get("area")
        if not isinstance(area, (int, float)) or area >= least:
            yield thing, annotations.words[str(thing["category_id"])]


def draw_mask(path: Path, thing: dict, row: dict) -> np.ndarray:
    """An annotation's mask, (H, W) bool, at the size of its picture's row."""
    name, size = f"{path} annotation {thing.get('id')}", (row["width"], row["height"])
    mask = segmentation_mask(thing.get("segmentation"), size, name)
    if mask.shape != size[::-1]:
        raise InputError(f"{name} is {mask.shape[1]}x{mask.shape[0]}, its picture {size[0]}x{size[1]}")
    return mask


def squares(width: int, height: int) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """The places of the largest square, as (left, top, right, bottom), and how far each is from the middle."""
    side, room = min(width, height), abs(width - height)
    for offset in sorted({round(i * room / (PLACES - 1)) for i in range(PLACES)}):
        left, top = (offset, 0) if width > height else (0, offset)
        yield (left, top, left + side, top + side), abs(2 * offset - room)


def write_scenes(
    annotations: Annotations, chosen: list[Choice], images: Path, folder: Path, config: CocoConfig
) -> Path:
    """Write a scene folder for each, named by its picture's id, and the manifest, whose path is returned.

    Raises InputError, before anything is written, when pictures are missing; and for one of another size.
    """
    missing = [choice.picture["file_name"] for choice in chosen if not (images / choice.picture["file_name"]).is_file()]
    if missing:
        raise InputError(f"{images} lacks {len(missing)} of {len(chosen)} pictures, {missing[0]} first")
    for choice in chosen:
        write_scene(choice, images, folder / scene_name(choice))
    rows = [
        {
            "scene": scene_name(choice),
            "image_id": choice.picture["id"],
            "file_name": choice.picture["file_name"],
            "square": choice.box,
            "concepts": [
                {"annotation_id": thing.annotation, "word": thing.word, "share": round(thing.share, 4)}
                for thing in choice.things
            ],
        }
        for choice in chosen
    ]
    write_json(folder / MANIFEST, {"annotations": annotations.path.name, "rules": asdict(config), "scenes": rows})
    return folder / MANIFEST


def scene_name(choice: Choice) -> str:
    """The picture's id, as COCO's own files pad it."""
    identity = choice.picture["id"]
    return f"{identity:012d}" if isinstance(identity, int) else hashlib.sha256(str(identity).encode()).hexdigest()[:12]


def write_scene(choice: Choice, images: Path, folder: Path) -> None:
    """img.png, mask0.png, ... and scene.json, whose words are the class names."""
    path = images / choice.picture["file_name"]
    photo = read_image(path)
    if photo.size != (choice.picture["width"], choice.picture["height"]):
        stated = f"{choice.picture['width']}x{choice.picture['height']}"
        raise InputError(f"{path} is {photo.width}x{photo.height}, but annotated at {stated}: it is another picture")
    folder.mkdir(parents=True)
    save_image(photo.crop(choice.box), folder / "img.png")
    for i, thing in enumerate(choice.things):
        save_image(Image.fromarray(thing.mask.astype(np.uint8) * 255), folder / f"mask{i}.png")
    concepts = [{"handle": f"<asset{i}>", "word": thing.word} for i, thing in enumerate(choice.things)]
    write_json(folder / "scene.json", {"concepts": concepts})
