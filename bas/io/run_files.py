"""The names of the files in a run folder, and the metrics and concepts in them."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bas.errors import InputError
from bas.io.json_files import read_record, read_records
from bas.io.settings_file import check_metadata
from bas.io.tensors import read_tensors, write_tensors

log = logging.getLogger(__name__)

CONCEPTS = "concepts.safetensors"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
CHECKPOINTS = "checkpoints"
TIMES = "times.json"
NUMBER = (int, float)
ROW = {"phase": str, "step": int, ...: NUMBER}  # of the metrics
SESSION = {"started": str, "device": str, "versions": dict, "stages": [{"stage": str, "seconds": NUMBER}]}
SCENE, PREVIEWS = "scene", "previews"  # what the training saw, and what it drew meanwhile


def read_settings(run: Path) -> dict[str, Any]:
    """The metadata in a run's settings.json. InputError where it is missing or damaged."""
    path = run / SETTINGS
    return check_metadata(path, read_record(path, {}, "restore it from a copy, or train anew"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, none where it is missing. InputError for a damaged line."""
    return read_records(path, ROW, "restore it from a copy, or remove it") if path.exists() else []


def read_sessions(run: Path) -> list[dict[str, Any]]:
    """The sessions in a run's times.json; none where it is missing or, with a warning, damaged."""
    path = run / TIMES
    if not path.exists():
        return []
    try:
        return read_record(path, {"sessions": [SESSION]}, "the times of earlier sessions are left out")["sessions"]
    except InputError as error:
        log.warning("%s", error)
        return []


def save_concepts(run: Path, rows: Tensor, masks: Tensor, handles: Iterable[str], note: dict) -> None:
    """The small file that says what a run learnt. rows: (N, d) float32; masks: (N, H, W) in 0..1, kept as 8 bits."""
    tensors = {"handles": rows.float(), "masks": (masks * 255).round().to(torch.uint8)}
    metadata = {"bas": "concepts-1", "handles": json.dumps(list(handles)), "note": json.dumps(note)}
    write_tensors(run / CONCEPTS, tensors, metadata)


def read_concepts(run: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a run's concepts file and the run's facts. Raises InputError for a file that is something else."""
    path = run / CONCEPTS
    tensors, metadata = read_tensors(path)
    ours = metadata.get("bas") == "concepts-1" and {"handles", "masks"} <= tensors.keys()
    if not ours or tensors["masks"].ndim != 3:
        raise InputError(f"{path} was not written by bas")
    return tensors, read_metadata(path, metadata)


def read_metadata(path: Path, metadata: dict[str, str]) -> dict:
    """What a concepts file's metadata notes of its run. Raises InputError where it is not as written."""
    try:
        facts = {**json.loads(metadata["note"]), "handles": json.loads(metadata["handles"])}
    except (KeyError, ValueError, TypeError, RecursionError):
        facts = None
    return check_metadata(path, facts)
