"""A scene: one photograph, one mask per concept, and the handle and initial word of each.

Reading follows stated rules: the picture is turned upright by its EXIF note and brought to RGB; masks are read from
their colour, or from their alpha where only that varies, and stay soft. Picture and masks are resized and cropped
together. Whatever cannot be used is an InputError that names the file.
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from bas.config import InputError, TrainConfig
from bas.models.text import HANDLE

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded
MAX_CONCEPTS = 4  # the paper's own limit (section 5): beyond it quality drops
MASK_NAME = re.compile(r"mask(0|[1-9][0-9]*)\.png")
DARKEST_MASK = 0.1  # a mask that is nowhere lighter is something else, such as a map of labels 1, 2, 3


@dataclass(frozen=True)
class Scene:
    """One photograph and its concepts, as read and checked, at the photograph's own size."""

    picture: Image.Image  # RGB, upright
    masks: list[np.ndarray]  # N arrays (H, W) float32 in [0, 1], soft edges kept
    handles: tuple[str, ...]  # N names such as <asset0>
    words: tuple[str | None, ...]  # N initial words, None for a handle that starts from nothing

    def __len__(self) -> int:
        """The number of concepts N."""
        return len(self.handles)

    def tensors(self, resolution: int, multiple: int, square: bool = False) -> tuple[Tensor, Tensor]:
        """Resize and crop picture and masks together. -> image (3, H, W) in [-1, 1], masks (N, H, W) in [0, 1]

        resolution: pixels of the shorter side; multiple: what both sides are a multiple of; square: cut a square.
        """
        size, box = frame(self.picture.size, resolution, multiple, square)
        image = pixels(fit(self.picture, size, Image.Resampling.BICUBIC).crop(box))
        layers = [fit(Image.fromarray(mask), size, Image.Resampling.BILINEAR).crop(box) for mask in self.masks]
        return image, torch.stack([torch.from_numpy(np.array(layer)) for layer in layers])


# --- Files to arrays ----------------------------------------------------------------------------------------------


def open_picture(path: Path) -> Image.Image:
    """A decoded, upright picture of an allowed format. Raises InputError naming the file and the reason."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(
                    f"{path} is {picture.width}x{picture.height}: more than 100 megapixels, make it smaller"
                )
            if getattr(picture, "n_frames", 1) > 1:
                raise InputError(f"{path} holds {picture.n_frames} frames: save the one you mean as a still picture")
            picture.load()
            return ImageOps.exif_transpose(picture)
    except InputError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        reason = "it is empty" if path.stat().st_size == 0 else (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a readable {', '.join(FORMATS)} picture: {reason}") from error


def _grey(picture: Image.Image) -> np.ndarray:
    """One channel as float32 in [0, 1], whatever its depth. (H, W)"""
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float32)
        return values / (65535.0 if picture.mode.startswith("I") else 1.0)
    return np.asarray(picture.convert("L"), dtype=np.float32) / 255.0


def read_image(path: Path) -> Image.Image:
    """The photograph as RGB: 16-bit and float greys scaled down, transparent pixels laid over white."""
    picture = open_picture(path)
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray((_grey(picture).clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:
            log.warning("%s has transparent pixels: they become white", path)
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def read_mask(path: Path) -> np.ndarray:
    """One mask, (H, W) float32 in [0, 1]. In an RGBA file the channel that varies is the mask."""
    picture = open_picture(path)
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        alpha_varies = len(set(picture.getchannel("A").getextrema())) > 1
        colour_varies = any(low != high for low, high in picture.convert("RGB").getextrema())
        if alpha_varies and colour_varies:
            raise InputError(f"{path}: colour and alpha both vary, so which is the mask? Save it as a grey picture")
        picture = picture.getchannel("A") if alpha_varies else picture.convert("RGB")
    mask = _grey(picture)
    if not np.isfinite(mask).all() or mask.min() < 0 or mask.max() > 1:
        raise InputError(f"{path} holds values outside black to white: save it as an 8-bit grey picture")
    if 0 < mask.max() <= 1 / 255:
        log.warning("%s holds only the values 0 and 1 of 255: 1 is read as inside", path)
        mask = mask * 255.0
    return mask


# --- The scene folder ---------------------------------------------------------------------------------------------


def find_files(folder: Path) -> tuple[Path, list[Path]]:
    """The picture img.* and the masks mask0.png, mask1.png, ... of a scene folder, checked for gaps."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: a scene is a folder with img.jpg and mask0.png, mask1.png, ...")
    images = sorted(p for p in folder.iterdir() if p.stem == "img" and p.is_file())
    if len(images) != 1:
        found = ", ".join(p.name for p in images) or "none"
        raise InputError(f"{folder} needs exactly one picture named img.jpg, img.png, ...; found {found}")
    masks = {int(m[1]): p for p in folder.iterdir() if (m := MASK_NAME.fullmatch(p.name))}
    if not masks:
        raise InputError(f"{folder} has no mask0.png: give one mask per concept, white where the concept is")
    missing = [f"mask{i}.png" for i in range(max(masks) + 1) if i not in masks]
    if missing:
        raise InputError(f"{folder} has masks up to mask{max(masks)}.png but lacks {', '.join(missing[:5])}")
    return images[0], [masks[i] for i in range(len(masks))]


