"""Write a scene: the image that masks are made for, by hand or by a model, and the folder that they go to."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from bas.data.mask_formats import NUMBERED, find_source, list_sources, read_source
from bas.data.scene_folder import find_image, images_in, match_size, numbered_folders, read_names
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


def write_draft(
    draft: Draft,
    masks: Sequence[Image.Image | None],
    concepts: list[dict],
    origins: Sequence[int | None] | None = None,
) -> None:
    """Write mask0.png, mask1.png, ..., the image where it is missing, and scene.json, whose other entries stay.

    masks: grey images of the image's size, None keeps the file that is there; concepts: handle and word of each. Masks
    of higher numbers are removed. If a write fails, as on a full disk, the scene stays as it was.

    origins: the number that each concept had until now, None for a new one; left out, all keep theirs. The masks of
    extra images follow their concepts, as `moved_masks` says.
    """
    folder = draft.folder
    moved = {} if origins is None else moved_masks(folder, origins)
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
        for old, new in moved.items():
            if new is not None:
                written.enter_context(replacing(new)).write_bytes(old.read_bytes())
        written.enter_context(replacing(names)).write_text(json_text(kept | {"concepts": concepts}), encoding="utf-8")
    for path in moved.keys() - moved.values():
        path.unlink()
    for number, path in numbered_masks(folder).items():
        if number >= len(masks):
            path.unlink()


def moved_masks(folder: Path, origins: Sequence[int | None]) -> dict[Path, Path | None]:
    """Return where the masks of extra images go when the concepts change: None for a mask of a removed concept.

    origins: the number that each concept had until now, None for a new one. Masks that stay are left out. Raises
    InputError for an extra image that no mask would be left to, and for a mask of no concept in the way of another.
    """
    if not folder.is_dir():
        return {}
    known, places = numbered_masks(folder), {old: new for new, old in enumerate(origins) if old is not None}
    moved: dict[Path, Path | None] = {}
    for extra in numbered_folders(folder):
        found = numbered_masks(extra)
        goes = {
            path: extra / f"mask{places[number]}.png" if number in places else None
            for number, path in found.items()
            if number in known
        }
        if goes and not any(goes.values()):
            raise InputError(f"{extra} shows removed concepts alone: move this folder away, or keep one of them")
        for number, path in found.items():
            if number not in known and path in goes.values():
                raise InputError(
                    f"{path} shows none of the {len(known)} concepts: move it away, or give it their number"
                )
        moved |= {path: target for path, target in goes.items() if target != path}
    return moved


def numbered_masks(folder: Path) -> dict[int, Path]:
    """Return the files mask0.png, mask1.png, ... of a folder by number."""
    matches = ((NUMBERED.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[2]): path for match, path in matches if match and match[1] == "mask"}


def _sources(folder: Path) -> list[list[Path]]:
    return list_sources(folder) if folder.is_dir() else []
