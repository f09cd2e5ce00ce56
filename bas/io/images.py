"""Picture files as the method needs them: an upright RGB photograph, a soft mask. What cannot be used is named."""

import logging
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from bas.errors import InputError

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded
ONE = np.float32(1 / 255)  # the value 1 of 255


def open_picture(path: Path) -> Image.Image:
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
    picture = open_picture(path)
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
    picture = open_picture(path)
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
