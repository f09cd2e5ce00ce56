"""The miniature world: captioned scenes of simple things in named places, with exact masks.

A scene is first decided (`mini_world_layouts.py`: what stands where, a small dataclass) and then drawn
(`mini_world_drawing.py`) from signed distance functions, so that one seed gives the same scene at 64 and at 256
pixels. The ten places are those of the evaluation protocol (Break-A-Scene, appendix). Concept objects are a second
family that training never shows: unseen shapes with two-colour markings, the things to extract.

    python tools/mini_world.py --output_dir /tmp/world            # a contact sheet of 64 captioned scenes
    python tools/mini_world.py --output_dir DIR --concepts 3      # one scene folder to extract from
    python tools/mini_world.py --output_dir weights/mini/scenes --demo
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mini_world_captions import describe
from mini_world_drawing import contact_sheet, draw
from mini_world_layouts import DEMO_SCENES, TWO_COLOURS, Layout, Thing, compose, compose_concepts
from mini_world_shapes import NEAREST_WORD
from PIL import Image


@dataclass
class Scene:
    """A drawn scene: image (H, W, 3) uint8, masks (N, H, W) float32 in 0..1, the visible part of each thing."""

    image: np.ndarray
    masks: np.ndarray
    caption: str
    objects: tuple[Thing, ...]
    background: str
    layout: Layout = field(repr=False)


def realise(layout: Layout, caption: str, size: int = 64) -> Scene:
    """A decided scene, drawn, with its caption."""
    image, masks = draw(layout, size)
    return Scene(image, masks, caption, layout.things, layout.background, layout)


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
    for i, (thing, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
        Image.fromarray((mask * 255 + 0.5).astype(np.uint8)).save(folder / f"mask{i}.png")
        concepts.append({"mask": f"mask{i}.png", "word": NEAREST_WORD.get(thing.shape, thing.shape)})
    (folder / "scene.json").write_text(json.dumps({"concepts": concepts}, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--concepts", type=int, default=0, help="write one scene folder of so many concept objects")
    parser.add_argument("--demo", action="store_true", help="write the scene folders that ship with the miniature")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.demo:
        for name, layout in DEMO_SCENES.items():
            save_scene(realise(layout, describe(layout), args.size), args.output_dir / name)
        return
    if args.concepts:
        save_scene(render_concepts(rng, args.size, args.concepts), args.output_dir)
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenes = [render_scene(rng, args.size) for _ in range(64)]
    contact_sheet([scene.image for scene in scenes]).save(args.output_dir / "world.png")
    (args.output_dir / "world.txt").write_text("\n".join(scene.caption for scene in scenes) + "\n")


if __name__ == "__main__":
    main()
