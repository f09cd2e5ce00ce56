"""Seg-Mix: images in which concepts, cut out of the scene, stand elsewhere. An option that the paper does not have."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from bas.data.scene import DARKEST_MASK, ExtraImage, Scene, sample_subset, size_to_cover
from bas.io.images import to_floats, to_levels

SEG_MIX_SIDES = 0.5, 0.8  # of the image's shorter side: the longest side of a concept alone; of k, by sqrt(k) less
SEG_MIX_LARGEST = 0.5  # of the scene's area: a larger concept is no object
TRIES = 20  # placements of a concept, before one that covers others is taken


@dataclass(frozen=True)
class CutOut:
    """A concept, cut out of an image along its bounding box."""

    image: Image.Image  # RGB
    mask: Image.Image  # L
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image

    @classmethod
    def from_image(cls, image: Image.Image, mask: np.ndarray) -> "CutOut":
        """Cut along a mask, (H, W) uint8."""
        left, top, right, bottom = box = bounding_box(mask)
        return cls(image.crop(box), Image.fromarray(mask[top:bottom, left:right]), box)


def movable_concepts(scene: Scene) -> list[int]:
    """Find the concepts that Seg-Mix cuts out: those that cover no more than half of the scene."""
    return [i for i, mask in enumerate(scene.masks) if mask.mean() <= 255 * SEG_MIX_LARGEST]


class SegMix:
    """Images in which concepts, cut out of the scene, stand on other backgrounds, at other places, in other sizes.

    After Seg-Mix of MuDI (Jang et al., arXiv 2404.04243, section 4.2). The concepts of an image are sampled as the
    subsets of the method are. They are cut out of the scene's image, or of an extra image that shows them. The largest
    gets a random size, and the others keep their size relative to it. Concepts cover each other only where there is no
    room. A concept that covers most of the scene is left out: it is the background of the others.
    """

    def __init__(
        self,
        scene: Scene,
        size: tuple[int, int],
        backgrounds: Sequence[tuple[Image.Image, str]] = (),
        move: float = 1,
        sampling: str = "union",
        cell: int = 0,
    ):
        """Cut the concepts out.

        size: (W, H) in pixels of plain colours. backgrounds: class images, each with its place; none for plain colours.
        move: 1 for any place and size, 0 for those in the image, or the share between them. sampling: which concepts an
        image shows, as `sample_subset` takes it. cell: pixels; concepts keep their size and move by multiples of it. If
        it is the stride of the whole network, the network computes the same for a moved concept, except at the border.
        0: by any number of pixels.
        """
        self.size, self.backgrounds, self.move, self.sampling = size, tuple(backgrounds), move, sampling
        self.cell = cell
        self.movable = movable_concepts(scene)
        self.share = len(self.movable) / len(scene)  # of the concepts
        images = [(scene.image, dict(enumerate(scene.masks)))]
        images += [(extra.image, extra.masks) for extra in scene.extra_images if not extra.close_up]
        self.sources = [
            (image.size, {i: CutOut.from_image(image, mask) for i, mask in masks.items() if i in self.movable})
            for image, masks in images
        ]

    def sample(self, generator: torch.Generator) -> tuple[ExtraImage, str]:
        """Make an image on a random background. -> it, and its place, "" on a plain colour. Needs a movable concept."""
        background, place = plain(*self.size, generator), ""
        if self.backgrounds:
            background, place = self.backgrounds[int(torch.randint(len(self.backgrounds), (), generator=generator))]
        return self.on(background, generator), place

    def on(self, background: Image.Image, generator: torch.Generator) -> ExtraImage:
        """Make an image on this background, which is not changed itself."""
        canvas = background.copy()
        chosen = [self.movable[j] for j in sample_subset(len(self.movable), self.sampling, generator)]
        sources = [source for source in self.sources if source[1].keys() >= {*chosen}]
        size, cuts = sources[int(torch.randint(len(sources), (), generator=generator))]
        longest = max(max(cuts[concept].image.size) for concept in chosen)
        low, high = SEG_MIX_SIDES
        share = low + (high - low) * torch.rand((), generator=generator).item()
        still = size_to_cover(size, canvas.size)[0] / size[0]
        free = share * min(canvas.size) / longest / len(chosen) ** 0.5
        scale = still if self.cell else still ** (1 - self.move) * free**self.move
        layers: dict[int, np.ndarray] = {}
        for concept in chosen:
            cut = cuts[concept]
            resized = [max(1, round(scale * side)) for side in cut.image.size]
            mask = cut.mask.resize(resized, Image.Resampling.BILINEAR)
            x, y = (
                canvas_side / 2 + still * ((first + last) - side) / 2
                for canvas_side, first, last, side in zip(canvas.size, cut.box[:2], cut.box[2:], size, strict=True)
            )
            inside, others = to_floats(np.asarray(mask)), [to_floats(layer) for layer in layers.values()]
            where = place(inside, canvas.size, (x, y), others, generator, self.move, self.cell)
            canvas.paste(cut.image.resize(resized, Image.Resampling.BICUBIC), where, mask)
            pasted = Image.new("L", canvas.size)
            pasted.paste(mask, where)
            over = np.array(pasted)
            layers = {i: to_levels(to_floats(below) * to_floats(255 - over)) for i, below in layers.items()}
            layers[concept] = over
        return ExtraImage("seg-mix", canvas, layers)


def plain(width: int, height: int, generator: torch.Generator) -> Image.Image:
    """Return an image of one colour, sampled uniformly from RGB."""
    colour = torch.randint(256, (3,), generator=generator).tolist()
    return Image.new("RGB", (width, height), tuple(colour))


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the (left, top, right, bottom) of a mask, (H, W) uint8."""
    ys, xs = (np.flatnonzero(mask.max(axis=axis) >= 255 * DARKEST_MASK) for axis in (1, 0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def place(
    mask: np.ndarray,
    size: tuple[int, int],
    centre: tuple[float, float],
    others: list[np.ndarray],
    generator: torch.Generator,
    move: float,
    cell: int = 0,
) -> tuple[int, int]:
    """Return a (left, top) for a mask (h, w) in an image of this (W, H), clear of other masks (H, W) if there is room.

    The mask moves by the share `move` of the way from `centre`, in pixels, to a random place. With a `cell`, `move` is
    the probability that it moves: by multiples of so many pixels along both sides, to each place inside the image
    equally often. Of TRIES places the first that covers nothing is taken, or else the one that covers least. Masks are
    in 0..1.
    """
    (h, w), (width, height) = mask.shape, size
    covered = {}
    for _ in range(TRIES):
        share = float(torch.rand((), generator=generator) < move) if cell else move
        left, top = (
            moved(middle - side / 2, max(whole - side, 0), share, cell, generator)
            for middle, side, whole in zip(centre, (w, h), size, strict=True)
        )
        inside = mask[: height - top, : width - left]
        covered[left, top] = sum(float((other[top : top + h, left : left + w] * inside).sum()) for other in others)
        if not covered[left, top]:
            break
    return min(covered, key=covered.__getitem__)


def moved(start: float, most: int, move: float, cell: int, generator: torch.Generator) -> int:
    """Return the share `move` of the way from `start` to a random place in 0..most, in pixels or in whole cells."""
    if not cell:
        end = int(torch.randint(most + 1, (), generator=generator))
        return min(max(round(start + move * (end - start)), 0), most)
    first = min(max(round(start), 0), most)
    down, up = first // cell, (most - first) // cell
    return first + cell * round(move * (int(torch.randint(down + up + 1, (), generator=generator)) - down))


def place_named(prompt: str) -> str:
    """Return the place in a class prompt: "at the beach" of "a photo at the beach"; "" if it names an object."""
    place = prompt.removeprefix("a photo ")
    return "" if place == prompt or place.startswith("of ") else place
