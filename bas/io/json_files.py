"""JSON files: of models, of people, and those that bas wrote itself. An error says in one line what is wrong."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from bas.errors import InputError, shown
from bas.io.files import MAX_BYTES, read_bytes, reading, require_file, write_text

log = logging.getLogger(__name__)

BYTE_ORDER_MARKS = {  # of other encodings; the longer ones first
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
MAX_ROWS_BYTES = 2**27  # of a file with one object per line: metrics of 600,000 steps
LARGEST = 2**1023  # of a whole number: a larger one has no float
Shape = (
    type | tuple[type, ...] | dict[Any, Any] | list[Any]
)  # the type of a value; the shapes of an object's entries; that of all entries of a list


def decode_text(data: bytes) -> str:
    """Decode UTF-8, with or without a byte order mark. ValueError for another encoding."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"it is {name}: save it as UTF-8")
    if b"\0" in data[:4]:
        raise ValueError("it is UTF-16 or not text: save it as UTF-8")
    return data.decode("utf-8-sig")


def read_text(path: Path) -> str:
    """Read a text file. InputError if it cannot be read or is not UTF-8."""
    data = read_bytes(path)
    try:
        return decode_text(data)
    except ValueError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): repair it, or copy it again") from None


def parse_json(data: bytes) -> Any:
    """Parse a JSON text. ValueError if it is not JSON, repeats a name, or contains half of a surrogate pair."""
    try:
        content = json.loads(decode_text(data), object_pairs_hook=without_duplicates)
        if b"\\ud" in data or b"\\uD" in data:  # half of a surrogate pair can be neither written nor tokenized
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return content


def read_content(path: Path, most: float = MAX_BYTES) -> Any:
    """Read a JSON file. InputError if it cannot be read, has more than `most` bytes, or is not JSON."""
    data = read_bytes(path, most)
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): repair it, or copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a model's JSON file. InputError if it is missing, too large, or holds no JSON object."""
    with reading(path):
        require_file(path)
        check_json_size(path)
    content = read_content(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}, not a JSON object: it is not a model's")
    return content


def check_shape(value: Any, shape: Shape, name: str = "it") -> None:
    """ValueError unless a JSON value has this shape. Entries of no name here are free, or as under `...`."""
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
    elif not isinstance(value, shape) or isinstance(value, bool) or (isinstance(value, int) and abs(value) > LARGEST):
        raise ValueError(f"{name} is {shown(value, 40)}")


def read_record(path: Path, shape: dict[Any, Any], advice: str) -> dict[str, Any]:
    """Read a JSON object that bas wrote itself. InputError, which ends with `advice`, if it is damaged."""
    return _check_record(str(path), read_bytes(path), shape, advice)


def read_records(path: Path, shape: dict[Any, Any], advice: str) -> list[dict[str, Any]]:
    """Read a file of one such object per line, without a last line that is still being written."""
    lines = read_bytes(path, MAX_ROWS_BYTES).split(b"\n")[:-1]
    return [_check_record(f"{path} line {i}", line, shape, advice) for i, line in enumerate(lines, start=1)]


def _check_record(name: str, data: bytes, shape: dict[Any, Any], advice: str) -> dict[str, Any]:
    """Parse and check a JSON object. InputError, which begins with `name` and ends with `advice`, if it is damaged."""
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
    """Read a JSON object that can be made again. A damaged file gives a warning; that and a missing one, no entries."""
    if not path.exists():
        return {}
    try:
        return read_record(path, {}, "it is made again")
    except InputError as error:
        log.warning("%s", error)
        return {}


def check_json_size(path: Path) -> None:
    """InputError if a file is larger than any model's configuration."""
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path} is larger than any configuration of a model: name another file")


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. ValueError if a name stands twice, because readers differ in which entry they take."""
    entries = dict(pairs)
    if len(entries) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} appears twice")
    return entries


def json_text(content: dict[str, Any]) -> str:
    """Return a JSON object as bas writes it."""
    return json.dumps(content, indent=2) + "\n"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as a whole or not at all."""
    write_text(path, json_text(content))
