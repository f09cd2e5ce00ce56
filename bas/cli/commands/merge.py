"""Write a small run and its base as one whole model, which needs no base any more."""

import argparse
from shlex import quote

from bas.cli.flags import Parser
from bas.config import TrainConfig, setting_rows
from bas.errors import InputError
from bas.io.files import new_folder
from bas.io.run_files import TUNED
from bas.pretrained.folder import load, save_model
from bas.pretrained.hub import find
from bas.runtime.device import DTYPES

EXAMPLES = ("bas merge runs/small --into_base --output_dir small_model",)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("run", metavar="RUN", help="a run that keeps its trained weights alone")
    parser.add_argument("--into_base", action="store_true", required=True, help="add the weights to those of the base")
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="new folder to write, which diffusers opens")
    precisions = setting_rows(TrainConfig)["save_precision"].metadata["choices"]
    parser.add_argument(
        "--save_precision", default="fp32", choices=precisions, help="precision of the model (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Load the run as a whole model, and write it."""
    path = find(args.run)
    if not (path / TUNED).is_file():
        raise InputError(f"{path} is no small run: it holds no {TUNED}; a whole model needs no merging")
    folder = new_folder(args.output_dir)
    models = load(path)
    save_model(models, folder, DTYPES[args.save_precision])
    handles = models.handles[0] if models.handles else "a bowl"
    print(f'{folder} is ready. Try: bas sample {quote(str(folder))} --prompt "a photo of {handles} at the beach"')
