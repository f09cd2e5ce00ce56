"""Hashes of weights. By its hash a run recognises its base, and notices a change."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bas.io.files import cache_dir, clear_leftovers, require_file
from bas.io.json_files import read_cache, write_json
from bas.io.run_files import CONCEPTS, TUNED, read_concepts
from bas.models.bundle import COMPONENTS
from bas.pretrained.component_files import STEMS, component_files
from bas.pretrained.lora_files import peft_config

if TYPE_CHECKING:
    from bas.pretrained.additions import Additions

log = logging.getLogger(__name__)

SETTLED = 2_000_000_000  # ns without a change from which on a hash is remembered: clocks of file systems are coarse


def weights_hash(path: str | Path, remembered: bool = True) -> str:
    """Return the sha256, in hex, of the weights at `path`: of a single file, else over the hashes of a folder's files.

    That of a small run is over its own two files and the hash of its base.

    With `remembered`, a file whose size, times, inode and device are those of an earlier call is not read again.
    """
    path = Path(path)
    if not path.is_dir():
        require_file(path)
        return _file_hash(path, remembered)
    if (path / TUNED).is_file():
        lines = [f"{name} {_file_hash(path / name, remembered)}\n" for name in (TUNED, CONCEPTS)]
        _, metadata = read_concepts(path)
        return hashlib.sha256("".join([*lines, f"base {metadata['base']}\n"]).encode()).hexdigest()
    components = [component for component in STEMS if component in COMPONENTS or (path / component).is_dir()]
    files = [file for component in components for file in component_files(path / component, STEMS[component])]
    lines = sorted(f"{file.relative_to(path).as_posix()} {_file_hash(file, remembered)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def base_hash(path: Path, additions: Additions | None, remembered: bool = True) -> str:
    """Return the hash of a base model with its additions: of its weights, and of each file with its weight or name.

    remembered: as in `weights_hash`.
    """
    digest = weights_hash(path, remembered)
    if additions is None:
        return digest
    lines = [f"base {digest}"]
    for file, weight in additions.loras:
        settings = f" {weights_hash(beside, remembered)}" if (beside := peft_config(file)) else ""
        lines.append(f"lora {weights_hash(file, remembered)} {weight!r}{settings}")
    lines += [f"embedding {weights_hash(file, remembered)} {file.stem}" for file in additions.embeddings]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_hash(path: Path, remembered: bool) -> str:
    """sha256 of a file's content, from the cache where that may be and the file is the same."""
    memory, key, state = cache_dir() / "hashes.json", str(path.resolve()), _file_state(path)
    entry = (known := read_cache(memory)).get(key)
    if remembered and isinstance(entry, dict) and entry.get("state") == state and is_sha256(entry.get("sha256")):
        return entry["sha256"]
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _file_state(path) != state or time.time_ns() - path.stat().st_ctime_ns < SETTLED:
        return digest
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(memory.parent, re.compile(re.escape(memory.name)))
        write_json(memory, known | {key: {"state": state, "sha256": digest}})
    except OSError as error:
        log.warning("cannot cache the hash of %s in %s: %s", path, memory, error.strerror)
    return digest


def is_sha256(text: object) -> bool:
    """Return whether this is a sha256 in hex."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def _file_state(path: Path) -> list[int]:
    """Return what changes with a file's content: no program can set the time of change (ctime)."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
