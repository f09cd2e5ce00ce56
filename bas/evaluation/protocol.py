"""The paper's protocol (appendix): scenes x methods x seeds are trained, and each draws every subset in every context.

    OUT/plan.json                                what all cells share; a restart must agree with it
    OUT/cells/SCENE/METHOD/seed-S/0000.png ...   the pictures of one cell, each with its settings
    OUT/cells/SCENE/METHOD/seed-S/cell.json      what was drawn, where the handles looked, how long it took
    OUT/cells/SCENE/METHOD/seed-S/run/           metrics and settings of its training; the tuned weights are not kept

A cell counts once its cell.json is there. One that was cut off is done anew, or goes on from a checkpoint of its run.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from bas.base import Base
from bas.config import InputError, SampleConfig, TrainConfig
from bas.evaluation.baselines import training_of
from bas.evaluation.metrics import attention_iou
from bas.files import read_json, write_json
from bas.gallery import subsets
from bas.interrupts import Interrupted
from bas.machine import autocast
from bas.pictures import save_picture
from bas.preview import scene_attention
from bas.run_folder import METRICS
from bas.sample import decode, generate, to_pictures
from bas.scene import Scene, load_scene, subset_prompt
from bas.train import Run, trained

PLAN, CELLS, CELL = "plan.json", "cells", "cell.json"
SEEDS_APART = 10_000  # between the pictures' seeds of two training seeds: more than one cell ever draws


@dataclass(frozen=True)
class Request:
    """One picture to draw."""

    prompt: str
    concepts: tuple[int, ...]  # of the scene, in the order of the prompt
    noise: int  # the seed of the picture


@dataclass(frozen=True)
class Cell:
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
        return (self.folder / CELL).exists()


def plan_cells(
    folder: Path,
    scenes: list[Path],
    methods: tuple[str, ...],
    seeds: tuple[int, ...],
    contexts: tuple[str, ...],
    explicit: dict,
    model_row: dict | None,
) -> list[Cell]:
    """All cells, seed by seed and scene by scene, so that whatever is finished compares all methods on the same scenes.

    explicit: settings of TrainConfig that hold for every row. Raises InputError for a scene that cannot be used.
    """
    cells = []
    configs = {method: training_of(method, explicit, model_row) for method in methods}
    handles = {
        scene: load_scene(replace(configs[methods[0]], instance_data_dir=str(scene))).handles for scene in scenes
    }
    for seed in seeds:
        for scene in scenes:
            for method, config in configs.items():
                name = scene.resolve().name
                run = folder / CELLS / name / method / f"seed-{seed}" / "run"
                training = replace(
                    config,
                    instance_data_dir=str(scene),
                    output_dir=str(run),
                    seed=seed,
                    img_log_steps=0,
                    checkpointing_steps=0,
                    resume_from_checkpoint="latest" if (run / METRICS).exists() else None,
                )
                cells.append(Cell(name, method, seed, training, requests_of(handles[scene], contexts, seed)))
    return cells


def requests_of(handles: tuple[str, ...], contexts: tuple[str, ...], seed: int) -> tuple[Request, ...]:
    """Every non-empty subset of the handles in every context. All methods draw from the same noise."""
    prompts = [(f"{subset_prompt(chosen)} {context}", chosen) for chosen in subsets(handles) for context in contexts]
    return tuple(
        Request(prompt, tuple(map(handles.index, chosen)), SEEDS_APART * seed + i)
        for i, (prompt, chosen) in enumerate(prompts)
    )


def agree_on(folder: Path, facts: dict) -> None:
    """Note what all cells of a folder share. InputError when those that are there were made with something else."""
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
    write_json(path, facts)


# --- One cell -----------------------------------------------------------------------------------------------------


def fill_cell(cell: Cell, base: Base, sampling: SampleConfig) -> dict:
    """Train, look where the handles look, draw everything, and note it; returns the note.

    Raises as `bas.train.train` does; after a signal Interrupted, and the same command goes on.
    """
    began = time.monotonic()
    try:
        with trained(cell.training, base) as run:
            trained_at = time.monotonic()
            note = {
                "scene": cell.scene,
                "method": cell.method,
                "seed": cell.seed,
                "handles": list(run.scene.handles),
                "words": list(run.scene.words),
                "attention_iou": look(run, cell.training),
                "pictures": list(draw(run, cell, sampling)),
            }
    except Interrupted as stop:
        raise Interrupted("stopped; the same command goes on", stop.exit_code - 128) from None
    seconds = {"training": trained_at - began, "drawing": time.monotonic() - trained_at}
    note["seconds"] = {name: round(value, 2) for name, value in seconds.items()}
    write_json(cell.folder / CELL, note)
    return note


def look(run: Run, config: TrainConfig) -> list[float]:
    """How well each handle's attention covers its mask, on the photograph itself: N values in 0..1."""
    _, image, masks = photograph(config, run.models.resolution, run.models.size_multiple)
    with autocast(run.models.device, run.precision), torch.compiler.set_stance("force_eager"):
        maps = scene_attention(run.models, run.scene.handles, image, config)
    return [round(value, 4) for value in attention_iou(maps, masks)]


def photograph(config: TrainConfig, resolution: int, multiple: int) -> tuple[Scene, Tensor, Tensor]:
    """The scene as it is, whatever the method was shown: scene, image (3, H, W) in [-1, 1], masks (N, H, W) in 0..1"""
    scene = load_scene(config)
    return scene, *scene.tensors(config.resolution or resolution, multiple, config.center_crop)


def draw(run: Run, cell: Cell, sampling: SampleConfig) -> Iterator[dict]:
    """Draw and save the pictures of a cell; yields what each is."""
    for start in range(0, len(cell.requests), sampling.batch_size):
        batch = cell.requests[start : start + sampling.batch_size]
        prompts, seeds = [request.prompt for request in batch], [request.noise for request in batch]
        with autocast(run.models.device, run.precision), torch.compiler.set_stance("force_eager"):
            pictures = to_pictures(decode(run.models, generate(prompts, seeds, run.models, sampling)))
        for i, (request, picture) in enumerate(zip(batch, pictures, strict=True), start=start):
            name = f"{i:04d}.png"
            settings = asdict(sampling) | {"prompt": request.prompt, "seed": request.noise, "method": cell.method}
            save_picture(picture, cell.folder / name, settings)
            yield {"file": name, **asdict(request)}
        if run.interrupts.asked:
            raise Interrupted("stopped", run.interrupts.asked)
