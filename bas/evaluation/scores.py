"""From a trial's images to numbers: the rows of results.jsonl, one for each image and one for each trial.

{"row": "picture", scene, method, seed, file, prompt, text, prompt_similarity, identity: {handle: value}, right, ...}
{"row": "cell", scene, method, seed, attention_iou: {handle: value}, draws: {handle: {handle: value}}, ...}
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from bas.errors import InputError
from bas.evaluation.generation import read_scene, segment_path
from bas.evaluation.metrics import Identity, class_prompt, leakage
from bas.evaluation.protocol import Trial, read_trial
from bas.evaluation.segments import read_segments
from bas.io.files import write_text
from bas.io.images import to_image
from bas.io.json_files import read_records
from bas.training.resume import scene_state

ROWS = "rows.jsonl"  # of a trial

Find = Callable[[list[Image.Image], str], list[np.ndarray]]  # segments of the class of this name in each image
Segments = Find | Literal["files"] | None  # a model, the files beside the images, or the whole images


class Scorer(Identity, Protocol):
    """`bas.evaluation.metrics.Metrics`, or what stands in for it."""

    def prompt_similarity(self, images: list[Image.Image], prompts: list[str]) -> list[float]:
        """Return one value for each image and its prompt."""
        ...


def score_trial(trial: Trial, scorer: Scorer, size: tuple[int, int], segments: Segments = None) -> list[dict]:
    """Score a trial's images, write its rows and return them. size: the model's resolution and size multiple.

    InputError for a scene that is not the one that was trained.
    """
    noted = read_trial(trial.folder)
    scene, scene_image, masks = read_scene(trial.training, *size)
    names = [list(scene.handles), list(scene.words)]
    if names != [noted["handles"], noted["words"]] or noted.get("sha256") not in (None, scene_state(scene)["scene"]):
        advice = f"bring it back as it was, or remove {trial.folder}"
        raise InputError(f"{trial.training.instance_data_dir} was changed after the trial was trained: {advice}")
    reference, layers = to_image(scene_image), list(masks.numpy())
    handles, words = noted["handles"], [str(word) for word in scene.words]
    entries = noted["pictures"]
    images = [open_image(trial.folder / entry["file"]) for entry in entries]
    texts = [class_prompt(entry["prompt"], dict(zip(handles, words, strict=True))) for entry in entries]

    common = {"scene": trial.scene, "method": trial.method, "seed": trial.seed}
    rows = [{"row": "picture", **common, **entry, "text": text} for entry, text in zip(entries, texts, strict=True)]
    for row, value in zip(rows, scorer.prompt_similarity(images, texts), strict=True):
        row |= {"prompt_similarity": value, "identity": {}}
    for i, handle in enumerate(handles):
        shown = [row for row in rows if i in row["concepts"]]
        own = [image for row, image in zip(rows, images, strict=True) if i in row["concepts"]]
        paths = [segment_path(trial.folder / row["file"], i) for row in shown]
        places = read_segments(paths, own) if segments == "files" else segments(own, words[i]) if segments else None
        for row, value in zip(shown, scorer.identity_similarity(own, reference, layers[i], places), strict=True):
            row["identity"][handle] = value
    for row in rows:
        row["identity_similarity"] = float(np.mean(list(row["identity"].values())))
        row["right"] = None if scorer.right is None else float(min(row["identity"].values()) >= scorer.right)

    alone = [[p for row, p in zip(rows, images, strict=True) if row["concepts"] == [i]] for i in range(len(handles))]
    table = leakage(scorer, alone, reference, layers)
    rows.append({"row": "cell", **common, **summary_of_handles(handles, noted["attention_iou"], table)})
    write_text(trial.folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def summary_of_handles(handles: list[str], iou: list[float], table: np.ndarray) -> dict:
    """Return what a trial's row says of its handles. table: (N, N), how much handle i alone shows concept j.

    leakage: the mean of what each shows of the others; confused: the share of handles that show another concept more
    than their own. Both are None for a single handle.
    """
    count = len(handles)
    others = table[~np.eye(count, dtype=bool)]
    return {
        "attention_iou": dict(zip(handles, iou, strict=True)),
        "draws": {a: dict(zip(handles, map(float, row), strict=True)) for a, row in zip(handles, table, strict=True)},
        "leakage": float(others.mean()) if count > 1 else None,
        "confused": float((table.argmax(axis=1) != np.arange(count)).mean()) if count > 1 else None,
    }


def open_image(path: Path) -> Image.Image:
    """Read an image of the trial into memory. Raises OSError where it cannot be read."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_rows(trial: Trial) -> list[dict]:
    """Read the rows of a trial; none where it is not scored."""
    path = trial.folder / ROWS
    shape = {"row": str, "scene": str, "method": str}
    return read_records(path, shape, "remove it, and the same command scores the trial again") if path.exists() else []
