"""Measures whether handles learnt from one image recombine: every subset of a scene's concepts in new places.

Scenes of two, three and four concepts in turn are made from a seed; the miniature never saw their shapes. Each is
trained with the miniature's own settings. Then every subset of its handles is generated in six places with three seeds:

    right       every named concept is found: its likeness is 0.7 or more (bas.evaluation.object_similarity)
    guest       a concept that the prompt does not name is found, and its likeness to the named ones cannot explain it
    likeness    the mean likeness of the named concepts
    place       the named place is seen, as the recogniser of tools.checks.mini reads it
    usual       the best match of every named concept, however poor, has its centre in the concept's usual box
    swapped     the same for its swapped box

The usual box of a concept is that of its mask in the scene, wider by 0.05 of the image on each side. Swapped boxes are
the usual ones of a subset, passed on in a circle: each concept has that of the next one. A concept alone has that of
the next one of the scene. `--layout` steers images into either; without it the columns say what chance gives.

    python -m tools.checks.combine --scenes 3 --seed 1 --output_dir /tmp/combine
    python -m tools.checks.combine --scenes 3 --seed 1 --output_dir /tmp/stronger --guidance_scale 7.5
    python -m tools.checks.combine --scenes 3 --seed 1 --output_dir /tmp/flips --set flip_probability=0.5
    python -m tools.checks.combine --scenes 3 --seed 1 --output_dir /tmp/combine --layout swapped
    python -m tools.checks.combine --scenes 3 --seed 1 --output_dir /tmp/combine --only 1 2

The table also shows two upper limits: the true concepts drawn by the world in the same places, and each scene's image
through the VAE. A second call continues: a finished run is not trained again, and a scene that is measured with the
same settings is not measured again. DIR holds table.md, scores.json, and figure.png with a row for each scene. The
folder of each scene holds sheet.png, its scores and its run. Steered images have files of their own beside those of
plain ones, as table-layout-swapped.md.
"""

import argparse
import time
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bas.cli.flags import add_fields, given
from bas.config import SampleConfig, TrainConfig
from bas.data.scene import subset_prompt
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.evaluation.metrics import attention_iou
from bas.evaluation.object_similarity import RIGHT, ObjectSimilarity
from bas.io.figures import grid, tint_masks
from bas.io.files import write_text
from bas.io.images import read_image, save_image
from bas.io.json_files import read_json, write_json
from bas.models.bundle import Models
from bas.pretrained.folder import load, read_spec
from bas.pretrained.hashes import weights_hash
from bas.pretrained.hub import find, train_config
from bas.sampling.gallery import subsets
from bas.sampling.layout import bounding_box
from bas.sampling.sampler import guidance_scale, sample
from bas.sampling.steer import Steer
from bas.training.preview import scene_attention
from tools.checks.mini import Recogniser, open_recogniser, recognise_images, through_vae
from tools.checks.runs import train_once
from tools.command_line import run as run_tool
from tools.mini_world.captions import describe
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import DEMO_SCENES, SLOTS, Layout, compose_concepts
from tools.mini_world.places import PLACES
from tools.mini_world.scenes import realise, save_scene

MARGIN = 0.05  # above the likeness of the true named concepts to an unnamed one, from which on that one is a guest
TEN = tuple(place for place in PLACES if place != "wall")  # the places of the paper's evaluation
SIDE = 64  # pixels of true concepts that are drawn here
FINER = 4  # times SIDE, of the scenes' images: close-ups stay sharp
SETS_APART = 1_000_003  # between the generators of two seeds
FIRST_NOISE = 1000  # the seed of the first image of each prompt
CELL = 112  # pixels of an image on the sheets
ROW = 6  # generated images of a scene in the figure
SIZES = {1: "alone", 2: "pairs", 3: "triples", 4: "all four"}  # of subsets
SAMPLING = {f.name for f in fields(SampleConfig)} - {"num_images", "seed", "height", "width", "layout"}
BOXES = ("usual", "swapped")
Box = tuple[float, float, float, float]  # left, top, right, bottom in shares of the image
WIDER = 0.05  # of the image's side, by which a box is wider than its concept on each side


