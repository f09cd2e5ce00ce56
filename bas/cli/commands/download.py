"""Fetch a known Stable Diffusion checkpoint, or any other by its hub id."""

import argparse

from bas.cli.flags import Parser
from bas.pretrained.hub import download

EXAMPLES = (
    "bas download sd21-base",
    "bas download stable-diffusion-v1-5/stable-diffusion-v1-5 --half",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("name", metavar="NAME", help="a known name, such as sd21-base, or a hub id")
    parser.add_argument("--half", action="store_true", help="fetch the 16-bit files: half the size")


def run(args: argparse.Namespace) -> None:
    """Download, and print the folder."""
    print(download(args.name, args.half))
