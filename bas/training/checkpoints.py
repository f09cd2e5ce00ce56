"""Resumable checkpoints: all that a run needs to continue with the same bits.

    RUN/checkpoints/step-NNNNNN/
        state.safetensors       trained.NAME, optimizer.INDEX.NAME, generator
        exp_avg.safetensors     exp_avg_sq.safetensors    Adam's moments, in files of their own: one at a time in memory
        state.json              step, length of metrics.jsonl, loss scale, overflows in a row, the run's metadata
        manifest.json           size and sha256 of the files above

The manifest is written last and removed first: a checkpoint without it does not count. Only files of these names are
ever removed.
"""

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from bas.errors import InputError, check_float, check_int
from bas.io.files import sync
from bas.io.json_files import read_record, write_json
from bas.io.run_files import CHECKPOINTS
from bas.io.settings_file import check_metadata
from bas.io.tensors import HALF_WRITTEN, read_tensors, write_tensors

log = logging.getLogger(__name__)

STATE, NOTE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
FILES = (STATE, *(f"{name}.safetensors" for name in MOMENTS), NOTE, MANIFEST)
TEMPORARY = re.compile(rf"\.({'|'.join(map(re.escape, FILES))})\.\d+\.tmp")  # of a write that was cut off
UNFINISHED = re.compile(r"\.step-\d+\.tmp")  # the folder of a save that was cut off
NOTE_SHAPE = {"step": int, "metrics": int, "scaler": {...: (int, float)}, "facts": dict}
ANOTHER = "resume from another checkpoint, or start again"
MAX_BYTES = 2**53


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    folder: Path
    step: int  # steps of the run that are done
    tensors: dict[str, Tensor]
    metrics: int  # bytes of metrics.jsonl at this step
    scaler: dict[str, Any]  # state of the gradient scaler; empty without fp16
    overflows: int  # steps in a row that fp16 skipped
    metadata: dict  # of the run: settings, handles, scene, base


