"""The scene that is learnt: an image, one mask per concept, and the handle and initial word of each.

A scene may hold extra images of the same concepts. Image and masks are resized and cropped together.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from math import gcd

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bas.errors import CONTROL, MAX_SIDE, InputError, is_utf8
from bas.io.images import fit, fit_mask, pixels
from bas.models.text import HANDLE, NAME_RULE

MAX_CONCEPTS = 4  # the paper's own limit (its section on limitations): beyond it quality drops
MAX_CLOSE_UP_CONCEPTS = 8  # N concepts have 2^N - 2 close-ups
CLOSE_UP_SHARE = 0.7  # of a close-up's side that its concepts cover
WIDEST_CLOSE_UP = 0.9  # of the image's side: a wider close-up would show what the image shows
DARKEST_MASK = 0.1  # a mask that is nowhere lighter is something else, such as a label map 1, 2, 3
SHOWN_OVERLAP = 0.005  # of a mask that lies in another: less rounds to nothing in a table
LARGE_OVERLAP = 0.1  # two handles that share more of a mask are drawn to the same place


@dataclass(frozen=True)
class ExtraImage:
    """One more image of a scene's concepts, or of some of them, at its own size."""

    name: str  # of its folder, for messages
    image: Image.Image  # RGB, upright
    masks: dict[int, np.ndarray]  # by concept: arrays (H, W) uint8, 255 inside
    close_up: bool = False  # a part of the scene's image

    def tensors(self, height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
        """Resize to cover this size and crop the middle. -> image (3, H, W) in [-1, 1], masks (N, H, W) in [0, 1]

        count: N, the number of concepts of the scene. A concept that the image does not show has a mask of 0.
        """
        size = size_to_cover(self.image.size, (width, height))
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        box = (left, top, left + width, top + height)
        masks = torch.zeros(count, height, width)
        for i, mask in self.masks.items():
            masks[i] = torch.from_numpy(np.array(fit_mask(mask, size).crop(box)))
        return pixels(fit(self.image, size, Image.Resampling.BICUBIC).crop(box)), masks


@dataclass(frozen=True)
class Scene:
    """An image and its concepts, read and checked, at the image's own size."""

    image: Image.Image  # RGB, upright
    masks: list[np.ndarray]  # N arrays (H, W) uint8, 255 inside, soft edges kept
    handles: tuple[str, ...]  # N names such as <asset0>
    words: tuple[str | None, ...]  # N initial words, None for a handle that starts from a random row
    extra_images: tuple[ExtraImage, ...] = ()

    def __len__(self) -> int:
        """Return the number of concepts N."""
        return len(self.handles)

    @property
    def images(self) -> list[tuple[Image.Image, dict[int, np.ndarray]]]:
        """The image and the extra ones, each with its masks by concept."""
        extra = [(extra.image, extra.masks) for extra in self.extra_images]
        return [(self.image, dict(enumerate(self.masks))), *extra]

    def tensors(self, resolution: int, multiple: int, square: bool = False) -> tuple[Tensor, Tensor]:
        """Resize and crop image and masks together. -> image (3, H, W) in [-1, 1], masks (N, H, W) in [0, 1]

        resolution: pixels of the shorter side; square: crop to a square. Both sides become multiples of `multiple`, or
        of its greatest divisor that the resolution has.
        """
        size, box = resize_and_crop_box(self.image.size, resolution, multiple, square)
        image = pixels(fit(self.image, size, Image.Resampling.BICUBIC).crop(box))
        layers = [np.array(fit_mask(mask, size).crop(box)) for mask in self.masks]
        return image, torch.stack([torch.from_numpy(layer) for layer in layers])


# --- Sizes --------------------------------------------------------------------------------------------------------


def size_to_cover(size: tuple[int, int], least: tuple[int, int]) -> tuple[int, int]:
    """Return the (W, H) of an image scaled to just cover another. InputError if a side would pass MAX_SIDE."""
    scale = max(part / side for part, side in zip(least, size, strict=True))
    width, height = (max(part, round(side * scale)) for part, side in zip(least, size, strict=True))
    if max(width, height) > MAX_SIDE:
        raise InputError(f"an image of {size[0]}x{size[1]} would become {width}x{height} for the model: crop it")
    return width, height


def resize_and_crop_box(
    size: tuple[int, int], resolution: int, multiple: int, square: bool
) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Return how to bring a (W, H) image to the model: the size to resize it to, then the box to crop from its middle.

    The sides of the box are multiples of `multiple`, or of its greatest divisor that the resolution has.
    """
    multiple = gcd(resolution, multiple)
    resized = size_to_cover(size, (resolution, resolution))
    kept = (resolution, resolution) if square else tuple(side // multiple * multiple for side in resized)
    left, top = ((side - part) // 2 for side, part in zip(resized, kept, strict=True))
    return resized, (left, top, left + kept[0], top + kept[1])


# --- Additions ----------------------------------------------------------------------------------------------------


def bracketed(name: str) -> str:
    """Return a handle by its name, which may be given with or without < >."""
    return f"<{name.removeprefix('<').removesuffix('>')}>"


def check_word(word: str | None, handle: str) -> None:
    """Raise InputError for an initial word with control characters, or with half of a surrogate pair."""
    if word and (CONTROL.search(word) or not is_utf8(word)):
        raise InputError(f"the initial word of {handle}, {word!a}, holds control characters: write it again")


def with_background(scene: Scene, name: str) -> Scene:
    """Add a concept of all that no mask covers (paper, section 4). Its initial word is "background".

    name: its handle, with or without < >. Raises InputError for a name in use, and where the masks cover everything.
    """
    handle, rest = bracketed(name), ~union(scene.masks)
    if not HANDLE.fullmatch(handle):
        raise InputError(f"--background_handle {name}: expected {NAME_RULE}")
    if handle in scene.handles:
        raise InputError(f"--background_handle {handle}: the scene has a concept of that name")
    if rest.max() < 255 * DARKEST_MASK:
        raise InputError(f"--background_handle {handle}: the masks cover the whole image, no background is left")
    extra_images = []
    for extra in scene.extra_images:
        left_over = ~union(extra.masks.values())
        shown = {len(scene): left_over} if left_over.max() >= 255 * DARKEST_MASK else {}
        extra_images.append(replace(extra, masks=extra.masks | shown))
    masks, handles, words = [*scene.masks, rest], (*scene.handles, handle), (*scene.words, "background")
    return Scene(scene.image, masks, handles, words, tuple(extra_images))


def with_close_ups(scene: Scene, square: bool = False) -> Scene:
    """Add a close-up of each proper subset of the concepts as an extra image, where it is narrower than the image.

    Not in the paper, whose images show their concepts large. A small concept fills more of the latents in its
    close-up, and is not learnt at one position only. Raises InputError for more than MAX_CLOSE_UP_CONCEPTS concepts.

    square: each is cropped to its middle square later; those in which a concept lies outside it are left out.
    """
    count, (width, height) = len(scene), scene.image.size
    if count > MAX_CLOSE_UP_CONCEPTS:
        expected = f"expected {MAX_CLOSE_UP_CONCEPTS} concepts or fewer, or close_ups = false in a --config file"
        raise InputError(f"--close_ups: {count} concepts have {2**count - 2} subsets to show: {expected}")
    close_ups = []
    solid = [mask > (127 if mask.max() > 127 else mask.max() // 2) for mask in scene.masks]  # a faint mask is darker
    for subset in (c for size in range(1, count) for c in combinations(range(count), size)):
        inside = union(solid[i] for i in subset)
        ys, xs = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
        (left, right), (top, bottom) = (xs.min(), xs.max() + 1), (ys.min(), ys.max() + 1)
        share = max((right - left) / width, (bottom - top) / height) / CLOSE_UP_SHARE
        if share > WIDEST_CLOSE_UP:
            continue
        w, h = round(share * width), round(share * height)
        x = min(max((left + right - w) // 2, 0), width - w)
        y = min(max((top + bottom - h) // 2, 0), height - h)
        masks = {i: scene.masks[i][y : y + h, x : x + w] for i in subset}
        edge_x, edge_y = (max(w - h, 0) // 2, max(h - w, 0) // 2) if square else (0, 0)
        if not all(mask[edge_y : h - edge_y, edge_x : w - edge_x].any() for mask in masks.values()):
            continue
        name = "-".join(("close-up", *map(str, subset)))
        close_ups.append(ExtraImage(name, scene.image.crop((x, y, x + w, y + h)), masks, close_up=True))
    return replace(scene, extra_images=(*scene.extra_images, *close_ups))


def union(masks: Iterable[np.ndarray]) -> np.ndarray:
    """Return what lies in any of the masks, (H, W) uint8. Of one mask it is that mask."""
    return reduce(np.maximum, masks)


def overlaps(masks: np.ndarray, i: int) -> dict[int, float]:
    """Return the share of mask i that lies in each other mask, from SHOWN_OVERLAP on. masks: (N, H, W) in [0, 1]"""
    shares = np.minimum(masks, masks[i]).sum(axis=(1, 2)) / max(masks[i].sum(), 1e-6)
    return {j: float(share) for j, share in enumerate(shares) if j != i and share >= SHOWN_OVERLAP}


# --- Union sampling -----------------------------------------------------------------------------------------------


def sample_subset(count: int, kind: str, generator: torch.Generator) -> list[int]:
    """Sample the concepts of one training example, in random order (paper, section 3; order as in the official code).

    kind="union": k is uniform in 1..N, then the subset is uniform among those of size k, so a single concept has
    probability 1/N. "uniform": all subsets are equally likely. "single": one concept (the ablation without union
    sampling). "all": every concept.
    """
    if kind == "uniform":
        number = int(torch.randint(1, 2**count, (), generator=generator))
        return [i for i in torch.randperm(count, generator=generator).tolist() if number >> i & 1]
    fixed = {"single": 1, "all": count}
    k = fixed[kind] if kind in fixed else int(torch.randint(1, count + 1, (), generator=generator))
    return torch.randperm(count, generator=generator)[:k].tolist()


def subset_prompt(handles: tuple[str, ...] | list[str]) -> str:
    """Return the training prompt of these handles: `a photo of <asset1> and <asset0>`"""
    return "a photo of " + " and ".join(handles)
