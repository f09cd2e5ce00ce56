"""Write a model folder as one .safetensors file in the original layout, as other tools read it."""

import argparse
from pathlib import Path

from bas.checkpoint import load
from bas.flags import Parser
from bas.hub import find
from bas.single_file import save_single_file


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("model", metavar="RUN", help="run or model folder")
    parser.add_argument("output_path", metavar="FILE", help="the .safetensors file to write")


def run(args: argparse.Namespace) -> None:
    """Load strictly, rename, write."""
    target = Path(args.output_path)
    save_single_file(load(find(args.model)), target)
    print(target)
