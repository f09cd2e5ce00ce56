"""Scenes: a photograph comes in, masks are painted and saved stroke by stroke, concepts are named.

A scene folder is always one that `bas train` reads. Concepts that have no pixels yet are in draft.json beside it, which
goes when the last of them is painted. What was read is kept in memory only as long as the folder is unchanged.
"""

import io
import math
import os
import shutil
import threading
import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bas.data.mask_formats import MAX_MASKS, list_sources
from bas.data.scene import bracketed, check_word
from bas.data.scene_folder import numbered_folders, read_entries
from bas.data.scene_writer import (
    Draft,
    concepts_to_edit,
    finish_save,
    moved_masks,
    numbered_masks,
    open_draft,
    save,
    version,
    write_draft,
)
from bas.errors import InputError
from bas.io.figures import CONCEPT_COLOURS, as_hex
from bas.io.images import read_image, suffix_of_copy
from bas.io.json_files import json_text, read_json, write_json
from bas.models.text import check_name
from bas.web.studio.folders import FOLDER, unpack_folder
from bas.web.studio.refusal import Refusal
from bas.web.studio.store import SCENES, Home
from bas.web.studio.tiles import lay, pack, unpack

DRAFT = "draft.json"
MAX_WORD = 100  # characters
UPLOAD = ".upload-"
writing = threading.Lock()  # one change of a scene at a time


@dataclass(frozen=True)
class Concept:
    """One concept of a scene, painted or not yet."""

    handle: str
    word: str | None
    mask: np.ndarray | None  # (H, W) uint8
    number: int | None = None  # of its mask file, where it has one
    changed: bool = False  # since that file was written


@dataclass(frozen=True)
class Opened:
    """A scene as it lies on the disk."""

    folder: Path
    version: str
    draft: Draft
    concepts: tuple[Concept, ...]


# --- Reading ------------------------------------------------------------------------------------------------------

kept: list[Opened] = []  # the scene that was read last


def open_scene(folder: Path) -> Opened:
    """Read a scene folder with or without masks. InputError for what `bas paint` could not open."""
    finish_save(folder)
    now = version(folder)
    for opened in kept:
        if opened.folder == folder and opened.version == now:
            return opened
    draft = open_draft(folder, None)
    rows = concepts_to_edit(draft)
    painted = [Concept(row["handle"], row["word"], row["mask"], i) for i, row in enumerate(rows)]
    if painted[0].mask is None:
        painted = []
    opened = Opened(folder, now, draft, tuple(with_unpainted(folder, painted)))
    kept[:] = [opened]
    return opened


def with_unpainted(folder: Path, painted: list[Concept]) -> list[Concept]:
    """Return the concepts in the order of draft.json, if it still fits the painted ones; else these alone."""
    try:
        rows = read_json(folder / DRAFT)["concepts"]
        if [row["handle"] for row in rows if row["painted"]] != [concept.handle for concept in painted]:
            return painted
        rest = iter(painted)
        return [next(rest) if row["painted"] else Concept(row["handle"], row["word"], None) for row in rows]
    except (InputError, KeyError, TypeError):
        return painted


def facts(opened: Opened) -> dict[str, Any]:
    """Return a scene for the page, without pixels."""
    width, height = opened.draft.image.size
    rows = [
        {
            "from": i,  # as `put_concepts` takes it
            "handle": concept.handle,
            "word": concept.word,
            "share": 0.0 if concept.mask is None else float(concept.mask.mean() / 255),
            "colour": as_hex(CONCEPT_COLOURS[i % len(CONCEPT_COLOURS)]),
        }
        for i, concept in enumerate(opened.concepts)
    ]
    size = {"width": width, "height": height, "image": opened.draft.image_path.name}
    return {"name": opened.folder.name, "version": opened.version, **size, "concepts": rows}


def summary(folder: Path) -> dict[str, Any]:
    """Return a scene in the list of all: whether it is ready, or why it cannot be read."""
    try:
        opened = open_scene(folder)
    except (InputError, OSError) as error:
        return {"name": folder.name, "problem": str(error)}
    painted = sum(concept.mask is not None for concept in opened.concepts)
    handles = [concept.handle for concept in opened.concepts]
    named = {"version": opened.version, "handles": handles}
    return {"name": folder.name, **named, "painted": painted, "concepts": len(opened.concepts)}


