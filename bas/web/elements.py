"""Elements of the pages: templates filled with escaped values, embedded images, and scripts named by their hash."""

import base64
import hashlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from bas import __version__
from bas.errors import InputError
from bas.io.figures import as_hex, concept_colour
from bas.io.images import read_image, read_mask, to_floats

log = logging.getLogger(__name__)

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 320  # pixels of an image on a page
T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """A captioned image, embedded in the page."""

    uri: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class Chip:
    """A handle with the colour that it has in every figure, as #rrggbb."""

    name: str
    colour: str


@dataclass(frozen=True)
class Table:
    """Names and values under a title that folds away."""

    title: str
    rows: Mapping[str, str]
    closed: bool = False


@dataclass(frozen=True)
class Script:
    """A script of this package, and its hash: the only one that a page's Content-Security-Policy runs."""

    text: Markup
    hash: str


@cache
def environment() -> Environment:
    """Return the template environment. It escapes every value, and a name without a value is an error."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return found


def render(template: str, script: str | None = None, **values: Any) -> str:
    """Fill a template. script: the file in templates/ that the page runs; without one it runs none."""
    loaded = load_script(script) if script else None
    return environment().get_template(template).render(script=loaded, version=__version__, **values)


@cache
def load_script(name: str) -> Script:
    """Read a script from templates/, with the hash that the page's Content-Security-Policy names."""
    text = "\n" + (TEMPLATES / name).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Script(Markup(text), f"sha256-{digest}")  # a file of this package, so not escaped


def figure(source: Path | Image.Image, caption: str, side: int = SIDE) -> Figure:
    """Embed an image, scaled down to `side` pixels if it is larger. OSError for a file that is not an image."""
    opened = source if isinstance(source, Image.Image) else Image.open(source)
    with opened as image:
        shown = image.convert("RGB")
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    return Figure(data_uri(shown), shown.width, shown.height, caption)


def data_uri(image: Image.Image) -> str:
    """Return an address that holds the image itself, as a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def chip(name: str, index: int) -> Chip:
    """Return the handle of concept `index` with its colour."""
    return Chip(name, as_hex(concept_colour(index)))


def table(title: str, values: Mapping[str, object], closed: bool = False) -> Table:
    """Return a table of settings in plain words."""
    return Table(title, {name: plain(value) for name, value in values.items()}, closed)


def plain(value: object) -> str:
    """Return a setting's value in plain words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "; ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)


def spread(items: Sequence[T], most: int) -> Sequence[T]:
    """Return at most `most` of the items, at even distances, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def readable(path: Path, read: Callable[[Path], T] = read_image) -> T | None:
    """Read an image. Returns None where there is none, and where it cannot be read, which is logged."""
    if not path.exists():
        return None
    try:
        return read(path)
    except InputError as error:
        log.warning("the page leaves out an image: %s", error)
        return None


def readable_masks(folder: Path, count: int) -> dict[int, np.ndarray]:
    """Read the masks of a scene folder that can be read, by concept, (H, W) in 0..1 each."""
    masks = {i: readable(folder / f"mask{i}.png", read_mask) for i in range(count)}
    return {i: to_floats(mask) for i, mask in masks.items() if mask is not None}
