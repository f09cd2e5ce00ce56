"""The folder of one training run: whether it may be written to, the lock on it, and what a killed run left there.

    RUN/unet vae text_encoder tokenizer scheduler model_index.json    the tuned model, as diffusers reads it
    RUN/tuned.safetensors       of a small run instead: the weights that --train names
    RUN/concepts.safetensors    the handles' rows, names, masks, settings and the base's hash; written last
    RUN/settings.json    RUN/config.toml    RUN/metrics.jsonl    RUN/times.json    RUN/report.html
    RUN/scene/    RUN/previews/    RUN/checkpoints/ (while training)

Every file is complete or absent: it is written beside its place, synced and renamed. Nothing is pickled.
"""

import errno
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from bas.errors import InputError
from bas.io.files import check_length, reason_of
from bas.io.json_files import read_record
from bas.io.run_files import (
    CHECKPOINTS,
    CONCEPTS,
    METRICS,
    MODEL_INDEX,
    PREVIEWS,
    REPORT,
    SCENE,
    SETTINGS,
    TIMES,
    TUNED,
    read_settings,
)
from bas.io.settings_file import CONFIG
from bas.io.tensors import HALF_WRITTEN
from bas.pretrained.component_files import STEMS
from bas.training.checkpoints import UNFINISHED, clear_unfinished, remove_all
from bas.training.disk_space import writing
from bas.training.tensorboard import EVENTS

log = logging.getLogger(__name__)

LOCK = ".bas.lock"  # held while a process writes to the folder, and gone afterwards
NO_RUN = "the folder is not a run of bas: name another --output_dir"
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}  # of a network drive
SUBFOLDERS = (*STEMS, "tokenizer", "tokenizer_2", "scheduler", SCENE, PREVIEWS)
WRITTEN = (SETTINGS, CONFIG, TIMES, MODEL_INDEX, TUNED, CONCEPTS, REPORT)  # the files of a run folder itself
TEMPORARY = re.compile(r"\.(.+)\.\d+\.tmp")  # what `replacing` calls a file while it is written
BEFORE_TRAINING = {SETTINGS, CONFIG, SCENE, EVENTS}  # all that a run without metrics.jsonl can hold
DEEPEST = (f"{CHECKPOINTS}/.step-1000000.tmp/exp_avg_sq.safetensors", "unet/diffusion_pytorch_model.safetensors")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the run folder and hold it for this process alone while the block lasts, however the process ends.

    Folders that were made for it and hold nothing afterwards are removed again. InputError if the folder cannot be
    written, or if another process holds it.
    """
    for name in DEEPEST:
        check_length(folder / name, "--output_dir")
    lock = FileLock(folder / LOCK)
    made = [place for place in (folder, *folder.parents) if not place.exists()]  # innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"another run is writing to {folder}: choose another --output_dir") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            _remove_empty(made)
            raise InputError(f"cannot write to --output_dir {folder}: {reason_of(error)}") from error
        log.warning("%s cannot be locked (%s): let no second run write to it", folder, error.strerror)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps files that are open
            (folder / LOCK).unlink()  # while it is held: a process that waits for this very file gets none
        lock.release()
        _remove_empty(made)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds something, or is not there
            folder.rmdir()


def check_output_folder(folder: Path, resuming: bool) -> None:
    """Check that a run may write here: into a new or empty folder, or an unfinished run of bas that is to be resumed.

    A folder is a run of bas where settings.json holds what bas writes there. Raises InputError for anything else;
    nothing is changed.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"cannot write to --output_dir {folder}: it is a file")
    if (folder / CONCEPTS).exists():
        raise InputError(f"{folder} already holds a finished run: {_advice(folder)}")
    try:
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as error:
        raise InputError(f"--output_dir {folder} cannot be read: {error.strerror}") from None
    if all(name.startswith(".") for name in names):
        return
    if SETTINGS not in names:
        raise InputError(f"--output_dir {folder} is not empty: name a new folder")
    read_record(folder / SETTINGS, {"config": {"instance_data_dir": str, "output_dir": str}}, NO_RUN)
    read_settings(folder)
    if blocked := [name for name in (CHECKPOINTS, *SUBFOLDERS) if name in names and not (folder / name).is_dir()]:
        raise InputError(f"{folder / blocked[0]} is not a folder, as it is in a run of bas: move it away")
    others = sorted(name for name in names - BEFORE_TRAINING - {CHECKPOINTS} if not name.startswith("."))
    if METRICS not in names and others:
        raise InputError(
            f"--output_dir {folder} is not empty, and a run without {METRICS} has no {', '.join(others[:3])}: "
            "name a new folder"
        )
    if not resuming and METRICS in names:
        raise InputError(f"{folder} holds an unfinished run: add --resume_from_checkpoint latest, or remove the folder")


def _advice(folder: Path) -> str:
    if _holds_leftovers(folder):  # whatever the lock: the caller may hold it
        return "--resume_from_checkpoint latest completes it, as it was killed at its end"
    return "choose another --output_dir or remove it"


def has_leftovers(folder: Path) -> bool:
    """Return whether a run holds what a finished one lacks: checkpoints, their folder, a lock, half-written files."""
    return (folder / LOCK).exists() or _holds_leftovers(folder)


def _holds_leftovers(folder: Path) -> bool:
    if any(map(_is_half_written, folder.glob(".*"))):
        return True
    names = [path.name for path in (folder / CHECKPOINTS).glob("*")]
    own = any(UNFINISHED.fullmatch(name) or name.removeprefix("step-").isdecimal() for name in names)
    return own or ((folder / CHECKPOINTS).is_dir() and not names)


def prepare_folder(folder: Path, resuming: bool) -> None:
    """Check a locked folder as `check_output_folder` does, then remove what a killed run left half-written."""
    check_output_folder(folder, resuming)
    clear_half_written(folder)


def clear_half_written(folder: Path) -> None:
    """Remove the half-written files and checkpoints of a locked run: the process that wrote them was killed."""
    inside = [path for name in SUBFOLDERS for path in (folder / name).rglob(".*")]
    half_written = [path for path in folder.glob(".*") if _is_half_written(path)]
    half_written += [p for p in inside if TEMPORARY.fullmatch(p.name) or HALF_WRITTEN.fullmatch(p.name)]
    for leftover in half_written:
        if leftover.is_file():
            leftover.unlink()
    clear_unfinished(folder)


def _is_half_written(path: Path) -> bool:
    """Return whether this is a half-written file of a run: other programs may have hidden files in its folder."""
    if HALF_WRITTEN.fullmatch(path.name):
        return (path.parent / SETTINGS).exists()
    match = TEMPORARY.fullmatch(path.name)
    return match is not None and match[1] in WRITTEN


def clear_finished(folder: Path) -> None:
    """Remove what a kill after the last write of the training left in a finished run."""
    with locked(folder), writing(folder):
        clear_half_written(folder)
        remove_all(folder)
