"""The runs that a check measures: trained once, and found again by the next call."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from bas.config import TrainConfig
from bas.errors import InputError
from bas.io.json_files import read_json, write_json
from bas.io.run_files import CONCEPTS
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import find
from bas.training.loop import train


def train_once(config: TrainConfig, noted: Path) -> None:
    """Train, unless `noted` says that the run's folder holds the same run already.

    Raises InputError where it holds a run of other settings or of another base model.
    """
    run, base = Path(config.output_dir), find(config.pretrained_model_name_or_path)
    stated = {"base": weights_hash(base), "settings": json.loads(json.dumps(asdict(config)))}
    if (run / CONCEPTS).exists() and noted.exists():
        if (trained := read_json(noted)) != stated:
            names = [name for name, value in stated["settings"].items() if trained["settings"].get(name) != value]
            raise InputError(f"{run} was trained with another {', '.join(names) or 'base'}: name another folder")
        return
    shutil.rmtree(run, ignore_errors=True)
    train(config)
    write_json(noted, stated)
