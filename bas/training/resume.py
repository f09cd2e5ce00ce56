"""What a resumed run must share with the one that it goes on with, and the refusal where it does not."""

import hashlib
from dataclasses import fields
from pathlib import Path

from bas.config import TrainConfig, flag_of
from bas.data.scene import Scene
from bas.errors import InputError
from bas.io.files import check_shape
from bas.training.run_folder import ANOTHER, NOTE

# Where it runs, where things lie, how it is watched and what spares memory; every other setting stays as it was.
FREE_ON_RESUME = {
    "device",
    "gradient_checkpointing",  # computes the same numbers again
    "instance_data_dir",
    "pretrained_model_name_or_path",
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
NOTED = {"step": int, "metrics": int, "scaler": dict, "facts": {"config": dict}}
SAME_ON_RESUME = {  # beside the settings, as far as a checkpoint notes it: how a refusal names it
    "handles": "handles",
    "words": "initial words",
    "scene": "scene",
    "base": "base",
    "precision": "--mixed_precision ({precision} there)",
    "schedule": "noise schedule",
    "class_images": "class images",
}


def scene_state(scene: Scene) -> dict:
    """What a resumed run must share of its scene: handles, initial words, and the sha256 of all pictures and masks."""
    digest = hashlib.sha256()
    for picture, masks in scene.images:
        digest.update(repr((picture.size, sorted(masks))).encode() + picture.tobytes())
        for i in sorted(masks):
            digest.update(masks[i].tobytes())
    return {"handles": list(scene.handles), "words": list(scene.words), "scene": digest.hexdigest()}


def _plain(value: object) -> object:
    """A setting as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def check_note(checkpoint: Path, note: dict) -> None:
    """InputError for a checkpoint's note that lacks what a run needs to go on."""
    try:
        check_shape(note, NOTED)
    except ValueError as error:
        raise InputError(f"{checkpoint / NOTE} is not as bas wrote it ({error}): {ANOTHER}") from None


def check_resumable(checkpoint: Path, facts: dict, noted: dict) -> None:
    """Raises InputError unless the checkpoint was made with these settings, and with all else that both know of."""
    known = [what for what in SAME_ON_RESUME if what in facts and what in noted]
    free = FREE_ON_RESUME | ({"mixed_precision"} if "precision" in known else set())  # what it came to is compared
    ours, theirs = facts["config"], DEFAULTS | noted["config"]  # an earlier version knew fewer settings
    differs = [FLAGS[name] for name in ours if name not in free and _plain(ours[name]) != _plain(theirs[name])]
    differs += [SAME_ON_RESUME[what].format(**noted) for what in known if facts[what] != noted[what]]
    if differs:
        raise InputError(
            f"{checkpoint} was made with another {', '.join(differs)}: resume with the same, or start anew"
        )
