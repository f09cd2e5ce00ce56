"""Textual-inversion files: one concept each, named by the file.

Written as `emb_params`, which all programs read; for SDXL as `clip_l` and `clip_g`, one for each text encoder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bas.errors import InputError
from bas.io.files import not_a_file
from bas.io.tensors import read_tensors, write_tensors
from bas.models.bundle import is_finite
from bas.models.text import HANDLE, NAME_RULE
from bas.pretrained.unsupported import EMBEDDING, other_kind

MOST_VECTORS = 75  # of the 77 places of a prompt, without its start and end
WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}


EMBEDDING_KEYS = ("clip_l", "clip_g")  # the rows of SDXL's first and second text encoder


def file_names(handles: tuple[str, ...], prefix: str) -> dict[str, str]:
    """Return the name of each handle's file, without ending: the handle without brackets behind the prefix.

    Names that differ in case alone get a number, because some disks take them for one. InputError for a prefix that no
    program takes in a name.
    """
    names: dict[str, str] = {}
    for handle in handles:
        name = prefix + handle[1:-1]
        if not HANDLE.fullmatch(f"<{name}>"):
            raise InputError(f"{name!r}: a name has {NAME_RULE}; choose another --prefix")
        taken, number = {other.lower() for other in names.values()}, 2
        while name.lower() in taken:
            name, number = f"{prefix}{handle[1:-1]}-{number}", number + 1
        names[handle] = name
    return names


def write_embedding(path: Path, rows: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
    """Write the rows (n, d) of one concept for each text encoder, in float32."""
    keys = EMBEDDING_KEYS if len(rows) > 1 else ("emb_params",)
    write_tensors(path, {key: each.float() for key, each in zip(keys, rows, strict=True)}, dict(metadata))


def handle_of(path: Path) -> str:
    """Return the handle of a textual-inversion file, which is named by it: `<NAME>` for NAME.safetensors."""
    return f"<{path.stem.strip('<>')}>"


def read_embedding(path: Path, widths: Mapping[str, int]) -> tuple[str, dict[str, Tensor]]:
    """Read a textual-inversion file for text encoders of these widths, which are by component.

    -> the handle, `<NAME>` for NAME.safetensors, and rows (n, width) in float32 by component

    Raises InputError for several concepts in one file, for another width, for values that are not finite, and for a
    name that no handle can have.
    """
    if not path.is_file():
        raise not_a_file(path)
    tensors, _ = read_tensors(path)
    handle = handle_of(path)
    if not HANDLE.fullmatch(handle):
        raise InputError(f"{path}: its name becomes the handle: rename it to {NAME_RULE}")
    if (kind := other_kind(tensors)) and kind[0] != EMBEDDING:
        raise InputError(f"{path} is {kind[0]}: {kind[1]}")
    both = {*EMBEDDING_KEYS} <= tensors.keys()
    if both and len(widths) == 1:
        raise InputError(f"{path} is an embedding for SDXL: give one for Stable Diffusion 1.x or 2.x")
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}  # without counts, such as `step`
    if len(tensors) != (2 if both else 1):
        raise InputError(f"{path} holds {len(tensors)} tensors: an embedding has one; split it, one file per concept")
    if not both and len(widths) > 1:
        (width,) = (tensor.shape[-1] for tensor in tensors.values())
        family = "" if {*EMBEDDING_KEYS} & tensors.keys() else f" and is for {WIDTHS.get(width, 'another model')}"
        raise InputError(f"{path} holds rows for one text encoder{family}: an embedding for SDXL has clip_l and clip_g")
    found, keys = {}, EMBEDDING_KEYS if both else tensors.keys()
    for key, (component, width) in zip(keys, widths.items(), strict=True):
        rows = tensors[key][None] if tensors[key].ndim == 1 else tensors[key]
        if rows.ndim != 2 or not rows.is_floating_point() or not len(rows):
            raise InputError(f"{path}: {key} is {list(rows.shape)} {rows.dtype}, which is not an embedding")
        if rows.shape[1] != width:
            family = WIDTHS.get(rows.shape[1], "another model")
            raise InputError(f"{path} is for {family}, with rows of {rows.shape[1]}: this model has rows of {width}")
        if len(rows) > MOST_VECTORS:
            raise InputError(f"{path} has {len(rows)} vectors: a prompt has places for {MOST_VECTORS}")
        if not is_finite(rows.float()):
            raise InputError(f"{path}: {key} holds values that are not finite numbers: download it again")
        found[component] = rows.float()
    if len({len(rows) for rows in found.values()}) > 1:
        raise InputError(f"{path} holds another number of vectors for each text encoder: copy or download it again")
    return handle, found


def describe_embedding(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> dict[str, Any]:
    """Describe a textual-inversion file: its handle, vectors and base."""
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.ndim}
    width = next((tensor.shape[-1] for tensor in tensors.values()), 0)
    both = {*EMBEDDING_KEYS} <= tensors.keys()
    return {
        "for": "SDXL" if both else WIDTHS.get(width, f"a model with text of width {width}"),
        "handle": handle_of(path),
        "learnt as": texts.get("bas.handle"),
        "vectors": [1 if tensor.ndim == 1 else len(tensor) for tensor in tensors.values()],
        "base hash": texts.get("bas.base_sha256"),
    }
