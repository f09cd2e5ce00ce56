"""What a resumed run must share with the one that it continues, and the errors where it does not."""

import hashlib
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from bas.config import TrainConfig, flag_of
from bas.data.collages import scene_for_method
from bas.data.scene import Scene
from bas.errors import InputError
from bas.io.files import read_bytes
from bas.io.images import strips, to_floats
from bas.io.json_files import MAX_ROWS_BYTES, check_shape, parse_json
from bas.io.run_files import CONCEPTS, METRICS, ROW, read_settings
from bas.pretrained.additions import Additions
from bas.pretrained.folder import read_spec
from bas.pretrained.hashes import base_hash
from bas.pretrained.hub import find
from bas.schedulers import NoiseSchedule
from bas.training.checkpoints import Checkpoint, list_checkpoints

# Settings that may change on resuming: the device, paths, logging, saving, and what only saves memory.
FREE_ON_RESUME = {
    "device",
    "gradient_checkpointing",  # computes the same numbers again
    "instance_data_dir",
    "pretrained_model_name_or_path",
    "lora",  # files and weights are part of the base's hash
    "embedding",
    "output_dir",
    "class_data_dir",
    "sample_batch_size",
    "log_steps",
    "report_to",
    "img_log_steps",
    "preview_inference_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "save_precision",
}

FLAGS = {f.name: flag_of(f) for f in fields(TrainConfig)}
DEFAULTS = {f.name: f.default for f in fields(TrainConfig)}
SAMPLING_ONLY = {"steps_offset", "final_sigmas_type"}  # of the noise schedule: no step of the training depends on it
SAME_ON_RESUME = {  # beside the settings, where a checkpoint has it: its name in the error
    "handles": "handles",
    "words": "initial words",
    "scene": "scene",
    "base": "base",
    "precision": "--mixed_precision ({precision} there)",
    "schedule": "noise schedule",
    "class_images": "class images",
}


def scene_state(scene: Scene) -> dict:
    """Return what a resumed run must share of its scene: handles, initial words, sha256 of all images and masks."""
    digest = hashlib.sha256()
    for image, masks in scene.images:
        digest.update(repr((image.size, sorted(masks))).encode())
        for _, strip in strips(image):
            digest.update(strip.tobytes())
        for i in sorted(masks):
            for _, strip in strips(Image.fromarray(masks[i])):
                digest.update(to_floats(np.asarray(strip)).tobytes())
    return {"handles": list(scene.handles), "words": list(scene.words), "scene": digest.hexdigest()}


def _plain(value: object) -> object:
    """Return a setting as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def of_training(value: object) -> object:
    """Return the part on which a training depends: a noise schedule without the fields that only sampling reads."""
    return {k: v for k, v in value.items() if k not in SAMPLING_ONLY} if isinstance(value, dict) else value


def continued_schedule(schedule: NoiseSchedule, earlier: dict) -> NoiseSchedule:
    """Return the noise schedule with the steps_offset of the continued run: its class images were made with that."""
    there = earlier.get("schedule")
    if not isinstance(there, dict) or "steps_offset" not in there:
        return schedule
    return replace(schedule, steps_offset=there["steps_offset"])


def check_resumable(place: Path, metadata: dict, earlier: dict) -> None:
    """Raise InputError naming what differs if the run at `place` was made with other settings.

    metadata: of this run, as far as it is known yet; earlier: of the run at `place`.
    """
    if differs := differing(metadata, earlier):
        raise InputError(f"{place} was made with another {', '.join(differs)}: resume with the same, or start again")


def differing(metadata: dict, earlier: dict) -> list[str]:
    """List the settings in which two runs differ, by their flags, and all else that both know of."""
    known = [name for name in SAME_ON_RESUME if name in metadata and name in earlier]
    free = FREE_ON_RESUME | ({"mixed_precision"} if "precision" in known else set())  # its result is compared
    ours, theirs = metadata["config"], DEFAULTS | earlier["config"]  # an earlier version knew fewer settings
    differs = [FLAGS[name] for name in ours if name not in free and _plain(ours[name]) != _plain(theirs[name])]
    differs += [
        SAME_ON_RESUME[name].format(**earlier)
        for name in known
        if of_training(metadata[name]) != of_training(earlier[name])
    ]
    return differs


def check_progress(checkpoint: Checkpoint, run: Path, steps: int) -> None:
    """Check that a checkpoint's step is one of the run's `steps`, and that the run's metrics reach it.

    A checkpoint of another folder may continue in a new one, without metrics. Raises InputError naming both sides.
    """
    if checkpoint.step > steps:
        raise InputError(f"{checkpoint.folder} is of step {checkpoint.step}, this run has {steps}: it is another run's")
    path = run / METRICS
    if not path.exists() and run.resolve() not in checkpoint.folder.resolve().parents:
        return
    whole = read_bytes(path, MAX_ROWS_BYTES) if path.exists() else b""
    content = whole[: checkpoint.metrics]
    *lines, cut = content.split(b"\n")
    step = _last_step(lines)
    fits = not cut and len(content) == checkpoint.metrics and step == checkpoint.step
    if not checkpoint.metrics:  # it was continued in a new folder, and saved there before the first step
        first, ended, _ = whole.partition(b"\n")
        fits = not ended or _last_step([first]) == checkpoint.step + 1
    if not fits:
        raise InputError(
            f"{path} does not reach {checkpoint.folder}: {len(content)} bytes up to step {step} here, "
            f"{checkpoint.metrics} bytes up to step {checkpoint.step} there; copy the file again, or resume in a new "
            "--output_dir"
        )


def _last_step(lines: list[bytes]) -> int | str:
    """Return the step of the last of these metrics lines: 0 without lines, "unknown" if one is damaged or missing."""
    steps = []
    for line in lines:
        try:
            row = parse_json(line)
            check_shape(row, ROW)
        except ValueError:
            return "unknown"
        steps.append(row["step"])
    if any(after != before + 1 for before, after in pairwise(steps)):
        return "unknown"
    return steps[-1] if steps else 0


def is_finished(config: TrainConfig) -> bool:
    """Return whether --output_dir holds this run, finished.

    InputError for one of other settings, another scene or base, and for one whose model cannot be read: its checkpoints
    may be all that is left of it.
    """
    folder = Path(config.output_dir)
    if not (folder / CONCEPTS).exists():
        return False
    base = base_hash(find(config.pretrained_model_name_or_path), Additions.of_base(vars(config)))
    metadata = {"config": asdict(config), **scene_state(scene_for_method(config)), "base": base}
    check_resumable(folder, metadata, read_settings(folder))
    try:
        read_spec(folder)
    except InputError as error:
        advice = f", or remove {folder / CONCEPTS} to resume" if list_checkpoints(folder) else ""
        raise InputError(f"{folder} has the file of a finished run, but {error}{advice}") from None
    return True
