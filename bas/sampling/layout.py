"""Layouts: for each handle the region of the image in which its concept shall stand, as a box or as a mask.

A layout file is JSON: {"<asset0>": [left, top, right, bottom], "<asset1>": "mask1.png"}. Boxes are shares of the
image's sides; mask files are named relative to the JSON.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bas.errors import InputError, check_float, shown
from bas.io.images import read_mask, to_floats
from bas.io.json_files import read_content

# A box (left, top, right, bottom) in shares of the image, or a mask (H, W) in 0..1.
Region = Sequence[float] | np.ndarray
Layout = Mapping[str, Region]  # by handle

OTHER_SHAPE = 0.1  # from which difference on the shapes of a mask and an image count as different


def read_layout(path: Path) -> Layout:
    """Read a layout file and its masks; `check_layout` checks what they say. InputError for another content."""
    content = read_content(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'--layout {path} is not {{"<asset0>": [left, top, right, bottom], "<asset1>": "mask.png"}}')
    return {
        handle: to_floats(read_mask(path.parent / region)) if isinstance(region, str) else region
        for handle, region in content.items()
    }


def mask_files(path: Path) -> list[Path]:
    """Return the mask files that a layout file names. InputError as in `read_content`."""
    content = read_content(path)
    regions = content.values() if isinstance(content, dict) else ()
    return [path.parent / region for region in regions if isinstance(region, str)]


def check_layout(layout: Layout, known: tuple[str, ...], size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Check a layout for images of (W, H), whose regions must cover a cell of the (h, w) grid. known: all handles

    InputError for an unknown handle, a wrong box, and masks of different sizes or of another shape than the image.
    """
    masks: dict[str, np.ndarray] = {}
    for handle, region in layout.items():
        if handle not in known:
            names = ", ".join(known) or "none: this is a base model"
            raise InputError(f"the layout has a region for {handle}, an unknown handle; known handles: {names}")
        if isinstance(region, np.ndarray):
            check_mask(handle, region, size)
            masks[handle] = region
        else:
            check_box(handle, region)
        if not cells_inside(region, *grid).any():
            cells = f"the {grid[1]}x{grid[0]} cells that attention is read on"
            raise InputError(f"the region of {handle} covers none of {cells}: make it larger or whiter")
    sizes = {mask.shape: f"{mask.shape[1]}x{mask.shape[0]} of {handle}" for handle, mask in masks.items()}
    if len(sizes) > 1:
        raise InputError(f"the layout has masks of different sizes, {' and '.join(sizes.values())}: give them one size")


def check_box(handle: str, box: object) -> None:
    """Raise InputError unless it is [left, top, right, bottom] in shares of the image."""
    if not isinstance(box, (list, tuple)) or len(box) != 4:
        raise InputError(f"the region of {handle} is {shown(box)}: expected [left, top, right, bottom] or a mask file")
    for side, value in zip(("left", "top", "right", "bottom"), box, strict=True):
        check_float(f"{side} of the box of {handle}, a share of the image,", value, 0, 1)
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        raise InputError(f"the box of {handle} is {[*box]}: expected left < right and top < bottom")


def check_mask(handle: str, mask: np.ndarray, size: tuple[int, int]) -> None:
    """Raise InputError for a mask that marks nothing, or has another shape than images of (W, H)."""
    if mask.ndim != 2 or not (mask.min() >= 0 and mask.max() <= 1):  # also false for not-a-number
        raise InputError(f"the mask of {handle} is not an array (H, W) of values from 0 to 1")
    if mask.max() == 0:
        raise InputError(f"the mask of {handle} is black all over: paint white where its concept shall stand")
    (h, w), (width, height) = mask.shape, size
    if abs(w * height - h * width) > OTHER_SHAPE * h * width:
        raise InputError(f"the mask of {handle} is {w}x{h}, the image {width}x{height}: they must have the same shape")


def cells_inside(region: Region, h: int, w: int) -> Tensor:
    """Mark the cells of a grid that are at least half inside a region. -> (h, w) bool"""
    if isinstance(region, np.ndarray):
        mask = torch.from_numpy(np.ascontiguousarray(region, dtype=np.float32))
        return F.adaptive_avg_pool2d(mask[None, None], (h, w))[0, 0] >= 0.5
    left, top, right, bottom = region
    return covered(top, bottom, h)[:, None] * covered(left, right, w) >= 0.5 - 1e-9


def covered(first: float, last: float, count: int) -> Tensor:
    """Return the share of each of `count` equal parts of 0..1 that lies between first and last. -> (count,) float64"""
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    return (edges[1:].clamp(max=last) - edges[:-1].clamp(min=first)).clamp(min=0) * count


def bounding_box(region: Region) -> tuple[float, float, float, float]:
    """Return the smallest box (left, top, right, bottom), in shares of the image, around a region."""
    if not isinstance(region, np.ndarray):
        left, top, right, bottom = region
        return left, top, right, bottom
    ys, xs = np.nonzero(region >= min(0.5, region.max()))
    (h, w) = region.shape
    return float(xs.min() / w), float(ys.min() / h), float((xs.max() + 1) / w), float((ys.max() + 1) / h)
