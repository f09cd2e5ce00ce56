"""Files of other tools that hold masks in a form or under a name that bas does not read, and what to do with each.

Annotation tools export COCO files under names of their own, XML, fractions or archives. A folder with such a file and
without a mask source gets an answer that names the file.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bas.io.images import SUFFIXES

MAX_SNIFFED = 2**24  # bytes of a JSON file that is opened to find out what it holds
COCO = "holds COCO annotations: keep those of this image and name it coco.json"
LABELME = "is labelme's: write its points into regions.json, or convert it with labelme_export_json and take label.png"
LABEL_STUDIO = "is Label Studio's own JSON, in percent: export as COCO and name it coco.json"
VIA = "is VIA's own JSON: export as COCO and name it coco.json"
ARRAY = "is not read: save its masks with numpy.save as masks.npy, an array (concepts, rows, columns)"
XML = "is not read: export the masks as COCO and name the file coco.json, or as a segmentation mask named labels.png"
YOLO = "holds fractions of the sides, as YOLO writes them: write them in pixels into regions.json"
IMAGE = (
    "may be a mask: name it mask0.png if it shows one concept in white, labels.png if it has a value for each concept"
)
LAYERS = "is not read: export each concept in white on black as mask0.png, mask1.png, ..."
OTHER = "may be an export of another tool: " + XML.removeprefix("is not read: ")
FOLDER = "is a folder that is not read: put its masks beside the image as mask0.png, mask1.png, ... or labels.png"

BY_NAME: tuple[tuple[str, str], ...] = (
    (
        r"labels?([ _-]?map)?\.(png|jpe?g|webp|bmp|tiff?|gif)",
        "would not be read: name it labels.png, saved without loss",
    ),
    (r"regions?\.json", "would not be read: name it regions.json"),
    (r"coco\.json", "would not be read: name it coco.json"),
    (r"masks?\.npy", "would not be read: name it masks.npy"),
    (r"\S*coco\S*\.json|instances?_\S+\.json|annotations?\.json|result\.json|panoptic_\S+\.json", COCO),
    (r"\S*via\S*\.json", VIA),
    (r".*\.xml", XML),
    (r".*\.(npz|npy|pt|pth|pkl|mat|h5)", ARRAY),
    (r".*\.(psd|xcf|svg|kra|ora)", LAYERS),
    (r"masks?|labels?|annotations?|segmentations?|segmentation(class|object)(raw)?|segmentation_masks?", FOLDER),
)
OF_A_MASK = re.compile(r"mask|label|seg|matte|alpha|cut[ _-]?out|task-\d+-annotation", re.IGNORECASE)
OF_A_TOOL = re.compile(r".*\.(json|csv|tsv|ndjson|jsonl|geojson|ya?ml|parquet|zip|tar|gz)", re.IGNORECASE)
NUMBERS = re.compile(r"\s*\d+(\s+-?[\d.]+(e-?\d+)?){4,}\s*", re.IGNORECASE)  # a class, then x y x y ...


def unread_masks(folder: Path) -> str | None:
    """Return one line on the likeliest file of masks that bas does not read, None where there is none."""
    found = find_export(folder)
    return f"{found[0].name} {found[1]}" if found else None


def other_file(folder: Path) -> str | None:
    """Return one line on a file beside the image that may hold its masks, though nothing says so; else None."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "scene.json" or path.stem.lower() == "img" or not path.is_file():
            continue
        if path.suffix.lower() in SUFFIXES or OF_A_TOOL.fullmatch(path.name):
            return f"{path.name} {IMAGE if path.suffix.lower() in SUFFIXES else OTHER}"
    return None


def find_export(folder: Path) -> tuple[Path, str] | None:
    """Find the likeliest file of masks that bas does not read, and what to do with it. None where there is none."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.name != "scene.json" and (advice := _advice(path)):
            return path, advice
    return None


def _advice(path: Path) -> str | None:
    """Return what to do with a file, None where it holds no masks."""
    if path.suffix.lower() == ".json" and path.is_file() and (found := _sniff_json(path)):
        return found
    for pattern, advice in BY_NAME:
        if re.fullmatch(pattern, path.name, re.IGNORECASE) and path.is_dir() == (advice is FOLDER):
            return advice
    if path.suffix.lower() == ".txt" and path.is_file():
        return YOLO if NUMBERS.fullmatch(_first_line(path)) else None
    if path.suffix.lower() in SUFFIXES and path.is_file() and OF_A_MASK.search(path.stem):
        return IMAGE
    return None


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(4096).decode("latin-1").rstrip("\r\n")


def _sniff_json(path: Path) -> str | None:
    """Return what a JSON file is by its keys, None for one that is broken, large or of another kind."""
    if path.stat().st_size > MAX_SNIFFED:
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return next((advice for holds, advice in BY_CONTENT if holds(content)), None)


def _has(content: Any, *keys: str) -> bool:
    return isinstance(content, dict) and all(key in content for key in keys)


def _is_coco(annotations: Any) -> bool:
    """Return whether annotations are COCO's, by the first: those of other tools have other keys."""
    return not annotations or any(_has(_first(annotations), key) for key in ("segmentation", "segments_info", "bbox"))


def _first(content: Any) -> Any:
    return content[0] if isinstance(content, list) and content else None


BY_CONTENT: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (lambda content: _has(content, "shapes"), LABELME),
    (lambda content: _has(content, "_via_img_metadata"), VIA),
    (lambda content: _has(_first(content), "annotations") or _has(_first(content), "result"), LABEL_STUDIO),
    (lambda content: _has(content, "result"), LABEL_STUDIO),
    (lambda content: _has(content, "annotations") and _is_coco(content["annotations"]), COCO),
    (lambda content: _has(content, "annotations"), OTHER),
    (lambda content: _has(_first(content), "segmentation"), COCO),
)
