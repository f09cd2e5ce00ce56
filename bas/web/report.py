"""The report of a run, RUN/report.html: its scene, its previews and losses, and its galleries.

The page loads nothing: images are embedded, and its script is the package's own. It is built from the files of the run
folder alone, so it can be written at any time, also while the run trains.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import quote

import numpy as np
from PIL import Image

from bas.config import TrainConfig
from bas.errors import InputError
from bas.io.figures import tint_masks
from bas.io.files import human_size, write_text
from bas.io.run_files import (
    CONCEPTS,
    METRICS,
    REPORT,
    SCENE,
    SETTINGS,
    numbered_first,
    read_rows,
    read_sessions,
    read_settings,
)
from bas.presets import KINDS, METHODS
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import SHIPPED
from bas.runtime.progress import clock
from bas.sampling.gallery import GRID
from bas.training.preview import PICTURES
from bas.web.elements import Chip, Figure, Table, chip, figure, readable, readable_masks, render, spread, table

log = logging.getLogger(__name__)

SHEET = "demo.png"  # the sheet that `bas demo` leaves in its run; the page shows it first
SHEET_SIDE = 1600  # pixels of a sheet of many images
MOST_STEPS = 12  # previews on the page
SMOOTHED = 1 / 25  # the share of a run that the bold curves average over
UNTRAINED = "cannot look like the concept yet"
SERIES = {  # of metrics.jsonl, in the order of the page
    "reconstruction": "masked reconstruction (eq. 1)",
    "attention": "cross-attention (eq. 2)",
    "prior": "prior preservation",
    "loss": "sum, weighted",
    "grad_norm": "gradient norm before clipping",
    "lr": "learning rate",
}
MEMORY = (("gpu_bytes", "on the GPU"), ("process_bytes", "in the process"))


@dataclass(frozen=True)
class Strip:
    """A row of figures in columns, of one handle, or of all together where `handle` is None."""

    handle: Chip | None
    columns: tuple[tuple[Figure, ...], ...]


@dataclass(frozen=True)
class Chart:
    """One series as SVG paths in a box of 1000 x 100."""

    name: str
    title: str
    scale: str
    raw: str
    smooth: str  # empty where the series is not averaged
    borders: tuple[str, ...]  # x where a phase follows another


@dataclass(frozen=True)
class Scene:
    """The files of a run's scene that can be read; masks: (H, W) in 0..1 by concept."""

    image: Image.Image | None
    masks: dict[int, np.ndarray]
    handles: list[str]


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path. Raises InputError for a folder that is not a run."""
    write_text(run / REPORT, page(run))
    return run / REPORT


def renew_report(gallery: Path) -> Path | None:
    """Write the report of the run that holds a gallery's folder, and return its path.

    None where no run holds it, or, with a warning, where the run's files are damaged: the gallery itself is complete.
    """
    run = gallery.absolute().parent
    if not (run / SETTINGS).is_file():
        return None
    try:
        return write_report(run)
    except InputError as error:
        log.warning("%s has no new page: %s", run, error)
        return None


def page(run: Path) -> str:
    """Return the report of a run. Raises InputError for a folder that is not a run."""
    if not (run / SETTINGS).is_file():
        raise InputError(f"{run} is not a run of bas: it has no {SETTINGS}")
    metadata, rows, sessions = read_settings(run), read_rows(run / METRICS), read_sessions(run)
    handles, finished = metadata["handles"], (run / CONCEPTS).exists()
    scene = Scene(readable(run / SCENE / "img.png"), readable_masks(run / SCENE, len(handles)), handles)
    previews = sorted((run / PICTURES).glob("step-*"), key=_step)
    shown = spread(previews, MOST_STEPS)
    sheet = readable(run / SHEET)
    command = f'bas sample {quote(str(run))} --prompt "a photo of {handles[0]} at the beach"'
    grids = [(path.parent.name, readable(path)) for path in sorted(run.glob(f"*/{GRID}"))]
    data = curves(rows)
    return render(
        "report.html",
        "report.js",
        heading=run.resolve().name,
        handles=[chip(name, i) for i, name in enumerate(handles)],
        sheet=figure(sheet, "the scene, then its concepts in new places", SHEET_SIDE) if sheet else None,
        tiles=tiles(metadata, rows, sessions, finished),
        trains=None if "merged" in metadata else KINDS.get(metadata["config"]["train"], KINDS["full"]).about,
        command=command if finished else "",
        scene=scene_figures(run / SCENE, scene),
        strips=strips(scene, shown, first_trained_step(metadata["config"])),
        previews_shown=len(shown),
        previews_left_out=len(previews) - len(shown),
        charts=charts(data),
        curves=data,
        galleries=[figure(grid, name, SHEET_SIDE) for name, grid in grids if grid],
        explore=f"bas explore {quote(str(run))}" if finished else "",
        tables=tables(run, metadata, sessions, finished),
    )


# --- Pieces of the page -------------------------------------------------------------------------------------------


def tiles(metadata: dict, rows: list[dict], sessions: list[dict], finished: bool) -> dict[str, str]:
    """Return the few numbers one asks for first, by name."""
    config = metadata["config"]
    planned = config["phase1_train_steps"] + config["phase2_train_steps"]
    stages = [stage for session in sessions for stage in session["stages"]]
    values = {
        "state": "finished" if finished else "unfinished",
        "steps": None if "merged" in metadata else f"{len(rows)} of {planned}",
        "time": clock(sum(stage["seconds"] for stage in stages)) if stages else None,
        "peak GPU memory": _peak(stages, "gpu_bytes"),
        "peak memory of the process": _peak(stages, "process_bytes"),
        "base model": Path(config["pretrained_model_name_or_path"] or SHIPPED).name,
        "seed": config["seed"],
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _peak(stages: list[dict], kind: str) -> str | None:
    peaks = [stage[kind] for stage in stages if kind in stage]
    return human_size(max(peaks)) if peaks else None


def scene_figures(folder: Path, scene: Scene) -> list[Figure]:
    """Show the scene, its masks together and alone, and its extra images with theirs."""
    if scene.image is None:
        return []
    figures = [figure(scene.image, "the scene"), figure(tint_masks(scene.image, scene.masks), "with its masks")]
    figures += [
        figure(tint_masks(scene.image, {i: mask}), f"{scene.handles[i]}, {mask.mean():.0%} of the image")
        for i, mask in scene.masks.items()
    ]
    for path in sorted(folder.glob("*/img.png"), key=numbered_first):
        if further := readable(path):
            masks = readable_masks(path.parent, len(scene.handles))
            caption = f"image {path.parent.name}: {', '.join(scene.handles[i] for i in masks)}"
            figures.append(figure(tint_masks(further, masks), caption))
    return figures


def first_trained_step(config: dict) -> int:
    """Return the first step whose preview shows a trained model: phase 1 trains token embeddings alone.

    0 for a baseline: it has one phase.
    """
    if config["method"] in METHODS:
        return 0
    return config["phase1_train_steps"] + 1 if config["phase2_train_steps"] else 0


def strips(scene: Scene, previews: Sequence[Path], trained_from: int) -> list[Strip]:
    """Show step by step what each handle generates and where it looks, then all handles together."""
    if not previews:
        return []
    found = [_handle_strip(scene, previews, i, trained_from) for i in range(len(scene.handles))]
    if len(scene.handles) > 1:
        columns = [
            (figure(image, _caption(folder, trained_from)),)
            for folder in previews
            if (image := readable(folder / "sample-all.png"))
        ]
        found.append(Strip(None, tuple(columns)))
    return found


def _handle_strip(scene: Scene, previews: Sequence[Path], index: int, trained_from: int) -> Strip:
    """Show the concept in the scene, then a column of sample and attention map per preview."""
    columns = []
    if scene.image and index in scene.masks:
        mask = tint_masks(scene.image, {index: scene.masks[index]})
        columns.append((figure(scene.image, "the scene"), figure(mask, "mask")))
    for folder in previews:
        sample, attention = (readable(folder / f"{kind}-{index}.png") for kind in ("sample", "attention"))
        if sample and attention:
            columns.append((figure(attention, "attention map"), figure(sample, _caption(folder, trained_from))))
    return Strip(chip(scene.handles[index], index), tuple(columns))


def _caption(preview: Path, trained_from: int) -> str:
    """Name a preview's step, and say where it cannot look like the concept yet."""
    step = _step(preview)
    return f"step {step}" if step >= trained_from else f"step {step}, in phase 1: {UNTRAINED}"


