"""Make the images of the documentation anew: train on scenes of the miniature's world, run the real commands.

    python -m tools.make_pictures --work_dir DIR

Writes docs/pictures/*.png. Four runs stay in the work folder, so that a second call only draws; three of them are those
of `tools.checks.applications --output_dir DIR/applications`, in either order.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from bas.cli.entry import main as bas
from bas.io.figures import grid, tint_masks
from bas.io.images import read_image, read_mask, to_floats
from bas.pretrained.hub import find
from bas.web.report import SHEET
from tools.checks.applications import CELL, ELSEWHERE, FURTHER, PARTS, PHOTO, SCENE, learn, loose_box
from tools.command_line import run as run_tool
from tools.mini_world.captions import describe
from tools.mini_world.places import PLACES
from tools.mini_world.scenes import realise, save_scene

IMAGES = Path(__file__).parent.parent / "docs" / "pictures"
PHOTO_SIDE = 64  # pixels: an image of the miniature's own size comes back untouched outside the mask
STRENGTHS = (0, 0.5, 1, 1.3, 2)
MOST = 1300  # pixels of an image's longer side in the documentation


def run(*words: object) -> None:
    """Run one command of bas; an error ends this program."""
    line = [str(word) for word in words]
    print("bas", *line, flush=True)
    if code := bas(line):
        raise SystemExit(code)


def publish(image: Path, name: str) -> None:
    """Put an image into the documentation, no larger than it is looked at."""
    with Image.open(image) as opened:
        small = opened.convert("RGB")
    small.thumbnail((MOST, MOST), Image.Resampling.LANCZOS)
    small.save(IMAGES / f"{name}.png", optimize=True)


def with_masks(folder: Path) -> Image.Image:
    """The image of a scene folder, its masks in their concepts' colours."""
    masks = {
        int(path.stem.removeprefix("mask")): to_floats(read_mask(path)) for path in sorted(folder.glob("mask*.png"))
    }
    return tint_masks(read_image(folder / "img.png"), masks)


def draw_edit(model: Path, work: Path) -> None:
    """Put each learnt object where another stood: the image and the mask, then one edit beside the other."""
    photo, place = work / "photo", PLACES[PHOTO.background][0]
    save_scene(realise(PHOTO, describe(PHOTO), PHOTO_SIDE), photo)
    mask = np.zeros_like(found := to_floats(read_mask(photo / "mask0.png")))
    mask[loose_box(found)] = 1
    Image.fromarray((255 * mask).astype(np.uint8)).save(work / "where.png")
    source = read_image(photo / "img.png")
    images, labels = [source, tint_masks(source, {0: mask})], ["the image", "and the mask, a wide box"]
    for i in range(3):
        labels.append(f"a photo of <asset{i}> {place}")
        target = work / f"edited {i}.png"
        words = ("--init_image", photo / "img.png", "--mask", work / "where.png", "--prompt", labels[-1])
        run("edit", model, *words, "--output_path", target)
        images.append(Image.open(target))
    grid([images], [labels], CELL).save(work / "edit.png")


def draw_beside(images: list[Path], model: Path, prompts: list[str], work: Path, name: str) -> None:
    """Draw input above output: images and their masks, below them four images of each prompt."""
    folder = work / name
    run("sample", model, "--prompt", *prompts, "--num_images", 4, "--output_path", folder / "drawn.png")
    drawn = [Image.open(path) for path in sorted(folder.glob("drawn-*.png"))]
    rows = [[read_image(scene / "img.png"), with_masks(scene)] for scene in images]
    labels = [[which, "and its masks"] for which in ("the image", *["an extra image"] * (len(images) - 1))]
    rows += [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
    labels += [[prompt] * 4 for prompt in prompts]
    grid(rows, labels, CELL).save(work / f"{name}.png")


def main() -> None:
    """Learn what is not learnt yet, draw everything, and put it into docs/pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for runs and single images")
    parser.add_argument("--steps", type=int, nargs=2, help="of both phases, for the runs of applications (a trial)")
    args = parser.parse_args()
    base, work, model = find(None), args.work_dir / "drawn", args.work_dir / "demo"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)

    run("demo", "--output_dir", model)
    run("vary", model, "--output_dir", work / "vary")
    run("explore", model, "--output_dir", work / "explore", "--batch_size", 16)
    together = "a photo of <asset0> and <asset1> and <asset2>"
    run("attend", model, "--prompt", f"{together} at the beach", "--output_dir", work / "attend")
    strengths = [f"a photo of (<asset0>:{s:g}) and <asset1> {ELSEWHERE}" for s in STRENGTHS]
    run("sample", model, "--prompt", *strengths, "--num_images", 4, "--grid", "--output_path", work / "strength.png")
    draw_edit(model, work)

    alone = ["a photo of <asset0>", "a photo of <asset1>"]
    places = ["a photo at <bg>", "a photo of <asset1> at <bg>", f"a photo of <asset1> {ELSEWHERE}"]
    for name, layouts, flags, prompts in (
        ("one", (SCENE,), {"background_handle": "bg"}, places),
        ("several", (SCENE, *FURTHER), {"background_handle": "bg"}, alone),
        ("parts", (PARTS,), {}, alone),
    ):
        folder = args.work_dir / "applications" / name
        learnt = learn(folder, base, layouts, args.steps, **flags)
        scene = folder / "scene"
        images = [scene, *sorted(path for path in scene.iterdir() if path.is_dir())]
        draw_beside(images, learnt.models.source, prompts, work, name)

    grids = {"demo": model / SHEET, "vary": work / "vary" / "grid.png", "explore": work / "explore" / "grid.png"}
    grids |= {"attend": work / "attend" / "sheet.png", "background": work / "one.png"}
    grids |= {name: work / f"{name}.png" for name in ("strength", "edit", "several", "parts")}
    for name, path in grids.items():
        publish(path, name)


if __name__ == "__main__":
    run_tool(main)
