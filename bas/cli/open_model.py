"""The model that a sampling command works with: the flags that name it, opening it, and where its galleries go."""

import argparse
from collections.abc import Callable
from pathlib import Path

from bas.cli.flags import Parser, add_machine
from bas.errors import InputError
from bas.io.files import new_folder
from bas.io.run_files import SETTINGS
from bas.models.bundle import Models, ModelSpec
from bas.pretrained.folder import load, read_spec
from bas.pretrained.hub import find
from bas.runtime.device import DTYPES, pick_device, pick_precision
from bas.web.report import renew_report


def add_model(parser: Parser) -> None:
    """Declare RUN, --model_path, and the two flags of the machine."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="run folder, model folder, .safetensors file or known name"
    )
    parser.add_argument("--model_path", metavar="RUN", help="the same, as the official script names it")
    add_machine(parser)


def add_gallery(parser: Parser, name: str) -> None:
    """Declare --output_dir of a command that draws a gallery."""
    help = f"new folder to write (default: RUN/{name}, which the run's page shows; {name} for other models)"
    parser.add_argument("--output_dir", help=help)


def gallery_folder(args: argparse.Namespace, model: Path, name: str) -> Path:
    """The new folder of a gallery: the one that is named, else one in the run."""
    return new_folder(args.output_dir or str(model / name if (model / SETTINGS).is_file() else name))


def print_gallery(grid: Path) -> None:
    """Print where the grid is, and the page of the run that shows it by now."""
    print(grid)
    if page := renew_report(grid.parent):
        print(page)


def find_model(args: argparse.Namespace) -> Path:
    """Where the model lies. Raises InputError if two are named, or the one that is named is not here."""
    if args.run and args.model_path and args.run != args.model_path:
        raise InputError(f"two models: {args.run} and --model_path {args.model_path}")
    return find(args.run if args.model_path is None else args.model_path)


def open_model(args: argparse.Namespace, check: Callable[[ModelSpec], object]) -> Models:
    """Load the model onto the device and in the precision that the flags ask for; `auto` is what training would take.

    Before any weight is read, `check` sees the model's description: it raises InputError for what it cannot do.
    """
    path, device = find_model(args), pick_device(args.device)
    spec = read_spec(path)
    check(spec)
    return load(path, device=device, dtype=DTYPES[pick_precision(args.precision, device, spec.unet_size)])
