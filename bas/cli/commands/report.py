"""Write the report of a run, RUN/report.html, from what the run folder holds now."""

import argparse
from pathlib import Path

from bas.cli.flags import Parser
from bas.web.report import write_report

EXAMPLES = ("bas report runs/creature",)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("run", metavar="RUN", help="run folder, finished or still training")


def run(args: argparse.Namespace) -> None:
    """Write the page, and print its path."""
    print(write_report(Path(args.run)))
