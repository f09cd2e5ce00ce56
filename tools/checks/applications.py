"""Measures the paper's applications (section 4) on a miniature model, on scenes of its world drawn here.

Three runs learn a scene with its background, the same from three images, and an object with a part of it. Then each
application is tried, and one table shows the results; scores.json and an image of each lie beside the runs.

    python -m tools.checks.applications --weights weights/mini --output_dir /tmp/check_applications

bas.evaluation.object_similarity measures how well an image shows a concept: how alike the concept's own look and the
best matching spot are (1: the same, 0: nothing in common). Places are read by the recogniser of checks.mini. A second
call with the same folder only measures.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bas.config import SampleConfig, TrainConfig
from bas.data.scene import subset_prompt
from bas.evaluation.metrics import attention_iou
from bas.evaluation.object_similarity import ObjectSimilarity
from bas.io.figures import grid
from bas.io.images import pixels
from bas.models.bundle import Models
from bas.pretrained.folder import load
from bas.pretrained.hub import find, train_config
from bas.sampling.blended_diffusion import Region, edit
from bas.sampling.sampler import sample
from bas.training.preview import scene_attention
from tools.checks.mini import Recogniser, labelled_scene, recognise_images, train_recogniser
from tools.checks.runs import train_once
from tools.command_line import run as run_tool
from tools.mini_world.captions import describe
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import Layout, Object
from tools.mini_world.places import PLACES
from tools.mini_world.scenes import realise, save_scene

SCENE = Layout(  # two objects that the miniature learns well; gear and arrow, the shipped shore, it learns badly
    (
        Object("moon", "red", "halves", "cyan", x=0.29, y=0.34, size=0.52, angle=-0.08),
        Object("clover", "green", "halves", "pink", x=0.68, y=0.7, size=0.5, angle=0.1),
    ),
    "beach",
    seed=7,
)
PHOTO = Layout((Object("house", "white", y=0.52, size=0.66),), "wooden floor", seed=5)  # the image that is edited
PARTS = Layout(  # an object, and what it wears
    (
        Object("clover", "red", "halves", "cyan", x=0.5, y=0.5, size=0.74),
        Object("crown", "yellow", "target", "blue", x=0.5, y=0.54, size=0.38),
    ),
    "snow",
    seed=3,
)
KNOWN = "a photo of a red ball"  # what the miniature can draw without learning
STRENGTHS = (0, 0.5, 1, 1.3)
ELSEWHERE = PLACES["snow"][0]  # where handles of several strengths are drawn: no image shows it
FINER = 4  # times the miniature's pixels, of the images' sides: close-ups stay sharp
CELL = 128
HELD_OUT = 300  # scenes that show how well places are read


def moved(layout: Layout, background: str, seed: int, *spots: tuple[float, float, float]) -> Layout:
    """The same objects in another place, each at (x, y, size)."""
    objects = zip(layout.objects, spots, strict=True)
    return Layout(tuple(replace(obj, x=x, y=y, size=size) for obj, (x, y, size) in objects), background, seed)


FURTHER = (
    moved(SCENE, "wall", 11, (0.68, 0.62, 0.58), (0.27, 0.3, 0.44)),
    moved(SCENE, "street", 12, (0.3, 0.7, 0.46), (0.7, 0.32, 0.54)),
)
UNSEEN = moved(SCENE, "snow", 13, (0.7, 0.34, 0.5), (0.28, 0.66, 0.48))  # of no training


# --- Learning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learnt:
    """A run, and the looks it was to learn."""

    models: Models
    config: TrainConfig
    photo: Image.Image  # the first one
    masks: np.ndarray  # (N, H, W), of the objects alone
    objects: tuple[str, ...]  # N handles: all but the background's


def learn(folder: Path, base: Path, layouts: tuple[Layout, ...], steps: list[int] | None, **changes) -> Learnt:
    """A finished run on images of these layouts, from an earlier call or made now."""
    side = load(base).resolution
    for i, layout in enumerate(layouts):
        target = folder / "scene" / (str(i) if i else "")
        if not (target / "scene.json").exists():
            save_scene(realise(layout, describe(layout), FINER * side), target)
    run = folder / "run"
    settings = {"output_dir": str(run), "pretrained_model_name_or_path": str(base), "img_log_steps": 0, **changes}
    if steps:
        settings |= dict(zip(("phase1_train_steps", "phase2_train_steps"), steps, strict=True))
    config = train_config(folder / "scene", checkpointing_steps=0, **settings)
    train_once(config, folder / "trained.json")
    models, (image, masks) = load(run), draw(layouts[0], side)
    return Learnt(models, config, Image.fromarray(image), masks, models.handles[: len(masks)])


# --- Measuring ----------------------------------------------------------------------------------------------------


def draw_each(learnt: Learnt, prompts: list[str], count: int, seed: int, sheet: Path) -> list[list[Image.Image]]:
    """`count` images of each prompt, and all of them on a sheet."""
    drawn = sample(learnt.models, prompts, SampleConfig(num_images=count, batch_size=16, seed=seed))
    rows = [drawn[i : i + count] for i in range(0, len(drawn), count)]
    grid(rows, [[prompt] * count for prompt in prompts], CELL).save(sheet)
    return rows


def likeness(learnt: Learnt, images: list[Image.Image]) -> list[float]:
    """How much these images show of each object, on average."""
    found = [ObjectSimilarity().identity_similarity(images, learnt.photo, mask) for mask in learnt.masks]
    return [float(np.mean(values)) for values in found]


def check_alone(learnt: Learnt, layout: Layout, count: int, sheet: Path) -> dict:
    """Each handle alone: attention IoU on an image, likeness to its own look and to the others' looks."""
    image, masks = draw(layout, learnt.photo.width)
    maps = scene_attention(learnt.models, learnt.objects, pixels(Image.fromarray(image)), learnt.config)
    iou = attention_iou(maps, torch.from_numpy(masks))
    rows = draw_each(learnt, [subset_prompt([handle]) for handle in learnt.objects], count, 1000, sheet)
    found = np.array([likeness(learnt, row) for row in rows])
    others = [np.delete(row, i).mean() for i, row in enumerate(found)]
    return {"iou": iou, "own": found.diagonal().tolist(), "others": [float(value) for value in others]}


