"""Generate pictures from prompts, with a run's handles or with any Stable Diffusion model."""

import argparse
from dataclasses import asdict, dataclass

from bas.cli.flags import Parser, add_config, add_fields, given
from bas.cli.open_model import add_model, find_model, open_model
from bas.config import SampleConfig, Settings, setting, setting_rows
from bas.errors import InputError
from bas.io.figures import grid
from bas.io.images import image_path, save_images
from bas.io.settings_file import read_config
from bas.sampling.sampler import check_request, sample_each


@dataclass(frozen=True)
class Request(Settings):
    """What --config may hold beside SampleConfig."""

    prompt: tuple[str, ...] = setting((), "one prompt or several")
    model_path: str | None = setting(None, "run, model folder, .safetensors file or known name")


EXAMPLES = (
    'bas sample runs/creature --prompt "a photo of <asset0> at the beach" --output_path creature.png',
    'bas sample runs/creature --prompt "a photo of (<asset0>:1.3) and <asset1>" --num_images 4 --grid',
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    parser.add_argument("--prompt", nargs="+", action="extend", help="one prompt or several, each in quotes")
    parser.add_argument(
        "--output_path", default="result.png", help="picture to write; several get a number each (default: %(default)s)"
    )
    parser.add_argument("--grid", action="store_true", help="all pictures on one labelled sheet, a row per prompt")
    add_config(parser)
    add_fields(parser, SampleConfig)


def run(args: argparse.Namespace) -> None:
    """Sample and write the pictures, each with the settings that made it."""
    settings = read_config(args.config, setting_rows(SampleConfig) | setting_rows(Request))
    prompt, model = settings.pop("prompt", None), settings.pop("model_path", None)
    args.prompt = args.prompt or list(prompt or ())
    if args.model_path is None and args.run is None:
        args.model_path = model
    if not args.prompt:
        raise InputError('say what to draw: --prompt "a photo of <asset0> at the beach"')
    config = SampleConfig(**{**settings, **given(args, SampleConfig)})
    target, name = image_path(args.output_path), find_model(args).name
    models = open_model(args, lambda spec: check_request(spec, args.prompt, config))
    pictures = sample_each(models, args.prompt, config)

    jobs = [(prompt, config.seed + i) for prompt in args.prompt for i in range(config.num_images)]
    notes = [asdict(config) | {"prompt": prompt, "seed": seed, "model": name} for prompt, seed in jobs]
    if args.grid:
        rows = [range(i, i + config.num_images) for i in range(0, len(jobs), config.num_images)]
        labels = [[f"{jobs[i][0]}, seed {jobs[i][1]}" for i in row] for row in rows]
        pictures = list(pictures)
        cell = max(192, min(512, pictures[0].width))
        pictures = [grid([[pictures[i] for i in row] for row in rows], labels, cell)]
        notes = [asdict(config) | {"prompts": args.prompt, "model": name}]
    for path in save_images(pictures, notes, target):
        print(path, flush=True)
