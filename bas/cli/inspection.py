"""What a file or a folder is, whether it would load, and what this machine has, for people and for programs.

Models are checked name by name and shape by shape against networks on the meta device, without reading a weight.
"""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from torch import Tensor

from bas import __version__
from bas.data.scene_folder import find_files, images_in, numbered_folders
from bas.errors import InputError, printable
from bas.io.files import cache_dir, human_size, read_bytes, reading, require_file
from bas.io.images import open_image, settings_text
from bas.io.json_files import MAX_ROWS_BYTES
from bas.io.run_files import CONCEPTS, METRICS, SETTINGS, TUNED, read_concepts, read_metadata, read_settings
from bas.io.tensors import read_tensors
from bas.models.bundle import COMPONENTS, Models
from bas.pretrained.embedding_files import describe_embedding
from bas.pretrained.folder import build_on_meta
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import SHIPPED, find, manifest
from bas.pretrained.loading import check_keys
from bas.pretrained.lora_files import describe_lora, holds_lora, lora_file
from bas.pretrained.small_runs import read_tuned
from bas.pretrained.unsupported import EMBEDDING, LORA, other_kind
from bas.runtime.device import pick_device, pick_precision
from bas.training.checkpoints import list_checkpoints

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "pillow", "einops")
EXTRAS = ("tensorboard", "bitsandbytes")
MAX_LINE = 4000  # characters of one value: the prompts of a run fit, notes of megabytes do not
ADDITIONS = {LORA: describe_lora, EMBEDDING: describe_embedding}  # files beside a model
CHECKED = "every weight has its place and shape (values are not read)"


def describe(path: Path, hashes: bool = True, prediction_type: str | None = None, base: Path | None = None) -> dict:
    """Describe what is at `path`, by name, `what` and `loads` first. `hashes` reads all weights, once per file.

    prediction_type: what a model predicts, over what its files say. base: where that of a small run is, if moved.
    """
    try:
        with reading(path):
            if path.is_dir() and not holds_lora(path):
                return _describe_folder(path, hashes, prediction_type, base)
            if path.is_dir() or path.suffix == ".safetensors":
                return _describe_tensors(lora_file(path), hashes, prediction_type)
            return _describe_image(path)
    except InputError as error:
        return {"what": "a folder" if os.path.isdir(path) else "a file", "loads": False, "problem": str(error)}


# --- Folders ------------------------------------------------------------------------------------------------------


def _describe_folder(path: Path, hashes: bool, prediction_type: str | None, base: Path | None) -> dict:
    if (path / CONCEPTS).exists():
        return _describe_run(path, hashes, prediction_type, base)
    if (path / SETTINGS).exists():
        return _describe_unfinished(path)
    if any((path / component).is_dir() for component in COMPONENTS) or not images_in(path):
        details = describe_model(path, hashes, prediction_type)
        return {"what": _folder_kind(path, details)} | details
    return _describe_scene(path)


def _folder_kind(path: Path, details: dict) -> str:
    """Name a model folder that is not a run of bas."""
    if details.get("handles"):
        return "a model with handles, as the official code writes it"
    if details["loads"]:
        return "a base model"
    if (path / "model_index.json").is_file():
        return "a diffusers folder"
    kind = other_kind(file.name for file in path.iterdir())
    return f"a folder of {kind[0]}" if kind else "a folder"


def _describe_run(path: Path, hashes: bool, prediction_type: str | None, base: Path | None) -> dict:
    """Describe a finished run: its model, and the metadata of concepts.safetensors."""
    tensors, metadata = read_concepts(path)
    config, merged = metadata["config"], metadata.get("merged", {})
    _, rows, columns = tensors["masks"].shape
    return {
        "what": "a finished run of bas",
        **describe_model(path, hashes, prediction_type, base),
        **(_small_run(path, config) if (path / TUNED).is_file() else {}),
        "handles": metadata["handles"],
        "trained at": f"{columns}x{rows} pixels",
        "steps": None if merged else f"{config['phase1_train_steps']} + {config['phase2_train_steps']}",
        "scene": config["instance_data_dir"],
        "base": config["pretrained_model_name_or_path"] or SHIPPED,
        "base hash": metadata["base"],
        "merged from": merged.get("runs"),
        "merged with weights": merged.get("weights"),
        "written by": f"bas {metadata['version']}",
    }


