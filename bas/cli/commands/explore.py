"""Generate every combination of a run's concepts in every context: single images, and one labelled grid."""

import argparse

from bas.cli.flags import Parser, add_fields, given
from bas.cli.open_model import add_model, find_model, given_additions, open_model
from bas.cli.output_files import add_gallery, gallery_folder, print_gallery
from bas.config import SampleConfig
from bas.sampling.gallery import CONTEXTS, combinations_in, explore
from bas.sampling.sampler import check_request

EXAMPLES = (
    "bas explore runs/creature",
    'bas explore runs/creature --contexts "at the beach" "in a box" --output_dir exploration',
)


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
    add_gallery(parser, "exploration")
    add_fields(parser, SampleConfig)


def run(args: argparse.Namespace) -> None:
    """Generate the images, and print where the grid is."""
    config = SampleConfig(**given(args, SampleConfig))
    model = find_model(args)
    folder = gallery_folder(args, model, "exploration")
    contexts = tuple(args.contexts)
    models = open_model(args, lambda spec: check_request(spec, combinations_in(spec, contexts), config))
    print_gallery(explore(models, folder, contexts, config, model=model.name, **given_additions(args)))
