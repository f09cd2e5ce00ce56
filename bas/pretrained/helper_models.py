"""Pretrained models of transformers that bas uses and never trains: found on this machine, read from safetensors.

A name is a folder or a hub id that was downloaded before. The network is never asked, and no code of a model is run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bas.errors import InputError
from bas.io.json_files import read_json
from bas.models.bundle import is_finite
from bas.models.text import load_tokenizer
from bas.pretrained.hub import HUB_ID, cached
from bas.pretrained.loading import blaming

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def find_helper(name: str, flag: str) -> Path:
    """Find the folder of a model: a path, or a hub id that was downloaded before. Errors name `flag`."""
    path = os.path.expanduser(name)  # those of Path raise for an unknown user, and for a name too long
    if os.path.isdir(path):
        return Path(path)
    if HUB_ID.fullmatch(name):
        if config := cached(name, "config.json"):
            return config.parent
        raise InputError(f"{name} is not downloaded yet: run `hf download {name}`, or name a folder with {flag}")
    raise InputError(f"{flag} {name} is neither a folder nor a hub id such as owner/model")


def load_helper(folder: Path, kind: str, model: str, processor: str, **options: Any) -> tuple[torch.nn.Module, Any]:
    """Load a model and its processor: of the right kind, from safetensors, with every weight.

    kind: the model_type that its config.json must have; model, processor: class names in transformers; options: of the
    model. Raises InputError for anything else, and for weights that are not finite.
    """
    found = read_json(folder / "config.json").get("model_type")
    if found != kind:
        raise InputError(f"{folder} is a model of type {found}: this method needs {kind}")
    import transformers  # slow to import: errors in the input are raised before

    transformers.logging.disable_progress_bar()  # it would mix with the command's own bar
    try:
        with blaming(folder):
            prepare = getattr(transformers, processor).from_pretrained(str(folder), local_files_only=True)
            network, report = getattr(transformers, model).from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
    except ImportError as error:  # Mask2Former's loss, which is built with the model, needs scipy
        raise InputError(f"{kind} needs one more package: {str(error).strip().splitlines()[0]}") from error
    if report["missing_keys"]:
        raise InputError(f"{folder} lacks {len(report['missing_keys'])} weights, {min(report['missing_keys'])} first")
    if broken := [name for name, tensor in network.state_dict().items() if not is_finite(tensor)]:
        raise InputError(
            f"{folder} holds {len(broken)} weights that are not finite numbers, {broken[0]} first: download it again"
        )
    return network.eval(), prepare


def load_words(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer in the folder of a CLIP. Raises InputError for a damaged one."""
    with blaming(folder):
        return load_tokenizer(folder)
