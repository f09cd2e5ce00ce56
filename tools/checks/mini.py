"""Measures a miniature model: does the image show what the prompt says, and how well does the VAE reconstruct?

A small network is trained here on fresh scenes of `tools.mini_world` whose objects have one colour. It names shape and
colour cell by cell, and the place as a whole. Then it reads generated images. Its errors on held-out scenes, as drawn
and through the VAE, stand in the table beside the model's, so that each figure can be judged.

    python -m tools.checks.mini --weights weights/mini --output_dir /tmp/check
"""

import argparse
import json
import time
from dataclasses import dataclass
from multiprocessing import Pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bas
from bas.errors import InputError
from bas.runtime.device import native_bf16
from tools.command_line import run as run_tool
from tools.mini_world.captions import describe
from tools.mini_world.colours import COLOURS
from tools.mini_world.drawing import contact_sheet, draw
from tools.mini_world.layouts import Layout, compose
from tools.mini_world.places import PLACES
from tools.mini_world.scenes import render_scene
from tools.mini_world.shapes import SHAPES

SEED = 90_210  # scenes here are drawn from (SEED, i): none of them is a training scene
BATCH = 64  # scenes of a step of the recogniser's training
SIDE = 64  # the recogniser reads images of this size
SHAPE_NAMES, COLOUR_NAMES, PLACE_NAMES = (tuple(names) for names in (SHAPES, COLOURS, PLACES))
NOTHING = len(SHAPES)  # the shape class of cells without an object
SHOWN = 36  # images of one object, of two and of three on the sheet
LEAST = 0.4  # of an even share of the object cells: what each of several objects has at least


