"""Trains the miniature Stable Diffusion of `weights/mini` from nothing, on the world of `tools.mini_world`.

Stages, each resumable and each skipped once its result stands in the run folder:

    world      draw the training scenes once
    tokenizer  byte-level BPE in CLIP's file format, one token for every word of the captions
    vae        pictures <-> latents: L1, L2, edges, a little KL (Rombach et al. 2022, section 3.1)
    clip       text and image towers by contrast (Radford et al. 2021, section 2.3)
    latents    the training scenes through the frozen encoder
    unet       denoising of latents by captions, as CLIP's text tower tells them
    decoder    the VAE's decoder alone once more: the latents stay what the UNet learnt
    export     the diffusers folder

A stage lasts a fixed wall-clock time, and its learning rate reaches zero exactly then, however fast the machine.

    python -m tools.train_mini all --preset cpu --run_dir runs/mini --output_dir weights/mini
    python -m tools.train_mini all --run_dir runs/onward --start_from weights/mini --output_dir runs/onward/mini

With `--start_from` the world, its latents, the UNet and the decoder are left to do, and `clip` where it is named first.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from bas.errors import InputError
from bas.runtime.device import pick_device
from tools.train_mini.clip import train_clip
from tools.train_mini.folder import adopt, export
from tools.train_mini.presets import PRESETS
from tools.train_mini.tokenizer import make_tokenizer
from tools.train_mini.unet import train_unet
from tools.train_mini.vae import encode_world, train_decoder, train_vae
from tools.train_mini.world import make_world


def fast_attention(device) -> None:
    """On a CPU the fused attention's backward pass takes most of a step; plain matrix products take a quarter of it."""
    if device.type == "cpu":
        torch.backends.cuda.enable_flash_sdp(False)  # these two switches govern the CPU as well
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


STAGES = {
    "world": lambda preset, run, device: make_world(preset, run),
    "tokenizer": lambda preset, run, device: make_tokenizer(preset, run),
    "vae": train_vae,
    "clip": train_clip,
    "latents": encode_world,
    "unet": train_unet,
    "decoder": train_decoder,
}


def work(args: argparse.Namespace) -> None:
    """The stages that were asked for, one after another."""
    args.run_dir.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[args.preset]
    changed = {name: value for name in ("minutes", "lr") if (value := getattr(args, name))}
    if changed and args.stage in ("vae", "clip", "unet", "decoder"):
        recipe = f"{args.stage}_recipe"
        preset = replace(preset, **{recipe: replace(getattr(preset, recipe), **changed)})
    if args.start_from:
        adopt(args.run_dir, args.start_from, with_clip=args.stage != "clip")
    device = pick_device(args.device)
    fast_attention(device)
    for stage, run_stage in STAGES.items():
        if args.stage in (stage, "all"):
            run_stage(preset, args.run_dir, device)
    if args.stage in ("export", "all"):
        export(preset, args.run_dir, args.output_dir)


def main() -> None:
    """Read the command line and work; exit code 2 and one line where something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=(*STAGES, "export", "all"))
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--run_dir", type=Path, default=Path("runs/mini"), help="checkpoints, logs, previews")
    parser.add_argument("--output_dir", type=Path, default=Path("weights/mini"), help="where `export` writes")
    parser.add_argument(
        "--start_from",
        type=Path,
        help="a miniature to go on from, in a new folder: UNet or decoder trains on; the stage clip begins anew",
    )
    parser.add_argument("--minutes", type=float, help="length of this stage instead of the preset's")
    parser.add_argument("--lr", type=float, help="highest learning rate of this stage instead of the preset's")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")
    args = parser.parse_args()
    try:
        work(args)
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except FileNotFoundError as error:
        parser.exit(2, f"{parser.prog}: {error}: run the stages before {args.stage} in {args.run_dir} first\n")


if __name__ == "__main__":
    main()