def read_notes(folder: Path, count: int) -> tuple[list[str | None], list[str | None]]:
    """Handles and initial words from an optional scene.json: {"concepts": [{"handle": "<toy>", "word": "toy"}, ...]}"""
    path = folder / "scene.json"
    if not path.exists():
        return [None] * count, [None] * count
    try:
        concepts = json.loads(path.read_text(encoding="utf-8"))["concepts"]
        notes = [(c.get("handle"), c.get("word")) for c in concepts]
        if not all(name is None or isinstance(name, str) for note in notes for name in note):
            raise TypeError("a handle or a word is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path} is not {{"concepts": [{{"handle": ..., "word": ...}}, ...]}}: {error}') from error
    if len(notes) != count:
        raise InputError(f"{path} names {len(notes)} concepts, but there are {count} masks")
    return [handle for handle, _ in notes], [word for _, word in notes]


def name_concepts(config: TrainConfig, folder: Path, count: int) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Handles and words of N concepts: flags win over scene.json, which wins over <asset0>, <asset1>, ..."""
    if config.num_of_assets not in (None, count):
        raise InputError(f"--num_of_assets is {config.num_of_assets}, but {folder} has {count} masks")
    noted_handles, noted_words = read_notes(folder, count)
    pattern = config.placeholder_token.strip("<>")
    handles = config.handles or tuple(noted or f"<{pattern}{i}>" for i, noted in enumerate(noted_handles))
    words = config.initializer_tokens or tuple(noted_words)
    for flag, values in (("--handles", handles), ("--initializer_tokens", words)):
        if len(values) != count:
            raise InputError(f"{flag} gives {len(values)} names, but {folder} has {count} masks")
    for handle in handles:
        if not HANDLE.fullmatch(handle):
            raise InputError(f"handle {handle!r}: expected <name> with 1 to 32 letters, digits, _ or -")
    if len(set(handles)) != count:
        raise InputError(f"the handles {' '.join(handles)} are not all different")
    return tuple(handles), tuple(words)


def load_scene(config: TrainConfig) -> Scene:
    """Read and check the scene folder `config.instance_data_dir`, before any weights are read.

    Raises InputError for anything that cannot be used; warns of what is odd but possible.
    """
    folder = Path(config.instance_data_dir)
    image_path, mask_paths = find_files(folder)
    handles, words = name_concepts(config, folder, len(mask_paths))
    picture = read_image(image_path)
    masks = [match_size(read_mask(path), path, picture, image_path) for path in mask_paths]
    for i, (path, mask) in enumerate(zip(mask_paths, masks, strict=True)):
        _check_coverage(path, mask)
        for other, earlier in zip(mask_paths[:i], masks[:i], strict=True):
            if np.array_equal(mask, earlier):
                raise InputError(f"{path} is the same mask as {other.name}: two concepts need two masks")
    if len(masks) > MAX_CONCEPTS:
        log.warning("%d concepts: the method works best with up to %d (paper, section 5)", len(masks), MAX_CONCEPTS)
    return Scene(picture, masks, handles, words)


def pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as the VAE sees it: (3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def fit(picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """The picture at (W, H), untouched where it has that size already."""
    return picture if picture.size == size else picture.resize(size, resampling)


def frame(
    size: tuple[int, int], resolution: int, multiple: int, square: bool
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """How to bring a (W, H) picture to the model: the size to resize it to, then the box to cut from its middle."""
    if resolution % multiple:
        raise InputError(f"--resolution {resolution}: this model takes multiples of {multiple} pixels")
    scale = resolution / min(size)
    resized = tuple(max(resolution, round(side * scale)) for side in size)
    kept = (resolution, resolution) if square else tuple(side // multiple * multiple for side in resized)
    left, top = ((side - part) // 2 for side, part in zip(resized, kept, strict=True))
    return resized, (left, top, left + kept[0], top + kept[1])


def match_size(mask: np.ndarray, path: Path, picture: Image.Image, image_path: Path) -> np.ndarray:
    """The mask at the picture's size. Another size of the same shape is resized, another shape is an error."""
    (h, w), (image_w, image_h) = mask.shape, picture.size
    if (w, h) == (image_w, image_h):
        return mask
    sizes = f"{path} is {w}x{h}, {image_path.name} is {image_w}x{image_h}"
    if abs(w / h - image_w / image_h) > 0.01 * image_w / image_h:
        hint = (
            ": the picture is turned by its EXIF note, draw masks on the upright one" if (h, w) == picture.size else ""
        )
        raise InputError(f"{sizes}: they must have the same shape{hint}")
    log.warning("%s: the mask is resized", sizes)
    return np.array(Image.fromarray(mask).resize(picture.size, Image.Resampling.BILINEAR))


def _check_coverage(path: Path, mask: np.ndarray) -> None:
    """A mask must show something and leave something out; nearly everything is worth a warning."""
    if mask.max() == 0:
        raise InputError(f"{path} is black all over: paint the concept white")
    if mask.max() < DARKEST_MASK:
        raise InputError(f"{path} is nearly black, {255 * mask.max():.0f} of 255 at most: is it a map of labels?")
    if mask.min() == 1:
        raise InputError(f"{path} is white all over: leave out what is not the concept")
    if mask.mean() > 0.95:
        log.warning("%s covers %.0f %% of the picture: is it inverted?", path, 100 * mask.mean())


# --- Union sampling -----------------------------------------------------------------------------------------------


def draw_subset(count: int, kind: str, generator: torch.Generator) -> list[int]:
    """The concepts of one training example, in random order (paper, section 3.2, as the official code draws them).

    k is uniform in 1..N and then the subset is uniform among those of size k, so a single concept comes up with
    probability 1/N. kind="single" always draws one (the ablation without union sampling).
    """
    k = 1 if kind == "single" else int(torch.randint(1, count + 1, (), generator=generator))
    return torch.randperm(count, generator=generator)[:k].tolist()


def subset_prompt(handles: tuple[str, ...] | list[str]) -> str:
    """The training prompt of these handles: `a photo of <asset1> and <asset0>`"""
    return "a photo of " + " and ".join(handles)
