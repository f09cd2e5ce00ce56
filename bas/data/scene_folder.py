"""Read a scene folder: the image img.*, its masks, scene.json, and extra images in subfolders 1, 2, ...

bas/io/images.py reads images and mask_formats.py reads masks. Here they become one scene: sizes must agree, every mask
must show something, and what cannot be used is an InputError that names the file.

An extra image lies in SCENE/1, SCENE/2, ... with its own img.* and mask0.png, mask1.png, ... Each mask has the number
of its concept in the first image, which shows all concepts. A concept without a mask is not in the extra image.
"""

import logging
import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from PIL import Image

from bas.config import TrainConfig
from bas.data.mask_exports import find_export
from bas.data.mask_formats import (
    NAMES,
    READERS,
    FoundMask,
    check_keys,
    find_source,
    mask_in_file,
    read_number,
    read_scene_json,
    read_source,
)
from bas.data.scene import (
    DARKEST_MASK,
    MAX_CONCEPTS,
    ExtraImage,
    Scene,
    bracketed,
    check_word,
    with_background,
    with_close_ups,
)
from bas.data.seg_mix import movable_concepts
from bas.errors import InputError
from bas.io.files import reading
from bas.io.images import LABELS_ADVICE, SUFFIXES, TURNS, image_size, read_image, to_array, upright_size
from bas.io.json_files import check_shape
from bas.models.text import check_name

log = logging.getLogger(__name__)

UNREADABLE = (".svg", ".psd", ".xcf", ".pdf", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".raw", ".tga", ".ppm")
NEARLY_NOTE = re.compile(r"scenes?( ?\(\d+\)| - copy)?\.jsonc?(\.txt)?", re.IGNORECASE)  # of scene.json
JOURNAL = ".saving.json"  # the note of a save that is not finished
MAX_EXTRA = 400_000_000  # pixels of all extra images and their masks together, 1 GB at most
LIKELY_INVERTED = 0.8  # of the image
FAINT_MASK = 0.9  # at most, as of colours turned to grey: the loss takes the square (eq. 1)


def load_scene(config: TrainConfig) -> Scene:
    """Read and check the scene folder `config.instance_data_dir`. Reads no weights.

    Raises InputError for what cannot be used, and warns about what is possible but unusual.
    """
    folder = Path(config.instance_data_dir)
    with reading(folder):
        scene = read_folder(folder, config)
    if scene.extra_images:
        names = ", ".join(extra.name for extra in scene.extra_images)
        log.info("%s has %d extra images: %s", folder, len(scene.extra_images), names)
    if config.background_handle:
        scene = with_background(scene, config.background_handle)
    if config.close_ups:
        count = len(scene.extra_images)
        scene = with_close_ups(scene, config.center_crop)
        if len(scene.extra_images) == count:
            log.info("close_ups adds nothing: no part of the concepts is narrower than the image")
    for line in idle_settings(scene, config):
        log.info("%s", line)
    if len(scene) > MAX_CONCEPTS:
        log.warning("%d concepts: the method works best with up to %d (paper, limitations)", len(scene), MAX_CONCEPTS)
    return scene


def idle_settings(scene: Scene, config: TrainConfig) -> list[str]:
    """List the settings that change nothing in this scene, each with its reason."""
    lines, movable = [], movable_concepts(scene)
    if config.seg_mix_probability and not movable:
        lines.append("Seg-Mix adds nothing: every concept covers more than half of the scene")
    every = config.seg_mix_probability == 1 and len(movable) == len(scene)
    if every and any(extra.close_up for extra in scene.extra_images):
        lines.append("close_ups adds nothing: with Seg-Mix 1 every image is made of concepts cut out of the scene")
    if config.attention_loss == "cross_entropy" and config.lambda_attention and len(scene) == 1:
        lines.append("cross_entropy adds nothing: a single handle has no other to compete with, so the loss is 0")
    return lines


