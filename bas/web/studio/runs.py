"""Runs for the page: how far each is, its curves and previews, its images, and how runs differ."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bas.config import TrainConfig, setting_rows
from bas.errors import InputError
from bas.io.images import numbered_paths, read_image, settings_text
from bas.io.json_files import read_json, write_json
from bas.io.run_files import CONCEPTS, METRICS, PREVIEWS, REPORT, SCENE, SETTINGS, read_rows, read_settings, scene_mask
from bas.pretrained.lora_files import FORMATS
from bas.sampling.gallery import GRID
from bas.training.preview import PICTURES, sheet_path
from bas.training.run_folder import LOCK
from bas.web.report import SERIES, first_trained_step, phase_starts
from bas.web.studio import jobs
from bas.web.studio.refusal import Refusal
from bas.web.studio.store import RUNS, Home, inside
from bas.web.studio.unchanged import while_unchanged

DRAWN, EDITED, EXPORTS, MARKS = "pictures", "edits", "exports", "marks.json"
VARIED, EXPLORED = "variations", "exploration"  # a folder for each time, as `bas vary` and `bas explore` write it
GALLERIES = {DRAWN: (DRAWN, VARIED, EXPLORED), EDITED: (EDITED,)}  # the folders whose images the page shows together
ATTENTION, MAPS = "attention", "maps.json"  # a folder for each image, as `bas attend` writes it
MASK, IMAGE = "mask.png", "image.png"  # in the folder of a job that edits
FORMS = ("single", *FORMATS)  # of exports
SHOWN = (".png", ".jpg", ".webp")
MOST_IMAGES = 10_000  # of one edit that are looked for
COLUMNS = 400  # of a curve at most
marking = threading.Lock()  # one change of the favourites at a time
FILES = {
    DRAWN,
    VARIED,
    EXPLORED,
    EDITED,
    EXPORTS,
    ATTENTION,
    PREVIEWS,
    SCENE,
}  # folders of a run whose files the page may ask for


def summary(run: Path, trained_by: dict[str, dict]) -> dict[str, Any] | None:
    """Sum up a run for the list. trained_by: the newest training of each run. None for a folder that is no run."""
    job = trained_by.get(run.name)
    if not (run / SETTINGS).is_file():
        row = {"name": run.name, "done": 0, "total": None}
        return row | {"state": job["state"], "job": job["id"], "scene": job["asked"].get("scene")} if job else None
    try:
        metadata = read_settings(run)
    except InputError as error:
        return {"name": run.name, "state": "damaged", "problem": str(error)}
    config, row = metadata["config"], jobs.last_row(run / METRICS)
    finished = (run / CONCEPTS).is_file()
    found = {
        "name": run.name,
        "state": "done" if finished else state_of(run, job),
        "done": row["step"] if row and isinstance(row.get("step"), int) else 0,
        "total": config["phase1_train_steps"] + config["phase2_train_steps"],
        "phase": row.get("phase") if row else None,
        "handles": metadata["handles"],
        "words": metadata.get("words"),
        "base": config["pretrained_model_name_or_path"] or "mini",
        "train": config["train"],
        "scene": None if "merged" in metadata else Path(config["instance_data_dir"]).name,
        "pictures": sum(len(images) for _, images in folders_of(run, DRAWN)),
        "cover": cover(run),
        "gallery": gallery_version(run),
        "report": (run / REPORT).is_file(),
    }
    if job and not finished:
        found |= {key: job.get(key) for key in ("line", "progress", "stopping")}
    return found | ({"job": job["id"]} if job else {})


def state_of(run: Path, job: dict | None) -> str:
    """Return the state of a run that is not finished: that of its training, here or in a terminal."""
    if job and job["state"] in jobs.ALIVE:
        return job["state"]
    if trained_elsewhere(run):
        return "elsewhere"
    return job["state"] if job and job["state"] != "done" else "unfinished"


def trained_elsewhere(run: Path) -> bool:
    """Return whether a process holds a run. If it is no job of the studio, it is a terminal's."""
    return (run / LOCK).exists() and jobs.held(run / LOCK)


def cover(run: Path) -> str | None:
    """Return the image that stands for a run: the newest drawn one, else the newest preview, else its scene."""
    newest = (
        (changed, f"{folder}/{name}")
        for folder, images in folders_of(run, DRAWN)
        for changed, name in images[:2]  # one of them may be a grid
        if name != GRID
    )
    if drawn := max(newest, default=None):
        return drawn[1]
    previews = sorted(run.glob(f"{PICTURES}/step-*/sample-*.png"))
    path = previews[-1] if previews else run / SCENE / "img.png"
    return path.relative_to(run).as_posix() if path.is_file() else None


