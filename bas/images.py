"""Picture files as the method needs them: an upright RGB photograph, a soft mask. What cannot be used is named."""

import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bas.config import InputError

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded


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
