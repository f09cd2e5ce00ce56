"""Generate an image and show where each handle looked: overlays, and the maps as .npy."""

import argparse
from dataclasses import fields

from bas.cli.flags import Parser, add_fields, given
from bas.cli.open_model import add_model, find_model, given_additions, open_model
from bas.config import STEERING, SampleConfig
from bas.io.files import filling, new_folder
from bas.models.bundle import ModelSpec
from bas.runtime.progress import ImageProgress
from bas.sampling.attention_maps import attend, plan_maps, write_attention
from bas.sampling.own_pixels import steps_taken
from bas.sampling.sampler import as_record, check_request

EXAMPLES = ('bas attend runs/creature --prompt "a photo of <asset0> and <asset1> at the beach" --output_dir attention',)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the prompt of the image")
    parser.add_argument("--words", action="store_true", help="write a map of every word, not only of the handles")
    parser.add_argument(
        "--attention_grid",
        type=int,
        metavar="INT",
        help="cells along the shorter side of the maps (default: as in training, or a quarter of the latent's)",
    )
    parser.add_argument(
        "--output_dir", default="attention", metavar="DIR", help="new folder to write (default: %(default)s)"
    )
    add_fields(parser, SampleConfig, {f.name for f in fields(SampleConfig)} - {"num_images", "batch_size"})


def run(args: argparse.Namespace) -> None:
    """Generate the image, write the maps, and print where the sheet is."""
    config, path = SampleConfig(**given(args, SampleConfig)), find_model(args)
    side = args.attention_grid
    folder = new_folder(args.output_dir)

    def check(spec: ModelSpec) -> None:
        check_request(spec, [args.prompt], config)
        plan_maps(spec, args.prompt, config, side, args.words)

    models = open_model(args, check, [args.prompt, config.negative_prompt])
    steered = any(getattr(config, name) for name in STEERING)
    progress = ImageProgress(1, steps_taken(config) + steered * config.num_inference_steps)
    attention = attend(models, args.prompt, config, side, args.words, progress)
    settings = as_record(models, config) | {"prompt": args.prompt, "model": path.name, **given_additions(args)}
    with filling(folder) as place:
        sheet = write_attention(attention, models.handles, place, settings)
    print(folder / sheet.name)
