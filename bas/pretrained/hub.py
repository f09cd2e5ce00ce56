"""Models by name: found on this machine without the network, described from the package, fetched by `download` alone.

The known names are the rows of weights/manifest.json. Downloads are in Hugging Face's cache, shared with other tools.
huggingface_hub is imported in functions: it brings an HTTP client, and most models are paths.
"""

import errno
import logging
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from bas.config import TrainConfig
from bas.errors import InputError
from bas.io.json_files import read_json
from bas.io.run_files import CONCEPTS, TUNED, read_concepts
from bas.models.bundle import COMPONENTS, Models, ModelSpec
from bas.models.config import UNetConfig, VAEConfig
from bas.presets import CARDS, CARDS_XL, OF_SDXL
from bas.pretrained import folder as model_folder
from bas.pretrained.additions import Additions
from bas.pretrained.component_files import STEMS, component_files
from bas.pretrained.folder import as_in_sdxl, as_sdxl, holds_sdxl, read_spec
from bas.pretrained.own_settings import read_own_settings
from bas.pretrained.single_file import clip_tokenizer
from bas.runtime.device import DTYPES, pick_device, pick_precision
from bas.runtime.progress import Progress
from bas.schedulers import NoiseSchedule

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]
# Installed, the shipped weights are part of the package; in a checkout they are beside it.
WEIGHTS = PACKAGE / "weights" if (PACKAGE / "weights").is_dir() else PACKAGE.parent / "weights"
SHIPPED = "mini"  # the model where none is named
KNOWN_CONFIGS = Path(__file__).parent / "known_configs.json"  # of the known models that are not shipped

WEIGHT_FILES = {".safetensors", ".ckpt", ".bin", ".pt", ".pth"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}
TOKENIZERS = ("tokenizer", "tokenizer_2")
CONFIGS = (
    *("model_index.json", *(f"{part}/*.json" for part in (*STEMS, "scheduler", *TOKENIZERS))),
    *(f"{part}/*.txt" for part in TOKENIZERS),
)


def load(
    model: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
) -> Models:
    """Load a path, a known name or a hub id as the commands do; without one, the miniature.

    Without `device`, the GPU if there is one; without `dtype`, what --precision auto stands for on that device. Raises
    InputError as `bas.pretrained.folder.load` does, and for a device that is not there.
    """
    path, device = find(model), pick_device(device)
    if dtype is None:
        dtype = DTYPES[pick_precision("auto", device, read_spec(path, prediction_type).unet_size)]
    return model_folder.load(path, device, dtype, prediction_type)


def train_config(scene: str | Path, **settings) -> TrainConfig:
    """Return the settings of a training as in `bas train SCENE`: those given, over those that suit the base model.

    `weights` is short for `pretrained_model_name_or_path`, as on the command line.

    Raises InputError for a setting that does not exist or is out of range, and for a base model that is not here.
    """
    if "weights" in settings:
        settings["pretrained_model_name_or_path"] = settings.pop("weights")
    return train_config_of(scene, settings, {})


def train_config_of(scene: str | Path, flags: dict[str, Any], file: dict[str, Any]) -> TrainConfig:
    """Return the settings of a training by flags, and those of a file below them. Raises as `train_config`."""
    base = (file | flags).get("pretrained_model_name_or_path")
    name = None if base is None else str(base)
    cards = CARDS_XL if is_sdxl(name) else CARDS
    return TrainConfig.resolve(flags | {"instance_data_dir": str(scene)}, training_row(name), cards, file)


def is_sdxl(name: str | None) -> bool:
    """Return whether a model is an SDXL, by the names in it. Raises InputError as `find` does."""
    if is_known_elsewhere(name):
        return "text_encoder_2" in read_json(KNOWN_CONFIGS)[str(name)]
    return holds_sdxl(find(name))


def training_row(name: str | None) -> dict[str, Any]:
    """Return the training settings that suit a model: those of its family, and over them those of its own bas.json.

    A small run has those of its base. Raises InputError as `find` does, and for a small run whose base is not here.
    """
    if is_known_elsewhere(name):
        return OF_SDXL if is_sdxl(name) else {}
    path = find(name)
    if (path / TUNED).is_file():
        from bas.pretrained.small_runs import base_of  # which finds bases by this module

        return training_row(str(base_of(path)))
    return (OF_SDXL if is_sdxl(name) else {}) | (read_own_settings(path, "train") or {})


