"""An evaluation from its plan to its results: cells filled and scored by this process, then all of it read together.

OUT/results.jsonl    every row of every planned cell
OUT/tables.md    OUT/scatter.png    OUT/index.html
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from bas.config import SampleConfig
from bas.errors import InputError, RunError
from bas.evaluation.page import page
from bas.evaluation.plot import scatter_png
from bas.evaluation.protocol import CELL, Cell, fill_cell
from bas.evaluation.scores import Scorer, Segments, read_rows, score_cell
from bas.evaluation.tables import markdown, summarise
from bas.io.figures import save_picture
from bas.io.files import read_json, write_text
from bas.pretrained.folder import glance, load
from bas.runtime.device import DTYPES, is_out_of_memory
from bas.sampling.sampler import check_request
from bas.training.base_model import Base
from bas.training.dry_run import matrix_speed, plan_run, unet_operations
from bas.training.setup import check_input

RESULTS, TABLES, SCATTER, PAGE = "results.jsonl", "tables.md", "scatter.png", "index.html"


@dataclass(frozen=True)
class Outcome:
    """What became of one cell."""

    cell: Cell
    error: str | None = None
    earlier: bool = False  # whether it was drawn and scored before


@dataclass
class Bench:
    """What all cells of this process share, made when the first of them needs it."""

    path: Path  # of the base
    device: torch.device
    sampling: SampleConfig
    make_scorer: Callable[[], tuple[Scorer, Segments]]

    @cached_property
    def base(self) -> Base:
        """The base model, resident."""
        return Base(self.path, load(self.path, device=self.device), keep=True)

    def size(self) -> tuple[int, int]:
        """The base's resolution and size multiple."""
        return self.base.models.resolution, self.base.models.size_multiple


def evaluate_each(cells: list[Cell], bench: Bench) -> Iterator[Outcome]:
    """Fill and score cells, one after another; yields what became of each. A cell that fails stops no other.

    Raises InputError, before anything is trained, for what cannot be drawn, and when the metrics' models are not here;
    Interrupted after a signal.
    """
    check_request(glance(bench.path), [], bench.sampling)
    scorer, segments = bench.make_scorer() if any(not read_rows(cell) for cell in cells) else (None, None)
    for cell in cells:
        if read_rows(cell):
            yield Outcome(cell, earlier=True)
            continue
        try:
            if not cell.finished:
                fill_cell(cell, bench.base, bench.sampling, segments == "files")
            score_cell(cell, scorer, bench.size(), segments)
        except (InputError, RunError, OSError) as error:
            yield Outcome(cell, error=str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield Outcome(cell, error=f"{bench.device} is out of memory")
        else:
            yield Outcome(cell)


def write_results(folder: Path, cells: list[Cell], facts: dict[str, str]) -> list[Path]:
    """Read every scored cell of the plan; write rows, tables, plot and page. Returns their paths."""
    scored = [(cell, rows) for cell in cells if (rows := read_rows(cell))]
    rows = [row for _, each in scored for row in each]
    if not rows:
        raise RunError(f"{folder}: no cell is scored, so there is nothing to show")
    pictures = sum(row["row"] == "picture" for row in rows)
    facts = {"cells": f"{len(scored)} of {len(cells)}", "pictures": str(pictures), **facts}
    write_text(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / TABLES, markdown(rows, facts))
    save_picture(scatter_png(summarise(rows)), folder / SCATTER)
    write_text(folder / PAGE, page(rows, [cell for cell, _ in scored], facts))
    return [folder / name for name in (RESULTS, TABLES, SCATTER, PAGE)]


# --- What it will take --------------------------------------------------------------------------------------------


def measured_seconds(cells: list[Cell]) -> float | None:
    """Seconds of the mean finished cell; None where there is none yet."""
    notes = [read_json(cell.folder / CELL)["seconds"] for cell in cells if cell.finished]
    return sum(sum(note.values()) for note in notes) / len(notes) if notes else None


def counted_seconds(cells: list[Cell], sampling: SampleConfig) -> float:
    """A lower bound for these cells on one such device: counted operations at the speed of its matrix product.

    Each method is counted on the first scene that has it. Reads no weights.
    """
    operations, known, passes = 0, {}, sampling.num_inference_steps * (1 if sampling.guidance_scale == 1 else 2)
    for cell in cells:
        if cell.method not in known:
            scene, base, device, precision = check_input(cell.training)
            plan = plan_run(cell.training, scene, base, precision)
            steps = sum(phase.steps * cost.operations for phase, cost in plan.costs.items())
            known[cell.method] = steps, passes * unet_operations(plan.models, plan.material)
        training, picture = known[cell.method]
        operations += training + picture * len(cell.requests)
    return operations / matrix_speed(device, DTYPES[precision]) if cells else 0.0
