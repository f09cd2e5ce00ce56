"""What a job of each kind is: the checks before it is put into the queue, and the words of its command.

Every job is a command of bas with checked settings, so its result is that of the same line in a terminal.
"""

import base64
import binascii
import io
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bas.config import EditConfig, SampleConfig, VaryConfig, setting_rows
from bas.errors import InputError
from bas.io.images import image_size, read_image, to_floats
from bas.io.run_files import CONCEPTS, METRICS, SETTINGS, TUNED, read_settings
from bas.io.settings_file import CONFIG
from bas.models.bundle import ModelSpec
from bas.pretrained.additions import Additions
from bas.pretrained.exports import Unsuited, how_to_use, needed_too, plan_export, read_export
from bas.pretrained.folder import holds_sdxl, read_spec
from bas.pretrained.hub import is_known_elsewhere
from bas.sampling.attention_maps import plan_maps
from bas.sampling.blended_diffusion import Region, check_edit
from bas.sampling.gallery import all_together, combinations_in
from bas.sampling.layout import check_box
from bas.sampling.sampler import check_request
from bas.sampling.steer import Steer
from bas.training.setup import check_input
from bas.web.studio import jobs, runs
from bas.web.studio.forms import SAMPLING, as_flags, base_of, config_of
from bas.web.studio.hearing import hearing
from bas.web.studio.proposals import MASKS, propose
from bas.web.studio.refusal import Refusal
from bas.web.studio.scenes import open_scene
from bas.web.studio.store import JOBS, RUNS, SCENES, Home, inside, stamp, text_of
from bas.web.studio.tiles import lay, unpack

EDITING = (*(name for name in SAMPLING if name not in ("separate", "height", "width")), "blending_start_percentage")
LAYOUT = "layout.json"
OF_THE_MODEL = ("clip_skip", "prediction_type", "precision")  # how a model was read and computed, of an image
PLACES = 20  # contexts of an exploration at most


def ask(home: Home, body: dict) -> str:
    """Check what a request asks for and put it into the queue. -> the job's name"""
    kind = body.get("kind")
    if kind not in KINDS:
        raise Refusal(400, f"kind is one of {', '.join(KINDS)}", "bad", "kind")
    return KINDS[kind](home, body)


def train(home: Home, body: dict) -> str:
    """Ask for the training of a scene into a new run."""
    config, words = config_of(home, body)
    check_input(config)
    asked = {"scene": body["scene"], "base": body.get("base"), "settings": body.get("settings") or {}}
    name = Path(config.output_dir).name
    Path(config.output_dir).mkdir()  # the name is taken from here on
    return jobs.make(home, "train", name, words, asked, {})


def resume(home: Home, body: dict) -> str:
    """Go on with a training that was stopped, failed or lost, from its last checkpoint.

    The command is that of the job which began it here. Without one the run itself says what to do, and the new job is
    foreign: it waits until somebody has seen its command.
    """
    run = home.find(RUNS, text_of(body, "run"))
    if (run / CONCEPTS).exists():
        raise Refusal(409, "this run is finished", "ended")
    trainings = trainings_of(home, run)
    if any(job["state"] in (*jobs.ALIVE, jobs.FOREIGN) for job in trainings):
        raise Refusal(409, "this run is being trained already, or waits for that", "running")
    return go_on(home, run, trainings)


def trainings_of(home: Home, run: Path) -> list[dict[str, Any]]:
    """Return the jobs that train a run of this name, oldest first."""
    found = [job for job in map(jobs.describe, jobs.Lane(home).folders()) if job]
    return [job for job in found if (job["kind"], job["name"]) == ("train", run.name)]


def go_on(home: Home, run: Path, trainings: list[dict[str, Any]]) -> str:
    """Put the rest of a training into the queue, and return its job: as it was asked for, from its last checkpoint."""
    asked_here = [job for job in trainings if job["here"] and not job["asked"].get("resume")]
    first = asked_here[-1] if asked_here else None  # older ones trained a run of this name that was deleted
    begun, asked = (run / SETTINGS).is_file(), {"run": run.name, "resume": True}
    if first is None and not begun:
        raise Refusal(409, "this run has no settings to go on with", "missing")
    if first:
        words = jobs.words_of(home.folder / JOBS / first["id"])
    else:
        scene = read_settings(run)["config"]["instance_data_dir"]
        words = ["train", scene, "--config", str(run / CONFIG), "--output_dir", str(run)]
    latest = ["--resume_from_checkpoint", "latest"] if begun else []
    return jobs.make(home, "train", run.name, [*words, *latest], asked, {}, here=first is not None)