def mask_tiles(folder: Path, number: int) -> bytes:
    """Return the mask of one concept as squares."""
    opened = open_scene(folder)
    width, height = opened.draft.image.size
    mask = concept_of(opened, number).mask
    return pack(np.zeros((height, width), np.uint8) if mask is None else mask)


def concept_of(opened: Opened, number: int) -> Concept:
    """Return one concept by its place. Refusal for a number without a concept."""
    if not 0 <= number < len(opened.concepts):
        raise Refusal(404, "the scene has no such concept", "missing")
    return opened.concepts[number]


# --- Changing -----------------------------------------------------------------------------------------------------


def add_photo(home: Home, wanted: str, data: bytes) -> str:
    """Make a scene of a photograph, or of the files of a scene folder, and return its name.

    InputError for what bas cannot read; nothing is left then.
    """
    if data.startswith(FOLDER):
        return add_folder(home, wanted, data)
    place = home.folder / SCENES
    upload = place / f"{UPLOAD}{time.time_ns()}"
    upload.write_bytes(data)
    try:
        read_image(upload)
        with writing:
            name = home.free_name(SCENES, wanted)
            folder = place / name
            folder.mkdir()
            os.replace(upload, folder / f"img{suffix_of_copy(upload)}")
    except InputError as error:
        raise InputError(str(error).replace(str(upload), wanted[:80] or "the file")) from None
    finally:
        upload.unlink(missing_ok=True)
    return name


def add_folder(home: Home, wanted: str, data: bytes) -> str:
    """Make a scene of the files of a folder, and return its name. Masks of another source become mask0.png, ..."""
    stage = home.folder / SCENES / f"{UPLOAD}{time.time_ns()}"
    given, made = stage / "given", stage / "made"
    given.mkdir(parents=True)
    try:
        unpack_folder(data, given)
        sources = list_sources(given)
        if sources and sources[0][0].name != "mask0.png":
            draft = open_draft(given, made)
            rows = concepts_to_edit(draft)
            write_draft(draft, [Image.fromarray(row.pop("mask")) for row in rows], rows)
            for extra in numbered_folders(given):
                shutil.move(extra, made)
        else:
            open_scene(given)
        with writing:
            name = home.free_name(SCENES, wanted)
            os.replace(made if made.is_dir() else given, home.folder / SCENES / name)
    except InputError as error:
        raise InputError(str(error).replace(str(given), wanted[:80] or "the folder")) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return name


def put_tiles(folder: Path, number: int, data: bytes, expected: str | None) -> Opened:
    """Lay changed squares into the mask of one concept, and save the scene."""
    with writing:
        opened = unchanged(folder, expected)
        concept, (width, height) = concept_of(opened, number), opened.draft.image.size
        mask = np.zeros((height, width), np.uint8) if concept.mask is None else concept.mask.copy()
        lay(mask, unpack(data, (width, height)))
        concepts = list(opened.concepts)
        concepts[number] = replace(concept, mask=mask if mask.any() else None, changed=True)
        return write(opened, concepts)


def put_concepts(folder: Path, rows: Any, expected: str | None) -> Opened:
    """Rename, reorder, add and remove concepts. rows: {"from": its place until now or None, "handle", "word"} each"""
    if not isinstance(rows, list) or len(rows) > MAX_MASKS or not all(isinstance(row, dict) for row in rows):
        raise Refusal(400, f"a scene has up to {MAX_MASKS} concepts", "bad")
    with writing:
        opened = unchanged(folder, expected)
        concepts, used = [], set()
        for i, row in enumerate(rows):
            place = row.get("from")
            if place is not None and (type(place) is not int or place in used):
                raise Refusal(400, "each concept comes from another place", "bad")
            used.add(place)
            old = Concept("", None, None) if place is None else concept_of(opened, place)
            concepts.append(replace(old, **checked_names(row, i)))
        for i, concept in enumerate(concepts):
            if concept.handle in [other.handle for other in concepts[:i]]:
                raise Refusal(422, f"two concepts are called {concept.handle}: give one another name", "same", str(i))
        return write(opened, concepts)


