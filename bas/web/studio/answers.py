"""What each address of the studio answers. The work is done by the other files of this folder."""

import io
import shlex
import shutil
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from starlette.responses import FileResponse, Response, StreamingResponse

from bas.io.images import read_image, read_mask
from bas.io.run_files import scene_mask
from bas.pretrained.hub import find
from bas.web.studio import jobs, runs, scenes
from bas.web.studio.app import Ask
from bas.web.studio.refusal import Refusal
from bas.web.studio.store import JOBS, RUNS, SCENES, file_inside, text_of
from bas.web.studio.zips import files_below, zipped

KEPT = {"cache-control": "private, max-age=31536000, immutable"}  # of what its address names exactly
THUMB = 320  # pixels of the longer side of an image in a gallery
CUTOUT = 72  # pixels of the longer side of a concept on its chip
LATEST = 30  # ended jobs that the page gets, besides all that have not ended
INLINE = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
EXAMPLE = "playroom"
WORK = {"train": "the training", "masks": "the proposal of a mask"}  # jobs that read a scene


def state(ask: Ask) -> dict[str, Any]:
    """Return all scenes, runs and jobs, in short. The page asks for it again and again, so it misses nothing."""
    ask.lane.asked = time.monotonic()
    ask.lane.tick()
    found = [job for folder in reversed(ask.lane.folders()[-200:]) if (job := jobs.describe(folder))]
    trained_by: dict[str, dict] = {}
    for job in found:
        if job["kind"] == "train":
            trained_by.setdefault(job["name"], job)
    summaries = [runs.summary(ask.home.folder / RUNS / name, trained_by) for name in ask.home.names(RUNS)]
    return {
        "scenes": [scene_summary(ask.home.folder / SCENES / name) for name in ask.home.names(SCENES)],
        "runs": [run for run in summaries if run],
        "unnamed": ask.home.unnamed(),
        "jobs": [job for i, job in enumerate(found) if i < LATEST or job["state"] in (*jobs.ALIVE, jobs.FOREIGN)],
    }


def scene_summary(folder: Path) -> dict[str, Any]:
    """Return a scene in short, read again only if its folder has changed."""
    try:
        return _summary(folder, scenes.version(folder))
    except OSError as error:
        return {"name": folder.name, "problem": str(error)}


@lru_cache(maxsize=1024)
def _summary(folder: Path, _version: str) -> dict[str, Any]:
    return scenes.summary(folder)


# --- Scenes -------------------------------------------------------------------------------------------------------


def _scene(ask: Ask) -> Path:
    return ask.home.find(SCENES, ask.path["scene"])


def add_scene(ask: Ask) -> dict[str, Any]:
    """Make a scene of the photograph that comes in."""
    name = scenes.add_photo(ask.home, ask.query.get("name", "photograph"), ask.body)
    return scenes.facts(scenes.open_scene(ask.home.folder / SCENES / name))


def add_example(ask: Ask) -> dict[str, Any]:
    """Add the scene that ships with bas, to try everything on."""
    folder = ask.home.make_folder(SCENES, EXAMPLE)
    shutil.copytree(find(None) / "scenes" / EXAMPLE, folder, dirs_exist_ok=True)
    return scenes.facts(scenes.open_scene(folder))


def get_scene(ask: Ask) -> dict[str, Any]:
    """Return a scene without its pixels."""
    return scenes.facts(scenes.open_scene(_scene(ask)))


def name_concepts(ask: Ask) -> dict[str, Any]:
    """Rename, reorder, add and remove concepts."""
    return scenes.facts(scenes.put_concepts(_scene(ask), ask.json.get("concepts"), ask.expected))


def delete_scene(ask: Ask) -> dict[str, Any]:
    """Move a scene to the trash. Refusal while a job needs it."""
    scene = _scene(ask)
    for folder in ask.lane.folders():
        current = jobs.state(folder)
        if current in jobs.ALIVE and any(Path(word).is_relative_to(scene) for word in jobs.words_of(folder)):
            job, todo = jobs.read_job(folder) or {}, "take it out of the queue" if current == "waiting" else "stop it"
            what = WORK.get(job.get("kind", ""), "a job")
            raise Refusal(409, f"{what} of {job.get('name')} needs this scene: {todo} first", "running")
    return {"trash": ask.home.trash(scene)}