def manifest() -> dict[str, dict]:
    """Return the known models, by name."""
    return read_json(WEIGHTS / "manifest.json")["models"]


def find(name: str | Path | None) -> Path:
    """Find a model on this machine. `name`: a path, a known name, a hub id, or None for the shipped miniature.

    The network is never asked. Raises InputError when the model is not here, saying how to get it.
    """
    if name == "":
        raise InputError("the model's name is empty: leave it out for the miniature")
    name = str(SHIPPED if name is None else name)
    if (path := _find(name)) is not None:
        return path
    known = manifest()
    if "folder" in known.get(name, {}):
        raise InputError(f"the model {name!r} is not part of this installation: name another with --weights")
    path = Path(os.path.expanduser(name))
    if name not in known and (not HUB_ID.fullmatch(name) or path.suffix in WEIGHT_FILES):
        raise InputError(f"{name} does not exist, and is not a known model: those are {', '.join(known)}")
    if name not in known and path.parent != Path() and path.parent.is_dir():
        raise InputError(f"{name} does not exist: {path.parent} holds no {path.name}")
    raise InputError(f"{name} is neither a path nor a downloaded model: `bas download {name}` fetches one")


def _find(name: str) -> Path | None:
    """Return where a model is on this machine, None if it is not here."""
    path = Path(os.path.expanduser(name))  # unlike the method of Path, no error for a user who is not known
    if os.path.lexists(path):  # False, not an error, for names that no path can have
        return path
    known = manifest()
    if "folder" in known.get(name, {}):
        folder = WEIGHTS / known[name]["folder"]
        return folder if folder.is_dir() else None
    if name not in known and not HUB_ID.fullmatch(name):
        return None
    indices = (cached(hub_id, "model_index.json") for hub_id in _hub_ids(name))
    return next((index.parent for index in indices if index), None)


def is_known_elsewhere(name: str | Path | None) -> bool:
    """Return whether this is a known model that was not downloaded: its configurations are part of the package."""
    return name is not None and str(name) in read_json(KNOWN_CONFIGS) and _find(str(name)) is None


def find_spec(
    name: str | Path | None, prediction_type: str | None = None, additions: Additions | None = None
) -> ModelSpec:
    """Describe a model by its name; a known one need not be downloaded for that. No weight is read.

    The additions to a model that is not here are not looked at.

    Raises InputError as `find` and `read_spec` do.
    """
    if name is None or not is_known_elsewhere(name):
        return model_folder.read_spec(find(name), prediction_type, additions)
    configs = read_json(KNOWN_CONFIGS)[str(name)]
    schedule = configs["scheduler"] | ({"prediction_type": prediction_type} if prediction_type else {})
    spec = ModelSpec(
        UNetConfig.from_json(configs["unet"]),
        VAEConfig.from_json(configs["vae"]),
        configs["text_encoder"],
        clip_tokenizer(pad_with_exclamation_mark=configs["text_encoder"]["hidden_act"] == "gelu"),
        NoiseSchedule.from_json(schedule),
        source=Path(name),
    )
    if "text_encoder_2" not in configs:
        return spec
    spec = as_sdxl(spec, configs["text_encoder_2"], padding=0, zeros_for_empty=True)
    return replace(spec, schedule=as_in_sdxl(spec.schedule, schedule))


