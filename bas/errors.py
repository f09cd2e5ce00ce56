"""The two errors that bas reports in one line, and the checks of one value that raise them."""

import difflib
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

from bas import other_tools

# Far above any model of this family: a larger number is a broken file or a slip.
MAX_CHANNELS = 8192
MAX_SIDE = 16_384  # pixels
# Line breaks, terminal sequences, and characters that nobody sees: what turns the direction of writing, spaces of no
# width, tags. Joiners (U+200C, U+200D) are not among them, because words of some scripts and emoji need them.
CONTROL = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\U000e0000-\\U000e007f]"
)
LONGEST_MESSAGE = 4000  # characters
PYTHONS_ADVICE = "; use sys.set_int_max_str_digits() to increase the limit"  # about a number of thousands of digits


def printable(text: str) -> str:
    """Return one line that changes nothing on a terminal: control characters are escaped, as `\\n` or `\\x1b`."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(value: object, most: int = 60) -> str:
    """Return a value as Python writes it, cut to `most` characters."""
    try:
        return f"{value!r:.{most}}"
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"


def _message(text: str) -> str:
    """Return a message for the user as one printable line. It may quote a file, its name, or an error of a library."""
    line = printable(text.replace(PYTHONS_ADVICE, ""))
    cut = len(line) > LONGEST_MESSAGE  # a value of megabytes stands in it
    return f"{line[: LONGEST_MESSAGE // 2]} ... {line[-LONGEST_MESSAGE // 2 :]}" if cut else line


class InputError(ValueError):
    """The user's input cannot be used. The message is one line: what is wrong, then what to do."""

    def __init__(self, message: str):
        super().__init__(_message(message))


class RunError(RuntimeError):
    """A run failed although its input was valid, for example because a loss is not finite. The message is one line."""

    def __init__(self, message: str):
        super().__init__(_message(message))


class NotFiniteError(RunError):
    """What a network computes is not finite: a number overflowed, or a weight is broken."""


def is_own_fault(error: Exception) -> bool:
    """Return whether an error is a mistake in bas's own code, and not a fault of the file that it was reading.

    Libraries raise nearly anything for a broken file, so their callers catch everything, and ask this first.
    """
    trace, depth = error.__traceback__, 0
    while trace and trace.tb_next:
        trace, depth = trace.tb_next, depth + 1
    if trace is None or not trace.tb_frame.f_globals.get("__name__", "").startswith("bas."):
        return False
    # In the caller's own frame, a library's code in C may have raised all but these two.
    mistakes = (NameError, AssertionError) if depth == 0 else (NameError, AssertionError, AttributeError, TypeError)
    return isinstance(error, mistakes)


def check_int(name: str, value: Any, least: float, most: float) -> int:
    """Return the value. InputError unless it is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        limits = f" from {least:.0f} to {most:.0f}" if math.isfinite(most) else ""
        raise InputError(f"{name} is {shown(value)}: expected a whole number{limits}")
    return value


def check_positive(name: str, value: Any, most: int = MAX_CHANNELS) -> int:
    """Return the value. InputError unless it is a whole number from 1 to `most`."""
    return check_int(name, value, 1, most)


def check_float(
    name: str,
    value: Any,
    least: float = -1000,
    most: float = 1000,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return the value. InputError unless it is a finite number from `least` to `most`, `above` < it < `below`."""
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not (sound and least <= value <= most and above < value < below):
        limits = [
            f"more than {above:g}" if above >= least else f"{least:g} or more",
            f"less than {below:g}" if below <= most else f"{most:g} or less",
        ]
        finite = " and ".join(limit for limit in limits if "inf" not in limit)
        raise InputError(f"{name} is {shown(value)}: expected a finite number{', ' * bool(finite)}{finite}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return the value. InputError unless it is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name} is {shown(value)}: expected true or false")
    return value


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Return the value. InputError unless it is one of `choices`."""
    if value not in (known := tuple(choices)):
        raise InputError(f"{name} is {shown(value)}: expected one of {', '.join(known)}")
    return value


def is_utf8(text: str) -> bool:
    """Return whether a text can be written to a file: an argument may hold bytes that encode no character."""
    return text.encode(errors="ignore").decode() == text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End a message about an unknown word: with what other tools mean by it, its nearest known one, or nothing.

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