def read_folder(folder: Path, config: TrainConfig) -> Scene:
    """Read the images and masks of a scene folder, checked, with the names that the settings give."""
    image_path, mask_files = find_files(folder)
    size, orientation = upright_size(image_path)  # decoded last: beside it, the memory would not hold large masks
    found = read_source(mask_files, size)
    handles, words = name_concepts(config, folder, found)
    masks: list[np.ndarray] = []
    for concept in found:
        path = folder / concept.name
        mask = match_size(concept.values, path, size, image_path)
        check_coverage(path, mask)
        same = [found[i].name for i, earlier in enumerate(masks) if np.array_equal(mask, earlier)]
        if same:
            raise InputError(f"{path} is the same mask as {same[0]}: two concepts need two masks")
        masks.append(mask)
    warn_if_turned(image_path, size, orientation, found)
    return Scene(read_image(image_path), masks, handles, words, read_extra_images(folder, len(masks)))


# --- Files --------------------------------------------------------------------------------------------------------


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """Find the image of a scene folder and the files of its one mask source.

    Raises InputError for gaps in numbers, and for a folder whose save was cut off: its masks and names may not fit.
    """
    require_scene_folder(folder)
    if (folder / JOURNAL).exists():
        raise InputError(f"a save of {folder} was cut off: `bas paint {quote(str(folder))}` finishes it")
    return find_image(folder), find_source(folder)


def require_scene_folder(path: Path) -> None:
    """Raise InputError unless it is a folder."""
    if not path.exists() and not path.is_symlink():
        raise InputError(f"{path} does not exist: name a scene, a folder with img.jpg and mask0.png, mask1.png, ...")
    if not path.is_dir():
        advice = f"; `bas paint {quote(str(path))}` makes one of an image" if path.is_file() else ""
        kind = "a scene is a folder with img.jpg and mask0.png, mask1.png, ..."
        raise InputError(f"{path} is not a folder: {kind}{advice}")


def images_in(folder: Path) -> list[Path]:
    """Return a folder's images img.*, in small or capital letters: a scene has one. Caption files are not images."""
    images = (path for path in folder.iterdir() if path.stem.lower() == "img" and path.suffix.lower() in SUFFIXES)
    return sorted(path for path in images if path.is_file())


def find_image(folder: Path) -> Path:
    """Find the one image img.* of a folder."""
    images = images_in(folder)
    if len(images) != 1:
        suffixes = (*SUFFIXES, *UNREADABLE)
        others = [path.name for path in folder.iterdir() if path.suffix.lower() in suffixes and not read_number(path)]
        advice = (
            "convert it to img.jpg or img.png"
            if all(Path(name).suffix.lower() in UNREADABLE for name in others)
            else "rename the one you mean"
        )
        none = f"none, but {', '.join(sorted(others)[:3])}: {advice}" if others else "none"
        found = ", ".join(path.name for path in images) or none
        raise InputError(f"{folder} needs exactly one image named img.jpg, img.png, ...; found {found}")
    return images[0]


def numbered_folders(folder: Path) -> list[Path]:
    """Return the subfolders that are named by numbers, by number."""
    numbered = [path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name))


# --- Extra images -------------------------------------------------------------------------------------------------


def read_extra_images(folder: Path, count: int) -> tuple[ExtraImage, ...]:
    """Read the extra images of a scene folder, by number. count: how many concepts its first image has."""
    numbered = numbered_folders(folder)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path not in numbered and os.access(path, os.R_OK | os.X_OK) and images_in(path):
            log.warning("%s holds an image but is not read: folders of extra images are named 1, 2, ...", path)
    files = [find_extra_files(path, count) for path in numbered]
    pixels = sum(prod(image_size(image)) * (1 + len(masks)) for image, masks in files)
    if pixels > MAX_EXTRA:
        found = f"{len(files)} extra images with {pixels // 1_000_000} megapixels, masks included"
        raise InputError(f"{folder} has {found}, bas reads {MAX_EXTRA // 1_000_000}: make them smaller, or keep fewer")
    return tuple(read_extra_image(image, masks) for image, masks in files)