def _small_run(path: Path, config: dict[str, Any]) -> dict:
    """Return what a small run trained, and what it holds of that."""
    tuned = read_tuned(path).weights
    ranks = sorted({rank for name, tensor in tuned.items() if ".lora_A." in name for rank in tensor.shape[:1]})
    return {
        "trained": config["train"],
        "ranks": ranks,
        "alpha": (config["alpha"] or config["rank"]) if ranks else None,
        "layers": len({name.partition(".lora_")[0] for name in tuned}),
        "trained weights": f"{sum(t.numel() for t in tuned.values()):,}, {precision(tuned.values())}",
        "added to the base": [*config["lora"], *config["embedding"]],
    }


def _describe_unfinished(path: Path) -> dict:
    metadata = read_settings(path)
    lines = read_bytes(path / METRICS, MAX_ROWS_BYTES).count(b"\n") if (path / METRICS).exists() else 0
    checkpoints = [checkpoint.name for checkpoint in list_checkpoints(path)]
    advice = (
        "add --resume_from_checkpoint latest to continue" if checkpoints else "it has no checkpoint: start it again"
    )
    return {
        "what": "an unfinished run of bas",
        "loads": False,
        "problem": f"its training has not ended: {advice}",
        "handles": metadata["handles"],
        "steps done": lines,
        "checkpoints": checkpoints,
        "base hash": metadata["base"],
        "written by": f"bas {metadata['version']}",
    }


def _describe_scene(path: Path) -> dict:
    file, masks = find_files(path)
    image = open_image(file)
    return {
        "what": "a scene to train on",
        "loads": False,
        "problem": f"it is not a model; to train on it: bas train {quote(str(path))}",
        "image": f"{file.name}, {image.width}x{image.height} pixels",
        "masks": [mask.name for mask in masks],
        "extra images": [folder.name for folder in numbered_folders(path)],
    }


# --- Models -------------------------------------------------------------------------------------------------------


def describe_model(path: Path, hashes: bool, prediction_type: str | None = None, base: Path | None = None) -> dict:
    """Describe the networks, precision, handles and hash of a model folder or file, or the reason it does not load."""
    try:
        models, tensors = build_on_meta(path, prediction_type, None, base)
        for component, network in models.networks.items():
            check_keys(network, tensors[component], f"{path} ({component})")
    except InputError as error:
        return {"loads": False, "problem": str(error)}
    details = {"loads": True, "checked": CHECKED, **_architecture(models, tensors)}
    if hashes:
        details["hash"] = weights_hash(path)
        details["known as"] = known_as(details["hash"])
    return details


def _architecture(models: Models, tensors: dict[str, dict[str, Tensor]]) -> dict:
    unet, texts = models.unet.config, [text_encoder.config for text_encoder in models.text_encoders]
    counts = {component: sum(t.numel() for t in tensors[component].values()) for component in models.networks}
    return {
        "family": models.spec.family,
        "unet": f"{' '.join(map(str, unet.block_out_channels))} channels, {unet.layers_per_block} blocks a level",
        "text": "; ".join(
            f"{text.hidden_size} features, {text.num_hidden_layers} layers, {len(models.tokenizer)} tokens"
            for text in texts
        ),
        "parameters": counts | {"total": sum(counts.values())},
        "resolution": models.resolution,
        "prediction type": models.schedule.prediction_type,
        "precision": precision(t for component in tensors.values() for t in component.values()),
        "bytes": sum(t.nbytes for component in tensors.values() for t in component.values()),
        "handles": list(models.handles),
    }


def precision(tensors) -> str:
    """Name the number formats of tensors, the most frequent first: "fp16", "fp32 and int64"."""
    kinds = [str(t.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp") for t in tensors]
    return " and ".join(sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind)))


