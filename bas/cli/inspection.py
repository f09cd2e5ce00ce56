"""What a file or a folder is, whether it would load, and what this machine has: facts for people and for programs.

Models are checked name by name and shape by shape against networks on the meta device; no weight is read for that.
"""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from shlex import quote

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from torch import Tensor

from bas import __version__
from bas.data.scene_folder import find_files, images_in, numbered_folders
from bas.errors import InputError
from bas.io.files import cache_dir, human_size, read_json, reading
from bas.io.images import open_image
from bas.io.run_files import CONCEPTS, METRICS, SETTINGS, read_concepts, read_metadata
from bas.io.settings_file import check_metadata
from bas.io.tensors import read_tensors
from bas.models.bundle import COMPONENTS, Models
from bas.pretrained.folder import build_on_meta, weights_hash
from bas.pretrained.hub import SHIPPED, find, manifest
from bas.pretrained.loading import check_keys
from bas.pretrained.unsupported import other_kind
from bas.runtime.device import pick_device, pick_precision
from bas.training.run_folder import list_checkpoints

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow", "einops")
EXTRAS = ("tensorboard", "bitsandbytes")
CHECKED = "every weight has its place and shape (values are not read)"


def describe(path: Path, hashes: bool = True) -> dict:
    """What lies at `path`: facts by name, `what` and `loads` first. `hashes` reads all weights, once per file."""
    try:
        with reading(path):
            if path.is_dir():
                return _describe_folder(path, hashes)
            return _describe_tensors(path, hashes) if path.suffix == ".safetensors" else _describe_picture(path)
    except InputError as error:
        return {"what": "a folder" if os.path.isdir(path) else "a file", "loads": False, "problem": str(error)}


# --- Folders ------------------------------------------------------------------------------------------------------


def _describe_folder(path: Path, hashes: bool) -> dict:
    if (path / CONCEPTS).exists():
        return _describe_run(path, hashes)
    if (path / SETTINGS).exists():
        return _describe_unfinished(path)
    if any((path / component).is_dir() for component in COMPONENTS) or not images_in(path):
        facts = describe_model(path, hashes)
        return {"what": _folder_kind(path, facts)} | facts
    return _describe_scene(path)


def _folder_kind(path: Path, facts: dict) -> str:
    """A name for a model folder that is no run of bas."""
    if facts.get("handles"):
        return "a model with handles, as the official code writes it"
    if facts["loads"]:
        return "a base model"
    if (path / "model_index.json").is_file():
        return "a diffusers folder"
    kind = other_kind(file.name for file in path.iterdir())
    return f"a folder of {kind[0]}" if kind else "a folder"


def _describe_run(path: Path, hashes: bool) -> dict:
    """A finished run: its model, and what concepts.safetensors notes of how it came about."""
    tensors, note = read_concepts(path)
    config = note["config"]
    _, rows, columns = tensors["masks"].shape
    return {
        "what": "a finished run of bas",
        **describe_model(path, hashes),
        "handles": note["handles"],
        "trained at": f"{columns}x{rows} pixels",
        "steps": f"{config['phase1_train_steps']} + {config['phase2_train_steps']}",
        "scene": config["instance_data_dir"],
        "base": config["pretrained_model_name_or_path"] or SHIPPED,
        "base hash": note["base"],
        "written by": f"bas {note['version']}",
    }


def _describe_unfinished(path: Path) -> dict:
    note = check_metadata(path / SETTINGS, read_json(path / SETTINGS))
    lines = (path / METRICS).read_bytes().count(b"\n") if (path / METRICS).exists() else 0
    checkpoints = [checkpoint.name for checkpoint in list_checkpoints(path)]
    advice = "add --resume_from_checkpoint latest to go on" if checkpoints else "it has no checkpoint: start it anew"
    return {
        "what": "an unfinished run of bas",
        "loads": False,
        "problem": f"its training has not ended; {advice}",
        "handles": note["handles"],
        "steps done": lines,
        "checkpoints": checkpoints,
        "base hash": note["base"],
        "written by": f"bas {note['version']}",
    }


def _describe_scene(path: Path) -> dict:
    picture, masks = find_files(path)
    opened = open_image(picture)
    return {
        "what": "a scene to train on",
        "loads": False,
        "problem": f"it is no model; train on it with: bas train {quote(str(path))}",
        "picture": f"{picture.name}, {opened.width}x{opened.height} pixels",
        "masks": [mask.name for mask in masks],
        "further pictures": [shot.name for shot in numbered_folders(path)],
    }


# --- Models -------------------------------------------------------------------------------------------------------


def describe_model(path: Path, hashes: bool) -> dict:
    """Architecture, precision, handles and hash of a model folder or single file, or the reason it does not load."""
    try:
        models, tensors = build_on_meta(path)
        for component in COMPONENTS:
            check_keys(getattr(models, component), tensors[component], f"{path} ({component})")
    except InputError as error:
        return {"loads": False, "problem": str(error)}
    facts = {"loads": True, "checked": CHECKED, **_architecture(models, tensors)}
    if hashes:
        facts["hash"] = weights_hash(path)
        facts["known as"] = known_as(facts["hash"])
    return facts