def find_extra_files(folder: Path, count: int) -> tuple[Path, dict[int, Path]]:
    """Find the image and the masks by concept of one extra image.

    InputError without an image or a mask, for masks of another source than maskN.png, and for a mask of an unknown
    concept.
    """
    image, masks = find_image(folder), {}
    for path in sorted(folder.iterdir()):
        kind, number = read_number(path) or ("", 0)
        if kind == "cutout" or path.name in READERS:
            raise InputError(f"{path} would not be read: an extra image has its masks as mask0.png, mask1.png, ...")
        if path.name == "scene.json":
            log.warning("%s is not read: the scene names the concepts, and a mask has its concept's number", path)
        if kind == "mask":
            if number >= count:
                raise InputError(f"{path}: the scene has the concepts 0 to {count - 1}, as its first image shows them")
            masks[number] = path
    if not masks:
        export = find_export(folder)
        advice = f"{export[0].name} is not read here" if export else "name each by the concept that it shows"
        raise InputError(f"{folder} has no mask0.png, mask1.png, ..., as an extra image needs them: {advice}")
    return image, masks


def read_extra_image(image_path: Path, mask_files: dict[int, Path]) -> ExtraImage:
    """Read one extra image, named by its folder."""
    (size, orientation), masks, found = upright_size(image_path), {}, []
    for number, path in mask_files.items():
        found.append(mask_in_file(path))
        masks[number] = match_size(found[-1].values, path, size, image_path)
        check_coverage(path, masks[number])
    warn_if_turned(image_path, size, orientation, found)
    return ExtraImage(image_path.parent.name, read_image(image_path), masks)


# --- Names --------------------------------------------------------------------------------------------------------


def read_names(folder: Path, found: list[FoundMask]) -> tuple[list[str | None], list[str | None]]:
    """Handles and initial words from an optional scene.json: {"concepts": [{"handle": "<toy>", "word": "toy"}, ...]}

    Without scene.json they are as the mask source names them. Raises InputError for another content or count.
    """
    path, count = folder / "scene.json", len(found)
    if not os.path.lexists(path):
        if near := next((other for other in sorted(folder.iterdir()) if NEARLY_NOTE.fullmatch(other.name)), None):
            raise InputError(f"{near} would not be read: name it scene.json")
        return [mask.handle for mask in found], [mask.word for mask in found]
    if any(mask.handle or mask.word for mask in found):
        log.warning("%s names the concepts: the names beside the masks are not used", path)
    content = read_scene_json(path)
    try:
        check_shape(content, {"concepts": [dict]})
        names = [(c.get("handle"), c.get("word")) for c in content["concepts"]]
        if not all(name is None or isinstance(name, str) for pair in names for name in pair):
            raise ValueError("a handle or a word is not a string")
        check_keys(content["concepts"], NAMES)
    except ValueError as error:
        raise InputError(f'{path} is not {{"concepts": [{{"handle": ..., "word": ...}}, ...]}}: {error}') from error
    if len(names) != count:
        raise InputError(f"{path} names {len(names)} concepts, but there are {count} masks")
    return [handle for handle, _ in names], [word for _, word in names]


def read_entries(folder: Path) -> dict[str, Any]:
    """Return all entries of a scene's scene.json, none without the file. InputError if it is not a JSON object."""
    path = folder / "scene.json"
    content = read_scene_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f'{path} is not {{"concepts": [{{"handle": ..., "word": ...}}, ...]}}: repair or remove it')
    return content


