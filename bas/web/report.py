"""One self-contained page for a run, RUN/report.html: what went in, how it was learnt, what came out.

The page asks nothing of the network: pictures are embedded, the script is its own. It is built from the files of the
run folder alone, so it can be made anew at any time, also while the run is still going.
"""

import base64
import html
import io
import json
import logging
import math
import string
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import TypeVar

import numpy as np
from PIL import Image

from bas import __version__
from bas.config import TrainConfig
from bas.errors import InputError
from bas.io.figures import as_hex, concept_colour, tint_masks
from bas.io.files import human_size, read_json, write_text
from bas.io.images import read_image, read_mask
from bas.io.run_files import CONCEPTS, METRICS, SCENE, SETTINGS, read_rows
from bas.io.settings_file import check_metadata
from bas.pretrained.folder import weights_hash
from bas.pretrained.hub import SHIPPED
from bas.runtime.progress import clock
from bas.sampling.gallery import GRID
from bas.training.preview import PICTURES
from bas.training.timing import TIMES

log = logging.getLogger(__name__)

REPORT = "report.html"
TEMPLATE = Path(__file__).parent / "templates" / "report.html"
SIDE = 320  # pixels of a picture on the page
SHEET_SIDE = 1600  # pixels of a sheet of many pictures
MOST_STEPS = 12  # previews on the page; of more, these many are taken at even distances
SMOOTHED = 1 / 25  # the share of a run that the bold curves average over
SERIES = {  # of metrics.jsonl, in the order of the page
    "reconstruction": "masked reconstruction (eq. 1)",
    "attention": "cross-attention (eq. 2)",
    "prior": "prior preservation",
    "loss": "sum, weighted",
    "grad_norm": "gradient norm before clipping",
    "lr": "learning rate",
}

escape = html.escape


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path. InputError when the folder is no run of bas."""
    write_text(run / REPORT, page(run))
    return run / REPORT


def renew_report(gallery: Path) -> Path | None:
    """Write the page of the run that a gallery's folder lies in anew, to show it there; None where it is in no run."""
    run = gallery.absolute().parent
    return write_report(run) if (run / SETTINGS).is_file() else None


def page(run: Path) -> str:
    """The whole page of a run."""
    if not (run / SETTINGS).is_file():
        raise InputError(f"{run} is no run of bas: it has no {SETTINGS}")
    facts, rows = check_metadata(run / SETTINGS, read_json(run / SETTINGS)), read_rows(run / METRICS)
    sessions = read_json(run / TIMES).get("sessions", []) if (run / TIMES).exists() else []
    handles, finished = facts["handles"], (run / CONCEPTS).exists()
    photo, masks = readable(run / SCENE / "img.png"), readable_masks(run / SCENE, len(handles))
    command = f'bas sample {quote(str(run))} --prompt "a photo of {handles[0]} at the beach"'
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{', '.join(handles)}: a run of bas"),
        heading=escape(run.resolve().name),
        handles="".join(chip(name, i) for i, name in enumerate(handles)),
        tiles=tiles(facts, rows, sessions, finished),
        command=escape(command) if finished else "",
        scene=scene_section(run / SCENE, photo, masks, handles),
        learning=learning_section(run, photo, masks, handles),
        charts=charts(rows),
        data=embedded_json(curves(rows)),
        galleries=galleries_section(run, finished),
        tables=tables(run, facts, sessions, finished),
        version=escape(__version__),
    )


# --- Pieces of the page -------------------------------------------------------------------------------------------


def chip(name: str, index: int) -> str:
    """A handle with the colour that it has in every picture."""
    return f'<span class="chip"><i style="background:{as_hex(concept_colour(index))}"></i>{escape(name)}</span>'


T = TypeVar("T")


def readable(path: Path, read: Callable[[Path], T] = read_image) -> T | None:
    """What a picture file holds; None where it is missing, and where it cannot be read, of which a line is logged."""
    if not path.exists():
        return None
    try:
        return read(path)
    except InputError as error:
        log.warning("the page leaves out a picture: %s", error)
        return None


def readable_masks(folder: Path, count: int) -> dict[int, np.ndarray]:
    """The masks of a scene folder, by concept, as far as they are there."""
    masks = {i: readable(folder / f"mask{i}.png", read_mask) for i in range(count)}
    return {i: mask for i, mask in masks.items() if mask is not None}


def picture(source: Path | Image.Image, caption: str, side: int = SIDE) -> str:
    """A captioned picture, embedded, no larger than it is shown."""
    opened = source if isinstance(source, Image.Image) else Image.open(source)
    with opened as image:
        shown = image.convert("RGB")
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    size = f'width="{shown.width}" height="{shown.height}"'
    tag = f'<img {size} alt="{escape(caption)}" src="{data_uri(shown)}">'
    return f"<figure>{tag}<figcaption>{escape(caption)}</figcaption></figure>"