def _step(preview: Path) -> int:
    return int(preview.name.removeprefix("step-"))


def tables(run: Path, metadata: dict, sessions: list[dict], finished: bool) -> list[Table]:
    """Return settings, hashes, versions, times and memory."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in metadata["config"].items()}
    changed = {name: value for name, value in config.items() if value != defaults.get(name)}
    kept = {name: value for name, value in config.items() if name not in changed}
    hashes = {"base weights": metadata["base"]} | ({"tuned weights": weights_hash(run)} if finished else {})
    found = [
        table("Settings other than the defaults", changed),
        table("Settings at their defaults", kept, closed=True),
        table("sha256", hashes),
    ]
    if "merged" in metadata:
        found.insert(0, table("Merged", merged_rows(metadata["merged"])))
    for i, session in enumerate(sessions):
        about = {"started": session["started"], "device": session["device"], **session["versions"]}
        for stage in session["stages"]:
            memory = [f"{human_size(stage[key])} {what}" for key, what in MEMORY if key in stage]
            about[stage["stage"]] = ", ".join([f"{stage['seconds']:.1f} s", *memory])
        found.append(table("Times, memory, versions" if i == 0 else f"Resumed, session {i + 1}", about))
    return found


def merged_rows(merged: dict) -> dict[str, str]:
    """Say of a merged run which runs it is made of, and how far each concept moved, a line each."""
    runs = {run: f"weight {weight:g}" for run, weight in zip(merged["runs"], merged["weights"], strict=True)}
    rank = {"rank": str(merged["rank"])} if merged.get("rank") else {}
    moved = {name: f"its attention's output moved by {drift:.1%}" for name, drift in merged["drift"].items()}
    return runs | rank | moved


# --- Curves -------------------------------------------------------------------------------------------------------


def curves(rows: list[dict]) -> dict:
    """Return what the page's script shows: steps, phases, and each series with None where no value is finite."""
    names = [name for name in SERIES if any(name in row for row in rows)]
    series = {name: [_finite(row.get(name)) for row in rows] for name in names}
    return {"phases": [row["phase"] for row in rows], "steps": [row["step"] for row in rows], "series": series}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def charts(data: dict) -> list[Chart]:
    """Return a chart of each series that has a finite value; none for fewer than two steps."""
    if len(data["steps"]) < 2:
        return []
    return [chart(name, data) for name, values in data["series"].items() if any(v is not None for v in values)]


