"""An evaluation from its plan to its results: this process runs and scores its trials, then all rows are read together.

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
from bas.evaluation.plot import scatter
from bas.evaluation.protocol import Trial, read_trial, run_trial
from bas.evaluation.scores import Scorer, Segments, read_rows, score_trial
from bas.evaluation.tables import markdown, summarise
from bas.io.files import write_text
from bas.io.images import save_image
from bas.pretrained.additions import Additions
from bas.pretrained.folder import read_spec
from bas.runtime.device import DTYPES, is_out_of_memory
from bas.sampling.sampler import check_request
from bas.training.base_model import Base, home_of
from bas.training.checkpoints import remove_all
from bas.training.dry_run import matrix_speed, plan_run, unet_operations
from bas.training.setup import check_input

LESS_MEMORY = "add --gradient_checkpointing or a smaller --batch_size to the same command, which goes on"
RESULTS, TABLES, SCATTER, PAGE = "results.jsonl", "tables.md", "scatter.png", "index.html"


@dataclass(frozen=True)
class Outcome:
    """What became of one trial."""

    trial: Trial
    error: str | None = None
    earlier: bool = False  # whether it was scored before this call


@dataclass
class EvaluationContext:
    """What all trials of this process share. The base model is loaded when the first of them needs it."""

    path: Path  # of the base model
    device: torch.device
    sampling: SampleConfig
    make_scorer: Callable[[], tuple[Scorer, Segments]]
    precision: str = "no"  # of the trainings
    prediction_type: str | None = None  # of the base, where its files do not say it
    additions: Additions | None = None  # files that are added to the base

    @cached_property
    def base(self) -> Base:
        """The base model, kept in memory between trials."""
        return Base.open(
            self.path, home_of(self.device, self.precision), None, True, self.prediction_type, self.additions
        )

    def size(self) -> tuple[int, int]:
        """Return the base's resolution and size multiple."""
        return self.base.models.resolution, self.base.models.size_multiple


def evaluate_each(trials: list[Trial], context: EvaluationContext) -> Iterator[Outcome]:
    """Run and score trials one after another, and yield what became of each. A trial that fails stops no other.

    Raises InputError before anything is trained for images that cannot be generated and for missing models of the
    metrics; Interrupted after a signal.
    """
    check_request(read_spec(context.path, context.prediction_type, context.additions), [], context.sampling)
    scored = [bool(read_rows(trial)) for trial in trials]
    if all(scored):
        yield from (Outcome(trial, earlier=True) for trial in trials)
        return
    scorer, segments = context.make_scorer()
    for trial, earlier in zip(trials, scored, strict=True):
        if earlier:
            yield Outcome(trial, earlier=True)
            continue
        try:
            if not trial.finished:
                run_trial(trial, context.base, context.sampling, segments == "files")
            remove_all(Path(trial.training.output_dir))  # checkpoints of a training that was interrupted
            score_trial(trial, scorer, context.size(), segments)
        except (InputError, RunError, OSError) as error:
            yield Outcome(trial, error=str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield Outcome(trial, error=f"{context.device} is out of memory: {LESS_MEMORY}")
        else:
            yield Outcome(trial)


def write_results(folder: Path, trials: list[Trial], facts: dict[str, str]) -> list[Path]:
    """Read every scored trial of the plan, and write rows, tables, plot and page. Returns their paths.

    Raises RunError where no trial is scored; InputError where scipy or matplotlib is not installed.
    """
    scored = [(trial, rows) for trial in trials if (rows := read_rows(trial))]
    rows = [row for _, each in scored for row in each]
    if not rows:
        raise RunError(f"{folder}: no trial is scored, so there is nothing to show")
    images = sum(row["row"] == "picture" for row in rows)
    facts = {"trials": f"{len(scored)} of {len(trials)}", "images": str(images), **facts}
    plot = scatter(summarise(rows))
    write_text(folder / RESULTS, "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / TABLES, markdown(rows, facts))
    save_image(plot, folder / SCATTER)
    write_text(folder / PAGE, page(rows, [trial for trial, _ in scored], facts, plot))
    return [folder / name for name in (RESULTS, TABLES, SCATTER, PAGE)]


# --- What it will take --------------------------------------------------------------------------------------------


def measured_seconds(trials: list[Trial]) -> float | None:
    """Return the mean seconds of the finished trials; None before the first is finished."""
    notes = [read_trial(trial.folder)["seconds"] for trial in trials if trial.finished]
    return sum(sum(note.values()) for note in notes) / len(notes) if notes else None


def counted_seconds(trials: list[Trial], sampling: SampleConfig) -> float:
    """Return a lower bound in seconds for these trials: counted operations at the speed of the device's matrix product.

    Each method is counted on the first scene that has it. Reads no weights.
    """
    guided = sampling.guidance_scale is None or sampling.guidance_scale > 1
    passes = sampling.num_inference_steps * (2 if guided else 1)
    known: dict[str, tuple[float, float, float]] = {}  # by method: operations of a training and of an image, speed
    seconds = 0.0
    for trial in trials:
        if trial.method not in known:
            scene, base, device, precision = check_input(trial.training, weights=False)
            plan = plan_run(trial.training, scene, base, precision, device)
            steps = sum(phase.steps * cost.operations for phase, cost in plan.costs.items())
            image = passes * unet_operations(plan.models, plan.data)
            known[trial.method] = steps, image, matrix_speed(device, DTYPES[precision])
        training, image, speed = known[trial.method]
        seconds += (training + image * len(trial.requests)) / speed
    return seconds