def data_uri(image: Image.Image) -> str:
    """A picture as an address that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def tiles(facts: dict, rows: list[dict], sessions: list[dict], finished: bool) -> str:
    """The few numbers one asks for first."""
    config = facts["config"]
    planned = config["phase1_train_steps"] + config["phase2_train_steps"]
    stages = [stage for session in sessions for stage in session["stages"]]
    values = {
        "state": "finished" if finished else "unfinished",
        "steps": f"{len(rows)} of {planned}",
        "time": clock(sum(stage["seconds"] for stage in stages)) if stages else None,
        "peak GPU memory": _peak(stages, "gpu_bytes"),
        "peak memory of the process": _peak(stages, "process_bytes"),
        "base": Path(config["pretrained_model_name_or_path"] or SHIPPED).name,
        "seed": config["seed"],
    }
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in values.items()
        if value is not None
    )


def _peak(stages: list[dict], kind: str) -> str | None:
    peaks = [stage[kind] for stage in stages if kind in stage]
    return human_size(max(peaks)) if peaks else None


def scene_section(folder: Path, photo: Image.Image | None, masks: dict[int, np.ndarray], handles: list[str]) -> str:
    """The photograph, its masks in their colours, each mask alone, and further photographs with theirs."""
    if photo is None:
        return '<p class="quiet">This run keeps no copy of its scene.</p>'
    figures = [picture(photo, "photograph"), picture(tint_masks(photo, masks), "with its masks")]
    figures += [
        picture(tint_masks(photo, {i: mask}), f"{handles[i]}, {mask.mean():.0%} of the picture")
        for i, mask in masks.items()
    ]
    for path in sorted(folder.glob("*/img.png"), key=_numbered_first):
        if further := readable(path):
            masks = readable_masks(path.parent, len(handles))
            caption = f"picture {path.parent.name}: {', '.join(handles[i] for i in masks)}"
            figures.append(picture(tint_masks(further, masks), caption))
    return f'<div class="strip wrap">{"".join(figures)}</div>'


def _numbered_first(picture: Path) -> tuple[bool, int, str]:
    """The order of a further photograph's file: folders 1, 2, ... 10 by number, then close-ups by name."""
    name = picture.parent.name
    return (False, int(name), "") if name.isdecimal() else (True, 0, name)


def learning_section(run: Path, photo: Image.Image | None, masks: dict[int, np.ndarray], handles: list[str]) -> str:
    """For each handle, step by step: what it draws, and where it looks, beside its mask."""
    previews = sorted((run / PICTURES).glob("step-*"), key=_step)
    if not previews:
        return '<p class="quiet">This run drew no previews (--img_log_steps).</p>'
    shown = spread(previews, MOST_STEPS)
    note = f'<p class="quiet">{len(shown)} of {len(previews)} previews are shown.</p>' if shown != previews else ""
    blocks = [_handle_block(photo, masks, shown, i, name) for i, name in enumerate(handles)]
    if len(handles) > 1:
        pairs = [(folder, readable(folder / "sample-all.png")) for folder in shown]
        columns = [
            f'<div class="step">{picture(drawn, f"step {_step(folder)}")}</div>' for folder, drawn in pairs if drawn
        ]
        blocks.append(f'<h3>all together</h3><div class="strip">{"".join(columns)}</div>')
    return note + "".join(blocks)


def _handle_block(
    photo: Image.Image | None, masks: dict[int, np.ndarray], previews: list[Path], index: int, name: str
) -> str:
    """One handle's strip: its place in the photograph, then a column of sample and attention per preview."""
    columns = []
    if photo and index in masks:
        mask = tint_masks(photo, {index: masks[index]})
        columns.append(f'<div class="step">{picture(photo, "photograph")}{picture(mask, "mask")}</div>')
    for folder in previews:
        sample, attention = (readable(folder / f"{kind}-{index}.png") for kind in ("sample", "attention"))
        if sample and attention:
            pair = picture(sample, f"step {_step(folder)}") + picture(attention, "attention")
            columns.append(f'<div class="step">{pair}</div>')
    return f'<h3>{chip(name, index)}</h3><div class="strip">{"".join(columns)}</div>'


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def spread(items: list, most: int) -> list:
    """At most so many of the items, at even distances, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def galleries_section(run: Path, finished: bool) -> str:
    """The grids of subsets and contexts that `bas explore` and `bas vary` left in folders of the run."""
    grids = [(path.parent.name, readable(path)) for path in sorted(run.glob(f"*/{GRID}"))]
    figures = "".join(picture(grid, name, SHEET_SIDE) for name, grid in grids if grid)
    if not figures and not finished:
        return ""
    command = f"<code>bas explore {escape(str(run))}</code>"
    hint = f'<p class="quiet">{command} draws every subset of the handles in ten contexts, and shows them here.</p>'
    shown = f'<div class="sheets">{figures}</div>' if figures else hint
    return f"<section><h2>Galleries</h2>{shown}</section>"


def tables(run: Path, facts: dict, sessions: list[dict], finished: bool) -> str:
    """Settings, hashes, versions, times and memory."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    config = {name: tuple(v) if isinstance(v, list) else v for name, v in facts["config"].items()}
    changed = {name: value for name, value in config.items() if value != defaults.get(name)}
    kept = {name: value for name, value in config.items() if name not in changed}
    hashes = {"base weights": facts["base"]} | ({"tuned weights": weights_hash(run)} if finished else {})
    blocks = [
        table("Settings other than the defaults", changed),
        table("Settings at their defaults", kept, closed=True),
        table("sha256", hashes),
    ]
    for i, session in enumerate(sessions):
        about = {"started": session["started"], "device": session["device"], **session["versions"]}
        for stage in session["stages"]:
            memory = [f"{human_size(stage[key])} {what}" for key, what in MEMORY if key in stage]
            about[stage["stage"]] = ", ".join([f"{stage['seconds']:.1f} s", *memory])
        blocks.append(table("Times, memory, versions" if i == 0 else f"Resumed, session {i + 1}", about))
    return "".join(blocks)


