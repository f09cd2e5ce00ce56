"""Files: read so that a bad one is named, written so that a half-written one never shows. Nothing is unpickled."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bas.errors import InputError

MAX_JSON_BYTES = 2**24  # sixteen times the largest vocabulary of this family
MAX_TENSORS = 20_000  # ten times the largest file of this family
MAPPED_ALONE = 2**18  # bytes: what is smaller shares one mapping with the others of its file
WEIGHT_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}

PICKLE_ADVICE = (
    "a pickle can run any program when it is opened, so bas opens none: use the model's .safetensors version"
)
FOREIGN = (  # how the file begins, what it is, what to do
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` beside it"),
    (b"<!doctype", "a web page", "the download went wrong: download the file itself"),
    (b"<html", "a web page", "the download went wrong: download the file itself"),
    (b"pk\x03\x04", "a zip archive, most likely a pickled PyTorch checkpoint", PICKLE_ADVICE),
    (b"gguf", "a GGUF file", "use the model's .safetensors version"),
    (b"\x80", "a pickled checkpoint", PICKLE_ADVICE),
)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system refuses within the block becomes an InputError that names the file, `path` unless it is known."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def read_bytes(path: Path) -> bytes:
    """The content of an ordinary file. InputError when it is none, or cannot be read."""
    if not os.path.isfile(path):  # unlike the method of Path, no error for a name that is too long
        raise InputError(f"{path} is not a file")
    with reading(path):
        return path.read_bytes()


def read_content(path: Path) -> Any:
    """Whatever a JSON file holds. InputError when it cannot be read, or is no JSON."""
    data = read_bytes(path)
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        if b"\\ud" in data or b"\\uD" in data:  # may be half a character, which can neither be written nor tokenized
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        return content
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): mend it, or copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. InputError when it is missing, too large, or anything but one JSON object."""
    with reading(path):
        require_file(path)
        refuse_large_description(path)
    content = read_content(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object: it is not a model's")
    return content


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file, memory-mapped rather than copied, and the file's metadata.

    Large weights are mapped one by one: the pages that were read of one leave memory with it, not with the last of all.
    """
    try:
        refuse_foreign_file(path)
        header, start = _read_header(path)
        with safe_open(path, framework="pt") as file:  # holds the header against the file
            tensors = {}
            for name in file.keys():  # noqa: SIM118
                tensor = _mapped(path, header[name], start)
                tensors[name] = file.get_tensor(name) if tensor is None else tensor
            return tensors, file.metadata() or {}
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a sound .safetensors file ({reason}): copy or download it again") from None


def require_file(path: Path) -> None:
    """InputError unless `path` is an ordinary file, or a link to one: opening a pipe would wait for ever."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to a file that is missing: download the model again")
    if not path.exists():
        raise InputError(f"{path} is missing: the model is incomplete, download it again")
    if not path.is_file():
        raise InputError(f"{path} is not an ordinary file")


def refuse_foreign_file(path: Path) -> None:
    """InputError naming what the file is, when its first bytes show that it cannot be a .safetensors file."""
    require_file(path)
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 8:
        raise InputError(f"{path} holds {len(head)} bytes, no model: copy or download it again")
    if head[8:9] == b"{":  # the length of the header, then the header
        return
    for beginning, what, advice in FOREIGN:
        if head.lstrip().lower().startswith(beginning):
            raise InputError(f"{path} is {what}: {advice}")


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a .safetensors file, and the byte at which its tensors begin.

    InputError or ValueError for one that the library would read, but that no model has: it takes time and memory by the
    gigabyte for millions of tensors, and of two tensors of one name the last.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_JSON_BYTES:
            raise ValueError(f"its header claims {human_size(length)}")
        header = json.loads(file.read(length), object_pairs_hook=_unique)
    if isinstance(header, dict) and len(header) > MAX_TENSORS:
        raise InputError(f"{path} holds {len(header)} tensors, more than any model: it belongs to something else")
    return header, 8 + length


def _mapped(path: Path, entry: dict[str, Any], start: int) -> Tensor | None:
    """One tensor of a header that was checked, in a mapping of its own; None for a small one and for other numbers."""
    begin, end = entry["data_offsets"]
    if end - begin < MAPPED_ALONE or entry["dtype"] not in WEIGHT_TYPES:
        return None
    data = np.memmap(path, mode="c", offset=start + begin, shape=end - begin)
    return torch.from_numpy(data).view(WEIGHT_TYPES[entry["dtype"]]).view(entry["shape"])


def refuse_large_description(path: Path) -> None:
    """InputError for a file that is too large to be a model's description."""
    if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than any configuration: it belongs to something else")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's entries. ValueError for a name that stands twice: readers differ in which one they take."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} stands twice")
    return entries


def human_size(size: float) -> str:
    """Bytes as people read them: 4.1 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def new_folder(name: str) -> Path:
    """A new or empty folder for many files. InputError when it holds something, or cannot be written."""
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {folder}: {error.strerror}") from None
    if used:
        raise InputError(f"--output_dir {folder} is not empty: name a new folder")
    return folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`. When the block ends well, it is flushed to disk and takes the path's place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        readers = temporary.stat().st_mode  # as the user's umask has it; safetensors makes files for the owner alone
        yield temporary
        temporary.chmod(readers)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make the operating system write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all. `metadata` joins the format note that readers expect.

    What stands on the disk is opened before it takes the path's place: a write that claims success may be cut short.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, {"format": "pt", **(metadata or {})})
            with safe_open(temporary, framework="pt"):  # refuses a file of another length than its header says
                pass
        except SafetensorError as error:  # a full disk, say, which the library wraps
            raise OSError(f"{path} cannot be written: {error}") from error


def cache_dir() -> Path:
    """Where bas keeps what it can make again: $BAS_CACHE, or ~/.cache/bas."""
    return Path(os.environ.get("BAS_CACHE") or Path.home() / ".cache" / "bas")
