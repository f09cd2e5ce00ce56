"""Merge small runs into one with the concepts of all, or one small run into its base as a whole model."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from bas.cli.flags import Parser
from bas.cli.open_model import add_base, find_base
from bas.config import MAX_RANK, TrainConfig, setting_rows
from bas.errors import InputError, check_float, check_int
from bas.io.files import filling, new_folder
from bas.io.run_files import TUNED
from bas.pretrained.additions import STRONGEST
from bas.pretrained.folder import load, save_model
from bas.pretrained.hub import find, trained_grid
from bas.pretrained.merging import merge_runs, read_sources
from bas.runtime.device import DTYPES

log = logging.getLogger(__name__)

EXAMPLES = (
    "bas merge runs/toys runs/mugs --output_dir runs/both",
    "bas merge runs/toys runs/mugs --weights 1 0.8 --rename 'mugs:<asset0>=<mug>' --output_dir runs/both",
    "bas merge runs/small --into_base --output_dir small_model",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("runs", metavar="RUN", nargs="+", help="small runs: those that keep only their trained weights")
    parser.add_argument(
        "--into_base", action="store_true", help="add the weights of one run to those of its base, as a whole model"
    )
    parser.add_argument("--output_dir", metavar="DIR", required=True, help="new folder to write")
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="FLOAT", help="how strongly each run counts (default: 1 each)"
    )
    parser.add_argument(
        "--rank", type=int, metavar="INT", help="write the nearest adapters of this rank (default: without loss)"
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        action="extend",
        default=[],
        metavar="RUN:OLD=NEW",
        help="give a handle another name (default: a handle of several runs becomes <RUN-handle>)",
    )
    parser.add_argument(
        "--save_precision",
        choices=setting_rows(TrainConfig)["save_precision"].metadata["choices"],
        help="precision of the written files (default: that of the first run; fp32 for a whole model)",
    )
    add_base(parser)


def run(args: argparse.Namespace) -> None:
    """Merge, and print how to go on."""
    paths = [find(name) for name in args.runs]
    if args.into_base:
        into_base(paths, args)
        return
    if len(paths) == 1:
        raise InputError("name two runs or more, or add --into_base to write one run and its base as a whole model")
    weights = args.weights or [1.0] * len(paths)
    if len(weights) != len(paths):
        raise InputError(f"{len(weights)} --weights for {len(paths)} runs: give one for each")
    weights = [check_float("--weights", weight, -STRONGEST, STRONGEST) for weight in weights]
    for path in (path for path, weight in zip(paths, weights, strict=True) if not weight):
        log.warning("%s has --weights 0: only the embeddings of its handles are merged", path)
    if args.rank is not None:
        check_int("--rank", args.rank, 1, MAX_RANK)
    folder, sources = new_folder(args.output_dir), read_sources(paths, weights, args.rename, find_base(args))
    precision = args.save_precision or sources[0].metadata["config"]["save_precision"]
    drift = merge_runs(sources, folder, args.rank, DTYPES[precision])
    for source in sources:
        for old, new in zip(source.metadata["handles"], source.handles, strict=True):
            named = new if new == old else f"{new}, in {source.run} {old}"
            print(f"{named}: its attention's output moved by {drift[new]:.1%}")
    print_ready(folder, [source.handles[0] for source in sources])


def print_ready(folder: Path, handles: Sequence[str]) -> None:
    """Print how to generate an image of these handles."""
    prompt = f"a photo of {' and '.join(handles)} at the beach"
    print(f'{folder} is ready. Try: bas sample {quote(str(folder))} --prompt "{prompt}"')


def into_base(paths: list[Path], args: argparse.Namespace) -> None:
    """Write one small run and its base as a whole model. InputError for flags that mean nothing there."""
    unused = [f"--{name}" for name in ("weights", "rank", "rename") if getattr(args, name)]
    if len(paths) > 1 or unused:
        advice = "leave out " + ", ".join(unused) if unused else "merge the runs first"
        raise InputError(f"--into_base writes one run as it is: {advice}")
    (path,) = paths
    if not (path / TUNED).is_file():
        raise InputError(f"{path} is not a small run: it holds no {TUNED}; a whole model needs no merging")
    folder, models = new_folder(args.output_dir), load(path, base=find_base(args))
    if grid := trained_grid(path):  # that of the maps which layouts read
        models.training = (models.training or {}) | {"attention_grid": grid}
    with filling(folder) as place:
        save_model(models, place, DTYPES[args.save_precision or "fp32"])
    print_ready(folder, models.handles[:1])