def cached(hub_id: str, file: str) -> Path | None:
    """Return where a file of the hub is on this machine, None if it was not downloaded. The network is not asked."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(hub_id, file)
    return Path(path) if isinstance(path, str) else None


def download(name: str, half: bool = False) -> Path:
    """Fetch a known model, or any by its hub id, and return its folder. `half` takes the 16-bit files.

    Only .safetensors, .json and .txt files that bas reads are fetched. Mirrors are tried in turn. Raises InputError
    with the reason of each, and other ways to get the model.
    """
    known = manifest()
    if "folder" in known.get(name, {}):
        return find(name)
    if name not in known and not HUB_ID.fullmatch(name):
        raise InputError(f"{name} is neither a known model ({', '.join(known)}) nor a hub id such as owner/model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failures, hub_ids, at_fault = [], _hub_ids(name), {}
    for hub_id in hub_ids:
        try:
            folder = Path(snapshot_download(hub_id, allow_patterns=_patterns(half), tqdm_class=_told_progress()))
            for part in (part for part in STEMS if part in COMPONENTS or (folder / part).is_dir()):
                component_files(folder / part, STEMS[part])
        except Exception as error:
            # The hub's client has errors of its own, by version, and imports what a proxy needs when it is used.
            told = isinstance(error, (HfHubHTTPError, HFValidationError, OSError, InputError, ImportError))
            if not told and not type(error).__module__.startswith("httpx"):
                raise
            failures.append(f"{hub_id}: {_first_line(error)}")
            at_fault.setdefault(_kind_of_failure(error), []).append(hub_id)
            if hub_id != hub_ids[-1]:
                log.warning("%s; the next mirror is tried", failures[-1])
        else:
            return folder
    advice = "; or ".join(_advice(kind, failed, half) for kind, failed in at_fault.items())
    raise InputError(f"{name} could not be downloaded ({'; '.join(failures)}): {advice}")


def download_bytes(name: str) -> int | None:
    """About how many bytes `download` fetches of a known model, counted from its weights at 4 bytes each.

    None where that is not known.
    """
    count = manifest()[name].get("parameters")
    return None if count is None else 4 * count


def _told_progress() -> type:
    """Return the class of the hub's progress bars, which also tells the watchers of bas how many bytes have come."""
    from huggingface_hub.utils import tqdm

    progress = Progress("download", 0, unit="bytes")

    class Told(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.come = 0 if options.get("unit") == "B" else None  # others count files

        def update(self, n: float | None = 1) -> bool | None:
            if self.come is not None:
                self.come += int(n or 0)
                if self.come > progress.total:  # of several bars, the one that is ahead
                    progress.total = self.come
                    total = max(self.come, int(self.total or 0))
                    speed = self.come / max(time.monotonic() - progress.began, 1e-9)
                    progress.tell(self.come, total, "bytes", (total - self.come) / speed, {})
            return super().update(n)

    return Told


def _kind_of_failure(error: Exception) -> str:
    """Return what a download failed at: "files", "name", "disk" or "network"."""
    if isinstance(error, InputError):
        return "files"
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return "disk"
    responses = [getattr(each, "response", None) for each in (error, error.__cause__)]
    refused = any(getattr(response, "status_code", None) in (401, 403, 404) for response in responses)
    return "name" if refused else "network"


def _advice(kind: str, hub_ids: list[str], half: bool) -> str:
    """Return what to do after failed downloads of one kind. The proxy in use is named without its password."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE

    if kind == "files":
        flag, only = ("leave out", "full precision") if half else ("add", "16-bit files")
        return f"{flag} --half, the model may have only {only}"
    if kind == "disk":
        return f"make room or write access in {HF_HUB_CACHE}, or name another folder with HF_HOME"

    first = "check the name, or log in with `hf auth login` if it needs an account"
    if kind == "network":
        proxies = getproxies()
        used = proxies.get(urlsplit(ENDPOINT).scheme) or proxies.get("all")
        first = "check the network, behind a proxy set HTTPS_PROXY"
        if used:
            first = f"check the network and the proxy {used.rpartition('@')[2]}"  # without its user and password
    addresses = " or ".join(f"{ENDPOINT}/{hub_id}" for hub_id in hub_ids)
    return f"{first}, or fetch the files of {addresses} by other means and give their folder"


def trained_grid(path: Path) -> int | None:
    """Return the `side` of the maps that the attention loss of a model read, from its run or from its own settings."""
    if (path / CONCEPTS).is_file():
        _, metadata = read_concepts(path)
        return metadata["config"]["attention_grid"]
    return (read_own_settings(path, "train") or {}).get("attention_grid")


def _hub_ids(name: str) -> list[str]:
    """Return the hub ids behind a known name, or the id itself."""
    row = manifest().get(name)
    return row["ids"] if row else [name]


def _patterns(half: bool) -> list[str]:
    """Return what to fetch: configurations and vocabulary, and each network once, whole or in shards."""
    variant = ".fp16" if half else ""
    weights = [
        f"{part}/{stem}{ending}"
        for part, stem in STEMS.items()
        for ending in (f"{variant}.safetensors", f"{variant}-?????-of-?????.safetensors")
    ]
    return [*CONFIGS, *weights]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
