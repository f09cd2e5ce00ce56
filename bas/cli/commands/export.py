"""Write a model folder as one .safetensors file in the original layout, as other tools read it."""

import argparse
from pathlib import Path

from bas.cli.flags import Parser
from bas.cli.open_model import add_prediction_type
from bas.cli.output_files import warn_of_replacement
from bas.errors import InputError
from bas.pretrained.folder import load, read_spec
from bas.pretrained.hub import find
from bas.pretrained.single_file import save_single_file

EXAMPLES = ("bas export my_model model.safetensors",)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("model", metavar="MODEL", help="a model without handles: a folder or a known name")
    parser.add_argument("output_path", metavar="FILE", help="the .safetensors file to write")
    add_prediction_type(parser)


def run(args: argparse.Namespace) -> None:
    """Check everything that needs no weights; then load strictly, rename the keys, and write."""
    target, path = Path(args.output_path), find(args.model)
    if target.suffix != ".safetensors" or target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target}: name a .safetensors file in an existing folder")
    if handles := read_spec(path, args.prediction_type).handles:
        raise InputError(
            f"{path} has the handles {' '.join(handles)}: a single file cannot hold them, use the folder itself"
        )
    warn_of_replacement([target])
    save_single_file(load(path, prediction_type=args.prediction_type), target)
    print(target)
