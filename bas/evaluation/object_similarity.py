"""Identity in the miniature's world: how well the best place of an image matches a concept whose exact look is known.

DINO knows photographs, not the drawn concepts of weights/mini. There a concept looks the same wherever it stands, so it
is searched for at every place, at several sizes, and mirrored. How often the measure ranks the true concept above
others is measured by tools/checks/metrics.py; docs/evaluation.md has the figures.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bas.errors import InputError
from bas.evaluation.masking import blacken_each

GRID = 32  # rows and columns that images are averaged to: half of the miniature's pixels
STEP = 1.1  # from one size of the concept to the next
SMALLEST, LARGEST = 0.3, 0.8  # of the image's side, at which the concept is searched
RIGHT = 0.7  # likeness from which on an image shows the concept
FLOOR = 1e-8  # least product of energies: where an image is the concept's mean colour all over, the cosine is 0
AT_ONCE = 256  # images in one pass


class ObjectSimilarity:
    """Identity similarity without a network: the best cosine of a concept with any place of an image."""

    right: float | None = RIGHT

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    @torch.inference_mode()
    def identity_similarity(
        self,
        images: list[Image.Image],
        reference: Image.Image,
        mask: np.ndarray,
        segments: list[np.ndarray] | None = None,
    ) -> list[float]:
        """Return a likeness in [-1, 1] for each image: 1 where the concept of `reference` under `mask` is unchanged.

        mask: (H, W) in 0..1. segments: (H, W) in 0..1 for each image; only what they show is searched.
        Raises InputError for a concept that is too small.
        """
        values, _ = self.find(blacken_each(images, segments), reference, mask)
        return values

    @torch.inference_mode()
    def find(
        self, images: list[Image.Image], reference: Image.Image, mask: np.ndarray
    ) -> tuple[list[float], list[tuple[float, float]]]:
        """Return for each image the likeness, and the centre (x, y) of the best match in shares of the image.

        Arguments and InputError as for `identity_similarity`.
        """
        colours, weight = cut_concept(
            average(reference).to(self.device), torch.from_numpy(mask).float().to(self.device)
        )
        values, centres = [], []
        for start in range(0, len(images), AT_ONCE):
            batch = torch.stack([average(image) for image in images[start : start + AT_ONCE]])
            best, where = best_matches(batch.to(self.device), colours, weight)
            values += best.tolist()
            centres += [(x, y) for x, y in where.tolist()]
        return values, centres


def average(image: Image.Image) -> Tensor:
    """Average an image of any size over cells. -> (3, GRID, GRID) in [0, 1]"""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return F.adaptive_avg_pool2d(pixels, GRID)


def cut_concept(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a concept's box out. image: (3, GRID, GRID), mask: (H, W) -> colours (3, h, w), weight (1, h, w) in 0..1

    A cell weighs 1 when the mask fills it and 0 when half of it or more is background, so that none of that counts.
    """
    weight = (2 * F.adaptive_avg_pool2d(mask[None], GRID) - 1).clamp(min=0)
    if not weight.any():
        raise InputError(f"a mask covers no cell of {GRID}x{GRID}: its concept is too small to be recognised")
    rows, columns = weight[0].amax(1).nonzero().flatten(), weight[0].amax(0).nonzero().flatten()
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    return image[(slice(None), *box)], weight[(slice(None), *box)]


def best_matches(images: Tensor, colours: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Find the concept's best match in each image. images: (b, 3, GRID, GRID) -> (b,) in [-1, 1], centres (b, 2)

    The cosine of concept c and place x, both less the concept's mean colour m, under the concept's weight w:
    sum w (x - m)(c - m) / sqrt(sum w (x - m)^2 sum w (c - m)^2). A weaker contrast alone changes nothing.
    """
    mean = (weight * colours).sum(dim=(1, 2), keepdim=True) / weight.sum()  # (3, 1, 1)
    x = images - mean
    energy = x.square().sum(dim=1, keepdim=True)
    best = torch.full((len(images),), -1.0, device=images.device)
    centres = torch.full((len(images), 2), 0.5, device=images.device)
    for size in sizes(*weight.shape[1:]):
        both = torch.cat([weight * (colours - mean), weight])[None]
        scaled = F.interpolate(both, size=size, mode="bilinear", antialias=True)
        product, w = torch.cat([scaled, scaled.flip(-1)]).split([3, 1], dim=1)  # as it is, and mirrored
        own = (product.square() / w.clamp(min=1e-3)).sum(dim=(1, 2, 3))[:, None, None]
        cosines = F.conv2d(x, product) / (F.conv2d(energy, w) * own).clamp(min=FLOOR).sqrt()
        values, spots = cosines.flatten(1).max(dim=1)
        spots = spots % cosines[0, 0].numel()  # the mirrored concept comes behind the other
        columns = cosines.shape[-1]
        where = torch.stack([spots % columns + size[1] / 2, spots // columns + size[0] / 2], dim=1) / GRID
        centres = torch.where((values > best)[:, None], where, centres)
        best = torch.maximum(best, values)
    return best, centres


def sizes(h: int, w: int) -> Iterator[tuple[int, int]]:
    """Yield the (h, w) in cells at which a concept of this size is searched, its own among them."""
    side, seen = max(h, w), set()
    for power in range(-30, 31):
        scale = STEP**power
        if power and not SMALLEST * GRID <= side * scale <= LARGEST * GRID:
            continue
        size = (scaled(h, scale), scaled(w, scale)) if power else (h, w)
        if size not in seen:
            seen.add(size)
            yield size


def scaled(length: int, scale: float) -> int:
    """Return a length in cells times the scale, from 2 to GRID."""
    return min(max(2, round(length * scale)), GRID)
