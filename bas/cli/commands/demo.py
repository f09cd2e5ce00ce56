"""Show the whole method in minutes: train on the shipped miniature's scene and draw one picture of the result."""

import argparse
import logging
from pathlib import Path

from bas.cli.flags import Parser
from bas.config import SampleConfig
from bas.data.scene import subset_prompt
from bas.data.scene_folder import load_scene
from bas.io.figures import grid, overlay_attention, tint_masks
from bas.io.images import save_image, to_image
from bas.io.run_files import CONCEPTS, METRICS
from bas.pretrained.folder import load
from bas.pretrained.hub import find, train_config
from bas.runtime.device import pick_device
from bas.sampling.sampler import sample
from bas.training.loop import train
from bas.training.preview import scene_attention
from bas.web.report import write_report

log = logging.getLogger(__name__)

EXAMPLES = ("bas demo --output_dir demo",)
SCENE = "scenes/playroom"  # inside the shipped model's folder
PICTURE = "demo.png"
CONTEXTS = ("at the beach", "in the snow", "in the jungle")  # one per handle
TOGETHER = ("at the beach", "in the snow", "on top of a pink fabric")  # all of them
CELL = 160


def configure(parser: Parser) -> None:
    """Declare the flags."""
    parser.add_argument("--output_dir", default="demo", help="run folder to write (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda when there is one)")


def run(args: argparse.Namespace) -> None:
    """Run it, and print where the picture and the page of the run are."""
    print(demo(Path(args.output_dir), args.device))
    print(write_report(Path(args.output_dir)))


def demo(output_dir: Path, device: str | None = None) -> Path:
    """Train on the shipped scene, or go on where the folder's run stopped, and draw the picture; returns its path."""
    resume = "latest" if (output_dir / METRICS).exists() else None
    config = train_config(find(None) / SCENE, output_dir=str(output_dir), device=device, resume_from_checkpoint=resume)
    if (output_dir / CONCEPTS).exists():
        log.info("%s holds a finished run: only the picture is drawn", output_dir)
    else:
        train(config)
    models = load(output_dir, device=pick_device(device))
    scene = load_scene(config)
    image, masks = scene.tensors(models.resolution, models.size_multiple, config.center_crop)
    photo = to_image(image)

    handles = scene.handles
    layers = dict(enumerate(masks.numpy()))
    attention = scene_attention(models, handles, image, config)
    looks = [overlay_attention(values, photo, i) for i, values in enumerate(attention.numpy())]
    alone, together = [subset_prompt([handle]) for handle in handles], subset_prompt(handles)
    elsewhere = [f"{prompt} {context}" for prompt, context in zip(alone, CONTEXTS, strict=True)]
    reunited = [f"{together} {context}" for context in TOGETHER]
    prompts = [[*alone, together, reunited[0]], [*elsewhere, *reunited[1:]]]
    drawn = iter(sample(models, [*prompts[0], *prompts[1]], SampleConfig(seed=config.seed)))
    rows = [[scene.image, tint_masks(photo, layers), *looks], *([next(drawn) for _ in row] for row in prompts)]
    seen = ["the photograph", "and its masks", *(f"attention of {h}" for h in handles)]
    labels = [seen, *prompts]
    sheet = grid(rows, labels, CELL, title="one picture in, one handle per concept out")
    save_image(sheet, output_dir / PICTURE)
    return output_dir / PICTURE
