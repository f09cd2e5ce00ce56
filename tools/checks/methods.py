"""Repeats the small evaluation: the paper's six methods and four ablations on scenes of the miniature's world.

    python -m tools.checks.methods --output_dir /tmp/methods                     all of it
    python -m tools.checks.methods --output_dir /tmp/methods --first_scenes 1 --seeds 0        a part of it
    python -m tools.checks.methods --output_dir /tmp/methods --record            what the recorded run has not yet
    python -m tools.checks.methods --output_dir /tmp/long --set phase2_train_steps=1200        other settings
    python -m tools.checks.methods --output_dir /tmp/slow --set cd-m.learning_rate=0.0001      of one method
    python -m tools.checks.methods --markdown                                    the tables of the recorded runs
    python -m tools.checks.methods --scatter docs/pictures/comparison.png        the plot of the newest one

Twelve scenes of two to four concepts that the miniature never saw, three seeds, shortened training and sampling: what
`bas evaluate` does with the settings below. Every trial that was run is compared with docs/comparison.json, the
recorded runs that docs/comparison.md shows; on the same machine, with the same miniature and settings, every number is
the same. `--record` skips the trials that are recorded, and adds the others. A run of another miniature or of other
settings is recorded beside those that are there.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from bas.config import TrainConfig, setting_rows
from bas.evaluation.baselines import PAPER, VARIANTS
from bas.evaluation.plot import scatter
from bas.evaluation.protocol import TRIAL, TRIALS
from bas.evaluation.scores import ROWS
from bas.evaluation.tables import COLUMNS, method_table, option_table, ordering_table, summarise, value_of
from bas.io.files import write_text
from bas.io.images import save_image
from bas.io.json_files import read_json, write_json
from bas.pretrained.folder import read_spec
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import find
from tools.checks.adapters import KINDS
from tools.checks.combine import read_setting
from tools.command_line import run as run_tool
from tools.mini_world.scenes import render_concepts, save_scene

RECORDED = Path(__file__).parents[2] / "docs" / "comparison.json"
SCENES, SIDE = 12, 256  # how many, and their pixels
SAMPLING = ("--prompts", "3", "--sampler", "dpmpp_2m", "--num_inference_steps", "15")
GUIDANCE = "class_image_guidance"  # the model's own, recorded beside the settings
TRAINING = {  # the paper's method: without Seg-Mix, which the miniature's own settings add
    "phase1_train_steps": 100,
    "phase2_train_steps": 400,
    "train_batch_size": 2,
    "seg_mix_probability": 0.0,
}


def write_scenes(folder: Path, count: int) -> list[Path]:
    """Scene folders world-0, world-1, ... of 2, 3, 4, 2, ... concepts; those that are there stay."""
    scenes = [folder / f"world-{i}" for i in range(count)]
    for i, scene in enumerate(scenes):
        if not scene.exists():
            save_scene(render_concepts(np.random.default_rng(i), SIDE, 2 + i % 3), scene)
    return scenes


def read_change(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, or METHOD.NAME=VALUE for one method alone. Raises InputError without a name."""
    method, dot, rest = text.partition(".")
    if not (dot and method in VARIANTS):
        return read_setting(text)
    name, value = read_setting(rest)
    return f"{method}.{name}", value


def by_settings(methods: list[str], changes: dict[str, Any]) -> dict[tuple[tuple[str, Any], ...], list[str]]:
    """The methods by the settings that are theirs alone: the rate of a kind of training, METHOD.NAME of `changes`."""
    usual = setting_rows(TrainConfig)["rank"].default
    rates = {row.settings["train"]: row.rate for row in KINDS.values() if row.settings.get("rank", usual) == usual}
    found: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for method in methods:
        rate = rates.get(VARIANTS[method].settings.get("train"))
        own = {} if rate is None or "learning_rate" in changes else {"learning_rate": rate}
        own |= {name.partition(".")[2]: value for name, value in changes.items() if name.startswith(f"{method}.")}
        found.setdefault(tuple(own.items()), []).append(method)
    return found


