"""The miniature world: captioned scenes of simple objects in named places, with exact masks.

A scene is first decided (`layouts.py`: what stands where, a small dataclass) and then drawn
(`drawing.py`) from signed distance functions, so that one seed gives the same scene at 64 and at 256
pixels. The ten places are those of the evaluation protocol (Break-A-Scene, appendix). Concept objects are a second
family that training never shows: unseen shapes with two-colour markings, the objects to extract.

    python -m tools.mini_world --output_dir /tmp/world            # a contact sheet of 64 captioned scenes
    python -m tools.mini_world --output_dir DIR --concepts 3      # one scene folder to extract from
    python -m tools.mini_world --output_dir weights/mini/scenes --size 256 --demo
"""

import argparse
from pathlib import Path

import numpy as np

from tools.command_line import run as run_tool
from tools.mini_world.captions import describe
from tools.mini_world.drawing import contact_sheet
from tools.mini_world.layouts import DEMO_SCENES, SLOTS
from tools.mini_world.scenes import realise, render_concepts, render_scene, save_scene


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tools.mini_world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--concepts", type=int, choices=tuple(SLOTS), help="write one scene folder of so many concepts")
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
    run_tool(main)
