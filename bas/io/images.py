"""Image files: read as upright RGB images and soft masks, written with the settings that made them."""

import importlib.util
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from bas.errors import InputError, is_own_fault
from bas.io.files import check_length, not_a_file, replacing, require_writable
from bas.io.png import without_long_notes

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
SUFFIX_OF = {  # of a copy, by Pillow's name of the format
    **{"PNG": ".png", "JPEG": ".jpg", "MPO": ".jpg", "WEBP": ".webp", "BMP": ".bmp", "TIFF": ".tif", "GIF": ".gif"},
    **{"AVIF": ".avif", "HEIF": ".heic"},
}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # after "ftyp" in the first bytes
FIRST_FRAME = ("MPO", "GIF")  # of several frames the first is read: a phone's second image, or an animation
MAX_PIXELS = 100_000_000  # checked on the header, before anything is decoded
STRIP = 2**20  # pixels of a part: copies of a whole image in other forms would take gigabytes
MAX_LABELS = 64  # colours; a drawn mask with soft edges has more
MAX_NUMBER = 21  # classes of PASCAL VOC, with the background
GREYISH = 30  # of 255, between the channels of a grey that was converted or compressed
LONGEST_SIDE = {"WEBP": 16_383, "JPEG": 65_500}  # pixels a side that a written file can have
MOST_SETTINGS = 65_000  # bytes of text that fit the EXIF segment of a JPEG file
LABELS_ADVICE = "if it is a label map, name it labels.png; else save it in black and white"
TURNS = {  # EXIF orientations (CIPA DC-008): what makes the stored image upright
    1: "upright",
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "mirrored top to bottom",
    5: "mirrored and turned by 90 degrees",
    6: "turned by 90 degrees",
    7: "mirrored and turned by 270 degrees",
    8: "turned by 270 degrees",
}
T = TypeVar("T")


