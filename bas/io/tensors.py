"""Weights in .safetensors files: memory-mapped when read, replaced as a whole when written. Nothing is unpickled."""

import json
import os
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bas.errors import InputError, is_own_fault
from bas.io.files import MAX_BYTES, human_size, replacing, require_file
from bas.io.json_files import without_duplicates

MAX_TENSORS = 20_000  # ten times the largest file of this family
MAPPED_ALONE = 2**18  # bytes: what is smaller shares one mapping with the others of its file
WEIGHT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
HALF_WRITTEN = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # what safetensors calls a file, beside it, while it writes it
PICKLE_ADVICE = (
    "a pickle can run any program when it is opened, so bas opens none: use the model's .safetensors version"
)
FOREIGN = (  # how the file begins, what it is, what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` beside it"),
    (b"<!doctype", "a web page", "the download went wrong: download the file itself"),
    (b"<html", "a web page", "the download went wrong: download the file itself"),
    (b"pk\x03\x04", "a zip archive, most likely a pickled PyTorch checkpoint", PICKLE_ADVICE),
    (b"gguf", "a GGUF file", "use the model's .safetensors version"),
    (b"\x89png", "a PNG image", "use a .safetensors file: bas reads no weights from images"),
    (b"\xff\xd8\xff", "a JPEG image", "use a .safetensors file: bas reads no weights from images"),
    *((beginning, "an archive", "unpack it") for beginning in (b"7z\xbc\xaf", b"rar!\x1a", b"\x1f\x8b")),
    (b"\x80", "a pickled checkpoint", PICKLE_ADVICE),
)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a .safetensors file, memory-mapped, and the file's metadata.

    Large tensors have a mapping each, so that the memory of one is free as soon as it is dropped. InputError for a file
    that is damaged or of another kind.
    """
    try:
        check_foreign_file(path)
        header, start = _read_header(path)
        with safe_open(path, framework="pt") as file:  # compares the header with the file's length
            whole, tensors = np.asarray(np.memmap(path, mode="c")), {}
            for name in file.keys():  # noqa: SIM118
                tensor = _mapped(path, header[name], start, whole)
                tensors[name] = file.get_tensor(name) if tensor is None else tensor
            return tensors, file.metadata() or {}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        if is_own_fault(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a sound .safetensors file ({reason}): copy or download it again") from None


def check_foreign_file(path: Path) -> None:
    """InputError that says what a file is if its first bytes are not those of a .safetensors file."""
    require_file(path)
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 8:
        raise InputError(f"{path} holds {len(head)} bytes, so it is not a model: copy or download it again")
    if head[8:9] == b"{":  # the length of the header, then the header
        return
    for beginning, what, advice in FOREIGN:
        if head.lstrip().lower().startswith(beginning):
            raise InputError(f"{path} is {what}: {advice}")
    if head and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):  # a header begins with its length
        raise InputError(f"{path} is a text file: name the folder of a model, or a .safetensors file")


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a .safetensors file and the byte at which its tensors begin.

    InputError or ValueError for headers that the library accepts and no model has: millions of tensors, which take
    gigabytes to list, and names that stand twice.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_BYTES:
            raise ValueError(f"its header claims {human_size(length)}")
        header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
    if isinstance(header, dict) and len(header) > MAX_TENSORS:
        raise InputError(f"{path} holds {len(header)} tensors, more than any model: name another file")
    return header, 8 + length


def _mapped(path: Path, entry: dict[str, Any], start: int, whole: np.ndarray) -> Tensor | None:
    """Map one tensor of a checked header. None for an empty one, and for a type that is none of weights.

    whole: the mapping that small tensors share. A file of them is read in half of the time that the library takes.
    """
    begin, end = entry["data_offsets"]
    if begin == end or entry["dtype"] not in WEIGHT_TYPES:
        return None
    if end - begin < MAPPED_ALONE:
        data = whole[start + begin : start + end]
    else:
        data = np.memmap(path, mode="c", offset=start + begin, shape=end - begin)
    return torch.from_numpy(data).view(WEIGHT_TYPES[entry["dtype"]]).view(entry["shape"])


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an .npy file as a whole or not at all."""
    buffer = BytesIO()  # written to a full disk directly, numpy raises an error without a reason
    np.save(buffer, array, allow_pickle=False)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a file by name, in place: the library writes it in an order that differs between writes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(data.ljust(length))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file as a whole or not at all, with `metadata` beside the `format` that readers expect.

    The written file is opened before it is renamed to `path`, because a write that reports success may be cut short.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, {"format": "pt", **(metadata or {})})
            with safe_open(temporary, framework="pt"):  # raises if the file has another length than its header says
                pass
            _sort_metadata(temporary)
        except SafetensorError as error:  # the library wraps the system's errors, such as that of a full disk
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
            raise OSError(f"{path} cannot be written: {error}") from error