def checked_names(row: dict, place: int) -> dict[str, str | None]:
    """Handle and word of a concept. Refusal, with its place, for names that training would not take."""
    handle, word = row.get("handle"), row.get("word")
    if not isinstance(handle, str) or not (word is None or (isinstance(word, str) and len(word) <= MAX_WORD)):
        raise Refusal(400, "handle and word are texts", "bad", str(place))
    handle = bracketed(handle.strip())
    try:
        check_name(handle)
        check_word(word, handle)
    except InputError as error:
        raise Refusal(422, str(error), "name", str(place)) from None
    return {"handle": handle, "word": (word or "").strip() or None}


def unchanged(folder: Path, expected: str | None) -> Opened:
    """Return the scene, if it is still what the page has seen. Refusal if another page or program has changed it."""
    opened = open_scene(folder)
    if expected != opened.version:
        raise Refusal(412, "the scene was changed elsewhere: load it again", "changed")
    return opened


def write(opened: Opened, concepts: list[Concept]) -> Opened:
    """Save a scene: masks and names of what is painted as bas reads them, the rest in draft.json.

    The masks of extra images follow their concepts. InputError if an extra image shows a concept whose mask is erased.
    """
    painted = [concept for concept in concepts if concept.mask is not None]
    origins = [concept.number for concept in painted]
    for concept in concepts:
        if concept.mask is None and concept.number is not None:
            check_erased(opened.folder, concept.number, concept.handle)
    moved_masks(opened.folder, origins)  # which refuses before anything is written
    rows = [{"handle": c.handle, "word": c.word, "painted": c.mask is not None} for c in concepts]
    if len(painted) < len(concepts):
        write_json(opened.folder / DRAFT, {"concepts": rows})
    masks = [
        None if concept.number == i and not concept.changed else Image.fromarray(concept.mask)
        for i, concept in enumerate(painted)
        if concept.mask is not None
    ]
    if painted:
        write_draft(opened.draft, masks, [{"handle": c.handle, "word": c.word} for c in painted], origins)
    else:
        clear_masks(opened.folder)
    if len(painted) == len(concepts):
        (opened.folder / DRAFT).unlink(missing_ok=True)
    numbers = iter(range(len(painted)))
    saved = tuple(replace(c, number=None if c.mask is None else next(numbers), changed=False) for c in concepts)
    renewed = replace(opened, version=version(opened.folder), concepts=saved)
    kept[:] = [renewed]
    return renewed


def check_erased(folder: Path, number: int, handle: str) -> None:
    """Raise InputError for a concept without a mask that an extra image shows: its mask there would be lost."""
    for extra in numbered_folders(folder):
        if number in numbered_masks(extra):
            raise InputError(f"{handle} has a mask in {extra} too: leave a part of this one, or remove the concept")


def clear_masks(folder: Path) -> None:
    """Leave a scene folder without masks, as a photograph that comes in: names of masks would be wrong there."""
    names = folder / "scene.json"
    gone = {path for files in list_sources(folder) for path in files}
    rest = {key: value for key, value in read_entries(folder).items() if key != "concepts"}
    if rest:
        save(folder, {names: partial(Path.write_text, data=json_text(rest), encoding="utf-8")}, gone)
    else:
        save(folder, {}, gone | {names})


# --- Views of the photograph --------------------------------------------------------------------------------------

VIEW = 2048  # pixels of the longer side of what the page shows


@lru_cache(maxsize=4)
def view(folder: Path, _changed: int, side: int, box: tuple[float, float, float, float] | None) -> tuple[bytes, str]:
    """Return the photograph, or a box (left, top, right, bottom) of it in pixels, at most `side` pixels wide and high.

    Returns the bytes and their type, as `as_view`.
    """
    image = open_scene(folder).draft.image
    if box:
        left, top, right, bottom = box
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise Refusal(400, "the box does not lie in the photograph", "bad", "box")
        image = image.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
    return as_view(image, side)


def as_view(image: Image.Image, side: int = VIEW) -> tuple[bytes, str]:
    """Encode an image for the page, at most `side` pixels wide and high: bytes and type. JPEG unless it is small."""
    side = max(16, min(side, VIEW))
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    buffer, kind = io.BytesIO(), "PNG" if image.width * image.height <= 2**18 else "JPEG"
    image.save(buffer, kind, quality=90)
    return buffer.getvalue(), f"image/{kind.lower()}"
