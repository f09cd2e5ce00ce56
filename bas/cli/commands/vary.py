"""Generate all concepts of a run together: one image for each seed, and a grid of all."""

import argparse

from bas.cli.flags import Parser, add_fields, given
from bas.cli.open_model import add_model, find_model, given_additions, open_model
from bas.cli.output_files import add_gallery, gallery_folder, print_gallery
from bas.config import VaryConfig
from bas.sampling.gallery import all_together, vary
from bas.sampling.sampler import check_request

EXAMPLES = ("bas vary runs/creature --num_images 9",)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    add_gallery(parser, "variations")
    add_fields(parser, VaryConfig)


def run(args: argparse.Namespace) -> None:
    """Generate the images, and print where the grid is."""
    config = VaryConfig(**given(args, VaryConfig))
    model = find_model(args)
    folder = gallery_folder(args, model, "variations")
    models = open_model(args, lambda spec: check_request(spec, [all_together(spec)], config))
    print_gallery(vary(models, folder, config, model=model.name, **given_additions(args)))
