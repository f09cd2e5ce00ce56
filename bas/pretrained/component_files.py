"""The weight files of one network in a model folder: in full or half precision, whole or in shards."""

import re
from pathlib import Path

from torch import Tensor

from bas.errors import InputError
from bas.io.json_files import read_json
from bas.io.tensors import PICKLE_ADVICE, read_tensors

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
STEMS |= {"text_encoder_2": "model"}
VARIANTS = ("", ".fp16", ".bf16")  # in order of preference; other variants, such as non_ema, have other weights


def read_component(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read all tensors of one network, from one file or from the shards of an index."""
    tensors = {}
    for path in component_files(folder, stem):
        found, _ = read_tensors(path)
        if twice := tensors.keys() & found.keys():
            raise InputError(f"{path} repeats {min(twice)!r} of another shard: download the model again")
        tensors |= found
    return tensors


def component_files(folder: Path, stem: str) -> list[Path]:
    """Return the weight files of one network, in full precision if possible. Raises InputError for pickles alone."""
    for variant in VARIANTS:
        path = folder / f"{stem}{variant}.safetensors"
        if path.exists() or path.is_symlink():
            return [path]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.exists():
            return _shards(index)
    if any(folder.glob("*.bin")):
        raise InputError(f"{folder} holds only pickled weights (.bin): {PICKLE_ADVICE}")
    raise InputError(f"{folder} holds no {stem}.safetensors: the model is incomplete, download it again")


def _shards(index: Path) -> list[Path]:
    """Return the files that an index.json names, all beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map: copy or download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors", name):
            raise InputError(f"{index} names a shard {name!r}: expected a .safetensors file beside it")
    return [index.parent / name for name in sorted(set(weight_map.values()))]
