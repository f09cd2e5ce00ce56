"""The names of the files in a run folder, and the metrics and concepts in them."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bas.errors import InputError
from bas.io.settings_file import check_metadata
from bas.io.tensors import read_tensors, write_tensors

CONCEPTS = "concepts.safetensors"
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
CHECKPOINTS = "checkpoints"
SCENE, PREVIEWS = "scene", "previews"  # what the training saw, and what it drew meanwhile


def read_rows(path: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line that is still being written is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


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
