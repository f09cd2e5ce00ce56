"""The scene as a method sees it: unchanged, or as the collages that the paper's baselines are trained on.

The baselines TI-m, DB-m and CD-m (section 4.1) cannot read masks. For them random subsets of the concepts are cut out
and pasted on random plain colours, each an image with its own prompt. The naive TI and DB (appendix) see the image
unchanged, with one prompt that names every handle.

Seg-Mix, an option, moves and scales what is cut out, and puts it on other backgrounds.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from bas.config import METHODS, TrainConfig
from bas.data.scene import DARKEST_MASK, ExtraImage, Scene, sample_subset, size_to_cover
from bas.data.scene_folder import load_scene

SEG_MIX_SIDES = 0.5, 0.8  # of the image's shorter side: the longest side of a concept alone; of k, by sqrt(k) less
SEG_MIX_LARGEST = 0.5  # of the scene's area: a larger concept is no object
TRIES = 20  # placements of a concept, before one that covers others is taken


def scene_for_method(config: TrainConfig) -> Scene:
    """The scene of a training, as its method sees it. Raises InputError as `load_scene` does.

    Close-ups are cut around masks. A collection may sample them; a naive baseline uses no mask and so no close-up.
    """
    if config.method not in METHODS:
        return load_scene(config)
    if METHODS[config.method].collection:
        return collect(load_scene(config), config.collection_size, config.seed)
    return load_scene(replace(config, close_ups=False))


def collect(scene: Scene, count: int, seed: int) -> Scene:
    """A scene of `count` collages. The first shows all concepts, each other one a subset from union sampling.

    Of several images one is sampled for each collage, then a subset of the concepts that it shows.
    """
    generator = torch.Generator().manual_seed(seed)
    sources = scene.images
    first = paste(scene.image, scene.masks, generator)
    collages = []
    for i in range(1, count):
        image, masks = sources[int(torch.randint(len(sources), (), generator=generator))]
        shown = sorted(masks)
        chosen = {shown[j]: masks[shown[j]] for j in sample_subset(len(shown), "union", generator)}
        collages.append(ExtraImage(str(i), paste(image, list(chosen.values()), generator), chosen))
    return Scene(first, scene.masks, scene.handles, scene.words, tuple(collages))


def paste(image: Image.Image, masks: list[np.ndarray], generator: torch.Generator) -> Image.Image:
    """Paste what lies inside any of the masks (H, W) on a plain colour, sampled uniformly from RGB. Soft edges mix."""
    colour = torch.randint(256, (3,), generator=generator).numpy()
    inside = np.maximum.reduce(masks)[..., None]
    mixed = np.asarray(image, dtype=np.float32) * inside + colour * (1 - inside)
    return Image.fromarray(mixed.round().astype(np.uint8))


def seg_mix(scene: Scene, backgrounds: Sequence[Image.Image], seed: int, move: float = 1) -> tuple[ExtraImage, ...]:
    """Images in which concepts, cut out of the scene, stand on these backgrounds at other places, in other sizes.

    After Seg-Mix of MuDI (Jang et al., arXiv 2404.04243, section 4.2). Union sampling decides which concepts an image
    shows. They are cut out of an image, or a close-up, that shows few others. The largest gets a random size, the
    others keep theirs beside it. Concepts cover each other only where there is no room. move: 1 for any place and size,
    0 for those in the scene and its close-ups, or the share between them. A concept that covers most of the scene is
    left out: it is the background of the others.
    """
    generator = torch.Generator().manual_seed(seed)
    movable = [i for i, mask in enumerate(scene.masks) if mask.mean() <= SEG_MIX_LARGEST]
    mixed = []
    for i, background in enumerate(backgrounds if movable else ()):
        canvas = background.copy()
        chosen = [movable[j] for j in sample_subset(len(movable), "union", generator)]
        fewest = min(len(shown) for _, shown in scene.images if shown.keys() >= set(chosen))
        sources = [source for source in scene.images if source[1].keys() >= set(chosen) and len(source[1]) == fewest]
        image, masks = sources[int(torch.randint(len(sources), (), generator=generator))]
        boxes = {concept: bounding_box(masks[concept]) for concept in chosen}
        longest = max(side for left, top, right, bottom in boxes.values() for side in (right - left, bottom - top))
        low, high = SEG_MIX_SIDES
        share = low + (high - low) * torch.rand((), generator=generator).item()
        resized, _ = size_to_cover(image.size, canvas.size)
        still, free = resized / image.size[0], share * min(canvas.size) / longest / len(chosen) ** 0.5
        scale = still ** (1 - move) * free**move
        layers: dict[int, np.ndarray] = {}
        for concept, box in boxes.items():
            size = [max(1, round(scale * side)) for side in (box[2] - box[0], box[3] - box[1])]
            layer = Image.fromarray((masks[concept] * 255).round().astype(np.uint8)).crop(box)
            mask = layer.resize(size, Image.Resampling.BILINEAR)
            x, y = (
                canvas_side / 2 + still * ((first + last) - side) / 2
                for canvas_side, first, last, side in zip(canvas.size, box[:2], box[2:], image.size, strict=True)
            )
            where = place(np.asarray(mask) / 255, canvas.size, (x, y), list(layers.values()), generator, move)
            canvas.paste(image.crop(box).resize(size, Image.Resampling.BICUBIC), where, mask)
            pasted = Image.new("L", canvas.size)
            pasted.paste(mask, where)
            inside = np.asarray(pasted, dtype=np.float32) / 255
            layers = {other: below * (1 - inside) for other, below in layers.items()} | {concept: inside}
        mixed.append(ExtraImage(f"seg-mix-{i}", canvas, layers))
    return tuple(mixed)


def plain(width: int, height: int, seed: int) -> Image.Image:
    """An image of one colour, sampled uniformly from RGB."""
    colour = torch.randint(256, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Image.new("RGB", (width, height), tuple(colour))


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) of a mask (H, W)."""
    ys, xs = np.nonzero(mask >= DARKEST_MASK)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


def place(
    mask: np.ndarray,
    size: tuple[int, int],
    centre: tuple[float, float],
    others: list[np.ndarray],
    generator: torch.Generator,
    move: float,
) -> tuple[int, int]:
    """A (left, top) for a mask (h, w) in an image of this (W, H), clear of other masks (H, W) if there is room.

    It lies the share `move` of the way from `centre`, in pixels, to a random place. Of TRIES places the first that
    covers nothing is taken, or else the one that covers least.
    """
    (h, w), (width, height) = mask.shape, size
    covered = {}
    for _ in range(TRIES):
        free = [int(torch.randint(max(1, most + 1), (), generator=generator)) for most in (width - w, height - h)]
        still = centre[0] - w / 2, centre[1] - h / 2
        left, top = (
            min(max(round((1 - move) * near + move * far), 0), max(most, 0))
            for near, far, most in zip(still, free, (width - w, height - h), strict=True)
        )
        inside = mask[: height - top, : width - left]
        covered[left, top] = sum(float((other[top : top + h, left : left + w] * inside).sum()) for other in others)
        if not covered[left, top]:
            break
    return min(covered, key=covered.__getitem__)
