"""Files: errors name the file that caused them; a file is written as a whole or not at all."""

import errno
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bas.errors import InputError

log = logging.getLogger(__name__)

LONGEST_NAME = "x" * 40  # of the files in a folder of images
LEFTOVER = re.compile(r"\.(.+)\.(\d+)\.tmp")  # as `temporary_path` names it: the file, and the process or thread
UNFILLED = re.compile(r"\.\d+\.tmp")  # as `filling` names its folder
MAX_BYTES = 2**24  # of settings and records: sixteen times the largest vocabulary of this family
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LONG_AGO = 24 * 3600  # seconds: a number of a process or a thread is used again some day


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError within the block into an InputError that names the file: the error's own, or else `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from None


def not_a_file(path: Path) -> InputError:
    """Return the error for a path that is missing, or is a folder, a pipe or a broken link."""
    return InputError(f"{path} {'is not a file' if os.path.lexists(path) else 'does not exist'}")


def read_bytes(path: Path, most: float = MAX_BYTES) -> bytes:
    """Read an ordinary file. InputError if it is something else, has more than `most` bytes, or cannot be read."""
    if not os.path.isfile(path):  # unlike the method of Path, no error for a name that is too long
        raise not_a_file(path)
    with reading(path):
        if (size := path.stat().st_size) > most:
            raise InputError(f"{path} has {human_size(size)}, files of its kind have less: copy it again, or remove it")
        return path.read_bytes()


def require_file(path: Path) -> None:
    """InputError unless `path` is an ordinary file or a link to one: opening a pipe would block."""
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path} is a link to a file that is missing: download the model again")
    if not path.exists():
        raise InputError(f"{path} is missing: the model is incomplete, download it again")
    if not path.is_file():
        raise InputError(f"{path} is not an ordinary file")


def human_size(size: float) -> str:
    """Format bytes for people: 4.1 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def lost_link(path: str | Path) -> str | None:
    """Return what is wrong with a folder that is a link to nothing. None for all else."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"the link {path} leads to {os.readlink(path)}, which is not there: make that folder, or remove the link"
    return None


def reason_of(error: OSError) -> str:
    """Return why a file or folder could not be written. For a link to nothing the system says only that it exists."""
    lost = lost_link(error.filename) if error.errno == errno.EEXIST and isinstance(error.filename, str) else None
    return lost or error.strerror or str(error)


def new_folder(name: str) -> Path:
    """Check that a folder is new or empty and can be written; the first file that is saved makes it.

    InputError if it holds something or cannot be made. Hidden files, which systems make by themselves, do not count,
    except those that a killed `filling` left. A command that fails afterwards leaves no empty folder.
    """
    folder = Path(name)
    check_length(folder / LONGEST_NAME, "--output_dir")
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        used = any(not path.name.startswith(".") or UNFILLED.fullmatch(path.name) for path in folder.iterdir())
        for place in made:
            place.rmdir()
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {folder}: {reason_of(error)}") from None
    if used:
        raise InputError(f"--output_dir {folder} is not empty: name a new folder")
    return folder


def require_writable(path: Path, flag: str, advice: str = "name another") -> Path:
    """Return the innermost folder of a path that exists. InputError, naming `flag`, if it is read-only."""
    if lost := next(filter(None, map(lost_link, (path, *path.parents))), None):
        raise InputError(f"cannot write to {flag} {path}: {lost}")
    existing = next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())
    if not os.access(existing, os.W_OK):
        raise InputError(f"cannot write to {flag} {path}: {existing} is read-only for you, {advice}")
    return existing


def temporary_path(path: Path) -> Path:
    """Return the path at which `replacing` writes a file before it is renamed to `path`: each thread has its own."""
    main = threading.current_thread() is threading.main_thread()
    number = os.getpid() if main else threading.get_native_id()  # on Linux numbers of one series
    return path.with_name(f".{path.name}.{number}.tmp")


def check_length(path: Path, flag: str) -> None:
    """InputError, naming `flag`, if a path is too long for this system, holds the null character, or begins with ~.

    No shell has expanded that in a settings file, or behind `--flag=`.
    """
    if path.parts[:1] == ("~",) and not Path("~").exists():
        raise InputError(f"{flag}: in {path} no shell has put your home folder in place of ~: write the whole path")
    try:
        os.lstat(temporary_path(path))
    except ValueError:
        raise InputError(f"{flag}: {str(path)!r} holds a character that no path can have: rename it") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{flag}: {path} would be too long for this system: name a shorter path") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError within the block name `path`. The error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or Path(error.filename) == temporary_path(path)):
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path, later: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`. After a block without error, flush it to disk and rename it to `path`.

    later: leave the whole file at its temporary path, for the caller to rename
    """
    temporary = temporary_path(path)
    try:
        with naming(path):
            temporary.touch()
            mode = temporary.stat().st_mode  # of the user's umask; safetensors makes files for their owner alone
            yield temporary
            temporary.chmod(mode)
            sync(temporary)
            if not later:
                os.replace(temporary, path)
                sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder within `folder`, which is new or empty; after the block its content moves up.

    If the block fails, nothing of it stays, so the same command can run again.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]  # innermost first
    temporary = folder / f".{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)
        sync(folder)
        made = []
    except OSError as error:
        if error.filename is not None and Path(error.filename).is_relative_to(temporary):
            error.filename = str(folder / Path(error.filename).relative_to(temporary))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for place in made:
            with suppress(OSError):  # it holds something, or is not there
                place.rmdir()


def clear_leftovers(folder: Path, written: re.Pattern[str]) -> None:
    """Remove from a folder, not from those in it, the temporary files of processes that were killed.

    written: the names of the files that bas writes there; temporary files of others stay.
    """
    for path in folder.glob(".*.tmp"):
        match = LEFTOVER.fullmatch(path.name)
        with suppress(OSError):  # gone already, or another user's
            if (
                match
                and written.fullmatch(match[1])
                and (not is_running(int(match[2])) or time.time() - path.lstat().st_mtime > LONG_AGO)
            ):
                path.unlink()


def is_running(process: int) -> bool:
    """Return whether a process or a thread of this number is running. Always true outside Linux.

    Windows would end the process that it is asked about, and macOS numbers threads apart from processes.
    """
    if sys.platform != "linux":
        return True
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, content: str) -> None:
    """Write a text file as a whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def cache_dir() -> Path:
    """Return the folder of what can be made again: $BAS_CACHE, or ~/.cache/bas."""
    return Path(os.environ.get("BAS_CACHE") or Path.home() / ".cache" / "bas")
