"""The names of the files in a run folder, and the metrics and concepts in them."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
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
TUNED = "tuned.safetensors"  # of a small run: the trained weights alone
TUNED_FORMAT = "tuned-1"  # what its metadata says under `bas`
METRICS = "metrics.jsonl"
SETTINGS = "settings.json"
CHECKPOINTS = "checkpoints"
TIMES = "times.json"
REPORT = "report.html"
MODEL_INDEX = "model_index.json"
NUMBER = (int, float)
ROW = {"phase": str, "step": int, ...: NUMBER}  # of the metrics
SESSION = {"started": str, "device": str, "versions": dict, "stages": [{"stage": str, "seconds": NUMBER, ...: NUMBER}]}
LEFT_OUT = "the times of earlier sessions are left out"
ROWS = ("handles", "handles_2")  # in the concepts file: the handles' rows, of the first text encoder and of the second
BETWEEN_SCENES = " + "  # in the settings of a merged run
SCENE, PREVIEWS = "scene", "previews"  # copies of the training's input; images generated during training


def scene_mask(scene: Path, number: int) -> Path:
    """Return a concept's mask in a run's copy of its scene, beside the image that it belongs to.

    A concept of a merged run has a folder with an image of its own. The file need not exist.
    """
    name = f"mask{number}.png"
    further = sorted(scene.glob(f"*/{name}"), key=numbered_first)
    return further[0] if further and not (scene / name).exists() else scene / name


def numbered_first(path: Path) -> tuple[bool, int, str]:
    """Sort files of the folders 1, 2, ... 10 by number, then those of other folders, as of close-ups, by name."""
    name = path.parent.name
    return (False, int(name), "") if name.isdecimal() else (True, 0, name)


def scene_names(metadata: dict[str, Any]) -> list[str]:
    """Return the names of the scenes that a run has learnt, one unless it is merged."""
    scenes = metadata["config"]["instance_data_dir"]
    paths = scenes.split(BETWEEN_SCENES) if "merged" in metadata else [scenes]
    return list(dict.fromkeys(Path(path).name for path in paths))


def read_settings(run: Path) -> dict[str, Any]:
    """Read a run's metadata from its settings.json. InputError if the file is missing or damaged."""
    path = run / SETTINGS
    return check_metadata(path, read_record(path, {}, "restore it from a copy, or train again"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl, one per optimizer step; none without the file. InputError for a damaged line."""
    return read_records(path, ROW, "restore it from a copy, or remove it") if path.exists() else []


def read_sessions(run: Path) -> list[dict[str, Any]]:
    """Read the sessions of a run from its times.json. A damaged file gives a warning and no sessions."""
    path = run / TIMES
    if not path.exists():
        return []
    try:
        sessions = read_record(path, {"sessions": [SESSION]}, LEFT_OUT)["sessions"]
        for number in (value for each in sessions for stage in each["stages"] for value in stage.values()):
            if number in (math.inf, -math.inf) or number != number:
                raise InputError(f"{path} is not as bas wrote it (it holds {number}): {LEFT_OUT}")
        return sessions
    except InputError as error:
        log.warning("%s", error)
        return []


def save_concepts(
    run: Path, rows: Sequence[Tensor], masks: Tensor, handles: Iterable[str], metadata: dict[str, Any]
) -> None:
    """Write what a run learnt of its concepts.

    That is the handles' rows (N, d) of each text encoder as float32, and the masks (N, H, W) as 8 bits.
    """
    tensors = {name: each.float() for name, each in zip(ROWS[: len(rows)], rows, strict=True)}
    tensors |= {"masks": (masks * 255).round().to(torch.uint8)}
    texts = {"bas": "concepts-1", "handles": json.dumps(list(handles)), "note": json.dumps(metadata)}
    write_tensors(run / CONCEPTS, tensors, texts)


def read_concepts(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors of a run's concepts file and the run's metadata. InputError if bas did not write it."""
    path = run / CONCEPTS
    tensors, texts = read_tensors(path)
    ours = texts.get("bas") == "concepts-1" and {"handles", "masks"} <= tensors.keys()
    if not ours or tensors["masks"].ndim != 3:
        raise InputError(f"{path} was not written by bas")
    metadata, masks = read_metadata(path, texts), tensors["masks"]
    if masks.dtype != torch.uint8 or len(masks) != len(metadata["handles"]) or not masks.numel():
        raise InputError(f"{path} does not hold a mask of 8 bits for each of its handles: copy the run again")
    return tensors, metadata


def handle_rows(concepts: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the handles' rows (N, d) of each text encoder, from the tensors of a concepts file."""
    return [concepts[name] for name in ROWS if name in concepts]


def read_metadata(path: Path, texts: dict[str, str]) -> dict[str, Any]:
    """Return a run's metadata from the texts of its concepts file. InputError if they are damaged."""
    try:
        metadata = {**json.loads(texts["note"]), "handles": json.loads(texts["handles"])}
    except (KeyError, ValueError, TypeError, RecursionError):
        metadata = None
    return check_metadata(path, metadata)
