"""Learn the concepts of one scene: two phases, then a tuned model in the run folder."""

import argparse

import torch

from bas.config import InputError, RunError, TrainConfig
from bas.config_file import add_config, read_config, setting_kinds
from bas.dry_run import dry_run, memory_advice
from bas.flags import Parser, add_fields, given
from bas.hub import find, read_model_row
from bas.info import as_text
from bas.report import write_report
from bas.run_folder import read_concepts
from bas.train import train

EXAMPLES = (
    "bas train my_scene --initializer_tokens creature bowl stone --output_dir runs/creature",
    "bas train my_scene --config runs/creature/config.toml --output_dir runs/again --dry_run",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("scene", metavar="SCENE", nargs="?", help="folder with img.* and mask0.png, mask1.png, ...")
    add_config(parser)
    parser.add_argument(
        "--dry_run", action="store_true", help="say what would be done and what it takes; write nothing"
    )
    add_fields(parser, TrainConfig)


def run(args: argparse.Namespace) -> None:
    """Train, and say how to sample from the result."""
    flags = given(args, TrainConfig)
    if args.scene and flags.setdefault("instance_data_dir", args.scene) != args.scene:
        raise InputError(f"two scenes: {args.scene} and --instance_data_dir {flags['instance_data_dir']}")
    explicit = {**read_config(args.config, setting_kinds(TrainConfig)), **flags}
    if not explicit.get("instance_data_dir"):
        raise InputError("name a scene folder: bas train SCENE, with img.jpg and mask0.png, mask1.png, ...")
    row = read_model_row(find(explicit.get("pretrained_model_name_or_path")))
    config = TrainConfig.resolve(explicit, row)
    if args.dry_run:
        print(as_text(dry_run(config)))
        return
    try:
        folder = train(config)
    except torch.OutOfMemoryError as error:
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        raise RunError(memory_advice(config, used)) from error
    handles = read_concepts(folder)[1]
    print(f"{write_report(folder)} shows how it went")
    print(f'{folder} is ready. Try: bas sample {folder} --prompt "a photo of {handles[0]} at the beach"')
