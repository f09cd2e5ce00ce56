"""Files: read so that a bad one is named, written so that a half-written one never shows. Nothing is unpickled."""

import errno
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bas.errors import InputError

log = logging.getLogger(__name__)

BYTE_ORDER_MARKS = {  # of other encodings; the longer ones first
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
LONGEST_NAME = "x" * 40  # of the files in a folder of images
LEFTOVER = re.compile(r"\..+\.(\d+)\.tmp")  # as `temporary_path` names it
LONG_AGO = 24 * 3600  # seconds: a number of a process is used again some day
MAX_JSON_BYTES = 2**24  # sixteen times the largest vocabulary of this family


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


def decode_text(data: bytes) -> str:
    """The characters of a UTF-8 file, with or without a byte order mark. ValueError for another encoding."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"it is {name}: save it as UTF-8")
    if b"\0" in data[:4]:
        raise ValueError("it is UTF-16 or no text: save it as UTF-8")
    return data.decode("utf-8-sig")


def parse_json(data: bytes) -> Any:
    """Whatever a JSON text holds. ValueError for anything else, and for half a character."""
    try:
        content = json.loads(decode_text(data), object_pairs_hook=without_duplicates)
        if b"\\ud" in data or b"\\uD" in data:  # may be half a character, which can neither be written nor tokenized
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content


def read_content(path: Path) -> Any:
    """Whatever a JSON file holds. InputError when it cannot be read, or is no JSON."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): mend it, or copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. InputError when it is missing, too large, or anything but one JSON object."""
    with reading(path):
        require_file(path)
        check_json_size(path)
    content = read_content(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object: it is not a model's")
    return content


Shape = type | tuple[type, ...] | dict[Any, Any] | list[Any]  # a value's type; entries by name; of each of a list


def check_shape(value: Any, shape: Shape, name: str = "it") -> None:
    """ValueError unless a value of JSON has this shape. An object may hold others, which under `...` have a shape."""
    if isinstance(shape, dict):
        check_shape(value, dict, name)
        for key in (shape.keys() | value.keys()) - {...} if ... in shape else shape:
            if key not in value:
                raise ValueError(f"{name} has no {key}")
            check_shape(value[key], shape[key if key in shape else ...], key)
    elif isinstance(shape, list):
        check_shape(value, list, name)
        for each in value:
            check_shape(each, shape[0], f"an entry of {name}")
    elif not isinstance(value, shape) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.40}")


def read_record(path: Path, shape: dict[Any, Any], advice: str) -> dict[str, Any]:
    """The object in a JSON file that bas wrote itself. InputError, which ends with `advice`, for a damaged one."""
    return _check_record(str(path), read_bytes(path), shape, advice)


def read_records(path: Path, shape: dict[Any, Any], advice: str) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line; a last line that is still being written is left out."""
    lines = read_bytes(path).split(b"\n")[:-1]
    return [_check_record(f"{path} line {i}", line, shape, advice) for i, line in enumerate(lines, start=1)]


def _check_record(name: str, data: bytes, shape: dict[Any, Any], advice: str) -> dict[str, Any]:
    """The object in a JSON text. InputError, from `name` to `advice`, for anything else."""
    try:
        record = parse_json(data)
    except ValueError as error:
        raise InputError(f"{name} is not valid JSON ({error}): {advice}") from None
    try:
        check_shape(record, shape)
    except ValueError as error:
        raise InputError(f"{name} is not as bas wrote it ({error}): {advice}") from None
    return record


def read_cache(path: Path) -> dict[str, Any]:
    """The object in a JSON file that can be made again; empty where it is missing or, with a warning, damaged."""
    if not path.exists():
        return {}
    try:
        return read_record(path, {}, "it is made anew")
    except InputError as error:
        log.warning("%s", error)
        return {}


def require_file(path: Path) -> None:
    """InputError unless `path` is an ordinary file, or a link to one: opening a pipe would wait for ever."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to a file that is missing: download the model again")
    if not path.exists():
        raise InputError(f"{path} is missing: the model is incomplete, download it again")
    if not path.is_file():
        raise InputError(f"{path} is not an ordinary file")


def check_json_size(path: Path) -> None:
    """InputError for a file that is too large to be a model's description."""
    if path.is_file() and path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path} is larger than any configuration: it belongs to something else")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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
    """Check that a folder is new or empty and can be written; the first file that is saved makes it.

    InputError if it holds something or cannot be made. A command that fails afterwards leaves no empty folder.
    """
    folder = Path(name)
    check_length(folder / LONGEST_NAME, "--output_dir")
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
        for place in made:
            place.rmdir()
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {folder}: {error.strerror}") from None
    if used:
        raise InputError(f"--output_dir {folder} is not empty: name a new folder")
    return folder


def temporary_path(path: Path) -> Path:
    """The name under which `replacing` writes a file before it takes the path's place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_length(path: Path, flag: str) -> None:
    """InputError, for a path that comes from `flag`, where the system takes none so long."""
    try:
        os.lstat(temporary_path(path))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{flag}: {path} would be too long for this system: name a shorter path") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system within the block name `path`: that of a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary_path(path))):
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`. When the block ends well, it is flushed to disk and takes the path's place."""
    temporary = temporary_path(path)
    try:
        with naming(path):
            temporary.touch()
            readers = (
                temporary.stat().st_mode
            )  # as the user's umask has it; safetensors makes files for the owner alone
            yield temporary
            temporary.chmod(readers)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove the temporary files of `replacing` whose processes were killed. Nothing below the folder is touched."""
    for path in folder.glob(".*.tmp"):
        match = LEFTOVER.fullmatch(path.name)
        with suppress(OSError):  # gone already, or another user's
            if match and (not is_running(int(match[1])) or time.time() - path.lstat().st_mtime > LONG_AGO):
                path.unlink()


def is_running(process: int) -> bool:
    """Whether there is a process of this number. True where the system does not tell without harm, as on Windows."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


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


def cache_dir() -> Path:
    """Where bas keeps what it can make again: $BAS_CACHE, or ~/.cache/bas."""
    return Path(os.environ.get("BAS_CACHE") or Path.home() / ".cache" / "bas")
