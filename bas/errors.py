"""The two errors that bas reports in one line, and the checks of one value that raise them."""

import difflib
from collections.abc import Iterable
from typing import Any

from bas import other_tools

# Far above any model of this family: a larger number is a broken file or a slip.
MAX_CHANNELS = 8192
MAX_SIDE = 16_384  # pixels


class InputError(ValueError):
    """The user's input cannot be used. The message is one line: what is wrong, then what to do."""

    def __init__(self, message: str):
        super().__init__("\\n".join(message.splitlines()))  # a file's name may hold line breaks


class RunError(RuntimeError):
    """A run failed although its input was valid, for example because a loss is not finite. The message is one line."""


def check_int(name: str, value: Any, least: int, most: int) -> int:
    """Return the value. InputError unless it is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}: expected a whole number from {least} to {most}")
    return value


def check_positive(name: str, value: Any, most: int = MAX_CHANNELS) -> int:
    """Return the value. InputError unless it is a whole number from 1 to `most`."""
    return check_int(name, value, 1, most)


def check_float(name: str, value: Any, least: float = -1000, most: float = 1000) -> float:
    """Return the value. InputError unless it is a number from `least` to `most`."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} is {value!r}: expected a number from {least:g} to {most:g}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return the value. InputError unless it is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: expected true or false")
    return value


def is_utf8(text: str) -> bool:
    """Whether a text can be written to a file: an argument of a command may hold bytes that encode no character."""
    return text.encode(errors="ignore").decode() == text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: what other tools mean by it, its nearest known one, or nothing.

    `known` are names or flags; a word is compared with them without its dashes.
    """
    plain = {name.lstrip("-"): name for name in known}
    name = word.split("=")[0].lstrip("-").replace("-", "_").lower()
    if name in plain:
        return f"; did you mean {plain[name]}?"
    if here := [plain[other] for other in other_tools.NAMES.get(name, ()) if other in plain]:
        return f"; bas calls it {' and '.join(here)}"
    if name in other_tools.NOT_NEEDED:
        return f"; leave it out: {other_tools.NOT_NEEDED[name]}"
    near = difflib.get_close_matches(name, plain, n=1)
    return f"; did you mean {plain[near[0]]}?" if near else ""