def name_concepts(
    config: TrainConfig, folder: Path, found: list[FoundMask]
) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Handles and words of N concepts: flags win over scene.json, which wins over <asset0>, <asset1>, ..."""
    count = len(found)
    if config.num_of_assets not in (None, count):
        raise InputError(f"--num_of_assets is {config.num_of_assets}, but {folder} has {count} masks")
    given_handles, given_words = read_names(folder, found)
    pattern = config.placeholder_token.strip("<>")
    default = tuple(bracketed(handle or f"{pattern}{i}") for i, handle in enumerate(given_handles))
    handles = tuple(map(bracketed, config.handles)) or default
    if f"<{pattern}>" != TrainConfig.placeholder_token and (config.handles or all(given_handles)):
        log.warning("--placeholder_token %s has no effect: all handles have names", config.placeholder_token)
    words = config.initializer_tokens or tuple(given_words)
    for flag, values in (("--handles", handles), ("--initializer_tokens", words)):
        if len(values) != count:
            raise InputError(f"{flag} gives {len(values)} names, but {folder} has {count} masks")
    for handle in handles:
        check_name(handle)
    for handle, word in zip(handles, words, strict=True):
        check_word(word, handle)
    if len(set(handles)) != count:
        raise InputError(f"the handles {' '.join(handles)} are not all different")
    return tuple(handles), tuple(words)


# --- Masks --------------------------------------------------------------------------------------------------------


def match_size(mask: np.ndarray, path: Path, size: tuple[int, int], image_path: Path) -> np.ndarray:
    """Return the mask at the image's (W, H), as (H, W) uint8, resized if needed. InputError for another shape."""
    (h, w), (image_w, image_h) = mask.shape, size
    if (w, h) == (image_w, image_h):
        return mask
    sizes = f"{path} is {w}x{h}, {image_path.name} is {image_w}x{image_h}"
    if not _same_shape(w / h, image_w / image_h):
        turned = _same_shape(h / w, image_w / image_h)
        hint = ": is one turned by an EXIF tag? Draw masks on the upright image" if turned else ""
        raise InputError(f"{sizes}: they must have the same shape{hint}")
    log.warning("%s: the mask is resized", sizes)
    check_not_black(path, mask)
    return to_array(Image.fromarray(mask).resize(size, Image.Resampling.BILINEAR))


def warn_if_turned(
    image_path: Path, size: tuple[int, int], orientation: int | None, masks: Sequence[FoundMask]
) -> None:
    """Warn where an image is turned by its EXIF tag and it is unknown whether its masks were made on the turned image.

    It is known for a mask with its own EXIF tag, and for one whose size fits only the upright image.
    size: (W, H) of the upright image; orientation: what its tag says.
    """
    if orientation in (None, 1):
        return
    (width, height) = size
    swaps_sides = orientation >= 5 and not _same_shape(width / height, height / width)
    unknown = [mask.name for mask in masks if not (mask.oriented or (swaps_sides and mask.sized))]
    if unknown:
        names = unknown[0] if len(unknown) == 1 else f"{unknown[0]} to {unknown[-1]}"
        turn = f"{image_path} is {TURNS[orientation]} by its EXIF tag, and is used upright".replace("turned m", "m")
        advice = "save the image without the tag, or turn the masks"
        log.warning("%s; if %s was drawn on the stored image, it does not fit: %s", turn, names, advice)


def _same_shape(shape: float, other: float) -> bool:
    """Return whether two ratios of width to height are equal up to rounding."""
    return abs(shape - other) <= 0.01 * other


def check_not_black(path: Path, mask: np.ndarray) -> None:
    """Raise InputError for a mask that shows nothing. mask: (H, W)"""
    if mask.max() == 0:
        raise InputError(f"{path} is black all over: paint the concept white")


def check_coverage(path: Path, mask: np.ndarray) -> None:
    """Raise InputError for a mask that shows nothing or everything, and warn about an unlikely one. mask: (H, W)"""
    check_not_black(path, mask)
    if mask.max() < 255 * DARKEST_MASK:
        raise InputError(f"{path} is nearly black, {mask.max()} of 255 at most: {LABELS_ADVICE}")
    if mask.min() == 255:
        raise InputError(f"{path} is white all over: leave out what is not the concept")
    if mask.max() < 255 * FAINT_MASK:
        weight = 100 * float(mask.max() / 255) ** 2
        advice = "paint it white, or name it labels.png if it is a label map"
        log.warning("%s is %d of 255 at most, so its concept weighs %.0f %%: %s", path, mask.max(), weight, advice)
    if (share := mask.mean() / 255) >= LIKELY_INVERTED:
        log.warning("%s covers %.0f %% of the image: is it inverted?", path, 100 * share)