def list_trash(ask: Ask) -> list[dict[str, str]]:
    """List what was deleted."""
    return ask.home.deleted()


def restore(ask: Ask) -> dict[str, Any]:
    """Take something out of the trash again."""
    return {"was": ask.home.restore(ask.path["name"])}


def view_photo(ask: Ask) -> Response:
    """Return the photograph, or a part of it."""
    folder, box = _scene(ask), None
    if "box" in ask.query:
        try:
            left, top, right, bottom = map(float, ask.query["box"].split(","))
        except ValueError:
            raise Refusal(400, "a box is left,top,right,bottom", "bad", "box") from None
        box = left, top, right, bottom
    changed = scenes.open_scene(folder).draft.image_path.stat().st_mtime_ns
    data, kind = scenes.view(folder, changed, ask.number("side", scenes.VIEW), box)
    return Response(data, media_type=kind, headers=KEPT if "v" in ask.query else None)


def get_mask(ask: Ask) -> Response:
    """Return a mask as squares."""
    return Response(scenes.mask_tiles(_scene(ask), ask.number("number")), media_type="application/octet-stream")


def put_mask(ask: Ask) -> dict[str, Any]:
    """Save the squares that a stroke has changed."""
    return scenes.facts(scenes.put_tiles(_scene(ask), ask.number("number"), ask.body, ask.expected))


# --- Jobs ---------------------------------------------------------------------------------------------------------


def stop_job(ask: Ask) -> dict[str, Any]:
    """Stop, with its state saved, or at once."""
    folder = ask.home.find(JOBS, ask.path["job"])
    jobs.stop(folder, text_of(ask.json, "how"))
    return jobs.describe(folder) or {}


def move_job(ask: Ask) -> dict[str, Any]:
    """Move a job one place forward or back in the queue."""
    ask.lane.move(ask.home.find(JOBS, ask.path["job"]), up=bool(ask.json.get("up")))
    return {}


def accept_job(ask: Ask) -> dict[str, Any]:
    """Put a job from elsewhere into the queue, once its command was seen."""
    folder, words = ask.home.find(JOBS, ask.path["job"]), ask.json.get("words")
    jobs.accept(folder, words if isinstance(words, list) else [])
    ask.lane.tick()
    return jobs.describe(folder) or {}


def read_log(ask: Ask) -> dict[str, Any]:
    """Return the end of what a job has printed, and its command: as one types it, and its words."""
    folder = ask.home.find(JOBS, ask.path["job"])
    words = jobs.words_of(folder)
    return {"text": jobs.tail(folder / jobs.LOG), "command": shlex.join(["bas", *words]), "words": words}


def view_edited(ask: Ask) -> Response:
    """Return the image that a job edits."""
    path = file_inside(ask.home.find(JOBS, ask.path["job"]), runs.IMAGE)
    data, kind = scenes.as_view(read_image(path))
    return Response(data, media_type=kind, headers=KEPT)


# --- Runs ---------------------------------------------------------------------------------------------------------


def _run(ask: Ask) -> Path:
    return ask.home.find(RUNS, ask.path["run"])


def get_run(ask: Ask) -> dict[str, Any]:
    """Return the previews of a run, and the mask of each handle."""
    return {"previews": runs.previews(_run(ask)), "masks": runs.masks(_run(ask))}


def get_metrics(ask: Ask) -> dict[str, Any]:
    """Return the curves of a run."""
    return runs.metrics(_run(ask))


def delete_run(ask: Ask) -> dict[str, Any]:
    """Move a run to the trash. Refusal while something is done with it."""
    run = _run(ask)
    busy = [job for folder in ask.lane.folders() if (job := jobs.describe(folder)) and job["state"] in jobs.ALIVE]
    if any(job["name"] == run.name for job in busy):
        raise Refusal(409, "this run is at work: stop it first", "running")
    if runs.trained_elsewhere(run):
        raise Refusal(409, "a terminal trains this run: stop it there first", "running")
    return {"trash": ask.home.trash(run)}


def list_pictures(ask: Ask) -> dict[str, Any]:
    """List what was drawn and edited with a run, newest first."""
    return {gallery: runs.pictures(_run(ask), gallery) for gallery in runs.GALLERIES}


