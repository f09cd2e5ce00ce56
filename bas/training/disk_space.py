"""The disk space that a training takes, counted before its weights are read, and what is said when a write fails."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from bas.config import TrainConfig
from bas.errors import InputError, RunError
from bas.io.files import DISK_IS_FULL, human_size, require_writable
from bas.io.run_files import CHECKPOINTS, TUNED
from bas.models.adapters import add_adapters
from bas.models.bundle import COMPONENTS, Models, weight_groups
from bas.presets import Part, Phase
from bas.pretrained.additions import Additions
from bas.pretrained.folder import build_on_meta
from bas.runtime.device import DTYPES
from bas.training.checkpoints import newest_kept
from bas.training.optimizer import ADAM_BYTES

WHILE_TRAINING = "checkpoints, while training"
METRICS_LINE = 220  # bytes, roughly
MAKE_ROOM = "make room, or try --checkpointing_steps 0 or --save_precision fp16"


def count_numbers(models: Models) -> dict[str, int]:
    """Count the weights of each group that a phase can train (`Phase.trains`), and of the VAE. Groups overlap."""
    groups = {name: sum(p.numel() for p in group.values()) for name, group in weight_groups(models).items()}
    rows = sum(encoder.get_input_embeddings().get_parameter("weight").numel() for encoder in models.text_encoders)
    return {**groups, "vae": sum(p.numel() for p in models.vae.parameters()), "embedding": rows}


def most_numbers(base: Path) -> dict[str, int]:
    """Bound `count_numbers` from above: each weight takes a byte of the base's files or more. Builds no network."""
    files = [base] if base.is_file() else base.rglob("*.safetensors")
    return dict.fromkeys((*get_args(Part), "vae", "embedding"), sum(file.stat().st_size for file in files))


def files_to_come(numbers: dict[str, int], config: TrainConfig) -> dict[str, int]:
    """Count the bytes of each kind of file that the run will write, less the checkpoints that are already there."""

    def optimized(phase: Phase) -> int:
        return sum(numbers.get(name, 0) for name in phase.trains)

    steps = sum(phase.steps for phase in config.phases)
    whole = config.kind.whole
    kept = (*COMPONENTS, "embedding") if whole else config.tuned
    weights = DTYPES[config.save_precision].itemsize * sum(numbers.get(name, 0) for name in kept)
    files = {"tuned model" if whole else "tuned weights": weights, "metrics": METRICS_LINE * steps}
    if config.checkpointing_steps and config.checkpointing_steps <= steps:
        one = (4 + ADAM_BYTES[config.optimizer]) * max(optimized(phase) for phase in config.phases)
        held = sum(path.stat().st_size for path in (Path(config.output_dir) / CHECKPOINTS).rglob("*.safetensors"))
        files[WHILE_TRAINING] = max(0, one * (config.checkpoints_total_limit + 1) - held)  # the new before the old goes
    return files


def free_disk_space(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet. InputError where it is read-only."""
    return shutil.disk_usage(require_writable(folder, "--output_dir")).free


def require_disk_space(folder: Path, base: Path, config: TrainConfig, handles: int) -> None:
    """Raise InputError if the run's files will take more than the free space on the disk of the run folder.

    handles: how many the run adds.
    """
    free, additions = free_disk_space(folder), Additions.of_base(vars(config))
    alone = additions is None and not (base / TUNED).is_file()  # all weights are in the files of the base
    if alone and config.kind.whole and sum(files_to_come(most_numbers(base), config).values()) <= free:
        return
    models, _ = build_on_meta(base, config.prediction_type, additions)
    add_adapters(models, config, handles)
    files = files_to_come(count_numbers(models), config)
    if sum(files.values()) > free:
        parts = ", ".join(f"{human_size(size)} {name}" for name, size in files.items())
        raise InputError(
            f"--output_dir {folder} has {human_size(free)} free, the run takes {human_size(sum(files.values()))} "
            f"({parts}): {MAKE_ROOM}"
        )


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Within the block an OSError becomes a RunError that names the run folder, the reason and what is kept."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}"
        # A library hides the number.
        advice = "make room" if error.errno in (*DISK_IS_FULL, None) else "make the folder writable"
        raise RunError(
            f"writing to {folder} failed: {reason}; {newest_kept(folder)}: "
            f"{advice}, then the same command goes on, of one scene with --resume_from_checkpoint latest"
        ) from error