def loose_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns around an object, with room for another about as large. mask: (H, W)"""
    places, margin = (np.flatnonzero(mask.max(axis=axis) > 0) for axis in (1, 0)), len(mask) // 12
    rows, columns = (slice(max(place[0] - margin, 0), place[-1] + 1 + margin) for place in places)
    return rows, columns


def check_edit(learnt: Learnt, count: int, sheet: Path) -> dict:
    """Put the first object where another stood: pixels outside that differ, likeness inside before and after."""
    image, masks = draw(PHOTO, learnt.photo.width)
    inside = loose_box(masks[0])
    mask = np.zeros(image.shape[:2], np.float32)
    mask[inside] = 1
    region = Region(mask, f"{subset_prompt(learnt.objects[:1])} {PLACES[PHOTO.background][0]}")
    results = edit(learnt.models, Image.fromarray(image), [region], num_images=count, batch_size=count)
    grid([[Image.fromarray(image), *results]], [["before"] + ["after"] * count], CELL).save(sheet)
    outside = [int(((np.asarray(r) != image).any(axis=-1) & (mask == 0)).sum()) for r in results]
    before, *after = ObjectSimilarity().identity_similarity(
        [Image.fromarray(image), *results], learnt.photo, learnt.masks[0], [mask] * (1 + count)
    )
    return {"outside": max(outside), "before": before, "after": float(np.mean(after))}


def check_background(learnt: Learnt, recogniser: Recogniser, count: int, sheet: Path) -> dict:
    """The share of images in which the scene's place is seen, with the background's handle and elsewhere."""
    obj, (bg,) = subset_prompt(learnt.objects[-1:]), learnt.models.handles[len(learnt.objects) :]
    prompts = [f"a photo at {bg}", f"{obj} at {bg}", f"{obj} {ELSEWHERE}", f"{KNOWN} at {bg}"]
    rows = draw_each(learnt, prompts, count, 2000, sheet)
    seen = [[reading.place for reading in recognise_images(recogniser, row)] for row in rows]
    return {prompt: places.count(SCENE.background) / count for prompt, places in zip(prompts, seen, strict=True)}


def check_strength(learnt: Learnt, count: int, sheet: Path) -> dict:
    """How much images of both objects show of each, by the strength of the first."""
    first, second = learnt.objects
    prompts = [f"{subset_prompt([f'({first}:{strength:g})', second])} {ELSEWHERE}" for strength in STRENGTHS]
    rows = draw_each(learnt, prompts, count, 3000, sheet)
    return {f"{strength:g}": likeness(learnt, row) for strength, row in zip(STRENGTHS, rows, strict=True)}


def places_read(recogniser: Recogniser) -> float:
    """The share of held-out scenes whose place the recogniser names: the ceiling."""
    scenes = [labelled_scene(1_000_000 + i) for i in range(HELD_OUT)]
    seen = [reading.place for reading in recognise_images(recogniser, [scene.image for scene in scenes])]
    return sum(place == tuple(PLACES)[scene.place] for place, scene in zip(seen, scenes, strict=True)) / HELD_OUT


# --- The table ----------------------------------------------------------------------------------------------------


def table(scores: dict) -> str:
    """The scores in words, a row for each."""

    def both(values: list[float]) -> str:
        return ", ".join(f"{value:.2f}" for value in values)

    edited, places, parts = scores["edit"], scores["background"], scores["parts"]
    one, several, strength = scores["one image"], scores["three images"], scores["strength"]
    rows = [
        ("edit", "pixels outside the mask that differ", f"{edited['outside']}"),
        ("edit", "likeness inside, before → after", f"{edited['before']:.2f} → {edited['after']:.2f}"),
        *(("background", f"{SCENE.background} seen in '{p}'", f"{100 * share:.0f} %") for p, share in places.items()),
        ("object and part", "attention IoU", both(parts["iou"])),
        ("object and part", "each alone: likeness to its own look", both(parts["own"])),
        ("object and part", "each alone: to the other's", both(parts["others"])),
    ]
    for name, score in (("one image", one), ("three images", several)):
        rows += [
            (name, "attention IoU on an unseen image", both(score["iou"])),
            (name, "each alone: likeness to its own look", both(score["own"])),
            (name, "each alone: to the other's", both(score["others"])),
        ]
    rows += [("strength", f"of the first {s}: likeness to both looks", both(pair)) for s, pair in strength.items()]
    lines = ["| application | measured | |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def main() -> None:
    """Learn, measure, print, and leave scores.json."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks.applications",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", help="a miniature's folder (default: the shipped one)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--images", type=int, default=8, help="images of each prompt")
    parser.add_argument("--steps", type=int, nargs=2, help="of both phases (default: as the miniature trains)")
    parser.add_argument("--scenes", type=int, default=8_000, help="scenes the recogniser of places trains on")
    args = parser.parse_args()
    began, base, out = time.monotonic(), find(args.weights), args.output_dir
    recogniser = train_recogniser(out / "recogniser.pt", args.scenes, epochs=4)
    one = learn(out / "one", base, (SCENE,), args.steps, background_handle="bg")
    several = learn(out / "several", base, (SCENE, *FURTHER), args.steps, background_handle="bg")
    parts = learn(out / "parts", base, (PARTS,), args.steps)
    scores = {
        "edit": check_edit(one, args.images, out / "edit.png"),
        "background": check_background(one, recogniser, args.images, out / "background.png"),
        "parts": check_alone(parts, PARTS, args.images, out / "parts.png"),
        "one image": check_alone(one, UNSEEN, args.images, out / "one.png"),
        "three images": check_alone(several, UNSEEN, args.images, out / "several.png"),
        "strength": check_strength(one, args.images, out / "strength.png"),
        "places read in drawn scenes": places_read(recogniser),
        "images of each prompt": args.images,
        "seconds": round(time.monotonic() - began),
    }
    (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    read = f"{100 * scores['places read in drawn scenes']:.0f} %"
    print(f"{table(scores)}\n\n{args.images} images of each prompt; the place is read rightly in {read} of scenes")
    print(f"that were drawn, not generated; {scores['seconds']} s")


if __name__ == "__main__":
    run_tool(main)
