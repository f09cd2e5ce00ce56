"""Draws the miniature world: a layout at any size, its exact masks, and many pictures on one sheet."""

from functools import lru_cache

import numpy as np
from PIL import Image

from tools.mini_world.colours import COLOURS, mix, pattern_weight
from tools.mini_world.layouts import Layout, Thing
from tools.mini_world.places import BACKGROUNDS
from tools.mini_world.shapes import CONCEPT_SHAPES, DETAILS, SHAPES

GAP = 2  # pixels between the pictures of a sheet


def paint(thing: Thing, x, y, size):
    """Colour (h, w, 3) and coverage (h, w) of one thing at picture coordinates x, y in 0..1."""
    cos, sin = np.cos(thing.angle), np.sin(thing.angle)
    dx, dy = (x - thing.x) * 2 / thing.size, (y - thing.y) * 2 / thing.size
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    pixel = 2 / (thing.size * size)
    d = (SHAPES | CONCEPT_SHAPES)[thing.shape](u, v)
    first = np.array(COLOURS[thing.colour], dtype=np.float32)
    tint = first * 0.35 + (0.2 if first.min() > 0.9 else 0.62)  # of white: grey
    second = np.array(COLOURS[thing.second], dtype=np.float32) if thing.second else tint
    colour = mix(first, second, pattern_weight(thing.pattern, u, v, d, pixel))
    if thing.shape in DETAILS:
        colour = mix(colour, 0.35 * first, np.clip(0.5 - DETAILS[thing.shape](u, v) / pixel, 0, 1))
    light = np.clip(0.96 - 0.07 * dx - 0.09 * dy, 0.8, 1.12)  # from the upper left
    outline = np.clip(0.5 + (d + 0.12) / pixel, 0, 1)
    colour = mix(colour * light[..., None], 0.45 * first, outline)
    return colour, np.clip(0.5 - d / pixel, 0, 1)


@lru_cache(maxsize=4)
def pixel_grid(size):
    """Picture coordinates x, y (size, size) of the pixel centres, 0..1."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    return x, y


def draw(layout: Layout, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """The picture (size, size, 3) uint8 and the visible masks (N, size, size) float32 of a scene."""
    x, y = pixel_grid(size)
    picture = BACKGROUNDS[layout.background](x, y, np.random.default_rng(layout.seed))
    masks = np.zeros((len(layout.things), size, size), dtype=np.float32)
    for i, thing in enumerate(layout.things):
        reach = 0.62 * thing.size  # covers the rotated square's content
        rows, columns = (
            slice(max(int((c - reach) * size), 0), int((c + reach) * size) + 2) for c in (thing.y, thing.x)
        )
        colour, coverage = paint(thing, x[rows, columns], y[rows, columns], size)
        picture[rows, columns] = mix(picture[rows, columns], colour, coverage)
        masks[:i, rows, columns] *= 1 - coverage
        masks[i, rows, columns] = coverage
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), masks


def contact_sheet(images, columns: int = 8) -> Image.Image:
    """Pictures (N, H, W, 3) uint8 of one size as a grid, in reading order, on white."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)
