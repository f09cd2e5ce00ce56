"""The folder of one training run: metrics, resumable checkpoints, and the finished model with its concepts.

    RUN/unet vae text_encoder tokenizer scheduler model_index.json    the tuned model, as diffusers reads it
    RUN/concepts.safetensors    the handles' rows, names, masks, settings and the base's hash
    RUN/settings.json    RUN/config.toml    RUN/metrics.jsonl    RUN/times.json    RUN/report.html
    RUN/scene/    RUN/previews/    RUN/checkpoints/ (while training)

Every file is whole or absent: it is written beside its place, synced and renamed. Nothing is pickled.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from bas.errors import InputError
from bas.io.files import read_record, sync, write_json
from bas.io.run_files import CHECKPOINTS, CONCEPTS, METRICS, PREVIEWS, SCENE, SETTINGS
from bas.io.tensors import read_tensors, write_tensors
from bas.models.bundle import COMPONENTS

log = logging.getLogger(__name__)

LOCK = ".lock"  # held while a process writes to the folder
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}  # of a network drive
SUBFOLDERS = (*COMPONENTS, "tokenizer", "scheduler", SCENE, PREVIEWS, CHECKPOINTS)
STATE, NOTE = "state.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam: files of their own, so that only one lies in the host's memory at a time
ANOTHER = "resume from another checkpoint, or start anew"
MANIFEST = "manifest.json"  # a checkpoint's last file: one without it was cut off and does not count


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the run folder, and hold it for this process alone while the block lasts, however the process ends.

    InputError if it cannot be written, or if another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"another run is writing to {folder}: choose another --output_dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"cannot write to --output_dir {folder}: {error.strerror}") from error
        log.warning("%s cannot be locked (%s): let no second run write to it", folder, error.strerror)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps files that are open
            (folder / LOCK).unlink()  # while it is held: a process that waits for this very file gets none
        lock.release()


def prepare_folder(folder: Path, resuming: bool) -> None:
    """Make a locked folder ready: clear what a killed run left half-written. Raises as `check_output_folder` does."""
    check_output_folder(folder, resuming)
    inside = (path for name in SUBFOLDERS for path in (folder / name).rglob(".*.tmp"))
    for leftover in (*folder.glob(".*.[0-9]*.tmp"), *inside):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for checkpoint in _checkpoints(folder):
        if not (checkpoint / MANIFEST).exists():
            log.warning("%s was cut off while it was written or removed: it does not count, and is cleared", checkpoint)
            shutil.rmtree(checkpoint)


def check_output_folder(folder: Path, resuming: bool) -> None:
    """InputError for a folder with a finished run, an unfinished one that is not to be resumed, or anything else.

    And for what is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write to --output_dir {folder}: it is a file")
    if (folder / CONCEPTS).exists():
        raise InputError(f"{folder} already holds a finished run: choose another --output_dir or remove it")
    if not resuming and (folder / METRICS).exists():
        raise InputError(f"{folder} holds an unfinished run: add --resume_from_checkpoint latest, or remove the folder")
    is_run = (folder / SETTINGS).exists() or (folder / METRICS).exists()
    if not is_run and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"--output_dir {folder} is not empty: name a new folder")


# --- Metrics ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One step's numbers, on their way from the device to the host."""

    head: dict[str, str | int | float]  # phase, step, learning rate
    names: tuple[str, ...]
    numbers: Tensor  # on the host; not valid before `arrived`
    arrived: torch.cuda.Event | None

    def read(self) -> dict:
        """The row as it stands in the file; waits for its numbers, which no later work of the device delays."""
        if self.arrived:
            self.arrived.synchronize()
        return self.head | dict(zip(self.names, self.numbers.tolist(), strict=True))


class MetricsLog:
    """One JSON line per optimizer step. Numbers leave the device in its own time, so that no step waits for them."""

    def __init__(self, path: Path, length: int = 0):
        self.path, self.pending = path, []
        with path.open("ab") as file:
            file.truncate(min(length, path.stat().st_size))

    def add(self, phase: str, step: int, lr: float, values: dict[str, Tensor]) -> None:
        """Note one step; values are 0-dim tensors."""
        numbers, arrived = torch.stack([value.detach().float() for value in values.values()]), None
        if numbers.is_cuda:
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(Row({"phase": phase, "step": step, "lr": lr}, tuple(values), numbers, arrived))

    def latest(self) -> dict | None:
        """The newest row whose numbers are here: of this step, or on a GPU, which works ahead, of the one before."""
        lag = 2 if self.pending and self.pending[-1].arrived else 1
        return self.pending[-lag].read() if len(self.pending) >= lag else None

    def flush(self) -> list[dict]:
        """Append all pending lines to the file, and return them, oldest first."""
        rows = [row.read() for row in self.pending]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self.pending = []
        return rows

    @property
    def length(self) -> int:
        """Bytes on disk, for a resumed run to cut back to."""
        return self.path.stat().st_size


