"""Seg-Mix: images in which concepts, cut out of the scene, stand elsewhere. An option that the paper does not have."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from bas.data.scene import DARKEST_MASK, ExtraImage, Scene, sample_subset, size_to_cover

SEG_MIX_SIDES = 0.5, 0.8  # of the image's shorter side: the longest side of a concept alone; of k, by sqrt(k) less
SEG_MIX_LARGEST = 0.5  # of the scene's area: a larger concept is no object
TRIES = 20  # placements of a concept, before one that covers others is taken


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


def place_named(prompt: str) -> str:
    """Where a class prompt says one is: "at the beach" of "a photo at the beach". "" where it names an object."""
    place = prompt.removeprefix("a photo ")
    return "" if place == prompt or place.startswith("of ") else place
