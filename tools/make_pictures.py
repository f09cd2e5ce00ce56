"""Make the pictures of the documentation anew: train on the shipped miniature's scene, run the real commands.

    python tools/make_pictures.py --work_dir /tmp/pictures

Writes docs/pictures/*.png. The runs stay in the work folder, so that a second call only draws; anything else in it is
made anew. Takes about a quarter of an hour on two processor cores.
"""

import argparse
import json
import shutil
from pathlib import Path

from PIL import Image

from bas.cli import main as bas
from bas.hub import find
from bas.images import read_image, read_mask
from bas.pictures import grid, tint_masks
from bas.run_folder import CONCEPTS

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
SCENE, OTHER = "playroom", "shore"  # what is learnt, and the photograph that is edited
STRENGTHS = (0, 0.5, 1, 1.5, 2)
CELL = 160


def run(*words: object) -> None:
    """Run one command of bas; an error ends this program."""
    line = [str(word) for word in words]
    print("bas", *line, flush=True)
    if code := bas(line):
        raise SystemExit(code)


def learn(scene: Path, folder: Path, *flags: str) -> Path:
    """A finished run on the scene, from an earlier call or made now."""
    if not (folder / CONCEPTS).exists():
        shutil.rmtree(folder, ignore_errors=True)
        run("train", scene, "--output_dir", folder, *flags)
    return folder


def edit(model: Path, photo: Path, work: Path) -> None:
    """Put two learnt things where two others were, one after the other; before and after side by side."""
    masks = [photo / "mask0.png", photo / "mask1.png"]
    rows = [{"mask": str(mask), "prompt": f"a photo of <asset{i}>"} for i, mask in enumerate(masks)]
    (work / "one.json").write_text(json.dumps(rows[:1]))
    (work / "both.json").write_text(json.dumps(rows))
    for name in ("one", "both"):
        target = work / f"{name}.png"
        run(
            "edit",
            model,
            "--init_image",
            photo / "img.png",
            "--regions",
            work / f"{name}.json",
            "--output_path",
            target,
        )
    before = tint_masks(read_image(photo / "img.png"), {i: read_mask(mask) for i, mask in enumerate(masks)})
    pictures = [before, *(Image.open(work / f"{name}.png") for name in ("one", "both"))]
    labels = ["the photograph and two masks", "<asset0> in the first", "then <asset1> in the second"]
    grid([pictures], [labels], CELL).save(PICTURES / "edit.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="folder for runs and single pictures")
    work = parser.parse_args().work_dir
    scenes = find(None) / "scenes"
    PICTURES.mkdir(parents=True, exist_ok=True)
    drawn = work / "drawn"
    shutil.rmtree(drawn, ignore_errors=True)
    drawn.mkdir(parents=True)

    model = learn(scenes / SCENE, work / "run")
    run("vary", model, "--output_dir", drawn / "vary")
    shutil.copy(drawn / "vary" / "grid.png", PICTURES / "vary.png")
    run("explore", model, "--output_dir", drawn / "explore")
    shutil.copy(drawn / "explore" / "grid.png", PICTURES / "explore.png")
    together = "a photo of <asset0> and <asset1> and <asset2>"
    run("attend", model, "--prompt", f"{together} at the beach", "--output_dir", drawn / "attend")
    shutil.copy(drawn / "attend" / "sheet.png", PICTURES / "attend.png")
    strengths = [f"a photo of (<asset0>:{s:g}) and <asset1>" for s in STRENGTHS]
    sheet = ("--num_images", 4, "--grid", "--output_path")
    run("sample", model, "--prompt", *strengths, *sheet, PICTURES / "strength.png")
    edit(model, scenes / OTHER, drawn)

    model = learn(scenes / SCENE, work / "run with background", "--background_handle", "bg")
    places = ["a photo of <bg>", "a photo of <asset0> at <bg>", "a photo of a red ball at <bg>"]
    run("sample", model, "--prompt", *places, *sheet, PICTURES / "background.png")


if __name__ == "__main__":
    main()