def folders_of(run: Path, gallery: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Yield each gallery folder of a run, with its images, newest first: the time of the last change and the name."""
    for name in GALLERIES[gallery]:
        yield from folders_below(run, name)


def folders_below(run: Path, folder: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Yield a folder of a run and those in it, each with its images; nothing without it."""
    try:
        images, inner = listed(run / folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    yield folder, images
    for name in inner:
        yield from folders_below(run, f"{folder}/{name}")


@while_unchanged
def listed(place: Path) -> tuple[list[tuple[int, str]], list[str]]:
    """Return the images in a folder, newest first, and the folders in it.

    An image that is changed in its place is not seen: who shows its time reads that anew.
    """
    images, folders = [], []
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.name.endswith(SHOWN):
                with suppress(FileNotFoundError):  # it went in between
                    images.append((entry.stat().st_mtime_ns, entry.name))
    return sorted(images, reverse=True), folders


def gallery_version(run: Path) -> str:
    """Return a text that changes with the galleries of a run: a new, changed or deleted image, a mark, a map."""
    folders = [run / name for names in GALLERIES.values() for name in names]
    folders += [each for name in (VARIED, EXPLORED, ATTENTION) for each in (run / name).glob("*/")]
    times = [path.stat().st_mtime_ns for path in (*folders, run / ATTENTION, run / MARKS) if path.exists()]
    return f"{max(times, default=0):x}-{sum(times) & 0xFFFFFFFF:x}"


# --- Watching -----------------------------------------------------------------------------------------------------


def metrics(run: Path) -> dict[str, Any]:
    """Return the curves of a run: for each of at most COLUMNS columns the least, the largest and the mean value."""
    rows = read_rows(run / METRICS)
    starts = [rows[i]["step"] for i in phase_starts([row["phase"] for row in rows])] if rows else []
    count = -(-len(rows) // COLUMNS) or 1
    parts = [rows[i : i + count] for i in range(0, len(rows), count)]
    curves = []
    for name, title in SERIES.items():
        columns = [[row[name] for row in part if finite(row.get(name))] for part in parts]
        if any(columns):
            values = [[min(c), max(c), sum(c) / len(c)] if c else None for c in columns]
            curves.append({"name": name, "title": title, "values": values})
    return {"steps": [part[-1]["step"] for part in parts], "starts": starts, "curves": curves}


def finite(value: Any) -> bool:
    """Return whether a value can be drawn."""
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def previews(run: Path) -> list[dict[str, Any]]:
    """Return the previews of a run by step: an image of each handle and of all, and each handle's attention."""
    config = read_settings(run)["config"]
    trained_from = first_trained_step(config)
    found = []
    for folder in sorted((run / PICTURES).glob("step-*")):
        step = folder.name.removeprefix("step-")
        if not step.isdecimal() or not sheet_path(run, int(step)).is_file():
            continue
        names = sorted(path.relative_to(run).as_posix() for path in folder.glob("*.png"))
        found.append({"step": int(step), "files": names, "trained": int(step) >= trained_from})
    return found


def masks(run: Path) -> list[str | None]:
    """Return the mask of each handle of a run in the scene that it was trained on. None for a handle without one."""
    paths = [scene_mask(run / SCENE, i) for i in range(len(read_settings(run)["handles"]))]
    return [path.relative_to(run).as_posix() if path.is_file() else None for path in paths]


# --- Images -------------------------------------------------------------------------------------------------------


def pictures(run: Path, gallery: str) -> list[dict[str, Any]]:
    """Return the images of a gallery, newest first, each with the settings that made it.

    `boxes` is its layout, `maps` are where its handles looked, if that was asked for.
    """
    stars = {*marks(run)}
    looked = {entry.name for entry in os.scandir(run / ATTENTION)} if (run / ATTENTION).is_dir() else set()
    found = []
    files = [f"{folder}/{name}" for folder, images in folders_of(run, gallery) for _, name in images]
    for changed, file in sorted(((run / file).stat().st_mtime_ns, file) for file in files)[::-1]:
        settings = settings_in(run / file, changed)
        row = {"file": file, "v": f"{changed:x}", "settings": settings, "star": file in stars, "maps": []}
        if layout := settings.get("layout"):
            row["boxes"] = boxes_in(Path(layout))
        if attention_folder(run, file).name in looked:
            row["maps"] = maps_of(run, file)
        found.append(row)
    return found


@lru_cache(maxsize=256)
def boxes_in(layout: Path) -> dict[str, list[float]]:
    """Read the boxes of a layout file; none if it is gone, or holds masks."""
    try:
        return {handle: box for handle, box in read_json(layout).items() if isinstance(box, list)}
    except (InputError, AttributeError):
        return {}


def attention_folder(run: Path, file: str) -> Path:
    """Return the folder for the attention maps of an image of a run."""
    return run / ATTENTION / file.replace("/", "-")


def maps_of(run: Path, file: str) -> list[dict[str, str]]:
    """Return the attention maps of an image: handles, and files that show where each looked. None if outdated."""
    notes = attention_folder(run, file) / MAPS
    if not notes.is_file() or notes.stat().st_mtime_ns < (run / file).stat().st_mtime_ns:
        return []
    try:
        names = read_json(notes)
    except InputError:
        return []  # the page then offers to make them again
    if not isinstance(names, dict):
        return []
    return [
        {"name": name, "file": (notes.parent / f"{key}.png").relative_to(run).as_posix()} for key, name in names.items()
    ]


def edit_of(home: Home, run: Path, file: str) -> Path | None:
    """Find the job that made an image by editing; it keeps the image before and the mask. None if it is gone."""
    for folder in reversed(jobs.Lane(home).folders()):
        job = jobs.describe(folder) if "-edit-" in folder.name else None
        if not job or job["name"] != run.name or not isinstance(target := job["asked"].get("file"), str):
            continue
        count = (job["asked"].get("settings") or {}).get("num_images", 1)
        if Path(file) in numbered_paths(Path(target), min(count, MOST_IMAGES)):
            return folder
    return None


@lru_cache(maxsize=256)
def changed_outside(job: Path, edited: Path, _changed: int) -> int | None:
    """Count the pixels outside its mask that an edit has changed. None if its job kept nothing to compare."""
    if not (job / IMAGE).is_file() or not (job / MASK).is_file():
        return None
    before, after = (np.asarray(read_image(path)) for path in (job / IMAGE, edited))
    with Image.open(job / MASK) as mask:
        outside = np.asarray(mask) == 0
    return int((before != after).any(axis=2)[outside].sum()) if before.shape == after.shape else None


@lru_cache(maxsize=4096)
def settings_in(path: Path, _changed: int) -> dict[str, Any]:
    """Read what made an image, as `save_image` noted it; nothing without a note."""
    try:
        with Image.open(path) as image:
            found = json.loads(settings_text(image) or "{}")
            given = (
                {name: value for name, value in found.items() if value is not None} if isinstance(found, dict) else {}
            )
            return given | {"size": list(image.size)}
    except (OSError, ValueError):
        return {}


def marks(run: Path) -> list[str]:
    """Return the images that were marked as favourites."""
    try:
        found = read_json(run / MARKS)["stars"]
    except (InputError, KeyError):
        return []
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def mark(run: Path, file: str, star: bool) -> None:
    """Mark an image as a favourite, or take the mark away."""
    with marking:
        stars = [name for name in marks(run) if name != file]
        write_json(run / MARKS, {"stars": [*stars, file] if star else stars})


def run_file(run: Path, name: str) -> Path:
    """Return a file of a run that the page may see. Refusal for any other."""
    parts = name.split("/")
    known = parts[0] in FILES or parts == [REPORT]
    path = run.joinpath(*parts)
    hidden = any(part.startswith(".") or "\\" in part or "\0" in part or not part for part in parts)
    if hidden or not known or not path.is_file() or not inside(path, run):
        raise Refusal(404, "the run has no such file", "missing")
    return path


# --- Comparing ----------------------------------------------------------------------------------------------------


def compare(home: Home, names: list[str]) -> dict[str, Any]:
    """Return the settings in which runs differ, their curves, and their newest previews."""
    folders = [home.find(RUNS, name) for name in names[:6]]
    configs = [read_settings(run)["config"] for run in folders]
    rows = setting_rows(TrainConfig)
    shown = [name for name in rows if name != "output_dir"]
    differs = [
        {"name": name, "values": [value_of(config.get(name)) for config in configs]}
        for name in shown
        if len({json.dumps(config.get(name)) for config in configs}) > 1
    ]
    return {
        "runs": [folder.name for folder in folders],
        "differs": differs,
        "metrics": [metrics(run) for run in folders],
        "previews": [previews(run) for run in folders],
    }


def value_of(value: Any) -> str:
    """Write a setting for people."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "default" if value is None else str(value)