def mark_picture(ask: Ask) -> dict[str, Any]:
    """Mark a favourite, or take the mark away."""
    run, file = _run(ask), text_of(ask.json, "file")
    runs.run_file(run, file)
    runs.mark(run, file, bool(ask.json.get("star")))
    return {}


def delete_picture(ask: Ask) -> dict[str, Any]:
    """Move an image to the trash."""
    file = text_of(ask.json, "file")
    if file.partition("/")[0] not in {name for names in runs.GALLERIES.values() for name in names}:
        raise Refusal(403, "only images are deleted here", "bad")
    return {"trash": ask.home.trash(runs.run_file(_run(ask), file))}


def compare_edit(ask: Ask) -> dict[str, Any]:
    """Return the job that made an edited image, and how many pixels outside of its mask have changed."""
    run, file = _run(ask), ask.query.get("file", "")
    path, job = runs.run_file(run, file), runs.edit_of(ask.home, run, file)
    if job is None or (outside := runs.changed_outside(job, path, path.stat().st_mtime_ns)) is None:
        raise Refusal(404, "the image before is not here any more", "missing")
    return {"job": job.name, "outside": outside}


def get_file(ask: Ask) -> Response:
    """Return a file of a run: images are shown, others are saved."""
    path = runs.run_file(_run(ask), ask.path["file"])
    kind = INLINE.get(path.suffix.lower())
    if kind and "download" not in ask.query:
        return FileResponse(path, media_type=kind)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def get_thumb(ask: Ask) -> Response:
    """Return an image, small."""
    path = runs.run_file(_run(ask), ask.path["file"])
    if path.suffix.lower() not in INLINE:
        raise Refusal(404, "this file is not an image", "missing")
    data, kind = _thumb(path, path.stat().st_mtime_ns)
    return Response(data, media_type=kind, headers=KEPT if "v" in ask.query else None)


@lru_cache(maxsize=2048)
def _thumb(path: Path, _changed: int) -> tuple[bytes, str]:
    with Image.open(path) as image:
        if max(image.size) <= THUMB:
            return path.read_bytes(), INLINE[path.suffix.lower()]
    small = read_image(path)
    small.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue(), "image/webp"


def get_cutout(ask: Ask) -> Response:
    """Return a concept as it looks in the photograph of its run, small."""
    run, number = _run(ask), ask.number("concept")
    mask = scene_mask(run / runs.SCENE, number)
    if not mask.is_file():
        raise Refusal(404, "the run holds no image of it", "missing")
    changed = mask.stat().st_mtime_ns, mask.with_name("img.png").stat().st_mtime_ns
    return Response(_cutout(mask, changed), media_type="image/png")


@lru_cache(maxsize=256)
def _cutout(mask: Path, _changed: tuple[int, int]) -> bytes:
    alpha, image = Image.fromarray(read_mask(mask)), read_image(mask.with_name("img.png"))
    image.putalpha(alpha)
    image = image.crop(alpha.getbbox())
    image.thumbnail((CUTOUT, CUTOUT), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def zip_run(ask: Ask) -> Response:
    """Return the run itself, its scene, or one of its exports, as a zip."""
    run, what = _run(ask), ask.query.get("what", "")
    folders = {"run": run, "scene": run / "scene", **{form: run / runs.EXPORTS / form for form in runs.FORMS}}
    if what not in folders or not folders[what].is_dir():
        raise Refusal(404, "there is nothing to take away", "missing")
    made = {name for names in runs.GALLERIES.values() for name in names} | {runs.EXPORTS, runs.ATTENTION}
    leave_out = made | {"checkpoints", "previews"} if what == "run" else set()
    files = files_below(folders[what], leave_out)
    name = run.name if what == "run" else f"{run.name}-{what}"
    named = {"content-disposition": f'attachment; filename="{name.encode("ascii", "replace").decode()}.zip"'}
    return StreamingResponse(zipped(folders[what], files), media_type="application/zip", headers=named)


def compare_runs(ask: Ask) -> dict[str, Any]:
    """Compare runs side by side."""
    return runs.compare(ask.home, [name for name in ask.query.get("runs", "").split("|") if name])