# --- The optimizer's state ----------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten the optimizer's state: `optimizer.INDEX.NAME`, for 8-bit moments `optimizer.INDEX.NAME/KEY`."""
    flat = {}
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            inner = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, v in inner.items():
                own = v.clone() if "/qmap" in key else torch.as_tensor(v)  # all parameters share one such table
                flat[f"optimizer.{i}.{key}"] = own
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` returned into an optimizer over the same parameters."""
    state: dict[int, dict] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            entry, (*outer, name) = state.setdefault(int(index), {}), name.split("/")
            value = int(tensor) if tensor.dtype == torch.int64 else tensor  # a count that is no tensor there
            (entry.setdefault(outer[0], {}) if outer else entry)[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


# --- Saving -------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-NNNNNN, its manifest last, then remove all but the newest `keep` checkpoints.

    Raises OSError when the disk refuses a write; the earlier checkpoints are then untouched.
    """
    parent = run / CHECKPOINTS
    folder, temporary = checkpoint_folder(run, step), parent / f".step-{step:06d}.tmp"
    remove_checkpoint(temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        files = _by_file(tensors)
        for name, part in files.items():
            write_tensors(temporary / name, part)
        write_json(temporary / NOTE, state)
        write_json(temporary / MANIFEST, {name: describe_file(temporary / name) for name in (*files, NOTE)})
        remove_checkpoint(folder)
        if folder.exists():  # it holds files that bas did not write
            for name in (*files, NOTE, MANIFEST):
                os.replace(temporary / name, folder / name)
            temporary.rmdir()
        else:
            os.replace(temporary, folder)
    except OSError:
        remove_checkpoint(temporary)  # to free its space on a full disk
        raise
    sync(parent)
    others = [path for path in list_checkpoints(run) if path != folder]
    for old in [*others, folder][:-keep]:
        remove_checkpoint(old)
    return folder


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of this step lies."""
    return run / CHECKPOINTS / f"step-{step:06d}"


def _by_file(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint by the file that holds them."""
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind = key.rpartition(".")[2] if key.startswith("optimizer.") else None
        files.setdefault(f"{kind}.safetensors" if kind in MOMENTS else STATE, {})[key] = tensor
    return files


def describe_file(path: Path) -> dict:
    """Return the manifest's entry of one file: its size in bytes and its sha256 in hex."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


# --- Removing -----------------------------------------------------------------------------------------------------


def remove_checkpoint(folder: Path) -> None:
    """Remove the files of a checkpoint, the manifest first, and the folder unless it holds files of somebody else."""
    if folder.is_symlink() or not folder.is_dir():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    others = False
    for path in sorted(folder.iterdir()):
        if _is_own(path):
            path.unlink()
        else:
            others = True
    if not others:
        folder.rmdir()


def _is_own(path: Path) -> bool:
    """Return whether a file in a checkpoint's folder bears a name that bas gives."""
    half_written = TEMPORARY.fullmatch(path.name) or HALF_WRITTEN.fullmatch(path.name)
    return path.is_file() and (path.name in FILES or half_written is not None)


def clear_unfinished(run: Path) -> None:
    """Remove what a killed process left of a checkpoint that it was writing or removing."""
    for folder in (run / CHECKPOINTS).glob(".step-*"):
        if UNFINISHED.fullmatch(folder.name):
            remove_checkpoint(folder)
    for folder in _folders(run):
        if not (folder / MANIFEST).exists() and all(map(_is_own, folder.iterdir())):
            log.warning("%s was cut off while it was written or removed: it does not count and is removed", folder)
            remove_checkpoint(folder)


def remove_later(run: Path, step: int) -> None:
    """Remove the checkpoints beyond this step, from which the run continues: it will write them anew."""
    for path in list_checkpoints(run):
        if _step(path) > step:
            remove_checkpoint(path)


def remove_all(run: Path) -> None:
    """Remove all checkpoints of a run, and their folder unless it holds something else."""
    clear_unfinished(run)
    for path in list_checkpoints(run):
        remove_checkpoint(path)
    folder = run / CHECKPOINTS
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


# --- Finding and loading ------------------------------------------------------------------------------------------


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _folders(run: Path) -> list[Path]:
    """Return the checkpoints' folders, complete or not, by step. bas wrote no folder of another name."""
    folders = (path for path in (run / CHECKPOINTS).glob("step-*") if path.is_dir() and not path.is_symlink())
    return sorted((path for path in folders if path.name.removeprefix("step-").isdecimal()), key=_step)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, by step."""
    return [path for path in _folders(run) if (path / MANIFEST).is_file()]


def newest_kept(run: Path) -> str:
    """Say which checkpoint a run keeps that ends with an error: a part of the error's message."""
    checkpoints = list_checkpoints(run)
    return f"{checkpoints[-1]} is kept" if checkpoints else "no checkpoint was saved yet"


def find_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """Find the checkpoint that --resume_from_checkpoint names; None, with a warning, where `latest` finds none.

    Raises InputError when a named one is missing.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        checkpoints = list_checkpoints(run)
        if not checkpoints:
            log.warning("there is no checkpoint in %s yet: the training starts at step 1", run)
        return checkpoints[-1] if checkpoints else None
    folder = Path(wanted)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"--resume_from_checkpoint {folder}: there is no complete checkpoint there")
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check it against its manifest.

    Raises InputError, naming the file, for one that is damaged or that bas did not write.
    """
    manifest = read_record(folder / MANIFEST, {NOTE: dict, STATE: dict}, ANOTHER)
    if others := manifest.keys() - set(FILES):
        raise InputError(f"checkpoint {folder} is damaged: {MANIFEST} lists {', '.join(sorted(others))}")
    tensors: dict[str, Tensor] = {}
    for name, expected in manifest.items():
        if not (folder / name).is_file() or describe_file(folder / name) != expected:
            raise InputError(f"checkpoint {folder} is damaged: {name} is not what was written")
        if name != NOTE:
            tensors |= read_tensors(folder / name)[0]
    state, path = read_record(folder / NOTE, NOTE_SHAPE, ANOTHER), folder / NOTE
    checkpoint = Checkpoint(
        folder=folder,
        step=check_int(f"{path}: step", state["step"], 1, MAX_BYTES),
        tensors=tensors,
        metrics=check_int(f"{path}: metrics", state["metrics"], 0, MAX_BYTES),
        scaler=state["scaler"],
        overflows=check_int(f"{path}: overflows", state.get("overflows", 0), 0, MAX_BYTES),
        metadata=check_metadata(path, state["facts"]),
    )
    if re.fullmatch(r"step-\d+", folder.name) and _step(folder) != checkpoint.step:
        raise InputError(f"checkpoint {folder} is damaged: {NOTE} says step {checkpoint.step}")
    return checkpoint


def check_tensors(
    checkpoint: Checkpoint, parameters: dict[str, nn.Parameter], adam: bool, done: int, precision: str
) -> None:
    """Check that a checkpoint's tensors and loss scale are those of the run's phase after `done` steps of it.

    parameters: what the phase trains, by name, in the optimizer's order; they may be on the meta device. adam: whether
    the optimizer's state per parameter is step, exp_avg and exp_avg_sq. Raises InputError naming both sides.
    """

    def mismatch(name: str, there: object, here: object) -> NoReturn:
        raise InputError(
            f"checkpoint {checkpoint.folder} does not fit this run: {name} is {there} there and {here} here"
        )

    tensors = checkpoint.tensors
    expected = {f"trained.{name}": tuple(p.shape) for name, p in parameters.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("trained.")}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            mismatch(name, found.get(name, "missing"), expected.get(name, "not trained"))
        if tensors[name].dtype != torch.float32:
            mismatch(name, tensors[name].dtype, torch.float32)
    shapes = [tuple(p.shape) for p in parameters.values()]
    known = set(map(str, range(len(shapes))))
    states: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            index, _, entry = name.removeprefix("optimizer.").partition(".")
            if index not in known:
                mismatch(name, "present", f"of none of the {len(shapes)} parameters")
            states.setdefault(index, set()).add(entry)
            wanted = shapes[int(index)] if entry in MOMENTS else ()
            if adam and tuple(tensor.shape) != wanted:
                mismatch(name, tuple(tensor.shape), wanted)
            if adam and tensor.dtype != torch.float32:
                mismatch(name, tensor.dtype, torch.float32)
    names = {"step", *MOMENTS}
    for index, entries in states.items():
        if adam and entries != names:
            mismatch(f"optimizer.{index}", ", ".join(sorted(entries)), ", ".join(sorted(names)))
    if adam:
        steps = [tensors[f"optimizer.{index}.step"].item() for index in states]
        skips = precision == "fp16"  # steps that overflow, perhaps all
        if (not skips and max(steps, default=0) != done) or not all(1 - skips <= step <= done for step in steps):
            mismatch("the optimizer's step", f"{max(steps):g}" if steps else "missing", done)
    own = torch.Generator()
    generator, state = tensors.get("generator"), own.get_state()
    if generator is None or generator.shape != state.shape or generator.dtype != state.dtype:
        there = "missing" if generator is None else f"{tuple(generator.shape)} {generator.dtype}"
        mismatch("generator", there, f"{tuple(state.shape)} {state.dtype}")
    try:
        own.set_state(generator)
    except RuntimeError:
        mismatch("generator", "no state of one", "one")
    scale = torch.amp.GradScaler("cpu").state_dict() if precision == "fp16" else {}
    if checkpoint.scaler.keys() != scale.keys():
        mismatch("the loss scale", ", ".join(checkpoint.scaler) or "missing", ", ".join(scale) or "not used")
    for name, value in checkpoint.scaler.items():
        check_float(
            f"{checkpoint.folder / NOTE}: {name}", value, 0 if name == "_growth_tracker" else 2.0**-100, 2.0**100
        )