# --- Scenes -------------------------------------------------------------------------------------------------------


def unseen_scenes(count: int, seed: int) -> dict[str, Layout]:
    """Decide scenes of 2, 3, 4, 2, ... concepts. The first ones are the same for every `count`."""
    rngs = [np.random.default_rng((SETS_APART, seed, i)) for i in range(count)]
    return {f"seed{seed}-{i:02d}": compose_concepts(rng, 2 + i % 3) for i, rng in enumerate(rngs)}


def places_of(layout: Layout, count: int) -> tuple[str, ...]:
    """Return the first `count` of the ten places that are not the scene's own."""
    return tuple(place for place in TEN if place != layout.background)[:count]


def true_image(layout: Layout, subset: tuple[int, ...], place: str, seed: int) -> Image.Image:
    """Draw the true concepts of a subset in a place, at other positions than in the scene, each as large as there."""
    rng = np.random.default_rng((seed, *subset))
    centres = np.array(SLOTS[len(subset)])[rng.permutation(len(subset))] + rng.uniform(-0.05, 0.05, (len(subset), 2))
    objects = [replace(layout.objects[i], x=float(x), y=float(y)) for i, (x, y) in zip(subset, centres, strict=True)]
    return Image.fromarray(draw(Layout(tuple(objects), place, int(rng.integers(2**31))), SIDE)[0])


def usual_boxes(masks: np.ndarray) -> list[Box]:
    """Return the box of each concept where it stands in the scene, a little wider. masks: (N, H, W) in 0..1"""
    found = []
    for mask in masks:
        left, top, right, bottom = bounding_box(mask)
        found.append((max(0, left - WIDER), max(0, top - WIDER), min(1, right + WIDER), min(1, bottom + WIDER)))
    return found


def boxes_of(subset: tuple[int, ...], usual: list[Box], kind: str) -> dict[int, Box]:
    """Return the box of each concept of a subset. kind: one of BOXES"""
    circle = subset if len(subset) > 1 else tuple(range(len(usual)))
    following = dict(zip(circle, (*circle[1:], circle[0]), strict=True))
    return {i: usual[i if kind == "usual" else following[i]] for i in subset}


# --- Measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """The concepts of a scene as they are: image, masks (N, H, W) in 0..1, and how alike they are, (N, N).

    cross[i, j]: the highest likeness to concept j of an image that shows concept i alone.
    """

    image: Image.Image
    masks: np.ndarray
    cross: np.ndarray


@dataclass(frozen=True)
class Shown:
    """One image: the concepts and the place that it should show, and what it shows."""

    subset: tuple[int, ...]
    place: str
    seed: int
    likeness: tuple[float, ...]  # to each of the scene's concepts
    seen: str  # the place that is read
    boxed: dict[str, bool]  # for each of BOXES, whether every named concept is in its box

    @property
    def right(self) -> bool:
        """Whether every named concept is found."""
        return all(self.likeness[i] >= RIGHT for i in self.subset)

    @property
    def named(self) -> float:
        """The mean likeness of the named concepts."""
        return float(np.mean([self.likeness[i] for i in self.subset]))

    def guests(self, cross: np.ndarray) -> tuple[int, ...]:
        """Return the concepts that are found though nothing names them. cross: (N, N), of `Truth`"""
        others = [j for j in range(len(self.likeness)) if j not in self.subset]
        least = {j: max(RIGHT, max(cross[i, j] for i in self.subset) + MARGIN) for j in others}
        return tuple(j for j in others if self.likeness[j] >= least[j])


def read_truth(layout: Layout, places: tuple[str, ...], seeds: int) -> Truth:
    """Draw a scene's image and masks, and measure how alike its concepts are in these places."""
    image, masks = draw(layout, SIDE)
    truth = Truth(Image.fromarray(image), masks, np.ones((len(masks), len(masks))))
    for i in range(len(masks)):
        alone = [true_image(layout, (i,), place, seed) for place in places for seed in range(seeds)]
        truth.cross[i] = np.max(likenesses(truth, alone), axis=0)
    return truth


