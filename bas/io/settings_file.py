"""Settings in files: in TOML for --config, in a model's own row, and in what a run notes of itself.

Flags win over the first two, where a key that is no setting is an error. Each run keeps its resolved settings as
RUN/config.toml, which can be given to --config again.
"""

import json
import sys
import tomllib
import types
import typing
from dataclasses import fields
from pathlib import Path

from bas.config import TrainConfig
from bas.errors import InputError, did_you_mean
from bas.io.files import read_bytes

CONFIG = "config.toml"  # of a run
NOT_KEPT = {"resume_from_checkpoint"}  # where a run went on is no setting of the next one

Kinds = dict[str, tuple[type, bool]]  # the type of one value, and whether there are several


def setting_kinds(settings: type) -> Kinds:
    """The settings of a dataclass and what each of them holds."""
    return {f.name: value_type(f.type) for f in fields(settings)}


def read_config(path: str | None, kinds: Kinds) -> dict:
    """The settings in a TOML file, lists as tuples; none without a path. InputError for what is no setting here."""
    if path is None:
        return {}
    return check_settings(Path(path), read_toml(Path(path)), kinds)


def check_settings(file: Path, settings: dict, kinds: Kinds) -> dict:
    """The settings that a file holds, lists as tuples. InputError for what is no setting here."""
    return {name: _checked(file, name, value, kinds) for name, value in settings.items()}


def read_toml(file: Path) -> dict:
    """The content of a TOML file. Raises InputError when it cannot be read or is none."""
    content = read_bytes(file)
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid TOML: {str(error).splitlines()[0]}") from None


def check_metadata(file: Path, facts: object) -> dict:
    """What a run notes of itself: config, handles, base and version. Raises InputError where one is not as written.

    Another version may have written it: settings that are unknown here stay, those that it lacks are at their defaults.
    """
    kinds = {"config": dict, "handles": list, "base": str, "version": str}
    sound = isinstance(facts, dict) and all(isinstance(facts.get(name), kind) for name, kind in kinds.items())
    if not sound or not facts["handles"] or not all(isinstance(handle, str) for handle in facts["handles"]):
        raise InputError(f"{file} does not hold what bas notes of a run: it was changed, or something else wrote it")
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    config = defaults | facts["config"]
    changed = {name: value for name, value in config.items() if name in defaults and value != defaults[name]}
    check_settings(file, changed, setting_kinds(TrainConfig))
    return facts | {"config": config}


def _checked(file: Path, name: str, value: object, kinds: Kinds) -> object:
    """The value as its setting takes it. Raises InputError for an unknown name or a value of another kind."""
    if name not in kinds:
        raise InputError(f"{file}: unknown setting {name}{did_you_mean(name, kinds)}")
    kind, many = kinds[name]
    values = value if many and isinstance(value, list) else [value]
    if many != isinstance(value, list) or not all(_is_a(entry, kind) for entry in values):
        expected = "a list, each " * many + KIND_NAMES[kind]
        raise InputError(f"{file}: {name} is {value!r:.60}, expected {expected}")
    return tuple(values) if many else kind(value)


KIND_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _is_a(value: object, kind: type) -> bool:
    """Whether a value is of this kind; a whole number that a float can hold is a number too, true and false none."""
    if kind is float and type(value) is int:
        return abs(value) <= sys.float_info.max
    return isinstance(value, kind) and isinstance(value, bool) == (kind is bool)


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


def value_type(annotation) -> tuple[type, bool]:
    """The type of one value and whether the flag takes several: `int | None` is (int, False)."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType), False
    return annotation, False
