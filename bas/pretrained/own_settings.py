"""The settings that suit a model, in its folder's bas.json: for its training, and for the images that it generates.

    {"train": {"attention_grid": 16, ...}, "sample": {"guidance_scale": 3.0}}

Those of training come between the defaults and the preset. Those of sampling take the place of the defaults.
"""

from pathlib import Path
from typing import Any

from bas.config import SampleConfig, TrainConfig, setting_rows
from bas.errors import InputError, shown
from bas.io.files import reading
from bas.io.json_files import read_json, write_json
from bas.io.settings_file import check_settings
from bas.presets import OF_A_MODEL, SAMPLING_OF_A_MODEL

OWN_SETTINGS = "bas.json"
USES = {  # by name in the file: all settings of the use, those that a model may set, and what they are about
    "train": (TrainConfig, OF_A_MODEL, "how it is trained"),
    "sample": (SampleConfig, SAMPLING_OF_A_MODEL, "how its images are sampled"),
}


def read_stored(folder: Path) -> dict[str, Any] | None:
    """Read the bas.json of a model folder, None where it has none. Of its content only the uses are checked.

    InputError if it cannot be read, and for anything beside the uses.
    """
    path = folder / OWN_SETTINGS
    with reading(path):
        stored = read_json(path) if path.is_file() else None
    if stored is not None and (others := sorted(stored.keys() - USES.keys())):
        raise InputError(f"{path} holds {shown(others[0])}: expected {' and '.join(USES)} alone; remove it there")
    return stored


def read_own_settings(folder: Path, use: str) -> dict[str, Any] | None:
    """Read the settings for one of USES in a model folder; None where it has no bas.json. InputError for wrong ones."""
    path, stored = folder / OWN_SETTINGS, read_stored(folder)
    if stored is None:
        return None
    row = stored.get(use, {})
    if not isinstance(row, dict):
        raise InputError(f"{path}: {use} is {shown(row)}, expected settings by name")
    settings, allowed, about = USES[use]
    known = setting_rows(settings)
    if others := sorted((row.keys() & known.keys()) - {*allowed}):
        raise InputError(f"{path} sets {', '.join(others)}: a model may set only {about}; remove it there")
    return check_settings(path, row, known)


def write_own_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings, by use. Without any, no file is written."""
    if kept := {use: row for use, row in settings.items() if row}:
        write_json(folder / OWN_SETTINGS, kept)
