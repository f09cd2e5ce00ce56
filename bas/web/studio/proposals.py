"""Proposed masks in the room Masks: SAM for clicks, CLIPSeg for words, as jobs of `bas masks --auto`.

The page shows a proposal until it is taken or dropped; taken, it is painted like strokes. So the folder of its job is
needed once, and the next proposal for the same scene removes it.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from starlette.responses import Response

from bas.config import ProposalConfig
from bas.data.mask_proposals import METHODS, read_prompts
from bas.errors import InputError
from bas.io.images import read_image
from bas.io.json_files import read_json
from bas.pretrained.helper_models import find_helper
from bas.web.studio import jobs
from bas.web.studio.app import Ask
from bas.web.studio.refusal import Refusal
from bas.web.studio.scenes import MAX_WORD, open_scene
from bas.web.studio.store import JOBS, SCENES, Home, file_inside, text_of
from bas.web.studio.tiles import pack

MASKS = "masks"  # the kind of the jobs
SAM, CLIPSEG = "sam", "clipseg"
FLAG = "bas studio --segmenter"
FOLDER = "proposal"  # in the folder of a job: the scene that the command writes
MAX_POINTS = 20  # of one proposal


def by_method(names: list[str]) -> dict[str, str]:
    """Return the folders of segmentation models by method. names: folders, or hub ids that were downloaded before.

    InputError for another model than SAM or CLIPSeg, and for two of one kind.
    """
    found: dict[str, str] = {}
    for name in names:
        folder = find_helper(name, FLAG)
        kind = read_json(folder / "config.json").get("model_type")
        if kind not in (SAM, CLIPSEG):
            raise InputError(f"{folder} is a model of type {kind}: {FLAG} takes {SAM} and {CLIPSEG}")
        if kind in found:
            raise InputError(f"{FLAG} names two models of type {kind}: name one")
        found[kind] = str(folder.resolve())
    return found


def list_segmenters(ask: Ask) -> dict[str, str | None]:
    """For each method None where its model is here, else one line that says what to give."""
    return {method: what_is_missing(ask.home, method) for method in (SAM, CLIPSEG)}


def what_is_missing(home: Home, method: str) -> str | None:
    """Return why a method cannot be used here, and what to do; None if it can."""
    try:
        find_helper(home.segmenters.get(method, METHODS[method].default), FLAG)
    except InputError as error:
        return str(error)
    return None


def propose(home: Home, body: dict) -> str:
    """Put a proposal for a scene into the queue, and return its job: from points, or from a word."""
    folder, method = home.find(SCENES, text_of(body, "scene")), body.get("method")
    if method not in (SAM, CLIPSEG):
        raise Refusal(400, f"method is {SAM} or {CLIPSEG}", "bad", "method")
    settings: dict[str, Any] = {"threshold": body["threshold"]} if "threshold" in body else {}
    prompt = f"--points={points_of(body)}" if method == SAM else f"--words={word_of(body)}"
    config = ProposalConfig(**settings, points=(points_of(body),) if method == SAM else ())
    draft = open_scene(folder).draft
    read_prompts(draft.image, config)
    if problem := what_is_missing(home, method):
        raise Refusal(422, problem, "model")
    earlier = earlier_jobs(home, folder.name)
    words = [MASKS, str(draft.image_path), "--auto", method, prompt, f"--threshold={config.threshold}"]
    words += [f"--segmenter={home.segmenters[method]}"] if method in home.segmenters else []
    asked = {"scene": folder.name, "method": method}
    job = jobs.make(home, MASKS, folder.name, [*words, "--output_dir={job}/" + FOLDER], asked, {})
    for old in earlier:  # only now: a page that knows one by its name must not find the new one there
        shutil.rmtree(old)
    return job


def points_of(body: dict) -> str:
    """Return the points of a request as `--points` takes them. Refusal for anything but pairs of numbers."""
    points = body.get("points")
    if not isinstance(points, list) or not 0 < len(points) <= MAX_POINTS:
        raise Refusal(400, f"points are 1 to {MAX_POINTS} pairs of numbers", "bad", "points")
    for point in points:
        pair = isinstance(point, list) and len(point) == 2
        if not pair or not all(type(value) in (int, float) and math.isfinite(value) for value in point):
            raise Refusal(400, "a point is a pair of numbers", "bad", "points")
    return "+".join(f"{x:.1f},{y:.1f}" for x, y in points)


def word_of(body: dict) -> str:
    """Return the word of a request. Refusal for none."""
    word = text_of(body, "word", MAX_WORD).strip()
    if not word:
        raise Refusal(422, "write a word for what to find", "word", "word")
    return word


def earlier_jobs(home: Home, scene: str) -> list[Path]:
    """Return the jobs of earlier proposals for a scene. Refusal while one of them waits or runs."""
    found = []
    for folder in jobs.Lane(home).folders():
        job = jobs.describe(folder) if f"-{MASKS}-" in folder.name else None
        if not job or (job["kind"], job["name"]) != (MASKS, scene) or job["state"] == jobs.FOREIGN:
            continue
        if job["state"] in jobs.ALIVE:
            raise Refusal(409, "a mask for this scene is being proposed already: wait for it, or stop it", "running")
        found.append(folder)
    return found


def get_mask(ask: Ask) -> Response:
    """Return a proposed mask as squares."""
    path = file_inside(ask.home.find(JOBS, ask.path["job"]), f"{FOLDER}/mask0.png")
    return Response(pack(np.asarray(read_image(path).getchannel(0))), media_type="application/octet-stream")
