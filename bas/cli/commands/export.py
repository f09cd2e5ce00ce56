"""Write a model for other tools: a whole one as one .safetensors file, a small run as a LoRA with its embeddings."""

import argparse
from pathlib import Path

from bas.cli.flags import Parser
from bas.cli.open_model import add_base, add_prediction_type
from bas.cli.output_files import warn_of_replacement
from bas.config import MAX_RANK, TrainConfig, setting_rows
from bas.errors import InputError, check_int
from bas.io.files import require_writable
from bas.io.run_files import TUNED
from bas.pretrained.exports import export, export_files
from bas.pretrained.folder import load, read_spec
from bas.pretrained.hub import find
from bas.pretrained.lora_files import FORMATS
from bas.pretrained.single_file import save_single_file
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
        help="single: one file in the original layout, of a model without handles; kohya: a LoRA that all programs "
        "read, with one embedding file for each handle; peft: a LoRA for diffusers (default: kohya for a small run, "
        "single for a model)",
    )
    precisions = setting_rows(TrainConfig)["save_precision"].metadata["choices"]
    parser.add_argument(
        "--save_precision", default="fp32", choices=precisions, help="precision of the file (default: %(default)s)"
    )
    parser.add_argument("--prefix", metavar="TEXT", default="", help="before the names of the embedding files")
    parser.add_argument(
        "--rank",
        type=int,
        metavar="INT",
        help="of a run by --train kv or v: write the nearest LoRA of this rank",
    )
    add_prediction_type(parser)
    add_base(parser)


def run(args: argparse.Namespace) -> None:
    """Check everything that needs no weights; then write, and print the files and what to type where."""
    target, path = Path(args.output_path), find(args.model)
    if target.suffix != ".safetensors" or target.is_dir() or not target.parent.is_dir():
        raise InputError(f"{target}: name a .safetensors file in an existing folder")
    require_writable(target.parent, "the folder")
    form = args.format or ("kohya" if (path / TUNED).is_file() else "single")
    if args.rank is not None:
        check_int("--rank", args.rank, 1, MAX_RANK)
    if form != "single":
        files = export_files(path, target, args.prefix)
        warn_of_replacement([*files.values()])
        export(path, files, form, DTYPES[args.save_precision], args.rank)
        words = {handle: file.stem for handle, file in files.items() if handle.startswith("<")}
        print(*files.values(), sep="\n")
        print(how_to_use(target.stem, words, form))
        return
    if handles := read_spec(path, args.prediction_type).handles:
        raise InputError(
            f"{path} has the handles {' '.join(handles)}: a single file cannot hold them, use the folder itself"
        )
    warn_of_replacement([target])
    save_single_file(load(path, prediction_type=args.prediction_type), target, DTYPES[args.save_precision])
    print(target)


def how_to_use(name: str, words: dict[str, str], form: str) -> str:
    """What to type in other programs for the first of the concepts."""
    handle, word = next(iter(words.items()))
    lines = [
        f'diffusers: load_lora_weights(".", weight_name="{name}.safetensors"); '
        f'load_textual_inversion("{word}.safetensors", token="{handle}"); "a photo of {handle}"'
    ]
    if form == "kohya":
        lines = [
            f"ComfyUI: LoraLoader {name}; a photo of embedding:{word}",
            f"A1111, Forge: a photo of {word} <lora:{name}:1>",
            f"InvokeAI: LoRA {name}; a photo of <{word}>",
            *lines,
        ]
    return "\n".join(lines)
