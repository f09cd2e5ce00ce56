"""How long a training takes, as an earlier one on this machine did."""

from pathlib import Path
from typing import Any

import torch

from bas.config import TrainConfig
from bas.errors import InputError
from bas.io.run_files import CONCEPTS, read_sessions, read_settings
from bas.runtime.device import pick_device
from bas.web.studio import jobs
from bas.web.studio.store import RUNS, Home

# Settings that do not change the time of a step. Phases are counted apart.
FREE = {
    *("instance_data_dir", "output_dir", "num_of_assets", "initializer_tokens", "placeholder_token", "handles", "seed"),
    *("initial_learning_rate", "learning_rate", "lambda_attention", "prior_loss_weight", "class_prompt"),
    *("class_data_dir", "log_steps", "report_to", "resume_from_checkpoint"),
    *("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "scale_lr", "alpha", "preset"),
    *("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
    *("phase1_train_steps", "phase2_train_steps", "checkpoints_total_limit", "card", "num_class_images"),
}
PREPARING, SAVING = "preparation", "saving"


def measured(home: Home, config: TrainConfig) -> dict[str, Any] | None:
    """Find the newest run that was trained here, on this device and without a break, with steps as costly as these.

    -> its name and the seconds of this training: its preparation and saving, and its time for each step. Previews are
    in the time of the steps, as often as that run made them. None without such a run.
    """
    device = pick_device(config.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    steps = {phase.name: phase.steps for phase in config.phases}
    found = [job for job in map(jobs.describe, jobs.Lane(home).folders()) if job]
    here = {job["name"] for job in found if job["kind"] == "train" and job["here"]}
    for run in (home.folder / RUNS / run for run in home.names(RUNS) if run in here):
        took = seconds_of(run, name, config) if (run / CONCEPTS).is_file() else None
        if took is not None and all(phase in took[1] for phase in steps):
            once, each = took
            return {"run": run.name, "seconds": once + sum(each[phase] * count for phase, count in steps.items())}
    return None


def seconds_of(run: Path, device: str, config: TrainConfig) -> tuple[float, dict[str, float]] | None:
    """Return the seconds of what a run did once, and of a step of each phase. None if it is unlike this training."""
    try:
        settings, sessions = read_settings(run)["config"], read_sessions(run)
    except InputError:
        return None
    if len(sessions) != 1 or sessions[0]["device"] != device:
        return None
    if any(plain(settings.get(name)) != plain(value) for name, value in vars(config).items() if name not in FREE):
        return None
    stages: dict[str, float] = {}
    for stage in sessions[0]["stages"]:
        stages[stage["stage"]] = stages.get(stage["stage"], 0.0) + stage["seconds"]
    counts = {phase.name: settings.get(f"{phase.name}_train_steps") for phase in config.phases}
    each = {phase: stages[phase] / count for phase, count in counts.items() if count and phase in stages}
    return stages.get(PREPARING, 0.0) + stages.get(SAVING, 0.0), each


def plain(value: Any) -> Any:
    """Return a setting as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
