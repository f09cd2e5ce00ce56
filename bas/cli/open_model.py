"""The model of a command that generates images: the flags that name it, and opening it."""

import argparse
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from shlex import quote
from typing import Any

from bas.cli.flags import Parser, add_machine
from bas.errors import InputError
from bas.io.run_files import CONCEPTS, MODEL_INDEX, SETTINGS
from bas.models.bundle import COMPONENTS, Models, ModelSpec
from bas.pretrained.additions import Additions
from bas.pretrained.embedding_files import handle_of
from bas.pretrained.folder import load, read_spec
from bas.pretrained.hub import WEIGHT_FILES, find, manifest
from bas.runtime.device import DTYPES, pick_device, pick_precision
from bas.schedulers import PREDICTION_TYPES

log = logging.getLogger(__name__)

ADDITIONS = ("lora", "embedding", "vae", "clip_skip")  # flags that add to a model, or change it
READING = ("prediction_type", "base")  # flags that say how a model is read
# Flags that take every value after them, a RUN too: those of texts, which name no file, and those of weight files.
OF_TEXTS, OF_FILES = ("prompt", "contexts"), ("lora", "embedding")


def add_prediction_type(parser: Parser) -> None:
    """Declare --prediction_type."""
    parser.add_argument(
        "--prediction_type",
        choices=PREDICTION_TYPES,
        help="what the model predicts, if its files do not say it or say it wrongly",
    )


def add_base(parser: Parser) -> None:
    """Declare --base."""
    parser.add_argument("--base", metavar="MODEL", help="where the base of a small run is, if it was moved")


def find_base(args: argparse.Namespace) -> Path | None:
    """Find what --base names, None without it."""
    return None if args.base is None else find(args.base)


def add_model(parser: Parser) -> None:
    """Declare RUN, --model_path, --prediction_type, --base, what changes the model, and the flags of the machine."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="run folder, model folder, .safetensors file or known name"
    )
    parser.add_argument("--model_path", metavar="RUN", help="RUN under the flag of the official script")
    add_prediction_type(parser)
    parser.add_argument(
        "--lora", nargs="+", action="extend", metavar="FILE", default=[], help="add a LoRA file, FILE or FILE:WEIGHT"
    )
    parser.add_argument(
        "--embedding", nargs="+", action="extend", metavar="FILE", default=[], help="add an embedding file as <FILE>"
    )
    parser.add_argument("--vae", metavar="FILE", help="a VAE to use in place of the model's: a file or a folder")
    parser.add_argument(
        "--clip_skip",
        type=int,
        metavar="INT",
        help="which layer of the text encoder is read: 1 the last, 2 the last but one (default: the model's own)",
    )
    add_base(parser)
    add_machine(parser)


def find_model(args: argparse.Namespace) -> Path:
    """Find the model on this machine. It is the miniature if none is named, which is logged.

    InputError if two are named, if the named one is not here, or if another flag took it as its last value.
    """
    if args.run and args.model_path and args.run != args.model_path:
        raise InputError(f"two models: {args.run} and --model_path {args.model_path}")
    named = args.run if args.model_path is None else args.model_path
    if named is None:
        check_taken(args)
        log.info("no RUN is named: the miniature generates the images", extra={"once": True})
    return find(named)


def check_taken(args: argparse.Namespace) -> None:
    """InputError if the last value of a flag with several values is a model: it is RUN in the wrong place."""
    for name in (*OF_TEXTS, *OF_FILES):
        values = getattr(args, name, None)
        if isinstance(values, list) and values and is_model(values[-1], files=name in OF_TEXTS):
            run = quote(values[-1])
            raise InputError(f"--{name} takes {run} as its own, and no RUN is named: write {run} before --{name}")


def is_model(name: str, files: bool) -> bool:
    """Return whether a text is a known name, or the path of a run or a model. files: whether of a weight file too"""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return any(os.path.exists(os.path.join(path, each)) for each in (CONCEPTS, SETTINGS, MODEL_INDEX, *COMPONENTS))
    return name in manifest() or (files and Path(path).suffix in WEIGHT_FILES and os.path.isfile(path))


def given_additions(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that added to the model, changed it or said how it is read, for the settings of an image."""
    return {name: value for name in (*ADDITIONS, *READING) if (value := getattr(args, name)) not in (None, [])}


def open_model(
    args: argparse.Namespace, check: Callable[[ModelSpec], object], texts: Iterable[str] | None = None
) -> Models:
    """Load the model onto the device and in the precision of the flags; `auto` is the precision of training.

    `check` sees the model's description before any weight is read, and raises InputError for what it cannot do.
    texts: all prompts, where these alone name handles; a warning names an embedding that none of them names.
    """
    path, device, base = find_model(args), pick_device(args.device), find_base(args)
    additions = Additions.read(args.lora, args.embedding, args.vae, args.clip_skip)
    additions = None if additions == Additions() else additions
    spec = read_spec(path, args.prediction_type, additions, base)
    check(spec)
    if texts is not None and additions:
        warn_of_unused(additions.embeddings, " ".join(texts))
    dtype = DTYPES[pick_precision(args.precision, device, spec.unet_size)]
    return load(path, device, dtype, args.prediction_type, additions, base)


def warn_of_unused(embeddings: Iterable[Path], text: str) -> None:
    """Warn of embeddings whose handles no prompt names: without brackets a name is an ordinary word."""
    for path in embeddings:
        if handle_of(path) not in text:
            log.warning("--embedding %s has no effect: no prompt names %s, with < >", path, handle_of(path))
