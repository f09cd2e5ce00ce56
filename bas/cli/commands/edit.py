"""Edit places of a photograph with learnt concepts, and leave every pixel outside them as it is."""

import argparse
import logging
from dataclasses import asdict
from pathlib import Path

from bas.cli.flags import Parser, add_fields, given
from bas.cli.open_model import add_model, find_model, open_model
from bas.config import EditConfig
from bas.errors import InputError
from bas.io.images import check_not_input, image_path, read_image, save_images
from bas.sampling.blended_diffusion import check_edit, edit, read_region, read_regions

log = logging.getLogger(__name__)


EXAMPLES = (
    'bas edit runs/creature --init_image photo.jpg --mask where.png --prompt "a photo of <asset0>"',
    "bas edit runs/creature --init_image photo.jpg --regions regions.json --num_images 4",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    parser.add_argument("--init_image", metavar="FILE", required=True, help="the photograph to edit")
    parser.add_argument("--mask", metavar="FILE", help="white where the photograph may change")
    parser.add_argument("--prompt", metavar="TEXT", help="what shall be there, e.g. 'a photo of <asset0>'")
    parser.add_argument(
        "--regions",
        metavar="FILE",
        help='several places, edited in turn: a JSON list [{"mask": FILE, "prompt": TEXT}, ...] '
        "with files relative to it; instead of --mask and --prompt",
    )
    parser.add_argument(
        "--output_path", default="edited.png", help="picture to write; several get a number each (default: %(default)s)"
    )
    add_fields(parser, EditConfig)


def run(args: argparse.Namespace) -> None:
    """Edit, and write the pictures, each with the settings that made it."""
    config = EditConfig(**given(args, EditConfig))
    if bool(args.mask) != bool(args.prompt) or bool(args.mask) == bool(args.regions):
        raise InputError("say where and what: --mask with --prompt, or --regions with a list of both")
    target, name, image = image_path(args.output_path), find_model(args).name, Path(args.init_image)
    if config.composite and target.suffix.lower() != ".png":
        log.warning("%s: only a .png keeps the pixels outside the mask exactly", target)
    picture = read_image(image)
    if args.regions:
        regions = read_regions(Path(args.regions), image, picture)
    else:
        regions = [read_region(Path(args.mask), args.prompt, image, picture)]
    check_not_input(target, image, *(region.file for region in regions))
    models = open_model(args, lambda spec: check_edit(spec, picture, regions, config))
    pictures = edit(models, picture, regions, config)

    shared = asdict(config) | {"prompts": [region.prompt for region in regions], "model": name}
    notes = [shared | {"seed": config.seed + i} for i in range(config.num_images)]
    for path in save_images(pictures, notes, target):
        print(path)