# --- Resumable checkpoints ----------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state as flat tensors, `optimizer.<index>.<name>`; 8-bit moments lie one deeper."""
    flat = {}
    for i, row in optimizer.state_dict()["state"].items():
        for name, value in row.items():
            inner = {f"{name}/{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
            for key, v in inner.items():
                own = v.clone() if "/qmap" in key else torch.as_tensor(v)  # all weights share one such table
                flat[f"optimizer.{i}.{key}"] = own
    return flat


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, into an optimizer over the same parameters."""
    state: dict[int, dict] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            row, (*outer, name) = state.setdefault(int(index), {}), name.split("/")
            value = int(tensor) if tensor.dtype == torch.int64 else tensor  # a count that is no tensor there
            (row.setdefault(outer[0], {}) if outer else row)[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save_checkpoint(run: Path, step: int, tensors: dict[str, Tensor], note: dict, keep: int) -> Path:
    """Write RUN/checkpoints/step-NNNNNN, its manifest last; when it is whole, remove all but the newest `keep`."""
    parent = run / CHECKPOINTS
    folder, temporary = parent / f"step-{step:06d}", parent / f".step-{step:06d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        files = _by_file(tensors)
        for name, part in files.items():
            write_tensors(temporary / name, part)
        write_json(temporary / NOTE, note)
        write_json(temporary / MANIFEST, {name: _describe(temporary / name) for name in (*files, NOTE)})
        if folder.exists():
            _remove(folder)
        os.replace(temporary, folder)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk its room is needed
        raise
    sync(parent)
    others = [path for path in list_checkpoints(run) if path != folder]
    for old in [*others, folder][:-keep]:
        _remove(old)
    return folder


def _by_file(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by the file that holds them."""
    files: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind = key.rpartition(".")[2] if key.startswith("optimizer.") else None
        files.setdefault(f"{kind}.safetensors" if kind in MOMENTS else STATE, {})[key] = tensor
    return files


def drop_later(run: Path, step: int) -> None:
    """Remove the checkpoints beyond this step, from which the run goes on: they belong to another course of it."""
    for path in list_checkpoints(run):
        if _step(path) > step:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """The manifest goes first, so that one that is cut off in the middle does not count."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _describe(path: Path) -> dict:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def list_checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, by step."""
    return [path for path in _checkpoints(run) if (path / MANIFEST).exists()]


def _checkpoints(run: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, by step; what only bears a like name is somebody else's."""
    folders = (path for path in (run / CHECKPOINTS).glob("step-*") if path.is_dir())
    return sorted((path for path in folders if path.name.removeprefix("step-").isdecimal()), key=_step)


def newest_kept(run: Path) -> str:
    """What a run that ends with an error leaves, for the line that says so."""
    whole = list_checkpoints(run)
    return f"{whole[-1]} is kept" if whole else "no checkpoint was saved yet"


def find_checkpoint(run: Path, wanted: str | None) -> Path | None:
    """The checkpoint that --resume_from_checkpoint names; None where `latest` finds none, which it says.

    Raises InputError when an explicit one is missing.
    """
    if wanted is None:
        return None
    if wanted == "latest":
        whole = list_checkpoints(run)
        if not whole:
            log.warning("there is no checkpoint in %s yet: starting anew", run)
        return whole[-1] if whole else None
    folder = Path(wanted)
    if not (folder / MANIFEST).is_file():
        raise InputError(f"--resume_from_checkpoint {folder}: there is no whole checkpoint there")
    return folder


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and note of a checkpoint, checked against its manifest. Raises InputError for a damaged one."""
    tensors: dict[str, Tensor] = {}
    for name, expected in read_record(folder / MANIFEST, {NOTE: dict, STATE: dict}, ANOTHER).items():
        if not (folder / name).is_file() or _describe(folder / name) != expected:
            raise InputError(f"checkpoint {folder} is damaged: {name} is not what was written")
        if name != NOTE:
            tensors |= read_tensors(folder / name)[0]
    return tensors, read_record(folder / NOTE, {}, ANOTHER)


# --- The concepts file --------------------------------------------------------------------------------------------