def pause(home: Home, body: dict) -> str:
    """Save and stop the training that runs, draw what waits to be drawn, and put the rest of the training behind that.

    A training that is continued gives the bits of one that was not stopped.
    """
    lane, training = jobs.Lane(home), home.find(JOBS, text_of(body, "job"))
    job = jobs.describe(training)
    if not job or (job["kind"], job["state"]) != ("train", "running"):
        raise Refusal(409, "this training does not run any more", "ended")
    run = home.find(RUNS, job["name"])
    if not (run / SETTINGS).is_file() or not jobs.last_row(run / METRICS):
        raise Refusal(409, "this training has not made its first step yet: try again then", "early")
    waiting = jobs.in_order({folder: jobs.state(folder) for folder in lane.folders()})
    rest = go_on(home, run, trainings_of(home, run))
    drawings = [each for each in waiting if (jobs.read_job(each) or job)["kind"] != "train"]
    lane.prefer([*drawings, home.folder / JOBS / rest])
    jobs.stop(training, "save")
    return rest


def download(home: Home, body: dict) -> str:
    """Fetch a known base model: the only work of the studio that uses the network."""
    base = base_of(body)
    if base is None or not is_known_elsewhere(base):
        raise Refusal(409, "this base model is here already", "here")
    found = [job for job in map(jobs.describe, jobs.Lane(home).folders()) if job and job["state"] in jobs.ALIVE]
    if any((job["kind"], job["name"]) == (jobs.DOWNLOAD, base) for job in found):
        raise Refusal(409, "this base model is being fetched already", "running")
    return jobs.make(home, jobs.DOWNLOAD, base, [jobs.DOWNLOAD, base], {"base": base}, {})


def finished(home: Home, body: dict) -> Path:
    """Return the run that a request names. Refusal for one that is still trained."""
    run = home.find(RUNS, text_of(body, "run"))
    if not (run / CONCEPTS).is_file():
        raise Refusal(409, "this run is not finished: let it train to its end first", "unfinished")
    return run


