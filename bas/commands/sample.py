"""Generate pictures from prompts, with a run's handles or with any Stable Diffusion model."""

import argparse
from dataclasses import asdict
from pathlib import Path

from bas.checkpoint import load
from bas.config import InputError, SampleConfig
from bas.flags import Parser, add_fields, add_machine, given
from bas.hub import find
from bas.machine import DTYPES, pick_device, pick_precision
from bas.pictures import grid, picture_path, save_picture
from bas.sample import sample


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="run folder, model folder, .safetensors file or known name"
    )
    parser.add_argument("--model_path", metavar="RUN", help="the same, as the official script names it")
    parser.add_argument("--prompt", nargs="+", required=True, help="one prompt or several, each in quotes")
    parser.add_argument(
        "--output_path", default="result.png", help="picture to write; several get a number each (default: %(default)s)"
    )
    parser.add_argument("--grid", action="store_true", help="all pictures on one labelled sheet, a row per prompt")
    add_machine(parser)
    add_fields(parser, SampleConfig)


def run(args: argparse.Namespace) -> None:
    """Sample and write the pictures, each with the settings that made it."""
    config = SampleConfig(**given(args, SampleConfig))
    if args.run and args.model_path and args.run != args.model_path:
        raise InputError(f"two models: {args.run} and --model_path {args.model_path}")
    target, path = picture_path(args.output_path), find(args.model_path or args.run)
    device = pick_device(args.device)
    models = load(path, device=device, dtype=DTYPES[pick_precision(args.precision, device)])
    pictures = sample(models, args.prompt, config)

    jobs = [(prompt, config.seed + i) for prompt in args.prompt for i in range(config.num_images)]
    notes = [asdict(config) | {"prompt": prompt, "seed": seed, "model": path.name} for prompt, seed in jobs]
    if args.grid:
        rows = [range(i, i + config.num_images) for i in range(0, len(jobs), config.num_images)]
        labels = [[f"{jobs[i][0]}, seed {jobs[i][1]}" for i in row] for row in rows]
        cell = max(192, min(512, pictures[0].width))
        pictures = [grid([[pictures[i] for i in row] for row in rows], labels, cell)]
        notes = [asdict(config) | {"prompts": args.prompt, "model": path.name}]
    write(pictures, notes, target)


def write(pictures: list, notes: list[dict], target: Path) -> None:
    """One picture under the name given, several with a number each; print every path."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for i, (picture, note) in enumerate(zip(pictures, notes, strict=True)):
        file = target if len(pictures) == 1 else target.with_stem(f"{target.stem}-{i}")
        save_picture(picture, file, note)
        print(file)