class Recogniser(nn.Module):
    """Images (b, 3, 64, 64) in [-1, 1] -> logits: shapes (b, 13, 16, 16), colours (b, 10, 16, 16), places (b, 11)."""

    def __init__(self):
        super().__init__()

        def block(c_in, c_out, stride):
            conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

        self.fine = nn.Sequential(block(3, 32, 2), block(32, 64, 2), block(64, 64, 1))  # 16 x 16
        self.middle = nn.Sequential(block(64, 96, 2), block(96, 96, 1))  # 8 x 8
        self.coarse = nn.Sequential(block(96, 128, 2), block(128, 128, 1))  # 4 x 4
        self.join = nn.Sequential(nn.Conv2d(64 + 96 + 128, 64, 1), block(64, 96, 1))
        self.cells = nn.Conv2d(96, NOTHING + 1 + len(COLOURS), 1)
        self.places = nn.Linear(64 + 96 + 128, len(PLACES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(x)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        grids = [fine, F.interpolate(middle, scale_factor=2.0), F.interpolate(coarse, scale_factor=4.0)]
        joined = torch.cat(grids, dim=1)
        shapes, colours = self.cells(self.join(joined)).split([NOTHING + 1, len(COLOURS)], dim=1)
        return shapes, colours, self.places(joined.mean(dim=(2, 3)))


class Labelled(NamedTuple):
    """A scene to learn reading from."""

    image: np.ndarray  # (H, W, 3) uint8
    shapes: np.ndarray  # (16, 16): the shape of each cell of which an object covers half
    colours: np.ndarray  # (16, 16): and its colour
    place: int


def labelled_scene(index: int) -> Labelled:
    """Scene `index`, with what there is to read in it."""
    scene = render_scene(np.random.default_rng((SEED, index)), SIDE, two_colours=0)
    shapes = np.full((16, 16), NOTHING, dtype=np.int64)
    colours = np.full((16, 16), -1, dtype=np.int64)  # -1: no colour to learn
    for obj, mask in zip(scene.objects, scene.masks, strict=True):
        covered = mask.reshape(16, 4, 16, 4).mean(axis=(1, 3)) > 0.5
        shapes[covered] = SHAPE_NAMES.index(obj.shape)
        colours[covered] = COLOUR_NAMES.index(obj.colour)
    return Labelled(scene.image, shapes, colours, PLACE_NAMES.index(scene.background))


def to_tensor(images) -> Tensor:
    """Images (b, H, W, 3) uint8 -> (b, 3, 64, 64) float32 in [-1, 1]"""
    x = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x if x.shape[-1] == SIDE else F.interpolate(x, size=(SIDE, SIDE), mode="area")


def blemish(x: Tensor, generator: torch.Generator) -> Tensor:
    """What a decoder does to images, roughly: blur some of them, and add noise."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    amount = torch.rand(len(x), 1, 1, 1, generator=generator)
    return x + amount * (blurred - x) + 0.06 * torch.randn(x.shape, generator=generator)


def train_recogniser(path: Path, scenes: int, epochs: int) -> Recogniser:
    """The recogniser, trained on `scenes` fresh scenes, or read from `path` where it was trained before.

    Raises InputError where it was trained for longer or shorter.
    """
    about = {"scenes": scenes, "epochs": epochs}
    if path.exists():
        recogniser, found = read_recogniser(path)
        if found != about:
            told = " and ".join(f"{found[name]} {name}" for name in about)
            raise InputError(f"{path} was trained on {told}, not {scenes} and {epochs}: move it away")
        return recogniser
    torch.manual_seed(SEED)
    recogniser = Recogniser()
    with Pool() as pool:
        images, shapes, colours, places = zip(*pool.map(labelled_scene, range(scenes), chunksize=64), strict=True)
    images, places = to_tensor(images), torch.tensor(places)
    shapes, colours = torch.from_numpy(np.stack(shapes)), torch.from_numpy(np.stack(colours))
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(recogniser.parameters(), 2e-3)
    steps = epochs * scenes // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        i = torch.randint(scenes, (BATCH,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16(torch.device("cpu"))):
            seen_shapes, seen_colours, seen_places = recogniser(blemish(images[i], generator))
        loss = F.cross_entropy(seen_shapes.float(), shapes[i]) + F.cross_entropy(seen_places.float(), places[i])
        loss = loss + F.cross_entropy(seen_colours.float(), colours[i], ignore_index=-1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"about": about, "weights": recogniser.state_dict()}, path)
    return recogniser.eval()


def read_recogniser(path: Path) -> tuple[Recogniser, dict[str, int]]:
    """A trained recogniser, and of how many scenes and epochs it is. InputError for a file that does not say so."""
    kept = torch.load(path, weights_only=True)
    if "about" not in kept:
        raise InputError(f"{path} is of an earlier version: move it away, and it is trained again")
    recogniser = Recogniser()
    recogniser.load_state_dict(kept["weights"])
    return recogniser.eval(), kept["about"]


def open_recogniser(named: Path | None, folder: Path, scenes: int, epochs: int) -> Recogniser:
    """That of a named file, however it was trained; else the folder's. Trained now where there is none."""
    if named and named.exists():
        return read_recogniser(named)[0]
    return train_recogniser(named or folder / "recogniser.pt", scenes, epochs)


@dataclass
class Reading:
    """What the recogniser sees in one image: the place, and for each shape its cells and the colour of those."""

    place: str
    cells: dict[str, int]
    colours: dict[str, str]

    @property
    def main(self) -> str | None:
        """The shape with the most cells; None in an image without objects."""
        return max(self.cells, key=self.cells.get, default=None)

    def shows(self, shape: str, colour: str, share: float) -> bool:
        """Whether `shape` fills at least `share` of all object cells, in that colour."""
        enough = self.cells.get(shape, 0) >= share * sum(self.cells.values())
        return enough and self.colours.get(shape) == colour


@torch.no_grad()
def recognise_images(recogniser: Recogniser, images) -> list[Reading]:
    """One Reading for each image (H, W, 3) uint8 or PIL."""
    readings = []
    for start in range(0, len(images), 64):
        shapes, colours, places = recogniser(to_tensor(images[start : start + 64]))
        for shape, colour, place in zip(shapes.argmax(1), colours.log_softmax(1), places.argmax(1), strict=True):
            cells, spoken = {}, {}
            for index in shape.unique().tolist():
                inside = shape == index
                if index != NOTHING:
                    cells[SHAPE_NAMES[index]] = int(inside.sum())
                    spoken[SHAPE_NAMES[index]] = COLOUR_NAMES[colour[:, inside].sum(1).argmax()]
            readings.append(Reading(PLACE_NAMES[place], cells, spoken))
    return readings


def score(layouts: list[Layout], readings: list[Reading]) -> dict[str, float]:
    """Percentages: of single objects shape, colour, place and all three; of two and three all right, and the place."""
    read = list(zip(layouts, readings, strict=True))
    singles = [(layout.objects[0], layout.background, r) for layout, r in read if len(layout.objects) == 1]
    several = {count: [(layout, r) for layout, r in read if len(layout.objects) == count] for count in (2, 3)}

    def percent(hits):
        hits = list(hits)
        return round(100 * sum(hits) / max(len(hits), 1), 1)

    return {
        "shape": percent(r.main == obj.shape for obj, _, r in singles),
        "colour": percent(r.main is not None and r.colours[r.main] == obj.colour for obj, _, r in singles),
        "place": percent(r.place == place for _, place, r in singles),
        "all three": percent(r.place == place and r.shows(t.shape, t.colour, 0.5) for t, place, r in singles),
        **{
            name: percent(
                all(r.shows(t.shape, t.colour, LEAST / count) for t in layout.objects) for layout, r in several[count]
            )
            for name, count in (("both of two", 2), ("three of three", 3))
        },
        **{
            name: percent(r.place == layout.background for layout, r in several[count])
            for name, count in (("place of two", 2), ("place of three", 3))
        },
    }


def psnr(images, originals) -> float:
    """Mean over images of the peak signal-to-noise ratio, in dB."""
    error = (to_tensor(images) - to_tensor(originals)).square().mean(dim=(1, 2, 3)) / 4
    return (-10 * error.log10()).mean().item()


@torch.no_grad()
def through_vae(models, images) -> list[np.ndarray]:
    """Images encoded to the posterior's mean and decoded again."""
    side = models.vae.config.sample_size
    decoded = []
    for image in images:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
        x = F.interpolate(x, size=(side, side), mode="bilinear") if x.shape[-1] != side else x
        y = (models.vae(x)[0].clamp(-1, 1) + 1) * 127.5
        decoded.append(y.round().byte().permute(1, 2, 0).numpy())
    return decoded


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks.mini", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=Path("weights/mini"))
    parser.add_argument("--output_dir", type=Path, required=True, help="recogniser, images, table.md, scores.json")
    parser.add_argument(
        "--prompts", type=int, default=200, help="prompts with one object, as many with two, as many with three"
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--scenes", type=int, default=24_000, help="scenes the recogniser trains on")
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    recogniser = train_recogniser(args.output_dir / "recogniser.pt", args.scenes, args.epochs)
    models = bas.load(args.weights, dtype=torch.float32)

    rng = np.random.default_rng(SEED)
    layouts = [compose(rng, 1 + i // args.prompts, two_colours=0) for i in range(3 * args.prompts)]
    originals = [draw(layout, SIDE)[0] for layout in layouts]
    decoded = through_vae(models, originals)
    prompts = [describe(layout) for layout in layouts]
    start = time.monotonic()
    images = []
    for i in range(0, len(prompts), 16):  # the sixteen share their noise
        images += bas.sample(
            models,
            prompts[i : i + 16],
            seed=i,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            batch_size=16,
        )
    seconds = (time.monotonic() - start) / len(prompts)

    rows = {
        "scenes themselves": score(layouts, recognise_images(recogniser, originals)),
        "scenes through the VAE": score(layouts, recognise_images(recogniser, decoded)),
        "generated": score(layouts, recognise_images(recogniser, images)),
    }
    heads = list(rows["generated"])
    table = ["| images | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    table += ["| " + " | ".join([name, *(f"{row[head]:.1f} %" for head in heads)]) + " |" for name, row in rows.items()]
    settings = {"prompts": args.prompts, "steps": args.steps, "guidance": args.guidance}
    facts = {"vae_psnr_db": round(psnr(decoded, originals), 2), "seconds_per_image": round(seconds, 2)}
    (args.output_dir / "table.md").write_text("\n".join(table) + "\n")
    (args.output_dir / "scores.json").write_text(json.dumps({**settings, **facts, **rows}, indent=2) + "\n")
    first = (images[i * args.prompts :][: min(args.prompts, SHOWN)] for i in range(3))
    shown = [np.asarray(image) for some in first for image in some]
    contact_sheet(shown, columns=12).save(args.output_dir / "images.png")
    (args.output_dir / "prompts.txt").write_text("\n".join(prompts) + "\n")
    print("\n".join(table), facts, sep="\n")


if __name__ == "__main__":
    run_tool(main)