def settings_of(body: dict, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of a request. Refusal for others than these names."""
    settings = body.get("settings") or {}
    if not isinstance(settings, dict) or not settings.keys() <= {*names}:
        raise Refusal(400, "a setting is not one of the form", "bad")
    return settings


def sample(home: Home, body: dict) -> str:
    """Ask for images from a prompt, with a box for each handle if any are given."""
    run, prompt, settings = finished(home, body), text_of(body, "prompt").strip(), settings_of(body, SAMPLING)
    if not prompt:
        raise Refusal(422, "write what to draw, with a handle in it", "prompt", "prompt")
    config, spec, boxes = SampleConfig(**settings), read_spec(run), body.get("boxes") or {}
    own_pixels = bool(boxes and body.get("own_pixels"))
    if boxes:
        check_boxes(spec, prompt, boxes)
    with hearing() as warnings:
        steer = Steer(config.separate, boxes or None, own_pixels)
        check_request(spec, [prompt], config, steer if config.separate or boxes else None)
    files, more = {}, []
    if boxes:
        files[LAYOUT] = json.dumps(boxes).encode()
        more = ["--layout={job}/" + LAYOUT, *(["--own_pixels"] if own_pixels else [])]
    target = run / runs.DRAWN / f"{moment()}.png"
    words = ["sample", str(run), f"--prompt={prompt}", f"--output_path={target}"]
    asked = {"prompt": prompt, "settings": settings, "boxes": boxes, "warnings": warnings}
    return jobs.make(home, "sample", run.name, [*words, *as_flags(SampleConfig, settings), *more], asked, files)


def vary(home: Home, body: dict) -> str:
    """Ask for all concepts of a run together, each time from another seed."""
    run, settings = finished(home, body), settings_of(body, SAMPLING)
    spec = read_spec(run)
    with hearing() as warnings:
        check_request(spec, [all_together(spec)], VaryConfig(**settings))
    words = ["vary", str(run), f"--output_dir={run / runs.VARIED / moment()}", *as_flags(VaryConfig, settings)]
    return jobs.make(home, "vary", run.name, words, {"settings": settings, "warnings": warnings}, {})


def explore(home: Home, body: dict) -> str:
    """Ask for every combination of the concepts of a run in every place."""
    run, settings, places = finished(home, body), settings_of(body, SAMPLING), places_of(body)
    spec = read_spec(run)
    with hearing() as warnings:
        check_request(spec, combinations_in(spec, tuple(places)), SampleConfig(**settings))
    words = ["explore", str(run), "--contexts", *places, f"--output_dir={run / runs.EXPLORED / moment()}"]
    asked = {"settings": settings, "places": places, "warnings": warnings}
    return jobs.make(home, "explore", run.name, [*words, *as_flags(SampleConfig, settings)], asked, {})


def places_of(body: dict) -> list[str]:
    """Return the contexts of an exploration. Refusal for none, too many, or one that a command would read as a flag."""
    places = body.get("places")
    if not isinstance(places, list) or not 0 < len(places) <= PLACES:
        raise Refusal(422, f"choose a place, and {PLACES} at most", "places", "places")
    for place in places:
        if not isinstance(place, str) or not 0 < len(place) <= 200 or not place.strip() or place.startswith("-"):
            raise Refusal(422, "a place is a short text that does not begin with -", "places", "places")
    return places


def moment() -> str:
    """Return a name for what is drawn now, in order of time, that no other request gets."""
    return f"{stamp()}-{time.time_ns() // 1000 % 10**6:06d}"


def check_boxes(spec: ModelSpec, prompt: str, boxes: Any) -> None:
    """Check boxes by handle, in shares of the image. Refusal or InputError for what is wrong."""
    if not isinstance(boxes, dict):
        raise Refusal(400, "boxes are given by handle", "bad", "boxes")
    for handle, box in boxes.items():
        if handle not in spec.handles or handle not in prompt:
            raise Refusal(422, f"{handle} has a box, but is not in the prompt", "boxes", "boxes")
        check_box(handle, box)


def attend(home: Home, body: dict) -> str:
    """Ask where the handles of a drawn image looked, or all its words: draw it once more, and keep the attention."""
    run, file, all_words = finished(home, body), text_of(body, "file"), bool(body.get("words"))
    path = runs.run_file(run, file)
    made = runs.settings_in(path, path.stat().st_mtime_ns)
    prompt, layout = made.get("prompt"), made.get("layout")
    if file.partition("/")[0] not in runs.GALLERIES[runs.DRAWN] or not isinstance(prompt, str):
        raise Refusal(422, "this image does not say how it was drawn", "image", "file")
    if any(made.get(name) for name in ("lora", "embedding", "vae", "base")):
        raise Refusal(422, "this image was drawn with further files: ask bas attend for it in a terminal", "image")
    if layout and not (Path(layout).is_file() and inside(Path(layout), home.folder)):
        raise Refusal(409, "the boxes of this image are not here any more: draw it again", "missing")
    names = [name for name in setting_rows(SampleConfig) if name not in ("num_images", "batch_size")]
    settings = {name: made[name] for name in names if made.get(name) is not None}
    model = {name: made[name] for name in OF_THE_MODEL if made.get(name) is not None}
    skipping = Additions.read([], [], clip_skip=model.get("clip_skip"))
    spec = read_spec(run, model.get("prediction_type"), None if skipping == Additions() else skipping)
    plan_maps(spec, prompt, SampleConfig(**settings), None, all_words)
    target = runs.attention_folder(run, file)
    if target.exists():  # of an older image of this name, or asked for again
        home.trash(target)
    words = ["attend", str(run), f"--prompt={prompt}", f"--output_dir={target}", *as_flags(SampleConfig, settings)]
    words += [f"--{name}={value}" for name, value in model.items()] + ["--words"] * all_words
    return jobs.make(home, "attend", run.name, words, {"file": file}, {})


def edit(home: Home, body: dict) -> str:
    """Change a painted region of a photograph or another image."""
    run, prompt, settings = finished(home, body), text_of(body, "prompt").strip(), settings_of(body, EDITING)
    source = edited_image(home, body)
    config, image = EditConfig(**settings), read_image(source)
    try:
        data = base64.b64decode(text_of(body, "mask", 2**22), validate=True)
    except binascii.Error:
        raise Refusal(400, "the mask is not in base64", "bad", "mask") from None
    mask = np.zeros((image.height, image.width), np.uint8)
    lay(mask, unpack(data, image.size))
    if not mask.any():
        raise Refusal(422, "nothing is painted: paint what may change", "mask", "mask")
    if not prompt:
        raise Refusal(422, "write what to put there, with a handle in it", "prompt", "prompt")
    with hearing() as warnings:
        check_edit(read_spec(run), image, [Region(to_floats(mask), prompt)], config)
    files = {runs.MASK: png(mask), runs.IMAGE: source.read_bytes()}
    target = run / runs.EDITED / f"{moment()}.png"
    words = ["edit", str(run), "--init_image={job}/" + runs.IMAGE, "--mask={job}/" + runs.MASK]
    words += [f"--prompt={prompt}", f"--output_path={target}", *as_flags(EditConfig, settings)]
    file = target.relative_to(run).as_posix()
    asked = {"prompt": prompt, "settings": settings, "file": file, "warnings": warnings}
    return jobs.make(home, "edit", run.name, words, asked, files)


def edited_image(home: Home, body: dict) -> Path:
    """Return the file of the image to edit: a scene's photograph, or an image of a run."""
    if body.get("scene") is not None:
        return open_scene(home.find(SCENES, text_of(body, "scene"))).draft.image_path
    path = runs.run_file(home.find(RUNS, text_of(body, "of")), text_of(body, "file"))
    if path.suffix not in runs.SHOWN or image_size(path) == (0, 0):
        raise Refusal(422, "this file is not an image", "image")
    return path


def png(mask: np.ndarray) -> bytes:
    """Return a mask (H, W), uint8, as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


# --- Taking away --------------------------------------------------------------------------------------------------

OPENED_BY = {
    "single": "the whole model as one file: ComfyUI, A1111, Forge, InvokeAI, diffusers",
    "kohya": "a LoRA and an embedding for each handle: ComfyUI, A1111, Forge, InvokeAI",
    "peft": "a LoRA as diffusers names it, and an embedding for each handle",
}
# Why a run cannot have a form of export, up to the card that it has instead.
UNSUITED = {
    "whole": "it is a whole model without adapters; take",
    "tokens": "other programs have no adapters of single tokens, so train with lora for them; for bas take",
    "vocabulary": "it has a vocabulary of its own, and one file carries no tokenizer; take",
}


def export_target(run: Path, form: str) -> Path:
    """Return the main file of an export."""
    return run / runs.EXPORTS / form / f"{run.name.replace(' ', '_')}.safetensors"


def exports(run: Path) -> list[dict[str, Any]]:
    """List for each form of export whether the run can have it, or why not; its files and what goes with them."""
    found = []
    for form in runs.FORMS:
        target = export_target(run, form)
        there = sorted(path for path in target.parent.glob("*") if path.is_file()) if target.is_file() else []
        files = [{"file": path.relative_to(run).as_posix(), "bytes": path.stat().st_size} for path in there]
        row = {"form": form, "about": OPENED_BY[form], "problem": problem_of(run, form), "files": files}
        found.append(row | {"uses": uses_of(run, form) if files else [], "needs": needs_of(run, form) if files else []})
    return found


def needs_of(run: Path, form: str) -> list[str]:
    """Say what an export needs beside it. Nothing if the base is gone: making the export says so."""
    with suppress(InputError):
        return needed_too(run) if form != "single" else []
    return []


def problem_of(run: Path, form: str) -> str | None:
    """Say why a run cannot have a form of export, in the words of the page's cards. None if it can."""
    target = export_target(run, form)
    try:
        plan_export(run, target, form, "")
    except Unsuited as error:
        folder = '"The run as a folder"' if (run / TUNED).is_file() else '"The model as a folder"'
        if error.reason == "whole" and not problem_of(run, "single"):
            folder = '"One file"'
        return f"{UNSUITED[error.reason]} {folder}"
    except InputError as error:
        return str(error).replace(f"{run} ", "this run ").replace(str(target), target.name)
    return None


def uses_of(run: Path, form: str) -> list[dict[str, str]]:
    """Say what to type in other programs for an export that lies there: each program, and its line."""
    try:
        files = read_export(export_target(run, form).parent)
    except InputError:
        return []
    lines = how_to_use(files, form, holds_sdxl(run)) if files else []
    return [dict(zip(("program", "line"), line.split(": ", 1), strict=True)) for line in lines]


def export(home: Home, body: dict) -> str:
    """Ask for the run in a form that other programs open."""
    run, form = finished(home, body), body.get("form")
    if form not in runs.FORMS:
        raise Refusal(400, f"form is one of {', '.join(runs.FORMS)}", "bad", "form")
    target = export_target(run, form)
    plan_export(run, target, form, "")
    target.parent.mkdir(parents=True, exist_ok=True)
    precision = ["--save_precision", "fp16"] if (run / TUNED).is_file() else []
    words = ["export", str(run), str(target), "--format", form, *precision]
    return jobs.make(home, "export", run.name, words, {"form": form}, {})


KINDS: dict[str, Callable[[Home, dict], str]] = {
    "train": train,
    "resume": resume,
    "pause": pause,
    "download": download,
    MASKS: propose,
    "sample": sample,
    "vary": vary,
    "explore": explore,
    "attend": attend,
    "edit": edit,
    "export": export,
}
