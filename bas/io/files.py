"""Files: read so that a bad one is named, written so that a half-written one never shows. Nothing is unpickled."""

import errno
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bas.errors import InputError

log = logging.getLogger(__name__)

LONGEST_NAME = "x" * 40  # of the files in a folder of images
LEFTOVER = re.compile(r"\..+\.(\d+)\.tmp")  # as `temporary_path` names it
LONG_AGO = 24 * 3600  # seconds: a number of a process is used again some day


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


def require_file(path: Path) -> None:
    """InputError unless `path` is an ordinary file, or a link to one: opening a pipe would wait for ever."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to a file that is missing: download the model again")
    if not path.exists():
        raise InputError(f"{path} is missing: the model is incomplete, download it again")
    if not path.is_file():
        raise InputError(f"{path} is not an ordinary file")


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


def write_text(path: Path, content: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def cache_dir() -> Path:
    """Where bas keeps what it can make again: $BAS_CACHE, or ~/.cache/bas."""
    return Path(os.environ.get("BAS_CACHE") or Path.home() / ".cache" / "bas")
