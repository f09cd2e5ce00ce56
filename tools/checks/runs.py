"""The runs that a check measures: trained once, and found again by the next call."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from bas.config import TrainConfig
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.io.json_files import read_json, write_json
from bas.io.run_files import CONCEPTS
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import find
from bas.training.loop import train
from bas.training.resume import FREE_ON_RESUME, scene_state

PATHS = {"instance_data_dir", "output_dir", "pretrained_model_name_or_path"}  # what lies there is compared instead


def train_once(config: TrainConfig, noted: Path) -> None:
    """Train, unless `noted` says that the run's folder holds the same run already.

    Raises InputError where it holds a run of other settings, of another base model or scene, or one without a note.
    """
    run = Path(config.output_dir)
    settings = {name: value for name, value in asdict(config).items() if name not in PATHS | FREE_ON_RESUME}
    stated = {
        "base": weights_hash(find(config.pretrained_model_name_or_path)),
        "scene": scene_state(load_scene(config)),
        "settings": json.loads(json.dumps(settings)),
    }
    if (run / CONCEPTS).exists():
        known = read_json(noted) if noted.exists() else {}
        if known == stated:
            return
        before, now = known.get("settings", {}), stated["settings"]
        differs = [name for name in ("base", "scene") if known.get(name) != stated[name]]
        differs += [name for name in {**before, **now} if before.get(name) != now.get(name)]
        told = f"with another {', '.join(differs)}" if known else f"without a note of how, {noted.name}"
        raise InputError(f"{run} was trained {told}: name another folder, or remove it")
    noted.unlink(missing_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    train(config)
    write_json(noted, stated)