def likenesses(truth: Truth, images: list[Image.Image]) -> np.ndarray:
    """Return the likeness of each image to each concept, (images, N), as `find_concepts` does."""
    return find_concepts(truth, images)[0]


def find_concepts(truth: Truth, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """Return the likeness of each image to each concept, (images, N), and the centres (images, N, 2) of its matches.

    They are those of the best of four shifts by half a cell, the centres as (x, y) in shares of the image. The measure
    compares cells of two pixels: without the shifts, a true concept that stands between cells is missed.
    """
    shifts = [(x, y) for x in (0, 1) for y in (0, 1)]
    shifted = [shift(image, x, y) for image in images for x, y in shifts]
    found = [ObjectSimilarity().find(shifted, truth.image, mask) for mask in truth.masks]
    values = np.array([values for values, _ in found]).reshape(len(truth.masks), len(images), len(shifts))
    centres = np.array([centres for _, centres in found]).reshape(*values.shape, 2) - np.array(shifts) / SIDE
    best = values.argmax(axis=2)[..., None]
    chosen = np.take_along_axis(centres, best[..., None], axis=2)[:, :, 0]
    return values.max(axis=2).T, chosen.transpose(1, 0, 2)


def shift(image: Image.Image, x: int, y: int) -> Image.Image:
    """Shift an image right and down by pixels of an image of SIDE, repeating its border."""
    pixels = np.asarray(image.resize((SIDE, SIDE)) if image.size != (SIDE, SIDE) else image)
    return Image.fromarray(np.pad(pixels, ((y, 0), (x, 0), (0, 0)), mode="edge")[:SIDE, :SIDE])


def requests(count: int, places: tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Return every non-empty subset of `count` concepts in every place."""
    names = tuple(map(str, range(count)))
    return [(tuple(map(int, subset)), place) for subset in subsets(names) for place in places]


def read_images(
    truth: Truth, asked: list[tuple[tuple[int, ...], str]], images: list[Image.Image], recogniser: Recogniser
) -> list[Shown]:
    """Measure images, as many for each request as there are seeds, request by request."""
    seeds = len(images) // len(asked)
    jobs = [(subset, place, seed) for subset, place in asked for seed in range(seeds)]
    found, centres = find_concepts(truth, images)
    usual, readings = usual_boxes(truth.masks), recognise_images(recogniser, images)
    shown = []
    for job, values, where, reading in zip(jobs, found, centres, readings, strict=True):
        boxed = {kind: all_inside(where, boxes_of(job[0], usual, kind)) for kind in BOXES}
        shown.append(Shown(*job, tuple(map(float, values)), reading.place, boxed))
    return shown


def all_inside(centres: np.ndarray, boxes: dict[int, Box]) -> bool:
    """Whether each of these concepts has its centre in its box. centres: (N, 2) as x, y in shares of the image"""
    return all(
        left <= centres[i, 0] <= right and top <= centres[i, 1] <= bottom
        for i, (left, top, right, bottom) in boxes.items()
    )


def generate(
    models: Models, asked: list[tuple[tuple[int, ...], str]], usual: list[Box], kind: str | None, config: SampleConfig
) -> list[Image.Image]:
    """Generate `num_images` images of each request, in boxes of a kind if one is given."""
    images = []
    for subset, group in groupby(asked, key=lambda request: request[0]):
        handles = [models.handles[i] for i in subset]
        prompts = [f"{subset_prompt(handles)} {PLACES[place][0]}" for _, place in group]
        boxes = boxes_of(subset, usual, kind) if kind else {}
        layout = {models.handles[i]: box for i, box in boxes.items()}
        steer = Steer(config.separate and len(subset) > 1, layout, config.own_pixels)
        images += sample(models, prompts, config, steer)
    return images


def summarise(shown: list[Shown], cross: np.ndarray) -> dict[str, float]:
    """Return the shares of right images, with a guest, of named places and of boxes, and the mean likeness."""
    return {
        "right": float(np.mean([image.right for image in shown])),
        "guest": float(np.mean([bool(image.guests(cross)) for image in shown])),
        "likeness": float(np.mean([image.named for image in shown])),
        "place": float(np.mean([image.seen == image.place for image in shown])),
        **{kind: float(np.mean([image.boxed[kind] for image in shown])) for kind in BOXES},
    }


# --- One scene ----------------------------------------------------------------------------------------------------


def learn(folder: Path, base: Path, layout: Layout, changes: dict[str, Any]) -> TrainConfig:
    """Train on a scene with the base model's own settings and `changes`, unless that is done; returns all settings."""
    run, scene = folder / "run", folder / "scene"
    if not (scene / "scene.json").exists():
        save_scene(realise(layout, describe(layout), FINER * SIDE), scene)
    settings = {"pretrained_model_name_or_path": str(base), "img_log_steps": 0, "checkpointing_steps": 0}
    settings |= {"class_data_dir": str(folder.parent / "class_images")} | changes  # the same for all scenes
    config = train_config(scene, output_dir=str(run), **settings)
    train_once(config, folder / "trained.json")
    return config


def measure(
    folder: Path,
    trained: TrainConfig,
    layout: Layout,
    recogniser: Recogniser,
    places: int,
    kind: str | None,
    config: SampleConfig,
) -> dict[str, Any]:
    """Measure a trained scene, write its sheet, and return its scores. kind: of the boxes to steer into"""
    began, models, shown_places = time.monotonic(), load(Path(trained.output_dir)), places_of(layout, places)
    truth = read_truth(layout, shown_places, config.num_images)
    asked = requests(len(layout.objects), shown_places)
    images = generate(models, asked, usual_boxes(truth.masks), kind, config)
    drawn = [true_image(layout, *request, seed) for request in asked for seed in range(config.num_images)]
    shown, true = read_images(truth, asked, images, recogniser), read_images(truth, asked, drawn, recogniser)
    decoded = [Image.fromarray(image) for image in through_vae(models, [np.array(truth.image)])]
    image, masks = load_scene(trained).tensors(models.resolution, models.size_multiple)
    maps = scene_attention(models, models.handles[: len(truth.masks)], image, trained)
    first = list(zip(images, shown, strict=True))[:: config.num_images]
    save_image(sheet(truth, decoded[0], first), folder / f"sheet{variant(config, kind)}.png")
    save_image(figure_row(truth, first), folder / f"row{variant(config, kind)}.png")
    return {
        "concepts": [asdict(obj) for obj in layout.objects],
        "background": layout.background,
        "codec": likenesses(truth, decoded)[0].tolist(),
        "attention_iou": attention_iou(maps, masks),
        "cross": truth.cross.tolist(),
        "images": [asdict(image) for image in shown],
        "true": [asdict(image) for image in true],
        "seconds": round(time.monotonic() - began),
    }


def sheet(truth: Truth, decoded: Image.Image, first: list[tuple[Image.Image, Shown]]) -> Image.Image:
    """Put the scene and the first seed of every request on one sheet, a row for each subset."""
    masks = dict(enumerate(truth.masks))
    rows = [[truth.image, tint_masks(truth.image, masks), decoded]]
    labels = [["the scene", "and its masks", "through the VAE"]]
    last = None
    for image, found in first:
        if found.subset != last:
            rows.append([])
            labels.append([])
            last = found.subset
        values = " ".join(f"{found.likeness[i]:.2f}" for i in found.subset)
        guests = "".join(f" +{i}" for i in found.guests(truth.cross))
        rows[-1].append(image)
        named = " and ".join(map(str, found.subset))
        labels[-1].append(f"{named}, {found.place}: {'right' if found.right else 'wrong'} {values}{guests}")
    return grid(rows, labels, CELL, title="named concepts, place, likeness, +guests")


def figure_row(truth: Truth, first: list[tuple[Image.Image, Shown]]) -> Image.Image:
    """Put a scene, its masks, each concept alone and then all of them into one row, each image in the next place."""
    places = list(dict.fromkeys(found.place for _, found in first))
    every = tuple(range(len(truth.masks)))
    wanted = [((i,), places[i % len(places)]) for i in every]
    wanted += [(every, place) for place in places[: ROW - len(every)]]
    drawn = {(found.subset, found.place): image for image, found in first}
    names = [" and ".join(f"<asset{i}>" for i in subset) for subset, _ in wanted]
    labels = [f"{name} {PLACES[place][0]}" for name, (_, place) in zip(names, wanted, strict=True)]
    images = [truth.image, tint_masks(truth.image, dict(enumerate(truth.masks))), *(drawn[key] for key in wanted)]
    return grid([images], [["the scene", "and its masks", *labels]], CELL)


def stack(rows: list[Image.Image]) -> Image.Image:
    """Put images below each other, as wide as the widest."""
    paper = rows[0].getpixel((0, 0))
    whole = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), paper)
    for i, row in enumerate(rows):
        whole.paste(row, (0, sum(above.height for above in rows[:i])))
    return whole


