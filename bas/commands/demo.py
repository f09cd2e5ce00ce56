"""Show the whole method in minutes: train on the shipped miniature's scene and draw one picture of the result."""

import argparse
from pathlib import Path

from bas.demo import demo
from bas.flags import Parser
from bas.report import write_report

EXAMPLES = ("bas demo --output_dir demo",)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("--output_dir", default="demo", help="run folder to write (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")


def run(args: argparse.Namespace) -> None:
    """Run it, and print where the picture and the page of the run are."""
    print(demo(Path(args.output_dir), args.device))
    print(write_report(Path(args.output_dir)))