def chart(name: str, data: dict) -> Chart:
    """Draw a series, each value thin and the running mean bold, logarithmic where it spans more than a factor of 20."""
    steps, values = data["steps"], data["series"][name]
    known = [value for value in values if value is not None]
    logarithmic = min(known) > 0 and max(known) > 20 * min(known)
    height = math.log if logarithmic else float
    low, high = height(min(known)), height(max(known))

    def across(step: int) -> float:
        return 1000 * (step - steps[0]) / (steps[-1] - steps[0])

    def path(series: list[float | None]) -> str:
        return line(
            [
                None if value is None else (across(step), 95 - 90 * ((height(value) - low) / ((high - low) or 1)))
                for step, value in zip(steps, series, strict=True)
            ]
        )

    width = max(1, round(len(steps) * SMOOTHED))
    return Chart(
        name,
        SERIES[name],
        f"{min(known):.3g} to {max(known):.3g}{', logarithmic' if logarithmic else ''}",
        path(values),
        "" if name == "lr" else path(running_mean(values, width)),
        tuple(f"{across(steps[i]):.1f}" for i in phase_starts(data["phases"])),
    )


def line(points: list[tuple[float, float] | None]) -> str:
    """Return an SVG path through the points, interrupted at each None."""
    parts, pen_down = [], False
    for point in points:
        if point:
            parts.append(f"{'L' if pen_down else 'M'}{point[0]:.2f} {point[1]:.2f}")
        pen_down = point is not None
    return "".join(parts)


def running_mean(values: list[float | None], width: int) -> list[float | None]:
    """Average each known value with the known ones up to `width - 1` before it."""
    means: list[float | None] = []
    for i, value in enumerate(values):
        window = [v for v in values[max(0, i - width + 1) : i + 1] if v is not None]
        means.append(None if value is None else sum(window) / len(window))
    return means


def phase_starts(phases: list[str]) -> list[int]:
    """Return the rows at which one phase follows another."""
    return [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
