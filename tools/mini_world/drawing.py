"""Draws the miniature world: a layout at any size, its exact masks, and many images on one sheet."""

from functools import lru_cache

import numpy as np
from PIL import Image

from tools.mini_world.colours import COLOURS, mix, pattern_weight
from tools.mini_world.layouts import Layout, Object
from tools.mini_world.places import BACKGROUNDS
from tools.mini_world.shapes import CONCEPT_SHAPES, DETAILS, SHAPES

GAP = 2  # pixels between the images of a sheet


def paint(obj: Object, x, y, size):
    """Colour (h, w, 3) and coverage (h, w) of one object at image coordinates x, y in 0..1."""
    cos, sin = np.cos(obj.angle), np.sin(obj.angle)
    dx, dy = (x - obj.x) * 2 / obj.size, (y - obj.y) * 2 / obj.size
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    pixel = 2 / (obj.size * size)
    d = (SHAPES | CONCEPT_SHAPES)[obj.shape](u, v)
    first = np.array(COLOURS[obj.colour], dtype=np.float32)
    tint = first * 0.35 + (0.2 if first.min() > 0.9 else 0.62)  # of white: grey
    second = np.array(COLOURS[obj.second], dtype=np.float32) if obj.second else tint
    colour = mix(first, second, pattern_weight(obj.pattern, u, v, d, pixel))
    if obj.shape in DETAILS:
        colour = mix(colour, 0.35 * first, np.clip(0.5 - DETAILS[obj.shape](u, v) / pixel, 0, 1))
    light = np.clip(0.96 - 0.07 * dx - 0.09 * dy, 0.8, 1.12)  # from the upper left
    outline = np.clip(0.5 + (d + 0.12) / pixel, 0, 1)
    colour = mix(colour * light[..., None], 0.45 * first, outline)
    return colour, np.clip(0.5 - d / pixel, 0, 1)


@lru_cache(maxsize=4)
def pixel_grid(size):
    """Image coordinates x, y (size, size) of the pixel centres, 0..1."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


def draw(layout: Layout, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The image (size, size, 3) uint8 and the visible masks (N, size, size) float32 of a scene."""
    x, y = pixel_grid(size)
    image = BACKGROUNDS[layout.background](x, y, np.random.default_rng(layout.seed))
    masks = np.zeros((len(layout.objects), size, size), dtype=np.float32)
    for i, obj in enumerate(layout.objects):
        reach = 0.62 * obj.size  # covers the rotated square's content
        rows, columns = (slice(max(int((c - reach) * size), 0), int((c + reach) * size) + 2) for c in (obj.y, obj.x))
        colour, coverage = paint(obj, x[rows, columns], y[rows, columns], size)
        image[rows, columns] = mix(image[rows, columns], colour, coverage)
        masks[:i, rows, columns] *= 1 - coverage
        masks[i, rows, columns] = coverage
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), masks


def contact_sheet(images, columns: int = 8) -> Image.Image:
    """Images (N, H, W, 3) uint8 of one size as a grid, in reading order, on white."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
