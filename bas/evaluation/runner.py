"""An evaluation from its plan to its results: trials filled and scored by this process, then all of it read together.

OUT/results.jsonl    every row of every planned trial
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
from bas.evaluation.protocol import TRIAL, Trial, run_trial
from bas.evaluation.scores import Scorer, Segments, read_rows, score_trial
from bas.evaluation.tables import markdown, summarise
from bas.io.files import read_json, write_text
from bas.io.images import save_image
from bas.pretrained.folder import load, read_spec
from bas.runtime.device import DTYPES, is_out_of_memory
from bas.sampling.sampler import check_request
from bas.training.base_model import Base
from bas.training.dry_run import matrix_speed, plan_run, unet_operations
from bas.training.setup import check_input

RESULTS, TABLES, SCATTER, PAGE = "results.jsonl", "tables.md", "scatter.png", "index.html"


@dataclass(frozen=True)
class Outcome:
    """What became of one trial."""

    trial: Trial
    error: str | None = None
    earlier: bool = False  # whether it was drawn and scored before


@dataclass
class EvaluationContext:
    """What all trials of this process share, made when the first of them needs it."""

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


def evaluate_each(trials: list[Trial], bench: EvaluationContext) -> Iterator[Outcome]:
    """Fill and score trials, one after another; yields what became of each. A trial that fails stops no other.

    Raises InputError, before anything is trained, for what cannot be drawn, and when the metrics' models are not here;
    Interrupted after a signal.
    """
    check_request(read_spec(bench.path), [], bench.sampling)
    scorer, segments = bench.make_scorer() if any(not read_rows(trial) for trial in trials) else (None, None)
    for trial in trials:
        if read_rows(trial):
            yield Outcome(trial, earlier=True)
            continue
        try:
            if not trial.finished:
                run_trial(trial, bench.base, bench.sampling, segments == "files")
            score_trial(trial, scorer, bench.size(), segments)
        except (InputError, RunError, OSError) as error:
            yield Outcome(trial, error=str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield Outcome(trial, error=f"{bench.device} is out of memory")
        else:
            yield Outcome(trial)


def write_results(folder: Path, trials: list[Trial], facts: dict[str, str]) -> list[Path]:
    """Read every scored trial of the plan; write rows, tables, plot and page. Returns their paths."""
    scored = [(trial, rows) for trial in trials if (rows := read_rows(trial))]
    rows = [row for _, each in scored for row in each]
    if not rows:
        raise RunError(f"{folder}: no trial is scored, so there is nothing to show")
    pictures = sum(row["row"] == "picture" for row in rows)
    facts = {"cells": f"{len(scored)} of {len(trials)}", "pictures": str(pictures), **facts}
    write_text(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / TABLES, markdown(rows, facts))
    save_image(scatter_png(summarise(rows)), folder / SCATTER)
    write_text(folder / PAGE, page(rows, [trial for trial, _ in scored], facts))
    return [folder / name for name in (RESULTS, TABLES, SCATTER, PAGE)]


# --- What it will take --------------------------------------------------------------------------------------------


def measured_seconds(trials: list[Trial]) -> float | None:
    """Seconds of the mean finished trial; None where there is none yet."""
    notes = [read_json(trial.folder / TRIAL)["seconds"] for trial in trials if trial.finished]
    return sum(sum(note.values()) for note in notes) / len(notes) if notes else None


def counted_seconds(trials: list[Trial], sampling: SampleConfig) -> float:
    """A lower bound for these trials on one such device: counted operations at the speed of its matrix product.

    Each method is counted on the first scene that has it. Reads no weights.
    """
    operations, known, passes = 0, {}, sampling.num_inference_steps * (1 if sampling.guidance_scale == 1 else 2)
    for trial in trials:
        if trial.method not in known:
            scene, base, device, precision = check_input(trial.training)
            plan = plan_run(trial.training, scene, base, precision)
            steps = sum(phase.steps * cost.operations for phase, cost in plan.costs.items())
            known[trial.method] = steps, passes * unet_operations(plan.models, plan.material)
        training, picture = known[trial.method]
        operations += training + picture * len(trial.requests)
    return operations / matrix_speed(device, DTYPES[precision]) if trials else 0.0
