"""Models by name: what is here already is found without the network; only `download` goes there.

The known names are the rows of weights/manifest.json. Downloads lie in the Hugging Face cache, shared with other tools.
huggingface_hub is imported where it is used: it brings an HTTP client, and most models are paths.
"""

import logging
import os
import re
from pathlib import Path

import torch

from bas.config import TrainConfig, setting_rows
from bas.errors import InputError
from bas.io.files import read_json, reading
from bas.io.settings_file import check_settings
from bas.models.bundle import Models
from bas.pretrained import folder as model_folder
from bas.pretrained.folder import STEMS, component_files

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
# Installed, the shipped weights are part of the package; in a checkout they stand beside it.
WEIGHTS = PACKAGE / "weights" if (PACKAGE / "weights").is_dir() else PACKAGE.parent / "weights"
SHIPPED = "mini"  # the model that takes part when none is named
MODEL_ROW = "bas.json"  # in a model folder: the training settings that suit this model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
CONFIGS = ("model_index.json", *(f"{part}/*.json" for part in (*STEMS, "scheduler", "tokenizer")), "tokenizer/*.txt")


def load(
    model: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    prediction_type: str | None = None,
) -> Models:
    """`bas.pretrained.folder.load` of a path, a known name or a hub id; without one, of the shipped miniature."""
    return model_folder.load(find(model), device, dtype, prediction_type)


def train_config(scene: str | Path, **settings) -> TrainConfig:
    """The settings of a training as `bas train SCENE` has them: those given, over those that suit the base model.

    `weights` is short for `pretrained_model_name_or_path`, as on the command line.

    InputError for a setting that does not exist or is out of range, and for a base model that is not here.
    """
    if "weights" in settings:
        settings["pretrained_model_name_or_path"] = settings.pop("weights")
    base = settings.get("pretrained_model_name_or_path")
    row = read_model_row(find(None if base is None else str(base)))
    return TrainConfig.resolve({**settings, "instance_data_dir": str(scene)}, row)


def manifest() -> dict[str, dict]:
    """The known models, by name."""
    return read_json(WEIGHTS / "manifest.json")["models"]


def find(name: str | Path | None) -> Path:
    """Where a model lies on this machine. `name`: a path, a known name, a hub id, or None for the shipped miniature.

    The network is never asked. InputError when the model is not here, saying how to get it; and for an empty name.
    """
    if name == "":
        raise InputError("the model's name is empty: leave it out for the miniature")
    name = str(SHIPPED if name is None else name)
    path = Path(os.path.expanduser(name))  # unlike the method of Path, no error for a user who is not known
    if os.path.lexists(path):  # False, not an error, for names that no path can have
        return path
    known = manifest()
    if "folder" in known.get(name, {}):
        folder = WEIGHTS / known[name]["folder"]
        if not folder.is_dir():
            raise InputError(f"the model {name!r} is not part of this installation: name another with --weights")
        return folder
    if name not in known and not HUB_ID.fullmatch(name):
        raise InputError(f"{name} does not exist, and is no known model: those are {', '.join(known)}")
    for hub_id in _hub_ids(name):
        if index := cached(hub_id, "model_index.json"):
            return index.parent
    if path.parent != Path() and path.parent.is_dir():
        raise InputError(f"{name} does not exist: {path.parent} holds no {path.name}")
    raise InputError(f"{name} is no path here and no model that was downloaded: `bas download {name}` fetches one")


def cached(hub_id: str, file: str) -> Path | None:
    """Where a file that was downloaded from the hub lies, None if it was not. The network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, file)
    return Path(path) if isinstance(path, str) else None


def download(name: str, half: bool = False) -> Path:
    """Fetch a known model, or any by its hub id, and return its folder. `half` takes the 16-bit files.

    Only .safetensors, .json and .txt files that bas reads are fetched. Mirrors are tried in turn.
    """
    known = manifest()
    if "folder" in known.get(name, {}):
        return find(name)
    if name not in known and not HUB_ID.fullmatch(name):
        raise InputError(f"{name} is neither a known model ({', '.join(known)}) nor a hub id such as owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failures = []
    for hub_id in _hub_ids(name):
        try:
            folder = Path(snapshot_download(hub_id, allow_patterns=_patterns(half)))
            for part, stem in STEMS.items():
                component_files(folder / part, stem)
        except (HfHubHTTPError, HFValidationError, OSError, InputError) as error:
            failures.append(f"{hub_id}: {_first_line(error)}")
            log.warning("%s", failures[-1])
        else:
            return folder
    raise InputError(f"{name} could not be downloaded ({'; '.join(failures)})")


def read_model_row(folder: Path) -> dict | None:
    """The training settings that a model brings along, or None: its own row between the defaults and the preset."""
    path = folder / MODEL_ROW
    with reading(path):
        if not path.is_file():
            return None
    row = read_json(path).get("train", {})
    if not isinstance(row, dict):
        raise InputError(f"{path}: train is {row!r:.60}, expected settings by name")
    return check_settings(path, row, setting_rows(TrainConfig))


def _hub_ids(name: str) -> list[str]:
    """The hub ids behind a known name, or the id itself."""
    row = manifest().get(name)
    return row["ids"] if row else [name]


def _patterns(half: bool) -> list[str]:
    """What to fetch: configurations and vocabulary, and each network once, whole or in shards."""
    variant = ".fp16" if half else ""
    weights = [
        f"{part}/{stem}{ending}"
        for part, stem in STEMS.items()
        for ending in (f"{variant}.safetensors", f"{variant}-?????-of-?????.safetensors")
    ]
    return [*CONFIGS, *weights]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
