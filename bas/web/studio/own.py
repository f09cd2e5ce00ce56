"""What this user asked for on this machine: a key outside of HOME, and what is derived from it.

A studio folder may come from another machine or person, in a zip or on a shared disk. So neither the secret of the
address nor the right to start a job is kept in it: both are codes (HMAC-SHA256) of a key beside bas's cache, which is
readable for this user alone. A code covers the folder's path, so that it is worth nothing in a copy.
"""

import hashlib
import hmac
import json
import os
import secrets
from functools import lru_cache
from pathlib import Path
from typing import Any

from bas.errors import InputError
from bas.io.files import cache_dir

KEY = "studio.key"
LENGTH = 32  # bytes of the key


def token(home: Path) -> str:
    """Return the secret part of the address of a studio folder: 128 bits, the same each time."""
    return code("token", str(home))[:32]


def mark(job: Path, content: dict[str, Any]) -> str:
    """Return the code of a job that was asked for here. content: job.json without the code."""
    return code("job", str(job.resolve()), json.dumps(content, sort_keys=True))


def is_marked(job: Path, content: dict[str, Any]) -> bool:
    """Return whether a job was asked for on this machine. content: job.json."""
    found = content.get("mark")
    rest = {name: value for name, value in content.items() if name != "mark"}
    return isinstance(found, str) and hmac.compare_digest(found.encode(), mark(job, rest).encode())


def code(*parts: str) -> str:
    """Return the key's code of some texts, as 64 hexadecimal digits."""
    return hmac.new(key(cache_dir() / KEY), json.dumps(parts).encode(), hashlib.sha256).hexdigest()


@lru_cache(maxsize=8)
def key(path: Path) -> bytes:
    """Return the key of this user, made when it is first needed. InputError if it cannot be kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(secrets.token_bytes(LENGTH))
        except FileExistsError:
            pass
        found = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the studio's key cannot be kept in {path.parent} ({error.strerror}): set BAS_CACHE to another folder"
        ) from None
    if len(found) != LENGTH:
        raise InputError(f"{path} is damaged: remove it, and the studio makes another")
    return found
