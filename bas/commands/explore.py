"""Draw every combination of a run's concepts in every context: single pictures, and one labelled grid."""

import argparse

from bas.commands.model import add_model, find_model, open_model
from bas.config import SampleConfig
from bas.files import new_folder
from bas.flags import Parser, add_fields, given
from bas.gallery import CONTEXTS, combinations_in, explore
from bas.sample import check_request


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    parser.add_argument(
        "--contexts",
        nargs="+",
        metavar="TEXT",
        default=CONTEXTS,
        help="what follows 'a photo of ...' in each prompt (default: the paper's ten, 'at the beach' and so on)",
    )
    parser.add_argument("--output_dir", default="exploration", help="new folder to write (default: %(default)s)")
    add_fields(parser, SampleConfig)


def run(args: argparse.Namespace) -> None:
    """Draw, and print where the grid is."""
    config = SampleConfig(**given(args, SampleConfig))
    find_model(args)
    folder = new_folder(args.output_dir)
    contexts = tuple(args.contexts)
    models = open_model(args, lambda models: check_request(models, combinations_in(models, contexts), config))
    print(explore(models, folder, contexts, config))
