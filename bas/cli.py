"""The `bas` command. Flags are made from the dataclass fields of `bas.config`: one source of truth.

Exit codes: 0 done, 1 training failed (a loss that is not finite), 2 the input cannot be used (one line says why).
"""

import argparse
import difflib
import logging
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

from bas import __version__
from bas.config import InputError, SampleConfig, TrainConfig

ABOUT = "Extract several concepts from one photograph, and re-imagine them (Break-A-Scene, in plain PyTorch)."


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest flag for an unknown one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs, allow_abbrev=False, formatter_class=HelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but a flag that this command doesn't have is an error here, where its flags are known."""
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            near = difflib.get_close_matches(rest[0], self._option_string_actions, n=1)
            self.error(f"unknown argument {rest[0]}" + (f"; did you mean {near[0]}?" if near else ""))
        return namespace, rest

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists the flags)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Help with one column of flags, wide enough for long names."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def add_fields(parser: argparse.ArgumentParser, settings: type) -> None:
    """One flag per dataclass field. Flags that are not given stay out of the result, so presets can fill them."""
    for f in fields(settings):
        names = [f"--{f.name}", *f.metadata.get("flag", ())]
        gloss = f.metadata["help"].replace("%", "%%")
        common = {"dest": f.name, "default": argparse.SUPPRESS}
        if f.type is bool and f.default:
            parser.add_argument(*f.metadata["flag"], action="store_false", help=gloss, **common)
        elif f.type is bool:
            parser.add_argument(*names, action="store_true", help=gloss, **common)
        else:
            kind, many = value_type(f.type)
            shown = " ".join(f.default) if many else f.default
            if shown not in (None, "") and "default:" not in gloss:
                gloss += f" (default: {shown})"
            extra = {"nargs": "+"} if many else {"choices": f.metadata.get("choices")}
            metavar = None if f.metadata.get("choices") else kind.__name__.upper()
            parser.add_argument(*names, type=kind, metavar=metavar, help=gloss, **extra, **common)


def value_type(annotation) -> tuple[type, bool]:
    """The type of one value and whether the flag takes several: `int | None` is (int, False)."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], True
    if isinstance(annotation, types.UnionType):
        return next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType), False
    return annotation, False


def given(args: argparse.Namespace, settings: type) -> dict:
    """The settings' fields that were given as flags."""
    names = {f.name for f in fields(settings)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in vars(args).items() if name in names}


# --- Commands -----------------------------------------------------------------------------------------------------


def train_command(args: argparse.Namespace) -> None:
    """Train both phases on a scene folder."""
    from bas.hub import find, read_model_row
    from bas.train import train

    explicit = given(args, TrainConfig)
    if args.scene and explicit.setdefault("instance_data_dir", args.scene) != args.scene:
        raise InputError(f"two scenes: {args.scene} and --instance_data_dir {explicit['instance_data_dir']}")
    if not explicit.get("instance_data_dir"):
        raise InputError("name a scene folder: bas train SCENE, with img.jpg and mask0.png, mask1.png, ...")
    row = read_model_row(find(explicit.get("pretrained_model_name_or_path")))
    config = TrainConfig.resolve(explicit, row)
    run = train(config)
    print(f'{run} is ready. Try: bas sample {run} --prompt "a photo of {first_handle(run)} at the beach"')


def first_handle(run: Path) -> str:
    """The first handle of a finished run, for the hint."""
    from bas.run_folder import read_concepts

    return read_concepts(run)[1][0]


def sample_command(args: argparse.Namespace) -> None:
    """Generate pictures with a run, or with any Stable Diffusion model."""
    from bas.checkpoint import load
    from bas.hub import find
    from bas.machine import DTYPES, pick_device, pick_precision
    from bas.pictures import grid, save_picture
    from bas.sample import sample

    config = SampleConfig(**given(args, SampleConfig))
    if args.run and args.model_path and args.run != args.model_path:
        raise InputError(f"two models: {args.run} and --model_path {args.model_path}")
    target = Path(args.output_path)
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"--output_path {target}: name a .png, .jpg or .webp file")
    path, device = find(args.model_path or args.run), pick_device(args.device)
    models = load(path, device=device, dtype=DTYPES[pick_precision(args.precision, device)])
    pictures = sample(models, args.prompt, config)

    target.parent.mkdir(parents=True, exist_ok=True)
    names = [(prompt, config.seed + i) for prompt in args.prompt for i in range(config.num_images)]
    notes = [asdict(config) | {"prompt": prompt, "seed": seed, "model": path.name} for prompt, seed in names]
    if args.grid:
        rows = [pictures[i : i + config.num_images] for i in range(0, len(pictures), config.num_images)]
        labels = [
            [f"{n['prompt']} · seed {n['seed']}" for n in notes[i : i + len(rows[0])]]
            for i in range(0, len(notes), len(rows[0]))
        ]
        pictures, notes = (
            [grid(rows, labels, cell=max(192, min(512, pictures[0].width)))],
            [asdict(config) | {"prompts": args.prompt}],
        )
    for i, (picture, note) in enumerate(zip(pictures, notes, strict=True)):
        file = target if len(pictures) == 1 else target.with_stem(f"{target.stem}-{i}")
        save_picture(picture, file, note)
        print(file)


def download_command(args: argparse.Namespace) -> None:
    """Fetch a known Stable Diffusion checkpoint, or any by its hub id."""
    from bas.hub import download

    print(download(args.name))


def export_command(args: argparse.Namespace) -> None:
    """Write a model folder as one original-layout .safetensors file, as other tools read it."""
    from bas.checkpoint import load
    from bas.hub import find
    from bas.single_file import save_single_file

    target = Path(args.output_path)
    save_single_file(load(find(args.model)), target)
    print(target)


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="bas", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"bas {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable) -> Parser:
        sub = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        sub.set_defaults(run_command=run)
        sub.add_argument("--debug", action="store_true", help="show the whole trace of an error")
        return sub

    sub = command("train", train_command)
    sub.add_argument("scene", metavar="SCENE", nargs="?", help="folder with img.* and mask0.png, mask1.png, ...")
    add_fields(sub, TrainConfig)

    sub = command("sample", sample_command)
    sub.add_argument("run", metavar="RUN", nargs="?", help="run folder, model folder, .safetensors file or known name")
    sub.add_argument("--model_path", metavar="RUN", help="the same, as the official script names it")
    sub.add_argument("--prompt", nargs="+", required=True, help="one prompt or several, each in quotes")
    sub.add_argument(
        "--output_path", default="result.png", help="picture to write; several get a number each (default: %(default)s)"
    )
    sub.add_argument("--grid", action="store_true", help="all pictures on one labelled sheet, a row per prompt")
    sub.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    sub.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "fp16", "bf16"),
        help="arithmetic (default: %(default)s)",
    )
    add_fields(sub, SampleConfig)

    sub = command("download", download_command)
    sub.add_argument("name", help="a name from weights/manifest.json, such as sd21-base, or a hub id")

    sub = command("export", export_command)
    sub.add_argument("model", metavar="RUN", help="run or model folder")
    sub.add_argument("output_path", metavar="FILE", help="the .safetensors file to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="bas: %(message)s", stream=sys.stderr)
    for noisy in ("transformers", "huggingface_hub", "PIL", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        args.run_command(args)
    except (InputError, RuntimeError) as error:
        if args.debug or not is_reported(error):
            raise
        print(f"bas: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


def is_reported(error: Exception) -> bool:
    """Whether an error's message is meant for the user as it stands."""
    return isinstance(error, InputError) or type(error).__name__ == "TrainingError"
