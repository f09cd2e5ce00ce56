"""Say what a file or a folder is and whether it loads; without a path, describe this machine."""

import argparse
import json

from bas.cli.flags import Parser
from bas.cli.inspection import as_text, describe, describe_machine
from bas.cli.open_model import add_base, add_prediction_type, find_base
from bas.pretrained.hub import find

EXAMPLES = (
    "bas info",
    "bas info runs/creature",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("path", metavar="PATH", nargs="?", help="a file, a folder, a known name or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    parser.add_argument("--no_hash", action="store_true", help="skip the hash, for which all weights are read once")
    add_prediction_type(parser)
    add_base(parser)


def run(args: argparse.Namespace) -> None:
    """Print the description."""
    if args.path is not None:
        path = find(args.path)
        details = {"path": str(path), **describe(path, not args.no_hash, args.prediction_type, find_base(args))}
    else:
        details = describe_machine()
    print(json.dumps(details, indent=2) if args.json else as_text(details))