def _architecture(models: Models, tensors: dict[str, dict[str, Tensor]]) -> dict:
    unet, text = models.unet.config, models.text_encoder.config
    counts = {component: sum(t.numel() for t in tensors[component].values()) for component in COMPONENTS}
    return {
        "family": f"Stable Diffusion {2 if text.hidden_act == 'gelu' else 1}",
        "unet": f"{' '.join(map(str, unet.block_out_channels))} channels, {unet.layers_per_block} blocks a level",
        "text": f"{text.hidden_size} features, {text.num_hidden_layers} layers, {len(models.tokenizer)} tokens",
        "parameters": counts | {"total": sum(counts.values())},
        "resolution": models.resolution,
        "prediction type": models.schedule.prediction_type,
        "precision": precision(t for component in tensors.values() for t in component.values()),
        "bytes": sum(t.nbytes for component in tensors.values() for t in component.values()),
        "handles": list(models.handles),
    }


def precision(tensors) -> str:
    """The number formats of these tensors, the most frequent first: "fp16", "fp32 and int64"."""
    kinds = [str(t.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp") for t in tensors]
    return " and ".join(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)))


def known_as(digest: str) -> str | None:
    """The name in weights/manifest.json of the weights with this hash, if they are there."""
    for name, row in manifest().items():
        if digest in (row.get("sha256"), row.get("single_file", {}).get("sha256")):
            return name
    return None


# --- Single files -------------------------------------------------------------------------------------------------


def _describe_tensors(path: Path, hashes: bool) -> dict:
    """A .safetensors file: a whole model, the concepts of a run, or one of the kinds that bas refuses by name."""
    tensors, metadata = read_tensors(path)
    if metadata.get("bas") == "concepts-1":
        note = read_metadata(path, metadata)
        problem = f"it is part of a run: give the folder {path.parent}"
        facts = {"what": "the concepts of a run of bas", "loads": False, "problem": problem, "handles": note["handles"]}
        return facts | {"base hash": note["base"], "written by": f"bas {note['version']}"}
    facts = describe_model(path, hashes)
    if facts["loads"]:
        return {"what": "a base model in one file"} | facts | {"metadata": metadata}
    kind = other_kind(tensors)
    return {
        "what": kind[0] if kind else "a .safetensors file",
        **facts,
        "tensors": len(tensors),
        "parameters": {"total": sum(t.numel() for t in tensors.values())},
        "precision": precision(tensors.values()),
        "metadata": metadata,
    }


def _describe_picture(path: Path) -> dict:
    """A picture with the settings that bas wrote into it; anything else is a file that does not load."""
    try:
        with Image.open(path) as picture:
            note = picture.info.get("bas")
            size = f"{picture.width}x{picture.height} pixels"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {"what": "a file"} | describe_model(path, hashes=False)
    what = "a picture made by bas" if note else "a picture"
    return {"what": what, "loads": False, "problem": "it is no model", "size": size} | (
        {"made with": note} if note else {}
    )


# --- The machine --------------------------------------------------------------------------------------------------


def describe_machine() -> dict:
    """Versions, devices, caches with their sizes, and which known models are here."""
    device = pick_device(None)
    return {
        "bas": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        **{name: _version(name) or f"not installed (an extra: pip install {name})" for name in EXTRAS},
        "devices": _devices(),
        "default": f"{device}, precision {pick_precision('auto', device)}",
        "caches": {str(folder): _cache(folder) for folder in (cache_dir(), Path(HF_HUB_CACHE))},
        "models": {name: _place(name) for name in manifest()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        *(f"cuda:{i} {gpu.name}, {human_size(gpu.total_memory)}" for i, gpu in enumerate(gpus)),
        f"cpu {os.cpu_count()} cores, {torch.get_num_threads()} threads in use",
    ]


def _cache(folder: Path) -> str:
    """Size of a cache folder and how much the disk has left."""
    if not folder.is_dir():
        return "empty"
    used = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_symlink() and file.is_file())
    return f"{human_size(used)}, {human_size(shutil.disk_usage(folder).free)} free"


def _place(name: str) -> str:
    """Where a known model lies, or how to get it."""
    try:
        folder = find(name)
    except InputError:
        return "not part of this installation" if "folder" in manifest()[name] else f"not here: bas download {name}"
    digest = weights_hash(folder)[:16] if name == SHIPPED else ""
    return f"{folder} {digest}".strip()


# --- For people ---------------------------------------------------------------------------------------------------


def as_text(facts: dict) -> str:
    """Facts as aligned lines, a name and its value each; what is not known is left out."""
    width = max(map(len, facts)) + 2
    lines = []
    for name, value in facts.items():
        if value not in (None, [], {}):
            first, *rest = _values(name, value)
            lines += [f"{name:<{width}}{first}", *(" " * width + more for more in rest)]
    return "\n".join(lines)


def _values(name: str, value: object) -> list[str]:
    """A value in as many lines as it takes."""
    if name == "bytes":
        return [human_size(value)]
    if name == "parameters":
        return [", ".join(f"{part} {count:,}" for part, count in value.items())]
    if isinstance(value, dict):
        return [f"{key}: {entry}" for key, entry in value.items()]
    if isinstance(value, list):
        return value if name == "devices" else [" ".join(value)]
    return [{True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)]
