"""The paper's protocol (appendix): scenes x methods x seeds are trained, and each draws every subset in every context.

    OUT/plan.json                                what all trials share; a restart must agree with it
    OUT/cells/SCENE/METHOD/seed-S/0000.png ...   the pictures of one trial, each with its settings
    OUT/cells/SCENE/METHOD/seed-S/cell.json      what was drawn, where the handles looked, how long it took
    OUT/cells/SCENE/METHOD/seed-S/run/           metrics and settings of its training; the tuned weights are not kept

A trial counts once its cell.json is there. One that was cut off is done anew, or goes on from a checkpoint of its run.
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bas.config import SampleConfig, TrainConfig
from bas.data.scene import subset_prompt
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.evaluation.baselines import training_of
from bas.evaluation.generation import Request, draw, look
from bas.io.files import read_json, write_json
from bas.io.run_files import CHECKPOINTS, METRICS
from bas.runtime.signals import Interrupted
from bas.sampling.gallery import subsets
from bas.training.base_model import Base
from bas.training.loop import trained

PLAN, TRIALS, TRIAL, RUN = "plan.json", "cells", "cell.json", "run"
SEEDS_APART = 10_000  # between the pictures' seeds of two training seeds: more than one trial ever draws


@dataclass(frozen=True)
class Trial:
    """One training and what is drawn with it."""

    scene: str  # its name
    method: str
    seed: int
    training: TrainConfig
    requests: tuple[Request, ...]

    @property
    def folder(self) -> Path:
        """Where the pictures go."""
        return Path(self.training.output_dir).parent

    @property
    def finished(self) -> bool:
        """Whether everything of it is drawn."""
        return (self.folder / TRIAL).exists()


def plan_trials(
    folder: Path,
    scenes: list[Path],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    contexts: tuple[str, ...],
    explicit: dict,
    model_row: dict | None,
) -> list[Trial]:
    """List all trials, seed by seed and scene by scene: a part of them compares all methods on the same scenes.

    explicit: settings of TrainConfig that hold for every row. Raises InputError for a scene that cannot be used.
    """
    trials = []
    configs = {method: training_of(method, explicit, model_row) for method in methods}
    handles = {
        scene: load_scene(replace(configs[methods[0]], instance_data_dir=str(scene))).handles for scene in scenes
    }
    for seed in seeds:
        for scene in scenes:
            for method, config in configs.items():
                name = scene.resolve().name
                run = folder / TRIALS / name / method / f"seed-{seed}" / RUN
                training = replace(
                    config,
                    instance_data_dir=str(scene),
                    output_dir=str(run),
                    seed=seed,
                    img_log_steps=0,
                    checkpointing_steps=0,
                    resume_from_checkpoint="latest" if (run / METRICS).exists() else None,
                )
                trials.append(Trial(name, method, seed, training, requests_of(handles[scene], contexts, seed)))
    return trials


def requests_of(handles: tuple[str, ...], contexts: tuple[str, ...], seed: int) -> tuple[Request, ...]:
    """Every non-empty subset of the handles in every context. All methods draw from the same noise."""
    prompts = [(f"{subset_prompt(chosen)} {context}", chosen) for chosen in subsets(handles) for context in contexts]
    return tuple(
        Request(prompt, tuple(map(handles.index, chosen)), SEEDS_APART * seed + i)
        for i, (prompt, chosen) in enumerate(prompts)
    )


def agree_on(folder: Path, facts: dict) -> None:
    """Note what all trials of a folder share. InputError when those that are there were made with something else."""
    path = folder / PLAN
    if path.exists():
        noted = read_json(path)
        differs = [
            f"{part} {name}".strip()
            for part, values in facts.items()
            for name, value in (values.items() if isinstance(values, dict) else [("", values)])
            if (noted.get(part, {}).get(name) if name else noted.get(part)) != value
        ]
        if differs:
            raise InputError(f"{folder} holds an evaluation with another {', '.join(differs)}: name a new --output_dir")
        return
    folder.mkdir(parents=True, exist_ok=True)
    used = any(not entry.name.startswith(".") for entry in folder.iterdir())
    if used and not path.exists():  # which another process may have written meanwhile
        raise InputError(f"--output_dir {folder} is not empty: name a new folder")
    write_json(path, facts)


# --- One trial -----------------------------------------------------------------------------------------------------


def run_trial(trial: Trial, base: Base, sampling: SampleConfig, segments: bool = False) -> dict:
    """Train, look where the handles look, draw everything, and note it; returns the note.

    With `segments`, where each handle looked while a picture was drawn is kept beside it.

    Raises as `bas.training.loop.train` does; after a signal Interrupted, and the same command goes on.
    """
    began = time.monotonic()
    try:
        with trained(trial.training, base) as run:
            trained_at = time.monotonic()
            note = {
                "scene": trial.scene,
                "method": trial.method,
                "seed": trial.seed,
                "handles": list(run.scene.handles),
                "words": list(run.scene.words),
                "attention_iou": look(run),
                "pictures": draw(run, trial.requests, trial.folder, sampling, segments),
            }
    except Interrupted as stop:
        raise Interrupted("stopped; the same command goes on", stop.exit_code - 128) from None
    seconds = {"training": trained_at - began, "drawing": time.monotonic() - trained_at}
    note["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    write_json(trial.folder / TRIAL, note)
    shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)  # of a training that was interrupted
    return note
