"""Settings in a TOML file: `--config run.toml`. Flags win over the file; a key that is no setting is an error.

Each run keeps its resolved settings as RUN/config.toml, which can be given to --config again.
"""

import difflib
import json
import tomllib
from dataclasses import fields
from pathlib import Path

from bas.config import InputError
from bas.files import require_file
from bas.flags import Parser, value_type

CONFIG = "config.toml"  # of a run
NOT_KEPT = {"resume_from_checkpoint"}  # where a run went on is no setting of the next one

Kinds = dict[str, tuple[type, bool]]  # the type of one value, and whether there are several


def add_config(parser: Parser) -> None:
    """Declare --config."""
    parser.add_argument("--config", metavar="FILE", help="settings from a .toml file; flags win over it")


def setting_kinds(settings: type) -> Kinds:
    """The settings of a dataclass and what each of them holds."""
    return {f.name: value_type(f.type) for f in fields(settings)}


def read_config(path: str | None, kinds: Kinds) -> dict:
    """The settings in a TOML file, lists as tuples; none without a path. InputError for what is no setting here."""
    if path is None:
        return {}
    file = Path(path)
    return {name: _checked(file, name, value, kinds) for name, value in read_toml(file).items()}


def read_toml(file: Path) -> dict:
    """The content of a TOML file. Raises InputError when it cannot be read or is none."""
    require_file(file)
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid TOML: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None


def _checked(file: Path, name: str, value: object, kinds: Kinds) -> object:
    """The value as its setting takes it. Raises InputError for an unknown name or a value of another kind."""
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1)
        raise InputError(f"{file}: unknown setting {name}" + (f"; did you mean {near[0]}?" if near else ""))
    kind, many = kinds[name]
    values = value if many and isinstance(value, list) else [value]
    if many != isinstance(value, list) or not all(_is_a(entry, kind) for entry in values):
        expected = "a list, each " * many + KIND_NAMES[kind]
        raise InputError(f"{file}: {name} is {value!r}, expected {expected}")
    return tuple(values) if many else kind(value)


KIND_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _is_a(value: object, kind: type) -> bool:
    """Whether a TOML value is of this kind; a whole number is a number too, true and false are none."""
    return isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)


def to_toml(settings: dict) -> str:
    """Settings as a TOML file that `read_config` takes; what is None is left out."""
    kept = {name: value for name, value in settings.items() if value is not None and name not in NOT_KEPT}
    return "".join(f"{name} = {_literal(value)}\n" for name, value in kept.items())


def _literal(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):  # TOML's strings are JSON's, but for the character DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
