"""Place learnt concepts in an image, inside masks. Every pixel outside the masks stays as it is."""

import argparse
import logging
from dataclasses import asdict, fields
from pathlib import Path

from bas.cli.flags import Parser, add_fields, given
from bas.cli.open_model import add_model, find_model, given_additions, open_model
from bas.cli.output_files import add_output_path, check_output_path, warn_of_replacement
from bas.config import EditConfig
from bas.errors import InputError
from bas.io.images import check_room, numbered_paths, read_image, save_images
from bas.models.bundle import ModelSpec
from bas.runtime.progress import ImageProgress
from bas.sampling.blended_diffusion import check_edit, edit_each, read_region, read_regions, skipped_steps
from bas.sampling.layout import mask_files
from bas.sampling.sampler import as_record

log = logging.getLogger(__name__)

EXAMPLES = (
    'bas edit runs/creature --init_image photo.jpg --mask where.png --prompt "a photo of <asset0>"',
    "bas edit runs/creature --init_image photo.jpg --regions edits.json --num_images 4",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    parser.add_argument("--init_image", metavar="FILE", required=True, help="the image to edit")
    parser.add_argument("--mask", metavar="FILE", help="mask image: white where the image may change")
    parser.add_argument("--prompt", metavar="TEXT", help="what to generate inside the mask, e.g. 'a photo of <asset0>'")
    parser.add_argument(
        "--regions",
        metavar="FILE",
        help='several regions, edited in turn: a JSON list [{"mask": FILE, "prompt": TEXT}, ...] '
        "with files relative to it; instead of --mask and --prompt",
    )
    add_output_path(parser, "edited.png")
    add_fields(parser, EditConfig, {f.name for f in fields(EditConfig)} - {"own_pixels"})  # it starts from its image


def run(args: argparse.Namespace) -> None:
    """Edit, and save each image with its settings as soon as it is done."""
    config = EditConfig(**given(args, EditConfig))
    if bool(args.mask) != bool(args.prompt) or bool(args.mask) == bool(args.regions):
        raise InputError("name a region and a prompt: --mask with --prompt, or --regions with a list of both")
    name, file = find_model(args).name, Path(args.init_image)
    image = read_image(file)
    if args.regions:
        regions = read_regions(Path(args.regions), file, image)
    else:
        regions = [read_region(Path(args.mask), args.prompt, file, image)]
    masks = mask_files(Path(config.layout)) if config.layout else []
    inputs = file, *(region.file for region in regions), *masks
    target = check_output_path(args.output_path, config.num_images, *inputs)
    if config.composite and target.suffix.lower() != ".png":
        log.warning("%s: only a .png keeps the pixels outside the mask exactly", target)
    prompts = [region.prompt for region in regions]
    masked = [region.file.name for region in regions if region.file]
    made_from = {"init_image": file.name, "masks": masked, **given_additions(args)}

    def check(spec: ModelSpec) -> None:
        check_edit(spec, image, regions, config)
        check_room(target, image.size, asdict(config) | {"prompts": prompts, "model": name, **made_from})
        warn_of_replacement(numbered_paths(target, config.num_images))

    models = open_model(args, check, [*prompts, config.negative_prompt])
    steps = len(regions) * (config.num_inference_steps - skipped_steps(config))
    images = edit_each(models, image, regions, config, ImageProgress(config.num_images, steps))

    shared = as_record(models, config) | {"prompts": prompts, "model": name}
    records = [shared | {"seed": config.seed + i, **made_from} for i in range(config.num_images)]
    for path in save_images(images, records, target, image.info.get("icc_profile")):
        print(path, flush=True)