MEMORY = (("gpu_bytes", "on the GPU"), ("process_bytes", "in the process"))


def table(title: str, values: dict, closed: bool = False) -> str:
    """Names and values that fold away."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(plain(value))}</td></tr>" for name, value in values.items()
    )
    return f"<details{'' if closed else ' open'}><summary>{escape(title)}</summary><table>{lines}</table></details>"


def plain(value: object) -> str:
    """A setting as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "; ".join(map(str, value)) or "none"
    return "not set" if value is None else str(value)


# --- Curves -------------------------------------------------------------------------------------------------------


def curves(rows: list[dict]) -> dict:
    """What the page's script shows: the steps, and each series with null where there is no finite value."""
    names = [name for name in SERIES if any(name in row for row in rows)]
    series = {name: [_finite(row.get(name)) for row in rows] for name in names}
    return {"phases": [row["phase"] for row in rows], "steps": [row["step"] for row in rows], "series": series}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def embedded_json(content: dict) -> str:
    """JSON that no text in it can break out of its <script> element."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")


def charts(rows: list[dict]) -> str:
    """One plot per series; all share the steps."""
    data = curves(rows)
    if len(rows) < 2:
        return '<p class="quiet">Fewer than two steps are logged.</p>'
    return "".join(chart(name, SERIES[name], data) for name in data["series"])


def chart(name: str, title: str, data: dict) -> str:
    """A series as an inline SVG 1000 x 100 that stretches to the page: each value thin, their running mean bold."""
    steps, values = data["steps"], data["series"][name]
    known = [value for value in values if value is not None]
    if not known:
        return ""
    logarithmic = min(known) > 0 and max(known) > 20 * min(known)
    height = math.log if logarithmic else float
    low, high = height(min(known)), height(max(known))
    first, last = steps[0], steps[-1]

    def path(series: list[float | None]) -> str:
        return line(
            [
                None
                if value is None
                else (1000 * (step - first) / (last - first), 95 - 90 * ((height(value) - low) / ((high - low) or 1)))
                for step, value in zip(steps, series, strict=True)
            ]
        )

    width = max(1, round(len(steps) * SMOOTHED))
    smooth = "" if name == "lr" else f'<path class="smooth" d="{path(running_mean(values, width))}"/>'
    borders = "".join(
        f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="100"/>'
        for x in (1000 * (steps[i] - first) / (last - first) for i in phase_starts(data["phases"]))
    )
    scale = f"{min(known):.3g} to {max(known):.3g}{', logarithmic' if logarithmic else ''}"
    return (
        f'<figure class="chart" data-series="{name}"><figcaption><b>{escape(title)}</b> <span>{scale}</span>'
        f'<output></output></figcaption><div class="plot"><svg viewBox="0 0 1000 100" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(title)}, {scale}">{borders}<path class="raw" d="{path(values)}"/>{smooth}'
        f'<line class="cursor" x1="0" x2="0" y1="0" y2="100"/></svg></div></figure>'
    )


def line(points: list[tuple[float, float] | None]) -> str:
    """An SVG path through the points, interrupted where there is none."""
    parts, pen_down = [], False
    for point in points:
        if point:
            parts.append(f"{'L' if pen_down else 'M'}{point[0]:.2f} {point[1]:.2f}")
        pen_down = point is not None
    return "".join(parts)


def running_mean(values: list[float | None], width: int) -> list[float | None]:
    """Each known value's mean with the known ones up to `width - 1` before it."""
    means = []
    for i, value in enumerate(values):
        window = [v for v in values[max(0, i - width + 1) : i + 1] if v is not None]
        means.append(None if value is None else sum(window) / len(window))
    return means


def phase_starts(phases: list[str]) -> list[int]:
    """Where one phase follows another."""
    return [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
