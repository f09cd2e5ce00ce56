"""Settings in files: in TOML for --config, in a model's own row, and in what a run notes of itself.

Flags win over the first two, where a key that is no setting is an error. Each run keeps its resolved settings as
RUN/config.toml, which can be given to --config again.
"""

import json
import tomllib
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from bas.config import TrainConfig, check_setting, setting_rows
from bas.errors import InputError, did_you_mean
from bas.io.files import read_bytes
from bas.io.json_files import decode_text

CONFIG = "config.toml"  # of a run
NOT_KEPT = {"resume_from_checkpoint"}  # where a run went on is no setting of the next one


def read_config(path: str | None, known: dict[str, Field]) -> dict[str, Any]:
    """The settings in a TOML file, lists as tuples; none without a path. InputError for what is no setting here."""
    if path is None:
        return {}
    return check_settings(Path(path), read_toml(Path(path)), known)


def check_settings(file: Path, settings: dict[str, Any], known: dict[str, Field]) -> dict[str, Any]:
    """The settings that a file holds, lists as tuples. InputError for an unknown name or a wrong value."""
    for name in settings.keys() - known.keys():
        for row in known.values():
            if row.type is bool and f"--{name}" in (f"--no_{row.name}", *row.metadata["flag"]):
                raise InputError(f"{file}: {name} is a flag of the command: in a file write {row.name} = false")
        raise InputError(f"{file}: unknown setting {name}{did_you_mean(name, known)}")
    return {name: check_setting(known[name], value, f"{file}: {name}") for name, value in settings.items()}


def read_toml(file: Path) -> dict:
    """The content of a TOML file. Raises InputError when it cannot be read or is none."""
    content = read_bytes(file)
    try:
        return tomllib.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid TOML: {str(error).splitlines()[0]}") from None


def check_metadata(file: Path, facts: object) -> dict:
    """What a run notes of itself: config, handles, base and version. Raises InputError where one is not as written.

    Another version may have written it: settings that are unknown here stay, those that it lacks are at their defaults.
    """
    kinds = {"config": dict, "handles": list, "base": str, "version": str}
    if not (
        isinstance(facts, dict)
        and all(isinstance(facts.get(name), kind) for name, kind in kinds.items())
        and facts["handles"]
        and all(isinstance(handle, str) for handle in facts["handles"])
    ):
        raise InputError(f"{file} does not hold what bas notes of a run: it was changed, or something else wrote it")
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    config = defaults | facts["config"]
    changed = {name: value for name, value in config.items() if name in defaults and value != defaults[name]}
    check_settings(file, changed, setting_rows(TrainConfig))
    return facts | {"config": config}


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
