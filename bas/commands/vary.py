"""Draw all concepts of a run together, again and again: one picture for each seed, and a grid of all."""

import argparse

from bas.commands.model import add_model, find_model, open_model
from bas.config import VaryConfig
from bas.files import new_folder
from bas.flags import Parser, add_fields, given
from bas.gallery import all_together, vary
from bas.sample import check_request


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    parser.add_argument("--output_dir", default="variations", help="new folder to write (default: %(default)s)")
    add_fields(parser, VaryConfig)


def run(args: argparse.Namespace) -> None:
    """Draw, and print where the grid is."""
    config = VaryConfig(**given(args, VaryConfig))
    find_model(args)
    folder = new_folder(args.output_dir)
    models = open_model(args, lambda models: check_request(models, [all_together(models)], config))
    print(vary(models, folder, config))
