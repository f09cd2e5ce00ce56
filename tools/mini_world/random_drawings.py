"""Random drawings for the decoder: outlines, colours and backgrounds far beyond the world's, but none of its concepts.

A decoder that has seen only the world would learn the world. Polygons, boxes and the twelve training shapes in any
colours teach it to draw whatever the latents say.
"""

import numpy as np

from tools.mini_world.colours import PATTERNS, mix, pattern_weight
from tools.mini_world.drawing import pixel_grid
from tools.mini_world.places import BACKGROUNDS
from tools.mini_world.shapes import SHAPES, box, polygon


def outline(rng, x, y):
    """The signed distance of a random outline: a star-shaped polygon, a box, or a training shape."""
    kind = rng.random()
    if kind < 0.5:
        corners = int(rng.integers(3, 11))
        angles, radii = np.sort(rng.random(corners)) * 2 * np.pi, rng.uniform(0.3, 1, corners)
        return polygon(x, y, np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))
    if kind < 0.7:
        return box(x, y, 0, 0, *rng.uniform(0.15, 0.9, 2), rng.uniform(0, 0.1))
    return SHAPES[tuple(SHAPES)[rng.integers(len(SHAPES))]](x, y)


def random_colour(rng):
    """Any colour; four times in ten a corner of the colour cube."""
    colour = rng.random(3).astype(np.float32)
    return np.round(colour) if rng.random() < 0.4 else colour


def random_background(rng, x, y):
    """A place of the world, or a gradient between two colours."""
    if rng.random() < 0.5:
        place = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        return np.array(BACKGROUNDS[place](x, y, rng), dtype=np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = 0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    return mix(random_colour(rng), random_colour(rng), np.clip(along, 0, 1))


def random_drawing(rng, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Two to eight random shapes. -> image (size, size, 3) uint8, how much shapes cover (size, size) float32 in 0..1"""
    x, y = pixel_grid(size)
    image, cover = random_background(rng, x, y), np.zeros((size, size), dtype=np.float32)
    for _ in range(rng.integers(2, 9)):
        side, angle, (cx, cy) = rng.uniform(0.15, 0.6), rng.uniform(0, 2 * np.pi), rng.random(2)
        dx, dy = (x - cx) * 2 / side, (y - cy) * 2 / side
        u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        pixel, distance = 2 / (side * size), outline(rng, u, v)
        first, second = random_colour(rng), random_colour(rng)
        pattern = PATTERNS[rng.integers(len(PATTERNS))]
        colour = mix(first, second, pattern_weight(pattern, u, v, distance, pixel))
        if rng.random() < 0.6:
            border = np.clip(0.5 + (distance + rng.uniform(0.05, 0.2)) / pixel, 0, 1)
            colour = mix(colour, 0.45 * first, border)
        coverage = np.clip(0.5 - distance / pixel, 0, 1)
        image, cover = mix(image, colour, coverage), cover * (1 - coverage) + coverage
    image = image[..., rng.permutation(3)]
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), cover.astype(np.float32)
