"""Generate images from prompts, with a run's handles or with any Stable Diffusion model."""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bas.cli.flags import Parser, add_config, add_fields, given
from bas.cli.open_model import ADDITIONS, add_model, find_model, given_additions, open_model
from bas.cli.output_files import add_output_path, check_output_path, warn_of_replacement
from bas.config import SampleConfig, Settings, setting, setting_rows
from bas.errors import InputError
from bas.io.figures import grid, grid_size
from bas.io.images import check_room, numbered_paths, save_images
from bas.io.settings_file import read_config
from bas.models.bundle import ModelSpec
from bas.runtime.progress import ImageProgress
from bas.sampling.layout import mask_files
from bas.sampling.own_pixels import steps_taken
from bas.sampling.sampler import as_record, check_request, sample_each


@dataclass(frozen=True)
class Request(Settings):
    """What --config may hold beside SampleConfig."""

    prompt: tuple[str, ...] = setting((), "one prompt or several")
    model_path: str | None = setting(None, "run, model folder, .safetensors file or known name")
    lora: tuple[str, ...] = setting((), "LoRA files, FILE or FILE:WEIGHT")
    embedding: tuple[str, ...] = setting((), "embedding files")
    vae: str | None = setting(None, "a VAE to use in place of the model's")
    clip_skip: int | None = setting(None, "which layer of the text encoder is read", least=1)


EXAMPLES = (
    'bas sample runs/creature --prompt "a photo of <asset0> at the beach" --output_path creature.png',
    'bas sample runs/creature --prompt "a photo of (<asset0>:1.3) and <asset1>" --num_images 4 --grid',
    'bas sample runs/creature --prompt "a photo of <asset0> and <asset1>" --separate',
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    add_model(parser)
    parser.add_argument(
        "--prompt", nargs="+", action="extend", metavar="TEXT", help="one prompt or several, each in quotes"
    )
    add_output_path(parser, "result.png")
    parser.add_argument("--grid", action="store_true", help="put all images into one labelled grid, a row per prompt")
    add_config(parser)
    add_fields(parser, SampleConfig)


def run(args: argparse.Namespace) -> None:
    """Generate the images, and save each with its settings as soon as it is done, or all as one grid."""
    settings = read_config(args.config, setting_rows(SampleConfig) | setting_rows(Request))
    prompt, model = settings.pop("prompt", None), settings.pop("model_path", None)
    for name in ADDITIONS:
        value = settings.pop(name, None)
        if value is not None and getattr(args, name) in (None, []):
            setattr(args, name, value)
    prompts: list[str] = args.prompt or list(prompt or ())
    if args.model_path is None and args.run is None:
        args.model_path = model
    if not prompts:
        raise InputError('no prompt: add --prompt "a photo of <asset0> at the beach"')
    config = SampleConfig(**{**settings, **given(args, SampleConfig)})
    jobs = [(prompt, config.seed + i) for prompt in prompts for i in range(config.num_images)]
    masks = mask_files(Path(config.layout)) if config.layout else []
    count, name = 1 if args.grid else len(jobs), find_model(args).name
    target = check_output_path(args.output_path, count, *masks)
    starts = range(0, len(jobs), config.num_images)
    labels = [[f"{prompt}, seed {seed}" for prompt, seed in jobs[i : i + config.num_images]] for i in starts]

    def check(spec: ModelSpec) -> None:
        check_request(spec, prompts, config)
        height, width = config.height or spec.resolution, config.width or spec.resolution
        size = grid_size(labels, cell_of(width)) if args.grid else (width, height)
        texts = prompts if args.grid else max(prompts, key=len)
        check_room(target, size, asdict(config) | {"prompts": texts, "model": name, **given_additions(args)})
        warn_of_replacement(numbered_paths(target, count))

    models = open_model(args, check, [*prompts, config.negative_prompt])
    progress = ImageProgress(len(jobs), steps_taken(config))
    images = sample_each(models, prompts, config, progress)
    shared = as_record(models, config) | {"model": name, **given_additions(args)}
    if args.grid:
        save_grid(images, prompts, labels, shared, target)
        return
    records = [shared | {"prompt": prompt, "seed": seed} for prompt, seed in jobs]
    for path in save_images(images, records, target):
        print(path, flush=True)


def save_grid(
    images: Iterable[Image.Image], prompts: list[str], labels: list[list[str]], shared: dict[str, Any], target: Path
) -> None:
    """Save a grid with a row of images for each prompt, with the settings that all share, and print its path.

    If an interrupt or an error ends the images early, those that are done are saved beside it, as NAME-partial.
    """
    done, place = [], target.with_stem(f"{target.stem}-partial")
    try:
        for image in images:
            done.append(image)
        place = target
    finally:
        if done:
            columns = len(labels[0])
            rows = [done[i : i + columns] for i in range(0, len(done), columns)]
            below = [texts[: len(row)] for texts, row in zip(labels[: len(rows)], rows, strict=True)]
            sheet, record = grid(rows, below, cell_of(done[0].width)), shared | {"prompts": prompts[: len(rows)]}
            for path in save_images([sheet], [record], place):
                print(path, flush=True)


def cell_of(width: int) -> int:
    """Return the side of a grid's cell, in pixels, for images of this width."""
    return max(192, min(512, width))