def known_as(digest: str) -> str | None:
    """Return the name in weights/manifest.json of the weights with this hash, None if there is none."""
    for name, row in manifest().items():
        if digest in (row.get("sha256"), row.get("single_file", {}).get("sha256")):
            return name
    return None


# --- Single files -------------------------------------------------------------------------------------------------


def _describe_tensors(path: Path, hashes: bool, prediction_type: str | None) -> dict:
    """Describe a .safetensors file: a whole model, the concepts of a run, or a kind that bas does not take."""
    tensors, metadata = read_tensors(path)
    metadata = dict(sorted(metadata.items()))  # safetensors returns them in any order
    if metadata.get("bas") == "concepts-1":
        of_run = read_metadata(path, metadata)
        problem = f"it is part of a run: give the folder {path.parent}"
        return {
            "what": "the concepts of a run of bas",
            "loads": False,
            "problem": problem,
            "handles": of_run["handles"],
            "base hash": of_run["base"],
            "written by": f"bas {of_run['version']}",
        }
    details = describe_model(path, hashes, prediction_type)
    if details["loads"]:
        return {"what": "a base model in one file"} | details | {"metadata": metadata}
    kind = other_kind(tensors)
    return {
        "what": kind[0] if kind else "a .safetensors file",
        **details,
        **(ADDITIONS[kind[0]](path, tensors, metadata) if kind and kind[0] in ADDITIONS else {}),
        "tensors": len(tensors),
        "parameters": {"total": sum(t.numel() for t in tensors.values())},
        "precision": precision(tensors.values()),
        "metadata": metadata,
    }


def _describe_image(path: Path) -> dict:
    """Describe an image with the settings that bas wrote into it; any other file does not load."""
    require_file(path)
    try:
        with Image.open(path) as image:
            settings = settings_text(image)
            size = f"{image.width}x{image.height} pixels"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {"what": "a file"} | describe_model(path, hashes=False)
    what = "an image made by bas" if settings else "an image"
    return {"what": what, "loads": False, "problem": "it is not a model", "size": size} | (
        {"made with": settings} if settings else {}
    )


# --- The machine --------------------------------------------------------------------------------------------------


def describe_machine() -> dict:
    """Describe versions, devices, caches with their sizes, and which known models are here."""
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
    """Return the size of a cache folder, and the free space of its disk."""
    if not folder.is_dir():
        return "empty"
    used = sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_symlink() and file.is_file())
    return f"{human_size(used)}, {human_size(shutil.disk_usage(folder).free)} free"


def _place(name: str) -> str:
    """Return the folder of a known model, or how to get it."""
    try:
        folder = find(name)
    except InputError:
        return "not part of this installation" if "folder" in manifest()[name] else f"not here: bas download {name}"
    digest = weights_hash(folder)[:16] if name == SHIPPED else ""
    return f"{folder} {digest}".strip()


# --- For people ---------------------------------------------------------------------------------------------------


def as_text(details: dict[str, Any]) -> str:
    """Write details as aligned lines, a name and its value each, without the unknown ones.

    Control characters are escaped: names and values come from foreign files, and must not forge a line.
    """
    width = max(map(len, details)) + 2
    lines = []
    for name, value in details.items():
        if value not in (None, [], {}):
            first, *rest = map(_line, _values(name, value))
            lines += [f"{printable(name):<{width}}{first}", *(" " * width + more for more in rest)]
    return "\n".join(lines)


def _line(value: str) -> str:
    """Return a value as it is printed, the end of a long one left out."""
    left_out = f"... ({len(value) - MAX_LINE} more characters: --json prints all)"
    return printable(value[:MAX_LINE]) + left_out * (len(value) > MAX_LINE)


def _values(name: str, value: Any) -> list[str]:
    """Return one value as one or more lines."""
    if name == "bytes":
        return [human_size(value)]
    if name == "parameters":
        return [", ".join(f"{part} {count:,}" for part, count in value.items())]
    if isinstance(value, dict):
        return [f"{key}: {entry}" for key, entry in value.items()]
    if isinstance(value, list):
        return value if name == "devices" else [" ".join(map(str, value))]
    return [{True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)]
