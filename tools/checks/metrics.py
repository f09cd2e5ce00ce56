"""Validates the miniature's measure of identity: how often does it rank the true object above another one?

A trial is a scene of two to four concept objects, one of them the wanted one, and images drawn anew: one shows the
wanted object, three show others of one kind each time, at other places, sizes and angles, mirrored or not, before other
backgrounds, half of the time with a second object. Every image is also measured after the miniature's VAE, which every
generated image passes. For comparison, the same images are ranked by the miniature's CLIP: by its features of images
with a black background, with the true segments, as DINO is used for photographs.

    python -m tools.checks.metrics --trials 300
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bas.evaluation.masking import blacken, blacken_each
from bas.evaluation.metrics import MINI_CLIP, PromptSimilarity
from bas.evaluation.object_similarity import ObjectSimilarity
from bas.io.images import to_images
from bas.models.bundle import Models
from bas.pretrained.folder import load
from bas.pretrained.hub import find
from tools.command_line import run as run_tool
from tools.mini_world.colours import COLOURS, MARKINGS
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import Layout, Object, choose, compose_concepts, place_objects
from tools.mini_world.places import PLACES
from tools.mini_world.shapes import CONCEPT_SHAPES

SEED = 31_337  # trials are drawn from (SEED, i)
SIDE = 64
OTHERS = 3  # images without the wanted object in each trial
Score = Callable[["Trial", list[Image.Image]], list[float]]


@dataclass
class Trial:
    """The input with the wanted object's mask; images of which the first shows it, and what they show, as masks."""

    image: Image.Image
    mask: np.ndarray  # (H, W) in 0..1
    images: list[Image.Image]  # 1 + OTHERS
    segments: list[np.ndarray]  # (H, W) in 0..1 each


def another(rng: np.random.Generator, kind: str, wanted: Object) -> Object:
    """A concept object that is not the wanted one: alike in nothing, in its shape, in its colours, or in both."""
    shape = choose(rng, [name for name in CONCEPT_SHAPES if name != wanted.shape])
    first, second = rng.permutation([name for name in COLOURS if name not in (wanted.colour, wanted.second)])[:2]
    marking = choose(rng, MARKINGS)
    match kind:
        case "another object":
            return Object(shape, str(first), marking, str(second))
        case "same shape, other colours":
            return Object(wanted.shape, str(first), marking, str(second))
        case "same colours and marking, other shape":
            return Object(shape, wanted.colour, wanted.pattern, wanted.second)
        case "same shape and colours, other marking":
            other = choose(rng, [name for name in MARKINGS if name != wanted.pattern])
            return Object(wanted.shape, wanted.colour, other, wanted.second)
    raise ValueError(f"unknown kind {kind!r}")


KINDS = (
    "another object",
    "same shape, other colours",
    "same colours and marking, other shape",
    "same shape and colours, other marking",
)


def make_trial(index: int, kind: str) -> Trial:
    """Trial `index` with distractors of one kind."""
    rng = np.random.default_rng((SEED, index))
    layout = compose_concepts(rng, int(rng.integers(2, 5)))
    image, masks = draw(layout, SIDE)
    chosen = int(rng.integers(len(masks)))
    wanted = layout.objects[chosen]
    companion = [another(rng, "another object", wanted)] if rng.random() < 0.5 else []
    images, segments = [], []
    for shown in [wanted, *(another(rng, kind, wanted) for _ in range(OTHERS))]:
        placed = place_objects(rng, [shown, *companion], anywhere=rng.random() < 0.5)
        drawn, layers = draw(Layout(placed, choose(rng, PLACES), int(rng.integers(2**31))), SIDE)
        if rng.random() < 0.5:
            drawn, layers = drawn[:, ::-1], layers[:, :, ::-1]
        images.append(Image.fromarray(np.ascontiguousarray(drawn)))
        segments.append(np.ascontiguousarray(layers[0]))
    return Trial(Image.fromarray(image), masks[chosen], images, segments)


@torch.inference_mode()
def through_vae(models: Models, images: list[Image.Image]) -> list[Image.Image]:
    """What the miniature's autoencoder makes of the images."""
    found = []
    for start in range(0, len(images), 64):
        arrays = np.stack([np.array(image) for image in images[start : start + 64]])
        x = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1
        found += to_images((models.vae.decode(models.vae.encode(x).mean) / 2 + 0.5).clamp(0, 1))
    return found


def clip_score(clip: PromptSimilarity) -> Score:
    """Cosines of the image encoder's features of black-masked images, with the true segments."""

    def features(images: list[Image.Image]) -> Tensor:
        values = clip.processor(images, return_tensors="pt").pixel_values
        return clip.model.visual_projection(clip.model.vision_model(values).pooler_output)

    @torch.inference_mode()
    def score(trial: Trial, images: list[Image.Image]) -> list[float]:
        shown = blacken_each(images, trial.segments)
        return F.cosine_similarity(features(shown), features([blacken(trial.image, trial.mask)])).tolist()

    return score


def object_score(trial: Trial, images: list[Image.Image]) -> list[float]:
    """The measure under test."""
    return ObjectSimilarity().identity_similarity(images, trial.image, trial.mask)


def ranked_right(scores: list[list[float]]) -> tuple[float, float]:
    """The share of pairs in which the true image scores higher than the other, and of trials without any mistake."""
    pairs = np.array([[true > other for other in others] for true, *others in scores])
    return float(pairs.mean()), float(pairs.all(axis=1).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.checks.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=300, help="of each kind")
    args = parser.parse_args()
    folder = find(None)
    models, clip = load(folder), PromptSimilarity(str(folder / MINI_CLIP))
    measures = {"object search": object_score, "CLIP, black-masked": clip_score(clip)}
    heads = [f"{name}{drawn}" for name in measures for drawn in (", drawn", ", through the VAE")]
    print("| the others show | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 1) + "|")
    seconds = images = 0
    for kind in KINDS:
        trials = [make_trial(i, kind) for i in range(args.trials)]
        rebuilt = through_vae(models, [image for trial in trials for image in trial.images])
        blurred = [rebuilt[i : i + 1 + OTHERS] for i in range(0, len(rebuilt), 1 + OTHERS)]
        shares = []
        for score in measures.values():
            begun = time.perf_counter()
            shares.append(ranked_right([score(trial, trial.images) for trial in trials]))
            shares.append(ranked_right([score(trial, shown) for trial, shown in zip(trials, blurred, strict=True)]))
            if score is object_score:
                seconds, images = seconds + time.perf_counter() - begun, images + 2 * len(rebuilt)
        print(
            f"| {kind} | " + " | ".join(f"{100 * one:.1f} % ({100 * all_:.1f} %)" for one, all_ in shares) + " |",
            flush=True,
        )
    speed = f"{60 * images / seconds:,.0f} images a minute"
    print(f"\n{args.trials} trials a cell: pairs ranked right (all {OTHERS} of a trial); object search: {speed}")


if __name__ == "__main__":
    run_tool(main)
