"""The whole method on the shipped miniature: a scene of three unseen things, both phases, one picture of it all."""

import logging
from pathlib import Path

from bas.checkpoint import load
from bas.config import SampleConfig
from bas.hub import find, train_config
from bas.machine import pick_device
from bas.pictures import grid, heat, save_picture, tint_masks
from bas.preview import scene_attention
from bas.run_folder import CONCEPTS, METRICS
from bas.sample import sample, to_picture
from bas.scene import load_scene, subset_prompt
from bas.train import train

log = logging.getLogger(__name__)

SCENE = "scenes/playroom"  # inside the shipped model's folder
PICTURE = "demo.png"
CONTEXTS = ("at the beach", "in the snow", "in the jungle")  # one per handle
TOGETHER = ("at the beach", "in the snow", "on top of a pink fabric")  # all of them
CELL = 160


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
    photo = to_picture(image)

    handles = scene.handles
    layers = dict(enumerate(masks.numpy()))
    attention = scene_attention(models, handles, image, config)
    looks = [heat(values, photo, i) for i, values in enumerate(attention.numpy())]
    alone, together = [subset_prompt([handle]) for handle in handles], subset_prompt(handles)
    elsewhere = [f"{prompt} {context}" for prompt, context in zip(alone, CONTEXTS, strict=True)]
    reunited = [f"{together} {context}" for context in TOGETHER]
    prompts = [[*alone, together, reunited[0]], [*elsewhere, *reunited[1:]]]
    drawn = iter(sample(models, [*prompts[0], *prompts[1]], SampleConfig(seed=config.seed)))
    rows = [[scene.picture, tint_masks(photo, layers), *looks], *([next(drawn) for _ in row] for row in prompts)]
    seen = ["the photograph", "and its masks", *(f"attention of {h}" for h in handles)]
    labels = [seen, *prompts]
    sheet = grid(rows, labels, CELL, title="one picture in, one handle per concept out")
    save_picture(sheet, output_dir / PICTURE)
    return output_dir / PICTURE