def evaluate(
    folder: Path, scenes: list[Path], methods: list[str], seeds: list[int], settings: dict[str, Any], processes: int
) -> None:
    """`bas evaluate` in as many processes of one thread as asked for. Raises CalledProcessError when it fails."""
    file = folder.with_name(f"{folder.name}.toml")
    write_text(file, "".join(f"{name} = {json.dumps(settings[name])}\n" for name in settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "bas", "evaluate", *map(str, scenes)]
    command += ["--output_dir", str(folder), "--config", str(file), *SAMPLING]
    command += ["--methods", *methods, "--seeds", *map(str, seeds)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def left(
    scenes: list[Path], methods: list[str], seeds: list[int], cells: list[dict]
) -> dict[tuple[tuple[str, ...], int], list[Path]]:
    """The scenes by the methods and the seed that none of the cells has of them: what one evaluation takes."""
    known, groups = {name_of(cell) for cell in cells}, {}
    for seed in seeds:
        for scene in scenes:
            if new := tuple(method for method in methods if (scene.name, method, seed) not in known):
                groups.setdefault((new, seed), []).append(scene)
    return groups


def condense(folder: Path) -> list[dict]:
    """What an evaluation measured: for each cell the mean of each column, and the seconds that it took."""
    cells = []
    for path in sorted((folder / TRIALS).glob(f"*/*/*/{ROWS}")):
        rows = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
        note = json.loads(path.with_name(TRIAL).read_text(encoding="utf-8"))
        cell = {key: note[key] for key in ("scene", "method", "seed")}
        for column, about in COLUMNS.items():
            values = [value_of(row, column) for row in rows if row["row"] == about.kind]
            if known := [value for value in values if value is not None]:
                cell[column] = float(np.mean(known))
        cells.append(cell | {"pictures": len(note["pictures"]), "seconds": sum(note["seconds"].values())})
    return cells


def differences(cells: list[dict], recorded: list[dict]) -> list[float]:
    """For each cell that both have, the largest difference in any column."""
    known = {name_of(cell): cell for cell in recorded}
    shared = [(cell, known[name_of(cell)]) for cell in cells if name_of(cell) in known]
    return [
        max(abs(ours[column] - theirs[column]) for column in COLUMNS if column in ours and column in theirs)
        for ours, theirs in shared
    ]


def name_of(cell: dict) -> tuple:
    """What tells a cell from the others."""
    return cell["scene"], cell["method"], cell["seed"]


def same_run(run: dict, other: dict) -> bool:
    """Whether two runs are of one miniature and one choice of settings, so that their cells can stand in one table."""
    return all(run[key] == other[key] for key in ("base", "settings"))


def with_run(recorded: list[dict], run: dict) -> list[dict]:
    """Return the recorded runs with one more: those of the settings above first, of these and of others the newest.

    The run takes in the cells that were recorded of the same one.
    """
    before = next((known["cells"] for known in recorded if same_run(known, run)), [])
    cells = {name_of(cell): cell for cell in (*before, *run["cells"])}
    grown = run | {"cells": [cells[name] for name in sorted(cells)]}
    runs = [grown, *(known for known in recorded if not same_run(known, run))]
    return sorted(runs, key=lambda run: {**run["settings"], GUIDANCE: None} != {**TRAINING, GUIDANCE: None})


def rows_of(cells: list[dict]) -> list[dict]:
    """The means of cells as the rows that the tables and the plot read."""
    return [cell | {"row": kind} for cell in cells for kind in ("picture", "cell")]


def markdown(run: dict) -> str:
    """The tables of a run, as docs/comparison.md shows them."""
    cells = run["cells"]
    rows = rows_of(cells)
    scenes, methods, seeds = (len({cell[key] for cell in cells}) for key in ("scene", "method", "seed"))
    images, hours = sum(cell["pictures"] for cell in cells), sum(cell["seconds"] for cell in cells) / 3600
    counts = f"{scenes} scenes, {methods} methods, {seeds} seeds: {len(cells)} trainings and {images} images"
    head = (
        f"- {run['date']}, torch {run['torch']}; {counts}; {hours:.1f} hours of one thread",
        f"- base {run['base'][:12]}; {', '.join(f'`{name}` {value}' for name, value in run['settings'].items())}",
    )
    tables = method_table(rows), ordering_table(rows), option_table(rows)
    return "\n".join([*head, *(line for table in tables if table for line in ("", *table)), ""])


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, help="folder of scenes and evaluation, to continue")
    parser.add_argument("--methods", nargs="+", choices=VARIANTS, default=PAPER, help="default: the paper's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--first_scenes", type=int, default=SCENES, help="only the first so many of the scenes")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of training, as METHOD.NAME=VALUE of one method",
        dest="changes",
    )
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help=f"write the result to docs/{RECORDED.name}")
    parser.add_argument("--markdown", action="store_true", help="print the recorded run; run nothing")
    parser.add_argument("--scatter", type=Path, help="draw the recorded run's plot into this file; run nothing")
    args = parser.parse_args()
    recorded = read_json(RECORDED)["runs"]
    if args.scatter:
        cells = [cell for cell in recorded[0]["cells"] if cell["method"] in PAPER]
        save_image(scatter(summarise(rows_of(cells))), args.scatter)
        return
    if args.markdown:
        print("\n".join(map(markdown, recorded)), end="")
        return
    if args.output_dir is None:
        parser.error("--output_dir is needed, or --markdown, or --scatter")
    run = {"date": datetime.now(UTC).date().isoformat(), "torch": metadata.version("torch"), "cells": []}
    base = find(None)
    guidance = read_spec(base).guidance_scale
    changes = dict(map(read_change, args.changes))
    run |= {"base": weights_hash(base), "settings": TRAINING | {GUIDANCE: guidance} | changes}
    known = next((other["cells"] for other in recorded if same_run(other, run)), [])
    scenes = write_scenes(args.output_dir / "scenes", args.first_scenes)
    shared = {name: value for name, value in changes.items() if "." not in name}
    for own, methods in by_settings(args.methods, changes).items():
        settings = TRAINING | shared | dict(own)
        folder = args.output_dir / "-".join(["evaluation", *(f"{name}-{value}" for name, value in own)])
        for (new, seed), some in left(scenes, methods, args.seeds, known if args.record else []).items():
            evaluate(folder, some, list(new), [seed], settings, args.processes)
        run["cells"] += condense(folder)
    print(markdown(run))
    if args.record:
        write_json(RECORDED, {"runs": with_run(recorded, run)})
        return
    apart = differences(run["cells"], known)
    if apart:
        print(f"{len(apart)} cells compared with the recorded run; the largest difference is {max(apart):.2g}")
    else:
        print("no cell compared: the recorded run has none of these trials")
    if not known:
        print(f"no recorded run is of this miniature, {run['base'][:12]}, and these settings")


if __name__ == "__main__":
    run_tool(main)
