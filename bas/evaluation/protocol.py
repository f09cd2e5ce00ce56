"""The paper's protocol (appendix): scenes x methods x seeds are trained, and generate every subset in every context.

    OUT/plan.json                                what all trials share; a restart must agree with it
    OUT/cells/SCENE/METHOD/seed-S/0000.png ...   the images of one trial, each with its settings
    OUT/cells/SCENE/METHOD/seed-S/cell.json      what was generated, the attention's IoU, the seconds
    OUT/cells/SCENE/METHOD/seed-S/run/           metrics and settings of its training; the tuned weights are not kept

A trial counts once its cell.json is there. An interrupted one is trained again, or resumes from a checkpoint.
"""

import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bas.config import MAX_SEED, SampleConfig, TrainConfig
from bas.data.scene import subset_prompt
from bas.data.scene_folder import load_scene
from bas.errors import InputError, check_int, shown
from bas.evaluation.baselines import training_of
from bas.evaluation.generation import Request, check_maps, generate_images, measure_attention
from bas.io.json_files import read_record, write_json
from bas.io.run_files import METRICS, SETTINGS, read_settings
from bas.io.settings_file import RETIRED
from bas.runtime.signals import Interrupted
from bas.sampling.gallery import subsets
from bas.training.base_model import Base
from bas.training.loop import trained
from bas.training.multi_scene import run_name
from bas.training.resume import FREE_ON_RESUME, differing, scene_state

log = logging.getLogger(__name__)

PLAN, TRIALS, TRIAL, RUN = "plan.json", "cells", "cell.json", "run"
TRIAL_SHAPE = {
    "scene": str,
    "method": str,
    "seed": int,
    "handles": [str],
    "words": list,
    "attention_iou": [(int, float)],
    "pictures": [{"file": str, "prompt": str, "concepts": [int]}],
    "seconds": {...: (int, float)},
}
# Settings that may differ between two calls: no trial's result depends on them.
FREE = (FREE_ON_RESUME | {"batch_size"}) - {"class_data_dir"}
ELSEWHERE = "name a new --output_dir"
SEEDS_APART = 10_000  # between the image seeds of two training seeds: more than a trial has images


@dataclass(frozen=True)
class Trial:
    """One training and the images that it is asked for."""

    scene: str  # its name
    method: str
    seed: int
    training: TrainConfig
    requests: tuple[Request, ...]

    @property
    def folder(self) -> Path:
        """The folder of its images."""
        return Path(self.training.output_dir).parent

    @property
    def finished(self) -> bool:
        """Whether all its images are generated."""
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

    explicit: settings of TrainConfig that hold for every variant. Raises InputError for a scene that cannot be used,
    for one without words, because prompt similarity compares an image with its prompt in words, and for a seed that
    leaves no room for those of the images. If several scenes cannot be used, the reason of each is logged.
    """
    for seed in seeds:
        check_int("--seeds", seed, -MAX_SEED // SEEDS_APART, MAX_SEED // SEEDS_APART - 1)
    trials = []
    configs = {method: training_of(method, explicit, model_row) for method in methods}
    handles = handles_of(scenes, configs[methods[0]])
    for seed in seeds:
        for scene in scenes:
            name = run_name(scene)
            for method, config in configs.items():
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


def handles_of(scenes: list[Path], config: TrainConfig) -> dict[Path, tuple[str, ...]]:
    """Return the handles of each scene. InputError, after all scenes were read, if some cannot be used."""
    found, rejected = {}, []
    for scene in scenes:
        try:
            content = load_scene(replace(config, instance_data_dir=str(scene)))
            if wordless := [h for h, word in zip(content.handles, content.words, strict=True) if not word]:
                advice = f'write its "word" into {scene}/scene.json'
                raise InputError(f"{scene} has no word for {', '.join(wordless)}: {advice}")
            found[scene] = content.handles
        except InputError as error:
            rejected.append((scene, error))
    if len(rejected) == 1:
        raise rejected[0][1]
    if rejected:
        for scene, error in rejected:
            log.error("%s cannot be used: %s", scene, error)
        names = ", ".join(run_name(scene) for scene, _ in rejected)
        raise InputError(
            f"{len(rejected)} of {len(scenes)} scenes cannot be used, as listed above: mend or leave out {names}"
        )
    return found


def requests_of(handles: tuple[str, ...], contexts: tuple[str, ...], seed: int) -> tuple[Request, ...]:
    """Ask for every non-empty subset of the handles in every context. All methods start from the same noise."""
    prompts = [(f"{subset_prompt(chosen)} {context}", chosen) for chosen in subsets(handles) for context in contexts]
    return tuple(
        Request(prompt, tuple(map(handles.index, chosen)), SEEDS_APART * seed + i)
        for i, (prompt, chosen) in enumerate(prompts)
    )


def read_trial(folder: Path) -> dict:
    """Read a trial's cell.json. Raises InputError where it is damaged."""
    return read_record(folder / TRIAL, TRIAL_SHAPE, "remove it, and the same command makes the trial again")


