"""Many scenes, each trained alone into a run folder of its own, from one base that stays in memory.

    OUT/NAME/    the run of the scene folder called NAME

A finished run is left as it is, an unfinished one continues from its checkpoint. A scene that fails does not stop the
others.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from bas.config import TrainConfig
from bas.data.mask_formats import mask_file
from bas.data.scene_folder import images_in, require_scene_folder
from bas.errors import InputError, RunError
from bas.io.files import reading
from bas.io.run_files import METRICS, SETTINGS
from bas.pretrained.additions import Additions
from bas.runtime.device import is_out_of_memory
from bas.runtime.signals import continued_by
from bas.training.base_model import Base, home_of, rounded_at_once
from bas.training.dry_run import memory_advice
from bas.training.loop import train
from bas.training.resume import is_finished
from bas.training.run_folder import clear_finished, has_leftovers
from bas.training.setup import check_machine

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The result of one scene."""

    scene: str
    folder: str
    error: str | None = None  # why it could not be trained
    earlier: bool = False  # whether it was finished before


def holds_scenes(folder: Path) -> bool:
    """Return whether a folder is not a scene itself, but has scenes in it."""
    with reading(folder):
        return folder.is_dir() and not is_scene(folder) and any(map(images_in, subfolders(folder)))


def is_scene(folder: Path) -> bool:
    """Return whether a folder is meant as a scene: by its image, its masks or scene.json; one may be misnamed."""
    return bool(images_in(folder) or mask_file(folder))


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, by name, but for hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_scenes(names: list[str]) -> list[Path]:
    """Find the scene folders among these folders, and in those that hold scene folders. InputError for others."""
    scenes = []
    for folder in map(Path, names):
        with reading(folder):
            scenes += scenes_in(folder)
    twice = [name for name, count in Counter(map(run_name, scenes)).items() if count > 1]
    if twice:
        raise InputError(f"two scenes are called {twice[0]}: their runs need different names, so rename one")
    return scenes


def scenes_in(folder: Path) -> list[Path]:
    """Return the folder itself if it is a scene, else the scenes in it. InputError if there is none, or for a run."""
    require_scene_folder(folder)
    if is_scene(folder):
        return [folder]
    if (folder / SETTINGS).exists():
        raise InputError(f"{folder} holds a run, not scenes: name the scene that it was trained on, see its {SETTINGS}")
    inside = subfolders(folder)
    found = [path for path in inside if images_in(path)]
    if not found:
        raise InputError(f"{folder} holds neither img.jpg, img.png, ... nor folders that do: it is not a scene")
    if left := [path.name for path in inside if path not in found]:
        log.warning("%s: no scene in %s, which have no img.*", folder, ", ".join(left))
    return found


def run_name(scene: Path) -> str:
    """Return what the run of a scene is called: as its folder, or as the link to it, is."""
    return os.path.basename(os.path.abspath(scene))


def settings_of(scene: Path, config: TrainConfig) -> TrainConfig:
    """Return the settings of one scene's run, which resumes where it was begun."""
    folder = Path(config.output_dir) / run_name(scene)
    resume = "latest" if (folder / METRICS).exists() else None
    return replace(config, instance_data_dir=str(scene), output_dir=str(folder), resume_from_checkpoint=resume)


def train_each(config: TrainConfig, scenes: list[Path]) -> Iterator[Outcome]:
    """Train the scenes one after another into folders of `config.output_dir`; yields the outcome of each.

    Raises InputError for what is wrong with the base, the machine or the settings; RunError where the base does not
    fit into memory; Interrupted after a signal.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        raise InputError("--resume_from_checkpoint: several scenes resume by themselves; leave it out")
    spec, device, precision = check_machine(config)
    path, additions, base = spec.source or Path(), Additions.of_base(vars(config)), None
    home, own = home_of(device, precision), rounded_at_once(config, precision)
    for scene in scenes:
        settings = settings_of(scene, config)
        outcome = Outcome(str(scene), settings.output_dir)
        try:
            finished = is_finished(settings)
            if finished and has_leftovers(Path(settings.output_dir)):
                clear_finished(Path(settings.output_dir))
        except (InputError, RunError, OSError) as error:
            yield replace(outcome, error=str(error))
            continue
        if finished:
            yield replace(outcome, earlier=True)
            continue
        try:
            base = base or Base.open(path, home, None, True, config.prediction_type, additions, own)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(memory_advice(settings, None)) from error
        try:
            log.info("training on %s", scene)
            with continued_by("the same command continues"):
                train(settings, base)
        except (InputError, RunError, OSError) as error:
            yield replace(outcome, error=str(error))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            yield replace(outcome, error=memory_advice(settings, None))
        else:
            yield outcome
