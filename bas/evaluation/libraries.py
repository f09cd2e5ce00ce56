"""The libraries of the `evaluation` extra, imported where they are first needed: scipy and matplotlib."""

import importlib
from types import ModuleType

from bas.errors import InputError


def optional_library(name: str) -> ModuleType:
    """Import a module of the `evaluation` extra, such as scipy.stats. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        extra = "pip install -c constraints.txt -e '.[evaluation]' in bas's folder"
        raise InputError(f"{package} is not installed: pip install {package}, or {extra}") from error
