"""Write a scene: the image that masks are made for, by hand or by a model, and the folder that they go to."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from bas.data.mask_formats import NUMBERED, find_source, list_sources, read_source
from bas.data.scene_folder import find_image, images_in, match_size, read_names
from bas.errors import InputError
from bas.io.files import reading, replacing, require_writable
from bas.io.images import read_image, read_orientation
from bas.io.json_files import json_text, read_json


@dataclass(frozen=True)
class Draft:
    """The image that masks are made for, and the folder that they go to."""

    image_path: Path
    image: Image.Image  # RGB, upright
    source: Path | None  # a scene folder whose masks are the start, as long as `folder` has none
    folder: Path  # the scene folder to write


def open_draft(source: Path, output_dir: Path | None) -> Draft:
    """Open an image, or a scene folder with or without masks, to make masks for.

    The scene is written to `output_dir`. Without one it goes into the scene folder itself, or for an image into a
    folder beside it that bears its name. Raises InputError for a folder that holds another image, or masks of another
    source, which mask0.png cannot stand beside.
    """
    with reading(source):
        if source.stem.lower() == "img" and source.is_file():
            source = source.parent
        folder = output_dir or (source if source.is_dir() else source.with_suffix(""))
        image_path = find_image(source) if source.is_dir() else source
        image = read_image(image_path)
        if folder.is_file():
            raise InputError(f"{folder} is a file: name another --output_dir")
        require_writable(folder, "the scene", "name another --output_dir")
        for present in images_in(folder) if folder.is_dir() else ():
            if not present.samefile(image_path) and present.read_bytes() != image_path.read_bytes():
                raise InputError(f"{folder} holds another image, {present.name}: name another --output_dir")
        others = [files[0].name for files in _sources(folder) if files[0].name != "mask0.png"]
        if others:
            raise InputError(f"{folder} has its masks in {others[0]}, not in mask0.png: name another --output_dir")
        draft = Draft(image_path, image, source if source.is_dir() else None, folder)
        concepts_to_edit(draft)
        return draft


def concepts_to_edit(draft: Draft) -> list[dict]:
    """Handle, word and mask, uint8 (H, W) or None, of each concept on disk; one concept without a mask to begin with.

    Raises InputError as `load_scene` does for masks and names that cannot be read.
    """
    origin = next((place for place in (draft.folder, draft.source) if place and _sources(place)), None)
    if origin is None:
        return [{"handle": "<asset0>", "word": None, "mask": None}]
    found = read_source(find_source(origin), draft.image.size)
    handles, words = read_names(origin, found)
    masks = [match_size(mask.values, origin / mask.name, draft.image.size, draft.image_path) for mask in found]
    return [
        {"handle": handle or f"<asset{i}>", "word": word, "mask": mask}
        for i, (handle, word, mask) in enumerate(zip(handles, words, masks, strict=True))
    ]


def write_draft(draft: Draft, masks: Sequence[Image.Image | None], concepts: list[dict]) -> None:
    """Write mask0.png, mask1.png, ..., the image where it is missing, and scene.json, whose other entries stay.

    masks: grey images of the image's size, None keeps the file that is there; concepts: handle and word of each. Masks
    of higher numbers are removed. If a write fails, as on a full disk, the scene stays as it was.
    """
    folder = draft.folder
    folder.mkdir(parents=True, exist_ok=True)
    names = folder / "scene.json"
    kept = read_json(names) if names.exists() else {}
    options = {}
    if read_orientation(draft.image_path) not in (None, 1):  # or it would be unknown which way up the masks are
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.Orientation] = 1
    with ExitStack() as written:  # every file, before one of them takes its place
        if not images_in(folder):
            image = written.enter_context(replacing(folder / f"img{draft.image_path.suffix.lower()}"))
            shutil.copyfile(draft.image_path, image)
        for i, mask in enumerate(masks):
            if mask is None:
                continue
            mask.save(written.enter_context(replacing(folder / f"mask{i}.png")), format="PNG", **options)
        written.enter_context(replacing(names)).write_text(json_text(kept | {"concepts": concepts}), encoding="utf-8")
    for path in folder.iterdir():
        if (match := NUMBERED.fullmatch(path.name)) and match[1] == "mask" and int(match[2]) >= len(masks):
            path.unlink()


def _sources(folder: Path) -> list[list[Path]]:
    return list_sources(folder) if folder.is_dir() else []
