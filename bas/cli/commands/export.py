"""Write a model for other tools: as one .safetensors file, or a small run as a LoRA, with a file for each handle."""

import argparse
from pathlib import Path

from bas.cli.flags import Parser
from bas.cli.open_model import add_base, add_prediction_type, find_base
from bas.cli.output_files import warn_of_replacement
from bas.config import MAX_RANK, TrainConfig, setting_rows
from bas.errors import InputError, check_int
from bas.io.files import check_length, require_writable
from bas.io.run_files import TUNED
from bas.pretrained.exports import (
    Targets,
    check_no_input,
    export_lora,
    export_single,
    how_to_use,
    needed_too,
    plan_export,
)
from bas.pretrained.folder import holds_sdxl
from bas.pretrained.hub import find
from bas.pretrained.lora_files import FORMATS
from bas.runtime.device import DTYPES

EXAMPLES = (
    "bas export my_model model.safetensors",
    "bas export runs/small small.safetensors --format kohya --save_precision fp16",
)


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("model", metavar="MODEL", help="a run, a model folder or a known name")
    parser.add_argument("output_path", metavar="FILE", help="the .safetensors file to write")
    parser.add_argument(
        "--format",
        choices=("single", *FORMATS),
        help="single: the whole model as one file in the original layout; kohya: a LoRA that all programs read; "
        "peft: a LoRA for diffusers; each with one embedding file for each handle (default: kohya for a small run, "
        "single for a whole model)",
    )
    precisions = setting_rows(TrainConfig)["save_precision"].metadata["choices"]
    parser.add_argument(
        "--save_precision", default="fp32", choices=precisions, help="precision of the file (default: %(default)s)"
    )
    parser.add_argument("--prefix", metavar="TEXT", default="", help="put this before the names of the embedding files")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="INT",
        help="write the nearest LoRA of this rank (default: for --train lora the adapters as trained; for kv and v the "
        "differences of the weights, with a LoRA of rank 64 beside them)",
    )
    parser.add_argument(
        "--bundle", action="store_true", help="also put the embeddings into the LoRA; diffusers refuses such a file"
    )
    add_prediction_type(parser)
    add_base(parser)


def run(args: argparse.Namespace) -> None:
    """Check everything that needs no weights; then write, and print the files and what to type where."""
    target, path, base = Path(args.output_path), find(args.model), find_base(args)
    if target.suffix != ".safetensors" or target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target}: name a .safetensors file in an existing folder")
    require_writable(target.parent, "the folder")
    small = (path / TUNED).is_file()
    form = args.format or ("kohya" if small else "single")
    if args.rank is not None:
        check_int("--rank", args.rank, 1, MAX_RANK)
    unused = [f"--{name}" for name in ("rank", "bundle") if getattr(args, name) and form != "kohya"]
    if unused and (form, unused) != ("peft", ["--rank"]):
        raise InputError(f"{unused[-1]} has no effect with --format {form}: leave it out")
    if args.prediction_type and form != "single":
        raise InputError(f"--prediction_type has no effect with --format {form}, which holds no model: leave it out")
    files = plan_export(path, target, form, args.prefix, args.rank, base, args.prediction_type)
    if args.prefix and not files.embeddings:
        raise InputError(f"--prefix {args.prefix} has no effect: {path} has no handles; leave it out")
    check_no_input(files, path, base)
    check_targets(files)
    dtype = DTYPES[args.save_precision]
    embeddings = [*files.embeddings.values()]
    warn_of_replacement([path for path in files if path not in embeddings])
    warn_of_replacement(embeddings, "give another --prefix")
    if form == "single":
        export_single(path, files, dtype, args.prediction_type, base)
    else:
        export_lora(path, files, form, dtype, args.rank, args.bundle, base)
    print(*files, sep="\n")
    for handle, file in files.embeddings.items():
        if file.stem != handle[1:-1]:
            print(f"{handle} is called {file.stem}")
    print(*how_to_use(files, form, holds_sdxl(path)), sep="\n")
    if form != "single":
        print(*(f"{line}\n" for line in needed_too(path, base)), sep="", end="")


def check_targets(files: Targets) -> None:
    """Raise InputError where one of the files cannot be written, before the first one is."""
    for file in files:
        check_length(file, "the export")
        if file.is_dir():
            advice = "give another --prefix" if file in files.embeddings.values() else "name another file"
            raise InputError(f"{file} is a folder, and the export needs a file of that name: {advice}")
