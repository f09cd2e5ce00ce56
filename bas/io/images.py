"""Picture files as the method needs them: an upright RGB photograph, a soft mask. What cannot be used is named."""

import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from bas.errors import InputError
from bas.io.files import replacing

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded
ONE = np.float32(1 / 255)  # the value 1 of 255


def open_image(path: Path) -> Image.Image:
    """A decoded, upright picture of an allowed format. Raises InputError naming the file and the reason."""
    if not os.path.isfile(path):  # unlike the method of Path, no error for a name that is too long
        raise InputError(f"{path} is not a file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on large sizes and damaged notes: judged here
            with Image.open(path, formats=FORMATS) as opened:
                picture = _decode(opened, path)
                return picture.convert("RGB") if picture.mode == "LAB" else picture  # Pillow turns it to nothing else
    except InputError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if path.stat().st_size == 0:
            reason = "it is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "it is none of these, or damaged; convert it to one of them"
        raise InputError(f"{path} is not a readable {', '.join(FORMATS)} picture: {reason}") from error


def _decode(picture: Image.Image, path: Path) -> Image.Image:
    """The pixels of an opened file, upright. Size and frames are read from its header before."""
    if picture.width * picture.height > MAX_PIXELS:
        raise InputError(f"{path} is {picture.width}x{picture.height}: more than 100 megapixels, make it smaller")
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a phone's: frame 0 is its photograph
        raise InputError(f"{path} holds {picture.n_frames} frames: save the one you mean as a still picture")
    picture.load()
    return ImageOps.exif_transpose(picture)


def _is_deep(picture: Image.Image) -> bool:
    """Whether it is a grey picture of 16 bits or floats, which Pillow would clip to 8 bits."""
    return picture.mode.startswith(("I", "F"))


def has_alpha(picture: Image.Image) -> bool:
    """Whether pixels can be transparent: by a channel, or by a colour or palette entry that stands for it."""
    return not _is_deep(picture) and picture.has_transparency_data


def _grey(picture: Image.Image, path: Path) -> np.ndarray:
    """One channel as float32 in [0, 1], whatever its depth. (H, W) Raises InputError for values beyond."""
    if not _is_deep(picture):
        return np.asarray(picture.convert("L"), dtype=np.float32) / 255.0
    values = np.asarray(picture, dtype=np.float32) / (65535.0 if picture.mode.startswith("I") else 1.0)
    if not (values.min() >= 0 and values.max() <= 1):  # also false for not-a-number
        raise InputError(f"{path} holds values outside black to white: save it as an 8-bit grey picture")
    return values


def read_image(path: Path) -> Image.Image:
    """The photograph as RGB: 16-bit and float greys scaled down, transparent pixels laid over white.

    The values are those stored: a colour profile is not applied.
    """
    picture = open_image(path)
    if _is_deep(picture):
        return Image.fromarray((_grey(picture, path) * 255).round().astype(np.uint8)).convert("RGB")
    if has_alpha(picture):
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:
            log.warning("%s has transparent pixels: they become white", path)
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def read_mask(path: Path) -> np.ndarray:
    """One mask, (H, W) float32 in [0, 1]. In an RGBA file the channel that varies is the mask."""
    picture = open_image(path)
    if has_alpha(picture):
        picture = picture.convert("RGBA")
        alpha_varies = len(set(picture.getchannel("A").getextrema())) > 1
        colour_varies = any(low != high for low, high in picture.convert("RGB").getextrema())
        if alpha_varies and colour_varies:
            raise InputError(f"{path}: colour and alpha both vary, so which is the mask? Save it as a grey picture")
        picture = picture.getchannel("A") if alpha_varies else picture.convert("RGB")
    mask = _grey(picture, path)
    if mask.max() == ONE and np.isin(mask, (0, ONE)).all():
        log.warning("%s holds only the values 0 and 1 of 255: 1 is read as inside", path)
        mask = (mask > 0).astype(np.float32)
    return mask


def image_path(name: str) -> Path:
    """A path for a picture to write. Raises InputError unless it ends in .png, .jpg or .webp and can be a file."""
    path = Path(name)
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--output_path {name}: name a .png, .jpg or .webp file")
    if path.is_dir() or not existing.is_dir():
        raise InputError(f"--output_path {name}: {path if path.is_dir() else existing} is in the way")
    return path


def check_not_input(target: Path, *inputs: Path) -> None:
    """InputError when a picture would be written over a file that the command reads."""
    if target.exists() and any(path.exists() and target.samefile(path) for path in inputs):
        raise InputError(f"--output_path {target} is what the command reads: name another file")


def save_image(picture: Image.Image, path: Path, settings: dict | None = None) -> None:
    """Write a picture, whole or not at all, in the format that its name ends in.

    `settings`, those that made it, become the PNG text `bas`, or the EXIF user comment of other formats.
    """
    kind = Image.registered_extensions()[path.suffix.lower()]
    options = {} if kind == "PNG" else {"quality": 95}
    if settings and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("bas", json.dumps(settings))
    elif settings:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.UserComment] = json.dumps(settings)
    with replacing(path) as temporary:
        picture.save(temporary, format=kind, **options)


def save_images(pictures: Iterable[Image.Image], notes: list[dict], target: Path) -> Iterator[Path]:
    """Save each picture as it comes, with its note: one under the name given, several with a number. -> their paths"""
    target.parent.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(notes) - 1))
    for i, (picture, note) in enumerate(zip(pictures, notes, strict=True)):
        path = target if len(notes) == 1 else target.with_stem(f"{target.stem}-{i:0{digits}}")
        save_image(picture, path, note)
        yield path


def to_image(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1], as a scene has its photograph -> an 8-bit RGB picture"""
    return to_images(image[None] / 2 + 0.5)[0]


def to_images(images: Tensor) -> list[Image.Image]:
    """(b, 3, H, W) in [0, 1] -> 8-bit RGB pictures"""
    array = (rearrange(images, "b c h w -> b h w c") * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in array]


def pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as the VAE sees it: (3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def fit(picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """The picture at (W, H), untouched where it has that size already."""
    return picture if picture.size == size else picture.resize(size, resampling)
