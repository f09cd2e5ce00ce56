"""Trains the miniature Stable Diffusion of `weights/mini` on the world of `tools/mini_world`.

Stages, each resumable by the same command and skipped once its result stands in the run folder:

    tokenizer  byte-level BPE in CLIP's file format, one token for every word of the captions
    clip       image and text encoder by contrast (Radford et al. 2021, section 2.3)
    text       CLIP's text encoder, brought to keep every word of a caption; the UNet reads it
    decoder    set latents -> images; the encoder is set, not trained (`codec.py`)
    unet       denoising of latents by captions, as the text encoder reads them
    export     the diffusers folder

A stage ends after a number of samples, not of minutes, so it can run behind other work for as long as it takes:

    nice python -m tools.train_mini all --run_dir runs/mini --output_dir runs/mini/exported
    nice python -m tools.train_mini unet --run_dir runs/onward --start_from weights/mini

With `--start_from` the tokenizer, CLIP and the text encoder are taken from there too, unless the stage `clip` or
`text` is named. Decoder and UNet
do not wait for each other. `runs/mini/unet.jsonl` logs the loss, `unet_validation.jsonl` that of held-out scenes.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from bas.errors import InputError
from bas.runtime.device import pick_device
from tools.train_mini.clip import train_clip
from tools.train_mini.decoder import train_decoder
from tools.train_mini.folder import export, start_from
from tools.train_mini.recipe import MINIATURE, Recipe
from tools.train_mini.text import train_text
from tools.train_mini.tokenizer import make_tokenizer
from tools.train_mini.unet import train_unet

STAGES = {
    "tokenizer": make_tokenizer,
    "clip": train_clip,
    "text": train_text,
    "decoder": train_decoder,
    "unet": train_unet,
}
FIELDS = {"clip": "clip", "text": "text", "decoder": "decoder", "unet": "denoiser"}  # of Recipe


def run_stages(args: argparse.Namespace, recipe: Recipe) -> None:
    """Run the stages that were asked for, one after another."""
    args.run_dir.mkdir(parents=True, exist_ok=True)
    changed = {name: value for name in ("goal", "cooldown", "seen") if (value := getattr(args, name)) is not None}
    if changed and args.stage not in FIELDS:
        options = " and ".join(f"--{name}" for name in changed)
        raise InputError(f"{options}: of one stage, not of {args.stage}; name {', '.join(FIELDS)}")
    if changed:
        field = FIELDS[args.stage]
        recipe = replace(recipe, **{field: replace(getattr(recipe, field), **changed)})
    if args.start_from:
        start_from(recipe, args.run_dir, args.start_from, args.stage)
    device = pick_device(args.device)
    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage(recipe, args.run_dir, device)
    if args.stage in ("export", "all"):
        export(recipe, args.run_dir, args.output_dir)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and run; exit code 2 and one line where something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "export", "all"))
    parser.add_argument("--run_dir", type=Path, default=Path("runs/mini"), help="checkpoints and logs")
    parser.add_argument("--output_dir", type=Path, default=Path("weights/mini"), help="where `export` writes")
    parser.add_argument("--start_from", type=Path, help="a miniature to train on from, in a new run folder")
    parser.add_argument("--goal", type=int, help="samples after which this stage ends")
    parser.add_argument("--cooldown", type=int, help="last samples of it over which the learning rate falls to 0")
    parser.add_argument("--seen", type=int, help="samples the weights of --start_from have seen: fresh scenes follow")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, to leave room for other work)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        run_stages(args, MINIATURE)
    except InputError as error:
        parser.exit(2, f"python -m tools.train_mini: {error}\n")
    except FileNotFoundError as error:
        parser.exit(
            2, f"python -m tools.train_mini: {error}: run the stages before {args.stage} in {args.run_dir} first\n"
        )


if __name__ == "__main__":
    main()
