"""Write a scene: the image that masks are made for, by hand or by a model, and the folder that they go to."""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import ExifTags, Image

from bas.data.mask_formats import NUMBERED, find_source, list_sources, read_source
from bas.data.scene_folder import JOURNAL, find_image, images_in, match_size, numbered_folders, read_entries, read_names
from bas.errors import InputError
from bas.io.files import reading, replacing, require_writable, sync
from bas.io.images import read_image, read_orientation, suffix_of_copy
from bas.io.json_files import json_text, read_record, write_json

NOTED = re.compile(r"(\d+/)?\.?\w[\w.-]*")  # a file of the folder, or of an extra image's
saving = threading.RLock()  # one save of a scene at a time, also while the last one is finished


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
        finish_save(source)
        finish_save(folder)
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
    seen: str | None = None,
) -> str:
    """Write mask0.png, mask1.png, ..., the image where it is missing, and scene.json, whose other entries stay.

    masks: grey images of the image's size, None keeps the file that is there; concepts: handle and word of each. Masks
    of higher numbers are removed. If a write fails, as on a full disk, the scene stays as it was.

    seen: the version of the scene that the masks were made from, if another program may have changed it since, which
    is an InputError then. Returns the new version.

    origins: the number that each concept had until now, None for a new one; left out, all keep theirs. The masks of
    extra images follow their concepts, as `moved_masks` says.
    """
    folder = draft.folder
    with saving:
        finish_save(folder)
        if seen not in (None, version(folder)):
            raise InputError("the scene was changed elsewhere: load the page again")
        moved = {} if origins is None else moved_masks(folder, origins)
        folder.mkdir(parents=True, exist_ok=True)
        names = folder / "scene.json"
        kept = read_entries(folder)
        options = {}
        if read_orientation(draft.image_path) not in (None, 1):  # or it would be unknown which way up the masks are
            options["exif"] = Image.Exif()
            options["exif"][ExifTags.Base.Orientation] = 1
        files: dict[Path, Callable[[Path], object]] = {}
        if not images_in(folder):
            files[folder / f"img{suffix_of_copy(draft.image_path)}"] = partial(shutil.copyfile, draft.image_path)
        for i, mask in enumerate(masks):
            if mask is not None:
                files[folder / f"mask{i}.png"] = partial(mask.save, format="PNG", **options)
        for old, new in moved.items():
            if new is not None:
                files[new] = partial(Path.write_bytes, data=old.read_bytes())
        text = json_text(kept | {"concepts": concepts})
        files[names] = partial(Path.write_text, data=text, encoding="utf-8")
        higher = (path for number, path in numbered_masks(folder).items() if number >= len(masks))
        save(folder, files, {*higher, *moved} - files.keys())
        return version(folder)


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


# --- All or nothing ----------------------------------------------------------------------------------------------


def version(folder: Path) -> str:
    """Return a text that changes with every file of a scene folder, those in its folders and hidden ones left out."""
    entries = os.scandir(folder) if folder.is_dir() else ()
    rows = [(entry.name, *_stat(entry)) for entry in entries if not (entry.name.startswith(".") or entry.is_dir())]
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()[:16]


def _stat(entry: os.DirEntry) -> tuple[int, int]:
    """Return the time of the last change and the size of a file, or of a link to nothing."""
    try:
        found = entry.stat()
    except OSError:
        found = entry.stat(follow_symlinks=False)
    return found.st_mtime_ns, found.st_size


def save(folder: Path, files: dict[Path, Callable[[Path], object]], removed: Iterable[Path]) -> None:
    """Write files of a scene folder, each by its function, and remove others: all of it, or nothing.

    All files are complete under temporary names before a note of what takes their place is written. Whoever opens the
    scene after a kill finishes what the note says.
    """
    written: dict[str, str] = {}
    with saving:
        try:
            for path, write in files.items():
                with replacing(path, later=True) as temporary:
                    write(temporary)
                written[_noted(temporary, folder)] = _noted(path, folder)
            gone = sorted(_noted(path, folder) for path in removed)
            write_json(folder / JOURNAL, {"renamed": written, "removed": gone})
        except BaseException:
            for name in (JOURNAL, *written):  # the note first
                (folder / name).unlink(missing_ok=True)
            raise
        finish_save(folder)


def finish_save(folder: Path) -> None:
    """Do what the note of a save says that was cut off, if there is one. InputError for a note that is damaged."""
    journal = folder / JOURNAL
    if not journal.exists():
        return
    with saving:
        if not journal.exists():  # the thread that wrote it has finished it
            return
        advice = "remove it, and look at the masks"
        note = read_record(journal, {"renamed": {...: str}, "removed": [str]}, advice)
        if not all(map(NOTED.fullmatch, (*note["renamed"], *note["renamed"].values(), *note["removed"]))):
            raise InputError(f"{journal} names files that are not of a scene: {advice}")
        for temporary, name in note["renamed"].items():
            with suppress(FileNotFoundError):  # it is done
                os.replace(folder / temporary, folder / name)
        for name in note["removed"]:
            (folder / name).unlink(missing_ok=True)
        for place in {(folder / name).parent for name in (JOURNAL, *note["renamed"], *note["removed"])}:
            sync(place)
        journal.unlink()


def _noted(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _sources(folder: Path) -> list[list[Path]]:
    return list_sources(folder) if folder.is_dir() else []
