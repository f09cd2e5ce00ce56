"""A scene of the miniature world, decided and drawn, and how it is written to a folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tools.mini_world.captions import describe
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import TWO_COLOURS, Layout, Object, compose, compose_concepts
from tools.mini_world.shapes import NEAREST_WORD


@dataclass
class Scene:
    """A drawn scene: image (H, W, 3) uint8, masks (N, H, W) float32 in 0..1, the visible part of each object."""

    image: np.ndarray
    masks: np.ndarray
    caption: str
    objects: tuple[Object, ...]
    background: str
    layout: Layout = field(repr=False)


def realise(layout: Layout, caption: str, size: int = 64) -> Scene:
    """A decided scene, drawn, with its caption."""
    image, masks = draw(layout, size)
    return Scene(image, masks, caption, layout.objects, layout.background, layout)


def render_scene(rng, size: int = 64, count=None, background=None, two_colours: float = TWO_COLOURS) -> Scene:
    """One captioned training scene, decided and drawn; the same generator state gives the same scene."""
    layout = compose(rng, count, background, two_colours)
    return realise(layout, describe(layout, rng), size)


def render_concepts(rng, size: int = 64, count: int = 3) -> Scene:
    """One scene of concept objects; its caption names what training has no words for."""
    layout = compose_concepts(rng, count)
    return realise(layout, describe(layout), size)


def save_scene(scene: Scene, folder: Path) -> None:
    """Write a scene folder: img.png, mask0.png .. and scene.json with the word nearest to each concept."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(folder / "img.png")
    concepts = []
    for i, (obj, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
        Image.fromarray((mask * 255 + 0.5).astype(np.uint8)).save(folder / f"mask{i}.png")
        concepts.append({"mask": f"mask{i}.png", "word": NEAREST_WORD.get(obj.shape, obj.shape)})
    (folder / "scene.json").write_text(json.dumps({"concepts": concepts}, indent=2) + "\n")