def open_image(path: Path) -> Image.Image:
    """Decode an image of an allowed format and turn it upright. InputError that names the file and the reason."""
    if not os.path.isfile(path):  # unlike the method of Path, no error for a name that is too long
        raise not_a_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about large sizes and damaged notes: checked here
            with Image.open(without_long_notes(path), formats=_formats(path)) as opened:
                image = _decode(opened, path)
                return image.convert("RGB") if image.mode == "LAB" else image  # Pillow turns it to nothing else
    except InputError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        if is_own_fault(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if path.stat().st_size == 0:
            reason = "it is empty"
        elif _is_heif(path):
            reason = "it is HEIC: `pip install pillow-heif` to read it, or convert it to one of them"
        elif isinstance(error, UnidentifiedImageError):
            reason = "it is none of these, or damaged; convert it to one of them"
        raise InputError(f"{path} is not a readable {', '.join(FORMATS)} image: {reason}") from error


def _is_heif(path: Path) -> bool:
    """Return whether a file is HEIC, as phones write it."""
    with path.open("rb") as file:
        start = file.read(12)
    return start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS


def _formats(path: Path) -> tuple[str, ...]:
    """Return the formats that a file may have: HEIC too, where its Pillow plugin is installed."""
    if _is_heif(path) and importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
        return (*FORMATS, "HEIF")
    return FORMATS


def image_size(path: Path) -> tuple[int, int]:
    """Return the (W, H) of an image as stored, from its header; (0, 0) for a file that `open_image` rejects."""
    return _from_header(path, lambda image: image.size) or (0, 0)


def upright_size(path: Path) -> tuple[tuple[int, int], int | None]:
    """Return the (W, H) of an image turned upright, and its EXIF orientation, None where it states none.

    InputError as `open_image`, where its header cannot be read.
    """
    found = _from_header(path, lambda image: (image.size, _orientation(image)))
    if found is None or found[0][0] * found[0][1] > MAX_PIXELS:
        return open_image(path).size, None
    (width, height), orientation = found
    turned = orientation in (5, 6, 7, 8)
    return ((height, width) if turned else (width, height)), orientation if orientation in TURNS else None


def suffix_of_copy(path: Path) -> str:
    """Return the suffix for a copy of an image: its own in small letters, if bas reads it, else that of its format."""
    own = path.suffix.lower()
    return own if own in SUFFIXES else SUFFIX_OF[_from_header(path, lambda image: image.format) or "PNG"]


def read_orientation(path: Path) -> int | None:
    """Read the EXIF orientation of an image, 1 to 8, None where it states none."""
    value = _from_header(path, _orientation)
    return value if value in TURNS else None


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation of an opened file, for which a PNG may be decoded. None for one that is too large."""
    small = image.width * image.height <= MAX_PIXELS
    return image.getexif().get(ExifTags.Base.Orientation) if small else None


def _from_header(path: Path, read: Callable[[Image.Image], T]) -> T | None:
    """Return what `read` finds in an opened file, None where it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(without_long_notes(path), formats=_formats(path)) as image:
                return read(image)
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        if is_own_fault(error):
            raise
        return None


def _decode(image: Image.Image, path: Path) -> Image.Image:
    """Decode an opened file and turn it upright, after a check of the size and the frames in its header."""
    if image.width * image.height > MAX_PIXELS:
        raise InputError(f"{path} is {image.width}x{image.height}: more than 100 megapixels, make it smaller")
    several = getattr(image, "is_animated", False)  # their number is not asked for: counting can take hours
    if several and image.format not in FIRST_FRAME:
        raise InputError(f"{path} holds several frames: save the one you mean as a still image")
    if several and image.format == "GIF":
        log.warning("%s holds several frames: the first is read", path)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image is grey with 16 bits or floats, which Pillow would clip to 8 bits."""
    return image.mode.startswith(("I", "F"))


def has_alpha(image: Image.Image) -> bool:
    """Return whether pixels can be transparent: by a channel, a colour or a palette entry."""
    return not _is_deep(image) and image.has_transparency_data


def strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Cut an image into strips of whole rows. Yields each with the number of its first row."""
    rows = max(STRIP // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def to_array(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image, (H, W) or (H, W, channels), without the copies that np.asarray makes."""
    one = np.asarray(image.crop((0, 0, 1, 1)))
    array = np.empty((image.height, image.width, *one.shape[2:]), one.dtype)
    for top, strip in strips(image):
        array[top : top + strip.height] = np.asarray(strip)
    return array


def _grey(image: Image.Image, path: Path) -> np.ndarray:
    """Convert an image to one channel (H, W), uint8, from any depth. InputError for values outside."""
    values, deep = np.empty((image.height, image.width), np.uint8), _is_deep(image)
    white = 1 if image.mode[0] == "F" else 65535
    for top, strip in strips(image):
        part = np.asarray(strip if deep else strip.convert("L"))
        if deep and not (part.min() >= 0 and part.max() <= white):  # also false for not-a-number
            raise InputError(f"{path} holds values outside black to white: save it as an 8-bit grey image")
        values[top : top + strip.height] = to_levels(part / np.float32(white)) if deep else part
    return values


def to_levels(mask: np.ndarray) -> np.ndarray:
    """Return a mask in [0, 1] as uint8, 255 for 1. What is above 0 stays above 0."""
    return np.maximum(np.rint(mask * np.float32(255)), mask > 0).astype(np.uint8)


def to_floats(mask: np.ndarray) -> np.ndarray:
    """Return a mask of uint8 as float32 in [0, 1], 1 for 255."""
    return np.divide(mask, np.float32(255), dtype=np.float32)


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    """Convert an image to 8-bit RGB, laid over white."""
    if _is_deep(image):
        return Image.fromarray(_grey(image, path)).convert("RGB")
    if has_alpha(image):
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def read_image(path: Path) -> Image.Image:
    """Read an image as 8-bit RGB: 16-bit and float greys scaled, transparent pixels laid over white.

    A colour profile is not applied.
    """
    image = open_image(path)
    alpha = has_alpha(image)
    if image.mode == "RGB" and not alpha:
        return image
    result = Image.new("RGB", image.size)
    if image.mode in ("RGBA", "P", "PA") and "icc_profile" in image.info:  # that of other modes is not one of RGB
        result.info["icc_profile"] = image.info["icc_profile"]
    for top, strip in strips(image):
        result.paste(_rgb(strip, path), (0, top))
        if alpha and strip.convert("RGBA").getchannel("A").getextrema()[0] != 255:
            log.warning("%s has transparent pixels: they become white", path)
            alpha = False  # said once
    return result


def varies(band: Image.Image) -> bool:
    """Return whether the pixels of one channel differ."""
    low, high = band.getextrema()
    return low != high


def read_mask(path: Path) -> np.ndarray:
    """Read one mask, (H, W) uint8, 255 inside. In an RGBA file the mask is the channel that varies.

    A mask has 256 levels: 16 bits and floats are rounded.
    """
    image = open_image(path)
    if has_alpha(image):
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha_varies = varies(image.getchannel("A"))
        colour_varies = any(varies(image.getchannel(band)) for band in "RGB")
        if alpha_varies and colour_varies:
            raise InputError(f"{path}: colour and alpha both vary, so which is the mask? Save it as a grey image")
        image = image.getchannel("A") if alpha_varies else image
    elif image.mode == "P" and (inside := _inside_of_palette(image, path)) is not None:
        return inside
    image = _of_eight_bits(image, path)
    _check_no_labels(image, path)
    mask = _grey(image, path)
    if mask.max() == 1 and not _is_deep(image):
        log.warning("%s holds only the values 0 and 1 of 255: 1 is read as inside", path)
        mask *= 255
    return mask


def _of_eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Read a mask of 16 bits as one of 8 if its largest value is 255 or 1: some tools store it so. Others stay."""
    if not image.mode.startswith("I"):
        return image
    values = to_array(image)
    if values.min() < 0 or values.max() not in (1, 255):
        return image
    if values.max() == 255:
        log.warning("%s has 16 bits, and 255 is its largest value: it is read as white", path)
    return Image.fromarray(values.astype(np.uint8))


def _check_no_labels(image: Image.Image, path: Path) -> None:
    """Raise InputError for a label map as a mask: of several colours, or of small numbers with an undecided 255.

    Warn of a photograph: with black around the concept, it is read by its brightness.
    """
    if _is_deep(image):
        return
    most = min(MAX_LABELS, image.width * image.height // 16)  # a small image has few colours in any case
    colours, levels, colourful = set(), np.zeros(256, int), 0
    for _, strip in strips(image):
        if len(colours) <= most:
            colours |= {
                colour for _, colour in strip.convert("RGB").getcolors(most) or [(0, i) for i in range(most + 1)]
            }
        levels += strip.convert("L").histogram()
        if image.mode not in ("1", "L"):
            colourful += np.count_nonzero(np.ptp(np.asarray(strip.convert("RGB")), axis=-1) > GREYISH)
    vivid = sum(max(colour) - min(colour) > GREYISH for colour in colours) if len(colours) <= most else 0
    if len(colours) > most and colourful > levels[MAX_NUMBER:].sum() / 2:
        log.warning("%s has many colours, and its brightness is read as the mask: is it a photograph?", path)
    numbers, between, white = levels[1:MAX_NUMBER].sum(), levels[MAX_NUMBER:255].sum(), levels[255]
    if vivid > 1 or numbers >= white > between == 0:
        found = f"{vivid} colours" if vivid > 1 else "small numbers and 255"
        raise InputError(f"{path} holds {found}: {LABELS_ADVICE}")


def _inside_of_palette(image: Image.Image, path: Path) -> np.ndarray | None:
    """Read a mask of two palette entries in colours: entry 0 is outside, the other inside. None for a grey palette.

    Raises InputError for colours that leave it open which is inside.
    """
    entries = image.getpalette("RGB") or []
    palette = np.array(entries + [0] * (768 - len(entries))).reshape(256, 3)
    used = np.flatnonzero(image.histogram()[:256])
    colours = palette[used]
    if len(used) < 2 or (colours == colours[:, :1]).all():
        return None
    if len(used) == 2 and used[0] == 0 and colours[0].sum() < colours[1].sum():
        log.warning("%s has a palette: entry %d is read as inside, entry 0 as outside", path, used[1])
        return from_inside(to_array(image) == used[1])
    raise InputError(f"{path} has {len(used)} palette entries in colours: {LABELS_ADVICE}")


def from_inside(inside: np.ndarray) -> np.ndarray:
    """Return what is inside, bool (H, W), as a mask of uint8 with its rows one after the other."""
    return np.multiply(inside, np.uint8(255), order="C", dtype=np.uint8)


def fit_mask(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Return a mask of uint8 resized to (W, H), as an image of float32 in [0, 1].

    Its rows are resized in strips: a large mask in float32 would take gigabytes.
    """
    width, rows = size[0], max(STRIP // mask.shape[1], 1)
    across = np.empty((len(mask), width), np.float32)
    for top in range(0, len(mask), rows):
        strip = Image.fromarray(to_floats(mask[top : top + rows]))
        across[top : top + rows] = np.asarray(fit(strip, (width, strip.height), Image.Resampling.BILINEAR))
    return fit(Image.fromarray(across), size, Image.Resampling.BILINEAR)


def image_path(name: str) -> Path:
    """Return the path of an image to write. InputError unless it ends in .png, .jpg or .webp and can be a file."""
    path = Path(name)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--output_path {name}: name a .png, .jpg or .webp file")
    check_length(path.with_stem(f"{path.stem}-0000"), "--output_path")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not existing.is_dir():
        raise InputError(f"--output_path {name}: {path if path.is_dir() else existing} is in the way")
    require_writable(path.parent, "--output_path")
    return path


def check_room(path: Path, size: tuple[int, int], settings: dict | None = None) -> None:
    """Raise InputError if an image of this (width, height) or its settings do not fit the format of the suffix."""
    kind = format_of(path)
    most, width, height = LONGEST_SIDE.get(kind, math.inf), *size
    if max(size) > most:
        raise InputError(f"{path}: {width}x{height} pixels, and {kind} holds {most} a side: name a .png file")
    if kind == "JPEG" and settings and len(json.dumps(settings)) > MOST_SETTINGS:
        raise InputError(f"{path}: the settings with all prompts do not fit a JPEG file: name a .png file")


def format_of(path: Path) -> str:
    """Return Pillow's name of the format that a suffix stands for."""
    return Image.registered_extensions()[path.suffix.lower()]


def save_image(image: Image.Image, path: Path, settings: dict | None = None, profile: bytes | None = None) -> None:
    """Write an image as a whole or not at all, in the format of its suffix. Raises InputError as `check_room`.

    settings: what made it, kept as the PNG text `bas` or as the EXIF user comment of other formats. profile: the ICC
    profile of its colours.
    """
    check_room(path, image.size, settings)
    kind = format_of(path)
    options: dict[str, Any] = {} if kind == "PNG" else {"quality": 95}
    if profile:
        options["icc_profile"] = profile
    if settings and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("bas", json.dumps(settings))
    elif settings:
        options["exif"] = Image.Exif()
        options["exif"][ExifTags.Base.UserComment] = json.dumps(settings)
    with replacing(path) as temporary:
        image.save(temporary, format=kind, **options)


def settings_text(image: Image.Image) -> str | None:
    """Return the settings that `save_image` wrote into an opened file, as JSON; None where there are none."""
    if text := image.info.get("bas"):
        return text
    comment = image.getexif().get(ExifTags.Base.UserComment) if image.format != "PNG" else None
    with suppress(ValueError, TypeError):  # of another program's comment
        if "seed" in json.loads(comment or "{}"):
            return comment
    return None


def numbered_paths(target: Path, count: int) -> list[Path]:
    """Return the files of `count` images: the target itself for one, else with numbers, out-00.png, out-01.png."""
    digits = len(str(count - 1))
    return [target] if count == 1 else [target.with_stem(f"{target.stem}-{i:0{digits}}") for i in range(count)]


def save_images(
    images: Iterable[Image.Image], settings: list[dict], target: Path, profile: bytes | None = None
) -> Iterator[Path]:
    """Save each image as it arrives, with its settings and ICC profile, as `numbered_paths`. Yields their paths."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for image, made_by, path in zip(images, settings, numbered_paths(target, len(settings)), strict=True):
        save_image(image, path, made_by, profile)
        yield path


def to_image(image: Tensor) -> Image.Image:
    """Convert a tensor (3, H, W) in [-1, 1] to an 8-bit RGB image."""
    return to_images(image[None] / 2 + 0.5)[0]


def to_images(images: Tensor) -> list[Image.Image]:
    """Convert a tensor (b, 3, H, W) in [0, 1] to 8-bit RGB images."""
    array = (rearrange(images, "b c h w -> b h w c") * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(np.ascontiguousarray(image)) for image in array]


def pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as the VAE takes it: (3, H, W) float32 in [-1, 1]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def fit(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Return the image at (W, H), untouched where it has that size already."""
    return image if image.size == size else image.resize(size, resampling)
