"""Settings in files: the TOML file of --config, the bas.json of a model, the metadata of a run.

Flags win over the first two. Each run keeps its resolved settings as RUN/config.toml, which --config takes again.
"""

import json
import tomllib
from collections import Counter
from dataclasses import Field
from pathlib import Path
from typing import Any, cast

from bas.config import TrainConfig, check_setting, setting_rows
from bas.errors import InputError, did_you_mean
from bas.io.files import read_bytes
from bas.io.json_files import check_shape, decode_text

CONFIG = "config.toml"  # of a run
METADATA = {"config": dict, "handles": [str], "base": str, "version": str}
MERGED = {"runs": [str], "weights": [(int, float)], "drift": {...: (int, float)}}  # of a merged run
RETIRED = {"cuda_graphs": False, "fused_kernels": False, "unet_layers": "all"}  # of earlier versions, with no effect
NOT_KEPT = {"resume_from_checkpoint"}  # the checkpoint that a run continued is not a setting of the next run


def read_config(path: str | None, known: dict[str, Field]) -> dict[str, Any]:
    """Read the settings in a TOML file; none without a path. Raises as `check_settings`."""
    if path is None:
        return {}
    return check_settings(Path(path), read_toml(Path(path)), known)


def check_settings(file: Path, settings: dict[str, Any], known: dict[str, Field]) -> dict[str, Any]:
    """Return the settings that a file holds, lists as tuples. InputError for an unknown name or a wrong value."""
    settings = {name: value for name, value in settings.items() if (name, value) not in RETIRED.items()}
    for flag, name in flags_of(known).items():
        if flag in settings:
            if name in settings:
                raise InputError(f"{file}: {flag} and {name} are one setting: leave out one of them")
            settings[name] = settings.pop(flag)
    for name in sorted(settings.keys() - known.keys()):
        plain = name.lstrip("-").replace("-", "_")
        for row in known.values():
            if row.type is bool and f"--{plain}" in (f"--no_{row.name}", *row.metadata["flag"]):
                raise InputError(f"{file}: {name} is a flag of the command: in a file write {row.name} = false")
        raise InputError(f"{file}: unknown setting {name}{did_you_mean(name, known)}")
    return {name: check_setting(known[name], value, f"{file}: {name}") for name, value in settings.items()}


def flags_of(known: dict[str, Field]) -> dict[str, str]:
    """Return the settings whose flag has another name, by that name, as `weights` for the base model; no switches."""
    rows = [row for row in known.values() if row.type is not bool]
    names = {flag.lstrip("-"): row.name for row in rows for flag in row.metadata["flag"]}
    return {flag: name for flag, name in names.items() if flag not in known}


def read_toml(file: Path) -> dict:
    """Read a TOML file. InputError if it cannot be read or is not TOML."""
    content = read_bytes(file)
    try:
        return tomllib.loads(decode_text(content))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid TOML: {str(error).splitlines()[0]}") from None


def check_metadata(file: Path, metadata: object) -> dict[str, Any]:
    """Return a run's metadata: its settings, handles, base and version. InputError if a part is missing or wrong.

    Another version of bas may have written it. Settings that are unknown here stay; those that it lacks get their
    defaults; ranges and choices may have changed, so only types are checked.
    """
    try:
        check_shape(metadata, METADATA)
        record = cast(dict[str, Any], metadata)
        if not record["handles"]:
            raise ValueError("handles is []")
        if twice := [name for name, times in Counter(record["handles"]).items() if times > 1]:
            raise ValueError(f"handles holds {twice[0]} twice")
        if "merged" in record:
            check_shape(record["merged"], MERGED, "merged")
            if len(record["merged"]["runs"]) != len(record["merged"]["weights"]):
                raise ValueError("merged has not a weight for each of its runs")
    except ValueError as error:
        raise InputError(f"{file} is not as bas wrote it ({error}): restore it from a copy, or train again") from None
    rows = setting_rows(TrainConfig)
    config = {name: row.default for name, row in rows.items()} | record["config"]
    for name, row in rows.items():
        if config[name] != row.default:
            check_setting(row, config[name], f"{file}: {name}", limits=False)
    return record | {"config": config}


def to_toml(settings: dict) -> str:
    """Write settings as a TOML file that `read_config` takes, without those that are None."""
    kept = {name: value for name, value in settings.items() if value is not None and name not in NOT_KEPT}
    return "".join(f"{name} = {_literal(value)}\n" for name, value in kept.items())


def _literal(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):  # TOML's strings are JSON's, but for the character DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