# --- The table ----------------------------------------------------------------------------------------------------


def read_shown(rows: list[dict]) -> list[Shown]:
    """Read images back from scores.json."""
    return [Shown(**row | {"subset": tuple(row["subset"]), "likeness": tuple(row["likeness"])}) for row in rows]


def by_size(scenes: dict[str, dict], kind: str) -> dict[str, dict[str, float]]:
    """Summarise all scenes' images by the size of their subset. kind: of scores.json, images or true"""
    found: dict[int, list[tuple[Shown, np.ndarray]]] = {}
    for scene in scenes.values():
        cross = np.array(scene["cross"])
        for image in read_shown(scene[kind]):
            found.setdefault(len(image.subset), []).append((image, cross))
    return {SIZES[size]: mean_of([summarise([image], cross) for image, cross in found[size]]) for size in sorted(found)}


def mean_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """Average rows of equal names."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} | {"images": len(rows)}


def markdown(scores: dict[str, Any]) -> str:
    """Return the table: all scenes by size of the subset, the ceilings, then each scene."""
    scenes = scores["scenes"]
    lines = [f"{len(scenes)} scenes, {scores['about']}", ""]
    columns = ("subsets", "images", "right", "guests", "likeness", "place", *(f"in {kind} boxes" for kind in BOXES))
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for title, kind in (("", "images"), ("true concepts, drawn: ", "true")):
        for size, row in by_size(scenes, kind).items():
            shares = [f"{100 * row[name]:.0f} %" for name in ("right", "guest")]
            cells = [
                f"{title}{size}",
                f"{row['images']:.0f}",
                *shares,
                f"{row['likeness']:.2f}",
                *(f"{100 * row[name]:.0f} %" for name in ("place", *BOXES)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    codec = [value for scene in scenes.values() for value in scene["codec"]]
    iou = [value for scene in scenes.values() for value in scene["attention_iou"]]
    clear = 100 * np.mean([value >= 0.95 for value in codec])
    lines += ["", f"Scenes through the VAE: likeness {np.mean(codec):.2f}, 0.95 or more {clear:.0f} %. "]
    lines[-1] += f"Attention IoU {np.mean(iou):.2f}."
    lines += [
        "",
        "| scene | concepts | alone | pairs | triples | all four | guests | codec | attention IoU |",
        "|---" * 9 + "|",
    ]
    for name, scene in scenes.items():
        sizes = by_size({name: scene}, "images")
        right = [f"{100 * sizes[size]['right']:.0f} %" if size in sizes else "–" for size in SIZES.values()]
        guests = mean_of([summarise([s], np.array(scene["cross"])) for s in read_shown(scene["images"])])["guest"]
        shapes = ", ".join(obj["shape"] for obj in scene["concepts"])
        figures = [" ".join(f"{value:.2f}" for value in scene[key]) for key in ("codec", "attention_iou")]
        lines.append(f"| {' | '.join([name, shapes, *right, f'{100 * guests:.0f} %', *figures])} |")
    return "\n".join([*lines, ""])


def read_setting(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, the value as TOML or else as text. Raises InputError without a name."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise InputError(f"--set {text}: expected NAME=VALUE, a setting of training")
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value


def variant(config: SampleConfig, kind: str | None) -> str:
    """Return what the names of the files of steered images end with, such as "-separate-layout-usual"."""
    parts = ("-separate" * config.separate, f"-layout-{kind}" if kind else "", "-own_pixels" * config.own_pixels)
    return "".join(parts)


def main() -> None:
    """Make scenes, learn them, measure them, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks.combine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=12, help="unseen scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default: %(default)s)")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="of these scenes alone, counted from 0")
    parser.add_argument("--shipped", action="store_true", help="the miniature's own two scenes instead of unseen ones")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of runs and results, to continue")
    parser.add_argument("--weights", help="a miniature's folder (default: the shipped one)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings of training", dest="changes"
    )
    parser.add_argument("--places", type=int, default=6, choices=range(1, 10), help="of the ten (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="images of a subset in a place (default: %(default)s)")
    parser.add_argument("--recogniser", type=Path, help="file of the recogniser of places (default: in --output_dir)")
    parser.add_argument("--layout", choices=BOXES, help="steer each concept into its box (default: no layout)")
    add_fields(parser, SampleConfig, SAMPLING)
    args = parser.parse_args()
    base, out = find(args.weights), args.output_dir
    config = SampleConfig(
        **{"batch_size": 16, **given(args, SampleConfig), "num_images": args.seeds, "seed": FIRST_NOISE, "layout": None}
    )
    config = replace(config, guidance_scale=guidance_scale(read_spec(base), config))
    if config.own_pixels and not args.layout:
        raise InputError("--own_pixels needs a --layout")
    suffix = variant(config, args.layout)
    layouts = DEMO_SCENES if args.shipped else unseen_scenes(args.scenes, args.seed)
    if unknown := {*(args.only or ())} - {*range(len(layouts))}:
        raise InputError(f"--only {min(unknown)}: the scenes are 0 to {len(layouts) - 1}")
    layouts = {name: layouts[name] for i, name in enumerate(layouts) if not args.only or i in args.only}
    recogniser = open_recogniser(args.recogniser, out, scenes=8_000, epochs=4)
    changes, scenes = dict(map(read_setting, args.changes)), {}
    stated = {"sampling": asdict(config), "places": args.places, "layout": args.layout}
    for i, (name, layout) in enumerate(layouts.items(), start=1):
        trained, noted = learn(out / name, base, layout, changes), out / name / f"scores{suffix}.json"
        if not noted.exists() or {key: read_json(noted).get(key) for key in stated} != stated:
            found = measure(out / name, trained, layout, recogniser, args.places, args.layout, config)
            write_json(noted, stated | found)
        scenes[name] = read_json(noted)
        print(f"[{i}/{len(layouts)}] {name}", flush=True)
        about = f"{args.places} places, {args.seeds} seeds, guidance {config.guidance_scale:g}, base {base.name}"
        about += f", steered: {suffix[1:].replace('-', ' ')}" if suffix else ""
        scores = {"about": about, "weights": weights_hash(base), "changes": changes, **stated, "scenes": scenes}
        write_json(out / f"scores{suffix}.json", scores | {"by_size": by_size(scenes, "images")})
        write_text(out / f"table{suffix}.md", markdown(scores))
        save_image(stack([read_image(out / done / f"row{suffix}.png") for done in scenes]), out / f"figure{suffix}.png")
    print((out / f"table{suffix}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_tool(main)