def shared(values: object) -> object:
    """Return a part of plan.json without the settings that may differ between two calls."""
    if not isinstance(values, dict):
        return values
    return {name: value for name, value in values.items() if name not in FREE and (name, value) not in RETIRED.items()}


def differences(facts: dict, noted: dict) -> list[str]:
    """List what differs between this call's facts and those that plan.json notes, each setting with its value there.

    A setting that one side lacks differs too: which value it has then depends on the method and on the base. Only of
    sampling every setting is noted; one that an earlier version did not know had its default.
    """
    found = []
    for part, ours in facts.items():
        theirs = noted[part]
        if not isinstance(ours, dict) or not isinstance(theirs, dict):
            found += [part] if ours != theirs else []
            continue
        if part == "sampling":
            theirs = {name: value for name, value in asdict(SampleConfig()).items() if name in ours} | theirs
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in theirs:
                found.append(f"{part} {name} (not given there)")
            elif name not in ours or ours[name] != theirs[name]:
                found.append(f"{part} {name} ({shown(theirs[name])} there)")
    return found


def agree_on(folder: Path, facts: dict) -> None:
    """Write plan.json, what all trials of a folder share. Raises InputError where its trials share something else."""
    path, facts = folder / PLAN, {part: shared(values) for part, values in facts.items()}
    if path.exists():
        noted = read_record(path, {}, ELSEWHERE)
        if differs := differences(facts, {part: shared(noted.get(part)) for part in facts}):
            raise InputError(
                f"{folder} holds an evaluation with another {', '.join(differs)}: give the same, or {ELSEWHERE}"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    used = any(not entry.name.startswith(".") for entry in folder.iterdir())
    if used and not path.exists():  # which another process may have written meanwhile
        raise InputError(f"--output_dir {folder} is not empty: name a new folder")
    write_json(path, facts)


def check_finished(trials: list[Trial]) -> None:
    """InputError if a finished trial was trained with other settings than are planned: its base may bring others."""
    for trial in trials:
        run = Path(trial.training.output_dir)
        if not trial.finished or not (run / SETTINGS).exists():
            continue
        if differs := differing({"config": asdict(trial.training)}, read_settings(run)):
            raise InputError(f"{run} was made with another {', '.join(differs)}: give the same, or {ELSEWHERE}")


# --- One trial -----------------------------------------------------------------------------------------------------


def run_trial(trial: Trial, base: Base, sampling: SampleConfig, segments: bool = False) -> dict:
    """Train, measure attention, generate all images, and write cell.json; returns its content.

    segments: also save where each handle attended in each image. Raises as `bas.training.loop.train` does, and
    Interrupted after a signal; the same command then resumes.
    """
    began = time.monotonic()
    check_maps(trial.training, base.models.spec)
    try:
        with trained(trial.training, base) as run:
            trained_at = time.monotonic()
            note = {
                "scene": trial.scene,
                "method": trial.method,
                "seed": trial.seed,
                "handles": list(run.scene.handles),
                "words": list(run.scene.words),
                "sha256": scene_state(load_scene(trial.training))["scene"],
                "attention_iou": measure_attention(run),
                "pictures": generate_images(run, trial.requests, trial.folder, sampling, segments),
            }
    except Interrupted as stop:
        raise Interrupted("stopped; the same command goes on", stop.exit_code - 128) from None
    seconds = {"training": trained_at - began, "drawing": time.monotonic() - trained_at}
    note["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    write_json(trial.folder / TRIAL, note)
    return note
