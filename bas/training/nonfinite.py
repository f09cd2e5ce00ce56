"""Numbers that are not finite: which of them end a run, and the message then."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bas.errors import RunError
from bas.io.run_files import METRICS, read_rows
from bas.presets import Phase
from bas.training.checkpoints import newest_kept
from bas.training.disk_space import writing
from bas.training.setup import Run

log = logging.getLogger(__name__)

ANEW = "start again, in another --output_dir, with"  # where no checkpoint helps
OVERFLOWS = 25  # steps in a row that fp16 may skip; by then its loss scale has fallen by 2 ** 25


def flush_and_check(run: Run) -> dict[str, float]:
    """Write the pending metrics and return the newest losses by name. Raises RunError if a number is not finite."""
    with writing(run.folder):
        rows = run.metrics.flush()
        if run.events:
            run.events.add(rows)
    for row in rows:
        where = f"{row['phase']} step {row['step']}"
        if not is_finite(row, run.precision):
            wrong = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
            name = next((name for name in wrong if name not in ("loss", "grad_norm")), wrong[0])  # the cause, not a sum
            raise RunError(
                f"{where}: {name} is {row[name]}; {newest_kept(run.folder)}; {ANEW} a lower learning rate "
                "or --mixed_precision no"
            )
        run.overflows = 0 if math.isfinite(row["grad_norm"]) else run.overflows + 1
        if run.overflows == OVERFLOWS:
            raise RunError(
                f"{where}: fp16 overflowed in {OVERFLOWS} steps in a row; {newest_kept(run.folder)}; "
                f"{ANEW} --mixed_precision bf16 or no"
            )
    newest = rows[-1] if rows else {}
    return {name: value for name, value in newest.items() if name not in ("phase", "step", "lr", "grad_norm")}


def is_finite(row: dict, precision: str) -> bool:
    """Return whether training can continue after this step. In fp16 the scaler skips a step that overflows."""
    names = row.keys() - ({"phase", "grad_norm"} if precision == "fp16" else {"phase"})
    return all(math.isfinite(row[name]) for name in names)


def check_weights(run: Run, optimized: Mapping[str, Tensor], when: str) -> None:
    """Raise RunError naming a weight that is not finite: a finite loss and gradient can still step there."""
    finite = torch.stack([parameter.isfinite().all() for parameter in optimized.values()]).tolist()
    if not all(finite):
        name = list(optimized)[finite.index(False)]
        raise RunError(
            f"{when} {name} is not finite, so nothing is saved; {newest_kept(run.folder)}; {ANEW} a lower learning rate"
        )


def warn_of_overflows(folder: Path, phase: Phase) -> None:
    """Warn of the steps of a phase that its gradient scaler skipped, counted from the metrics of all its sessions."""
    rows = [row for row in read_rows(folder / METRICS) if row["phase"] == phase.name]
    norms = [row["grad_norm"] for row in rows if "grad_norm" in row]
    if skipped := sum(not math.isfinite(norm) for norm in norms):
        log.warning("%s: fp16 overflowed in %d of %d steps, which changed nothing", phase.name, skipped, len(norms))
