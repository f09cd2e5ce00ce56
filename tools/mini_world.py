"""The miniature world: captioned scenes of simple things in named places, with exact masks.

A scene is first decided (`compose`: what stands where, a small dataclass) and then drawn (`draw`) from signed
distance functions, so that one seed gives the same scene at 64 and at 256 pixels. The ten places are those of the
evaluation protocol (Break-A-Scene, appendix). Concept objects are a second family that training never shows:
unseen shapes with two-colour markings, the things to extract.

    python tools/mini_world.py --output_dir /tmp/world            # a contact sheet of 64 captioned scenes
    python tools/mini_world.py --output_dir DIR --concepts 3      # one scene folder to extract from
    python tools/mini_world.py --output_dir weights/mini/scenes --demo
"""

import argparse
import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {  # sRGB, 0..1
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.98, 0.88, 0.14),
    "green": (0.16, 0.66, 0.20),
    "cyan": (0.16, 0.80, 0.86),
    "blue": (0.14, 0.26, 0.86),
    "purple": (0.52, 0.16, 0.70),
    "pink": (0.98, 0.50, 0.74),
    "white": (0.97, 0.97, 0.97),
    "black": (0.11, 0.11, 0.13),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
MARKINGS = ("halves", "target", "rays", "border")  # of concept objects only
PLACES = {  # name: (what a caption says after the objects, the place as a noun)
    "beach": ("at the beach", "the beach"),
    "jungle": ("in the jungle", "the jungle"),
    "snow": ("in the snow", "the snow"),
    "street": ("in the street", "the street"),
    "pink fabric": ("on top of a pink fabric", "a pink fabric"),
    "wooden floor": ("on top of a wooden floor", "a wooden floor"),
    "city": ("with a city in the background", "a city"),
    "mountain": ("with a mountain in the background", "a mountain"),
    "tower": ("with the Eiffel tower in the background", "the Eiffel tower"),
    "water": ("floating on top of water", "water"),
    "wall": ("in front of a wall", "a wall"),
}
OPENINGS = ("a photo of ", "a photo of ", "a photo of ", "a picture of ", "an image of ", "")


@dataclass(frozen=True)
class Thing:
    """One object: what it looks like, and where it stands (fractions of the picture's side)."""

    shape: str  # a key of SHAPES or CONCEPT_SHAPES
    colour: str  # a key of COLOURS
    pattern: str = "plain"  # one of PATTERNS or MARKINGS
    second: str | None = None  # the pattern's other colour; None: a tint of the first
    x: float = 0.5  # centre, from the left
    y: float = 0.5  # centre, from the top
    size: float = 0.5  # side of the square that holds it
    angle: float = 0.0  # radians, clockwise


@dataclass(frozen=True)
class Layout:
    """A scene before it is drawn; later things stand in front of earlier ones."""

    things: tuple[Thing, ...]
    background: str  # a key of PLACES
    seed: int  # of the background's own randomness


@dataclass
class Scene:
    """A drawn scene: image (H, W, 3) uint8, masks (N, H, W) float32 in 0..1, the visible part of each thing."""

    image: np.ndarray
    masks: np.ndarray
    caption: str
    objects: tuple[Thing, ...]
    background: str
    layout: Layout = field(repr=False)


# --- shapes: signed distance to the outline, negative inside, for x to the right and y down in -1..1 ------------------


def circle(x, y, cx, cy, radius):
    return np.hypot(x - cx, y - cy) - radius


def box(x, y, cx, cy, half_width, half_height, corner=0.0):
    dx, dy = np.abs(x - cx) - half_width + corner, np.abs(y - cy) - half_height + corner
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0) - corner


def polygon(x, y, points):
    """Exact distance to a simple polygon: nearest edge, and the parity of crossings for the sign."""
    a = np.asarray(points, dtype=np.float32)
    b = np.roll(a, -1, axis=0)
    (ax, ay), (ex, ey) = (a.T[..., None, None], (b - a).T[..., None, None])
    px, py = x - ax, y - ay
    along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
    distance = np.hypot(px - along * ex, py - along * ey).min(axis=0)
    straddles = (py >= 0) != (py >= ey)
    crossings = (straddles & ((px * ey < py * ex) == (ey > 0))).sum(axis=0)
    return np.where(crossings % 2 == 1, -distance, distance)


def polar(x, y):
    return np.hypot(x, y), np.arctan2(y, x)


def star_points(tips, inner, outer=1.0):
    angles = np.arange(2 * tips) * np.pi / tips - np.pi / 2
    radii = np.where(np.arange(2 * tips) % 2 == 0, outer, inner)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def heart(x, y):
    # The exact distance of Quilez (iquilezles.org/articles/distfunctions2d), tip at the bottom.
    x, y = np.abs(x) / 1.62, (0.95 - y) / 1.62
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    half = 0.5 * np.maximum(x + y, 0)
    body = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)) * np.sign(x - y)
    return 1.62 * np.where(x + y > 1, lobe, body)


def fish(x, y):
    body = (np.hypot((x + 0.22) / 0.76, y / 0.52) - 1) * 0.56
    return np.minimum(body, polygon(x, y, [(0.3, 0), (0.98, -0.6), (0.8, 0), (0.98, 0.6)]))


def mug(x, y):
    handle = np.abs(np.hypot(x - 0.42, y) - 0.42) - 0.12
    return np.minimum(box(x, y, -0.22, 0, 0.62, 0.8, 0.12), handle)


def flower(x, y):
    radius, angle = polar(x, y)
    return (radius - 0.74 - 0.2 * np.cos(6 * angle)) * 0.75


def bottle(x, y):
    body = box(x, y, 0, 0.36, 0.52, 0.62, 0.18)
    return np.minimum(body, np.minimum(box(x, y, 0, -0.55, 0.22, 0.43), circle(x, y, 0, -0.08, 0.42)))


def gear(x, y):
    radius, angle = polar(x, y)
    teeth = (radius - 0.8 - 0.15 * np.clip(4 * np.cos(8 * angle), -1, 1)) * 0.7
    return np.maximum(teeth, 0.24 - radius)


def clover(x, y):
    leaves = [circle(x, y, 0.44 * np.sin(a), -0.14 - 0.4 * np.cos(a), 0.42) for a in (-2.1, 0, 2.1)]
    stem = polygon(x, y, [(-0.1, -0.1), (0.1, -0.1), (0.24, 0.96), (-0.24, 0.96)])
    return np.minimum(np.minimum.reduce(leaves), stem)


ARROW = [(-0.95, -0.36), (0.0, -0.36), (0.0, -0.86), (0.97, 0), (0.0, 0.86), (0.0, 0.36), (-0.95, 0.36)]
BOLT = [(-0.1, -1), (-0.8, 0.22), (-0.16, 0.22), (-0.5, 1), (0.84, -0.32), (0.2, -0.32), (0.64, -1)]
CROWN = [(-0.9, 0.72), (-0.95, -0.6), (-0.45, 0.02), (0, -0.85), (0.45, 0.02), (0.95, -0.6), (0.9, 0.72)]
TREE = [(0, -1), (0.52, -0.28), (0.28, -0.28), (0.78, 0.52), (-0.78, 0.52), (-0.28, -0.28), (-0.52, -0.28)]
ROOF = [(0, -0.98), (0.98, -0.12), (-0.98, -0.12)]

SHAPES = {
    "ball": lambda x, y: circle(x, y, 0, 0, 0.94),
    "cube": lambda x, y: box(x, y, 0, 0, 0.82, 0.82, 0.08),
    "star": lambda x, y: polygon(x, y + 0.04, star_points(5, inner=0.45)),
    "heart": heart,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.68) - 0.25,
    "cross": lambda x, y: np.minimum(box(x, y, 0, 0, 0.94, 0.3), box(x, y, 0, 0, 0.3, 0.94)),
    "fish": fish,
    "mug": mug,
    "tree": lambda x, y: np.minimum(polygon(x, y, TREE), box(x, y, 0, 0.7, 0.16, 0.28)),
    "flower": flower,
    "house": lambda x, y: np.minimum(polygon(x, y, ROOF), box(x, y, 0, 0.38, 0.74, 0.56)),
    "bottle": bottle,
}
DETAILS = {  # the part of a shape that is drawn in a dark shade of its colour
    "fish": lambda x, y: circle(x, y, -0.58, -0.12, 0.1),
    "tree": lambda x, y: box(x, y, 0, 0.76, 0.16, 0.24),
    "flower": lambda x, y: circle(x, y, 0, 0, 0.26),
    "house": lambda x, y: box(x, y, 0, 0.6, 0.2, 0.34),
    "bottle": lambda x, y: box(x, y, 0, -0.84, 0.26, 0.14),
}
CONCEPT_SHAPES = {
    "moon": lambda x, y: np.maximum(circle(x, y, 0, 0, 0.94), -circle(x, y, 0.56, -0.14, 0.66)),
    "arrow": lambda x, y: polygon(x, y, ARROW),
    "bolt": lambda x, y: polygon(x, y, BOLT),
    "gear": gear,
    "crown": lambda x, y: polygon(x, y, CROWN),
    "clover": clover,
}
NEAREST_WORD = {  # the word of the training captions that comes closest to a concept shape
    "moon": "ball", "arrow": "fish", "bolt": "star", "gear": "flower", "crown": "cube", "clover": "tree"
}  # fmt: skip


# --- patterns: how much of the second colour, 0..1, at object coordinates x, y and distance d from the outline --------


def square_wave(phase, softness):
    """1 for the first half of each period of 1, 0 for the second, with anti-aliased steps."""
    return np.clip(0.5 + (0.25 - np.abs(phase % 1 - 0.5)) / softness, 0, 1)


def pattern_weight(pattern, x, y, d, pixel):
    """The second colour's share at each point; `pixel` is one pixel in object coordinates."""
    match pattern:
        case "plain":
            return np.zeros_like(x)
        case "striped":
            return square_wave(1.5 * (x + y) / np.sqrt(2), 1.5 * pixel)
        case "dotted":
            across = np.hypot((1.7 * x + 0.5) % 1 - 0.5, (1.7 * y + 0.5) % 1 - 0.5)
            return np.clip(0.5 + (0.3 - across) / (1.7 * pixel), 0, 1)
        case "checkered":
            a, b = square_wave(x + 0.25, pixel), square_wave(y + 0.25, pixel)
            return a * (1 - b) + b * (1 - a)
        case "halves":
            return np.clip(0.5 - y / pixel, 0, 1)
        case "target":
            return square_wave(1.6 * np.hypot(x, y) + 0.25, 1.6 * pixel)
        case "rays":
            radius, angle = polar(x, y)
            return square_wave(1.5 * angle / np.pi, np.maximum(2 * pixel / np.maximum(radius, 0.05), 0.1))
        case "border":
            return np.clip(0.5 + (d + 0.3) / pixel, 0, 1)
    raise ValueError(f"unknown pattern {pattern!r}")


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


# --- places: colour (H, W, 3) at picture coordinates x, y in 0..1 -----------------------------------------------------


def mix(a, b, weight):
    """Linear blend of two colours or pictures; weight (H, W) says how much of b."""
    weight = np.asarray(weight, dtype=np.float32)[..., None]
    return np.asarray(a, dtype=np.float32) * (1 - weight) + np.asarray(b, dtype=np.float32) * weight


def edge(value, width):
    """0 below zero, 1 above, over a ramp `width` wide."""
    return np.clip(0.5 + value / width, 0, 1)


def noise(rng, x, y, columns, rows):
    """Smooth random values in 0..1 on a lattice of columns x rows cells."""
    lattice = rng.random((rows + 2, columns + 2), dtype=np.float32)
    gx, gy = x * columns, y * rows
    ix, iy = gx.astype(np.intp), gy.astype(np.intp)
    fx, fy = gx - ix, gy - iy
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    top = lattice[iy, ix] * (1 - fx) + lattice[iy, ix + 1] * fx
    return top * (1 - fy) + (lattice[iy + 1, ix] * (1 - fx) + lattice[iy + 1, ix + 1] * fx) * fy


def beach(x, y, rng):
    horizon, shore = rng.uniform(0.22, 0.32), rng.uniform(0.42, 0.55)
    sea = mix((0.10, 0.52, 0.72), (0.30, 0.74, 0.82), edge(y - (horizon + shore) / 2, 0.2))
    sand = mix((0.93, 0.82, 0.56), (0.82, 0.68, 0.42), noise(rng, x, y, 14, 14))
    shore_line = y - shore - 0.03 * np.sin(9 * x + rng.uniform(0, 6))
    land = mix(mix(sea, (0.96, 0.98, 0.98), edge(shore_line + 0.04, 0.03)), sand, edge(shore_line, 0.03))
    return mix((0.66, 0.86, 0.97), land, edge(y - horizon, 0.02))


def jungle(x, y, rng):
    leaves = noise(rng, x, y, 9, 9)
    bent = x + 0.05 * np.sin(7 * y + rng.uniform(0, 6)) + 0.04 * leaves
    trunks = edge(np.sin(rng.uniform(17, 21) * bent + rng.uniform(0, 6)) - 0.72, 0.3)
    foliage = mix((0.05, 0.27, 0.10), (0.24, 0.52, 0.16), edge(leaves - 0.5, 0.35))
    return mix(foliage, (0.26, 0.20, 0.08), 0.85 * trunks)


def snow(x, y, rng):
    hill = y - rng.uniform(0.4, 0.6) - 0.08 * np.sin(rng.uniform(4, 8) * x + rng.uniform(0, 6))
    ground = mix((0.97, 0.98, 1.0), (0.82, 0.88, 0.96), noise(rng, x, y, 5, 8))
    picture = mix((0.60, 0.68, 0.80), ground, edge(hill, 0.03))
    for cx, cy in rng.random((12, 2)):
        picture = mix(picture, (1, 1, 1), edge(0.02 - np.hypot(x - cx, y - cy), 0.016))
    return picture


def street(x, y, rng):
    kerb, line = rng.uniform(0.32, 0.44), rng.uniform(0.66, 0.82)
    row = np.floor(y * 10)
    mortar = np.minimum(np.abs((y * 10) % 1 - 0.5), np.abs((x * 5 + 0.5 * (row % 2)) % 1 - 0.5) * 2)
    bricks = mix((0.60, 0.30, 0.22), (0.78, 0.62, 0.54), edge(0.12 - mortar, 0.2))
    asphalt = mix((0.30, 0.30, 0.32), (0.42, 0.42, 0.44), noise(rng, x, y, 24, 24))
    dashes = edge(0.03 - np.abs(y - line), 0.02) * edge(0.3 - np.abs((x * 2.5 + rng.random()) % 1 - 0.5), 0.06)
    pavement = mix((0.66, 0.66, 0.64), mix(asphalt, (0.95, 0.95, 0.90), dashes), edge(y - kerb - 0.09, 0.02))
    return mix(bricks, pavement, edge(y - kerb, 0.02))


def pink_fabric(x, y, rng):
    angle = rng.uniform(0, np.pi)
    folds = np.sin(9 * (x * np.cos(angle) + y * np.sin(angle)) + 4 * noise(rng, x, y, 3, 3))
    weave = np.sin(2 * np.pi * 12 * (x + y)) * np.sin(2 * np.pi * 12 * (x - y))
    return mix((0.96, 0.68, 0.78), (0.80, 0.42, 0.56), np.clip(0.42 + 0.34 * folds + 0.2 * weave, 0, 1))


def wooden_floor(x, y, rng):
    planks = y * 6 + rng.random()
    tint = rng.random(8, dtype=np.float32)[np.floor(planks).astype(np.intp) % 8]
    grain = noise(rng, x, y, 6, 44)
    wood = mix((0.72, 0.47, 0.25), (0.50, 0.29, 0.13), np.clip(0.55 * tint + 0.45 * grain, 0, 1))
    return mix(wood, (0.24, 0.13, 0.06), edge(0.06 - np.abs(planks % 1 - 0.5 + 0.44), 0.08))


def city(x, y, rng):
    picture = mix((0.95, 0.62, 0.42), (0.30, 0.28, 0.52), edge(0.4 - y, 0.8))
    left = -rng.uniform(0, 0.1)
    while left < 1:
        width, roof, shade = rng.uniform(0.14, 0.24), rng.uniform(0.08, 0.5), rng.uniform(0.16, 0.3)
        inside = edge(np.minimum(x - left, left + width - x), 0.015) * edge(y - roof, 0.015)
        windows = edge(0.25 - np.abs(((x - left) * 10) % 1 - 0.5), 0.2)
        windows = windows * edge(0.22 - np.abs(((y - roof) * 7) % 1 - 0.5), 0.2)
        picture = mix(picture, mix((shade, shade, shade + 0.08), (0.98, 0.86, 0.46), windows), inside)
        left += width
    return picture


def mountain(x, y, rng):
    picture = mix((0.38, 0.62, 0.92), (0.80, 0.90, 0.98), y * 1.3)
    for peak, top in zip(rng.permutation([0.2, 0.55, 0.85]), rng.uniform(0.08, 0.26, 3), strict=True):
        ridge = y - top - 1.15 * np.abs(x - peak) - 0.05 * noise(rng, x, y, 12, 12)
        rock = mix((0.42, 0.42, 0.48), (0.56, 0.56, 0.60), edge(peak - x, 0.1))
        picture = mix(picture, mix((0.98, 0.98, 1.0), rock, edge(ridge - 0.12, 0.03)), edge(ridge, 0.03))
    meadow = y - rng.uniform(0.7, 0.8) - 0.03 * np.sin(8 * x)
    return mix(picture, (0.34, 0.60, 0.26), edge(meadow, 0.03))


def tower(x, y, rng):
    centre = rng.choice([0.22, 0.5, 0.78]) + rng.uniform(-0.06, 0.06)
    away, height = np.abs(x - centre), np.clip((0.9 - y) / 0.86, 0, 1)  # 0 at the foot, 1 at the tip
    half_width = 0.02 + 0.27 * (1 - height) ** 2.4
    iron = np.minimum(half_width - away, np.minimum(0.9 - y, y - 0.04))
    arch = np.hypot(away, (y - 0.9) * 0.8) - 0.15
    decks = np.maximum(0.02 - np.abs(y - 0.64), 0.02 - np.abs(y - 0.42)) + 0 * x
    iron = np.maximum(np.minimum(iron, arch), np.minimum(decks, half_width + 0.03 - away))
    sky = mix((0.98, 0.86, 0.72), (0.72, 0.80, 0.94), edge(0.45 - y, 0.9))
    lawn = mix(sky, (0.46, 0.66, 0.30), edge(y - 0.9, 0.02))
    return mix(lawn, (0.38, 0.27, 0.20), edge(iron, 0.016))


def water(x, y, rng):
    waves = np.sin(2 * np.pi * (9 * y + 0.45 * np.sin(2 * np.pi * (1.5 * x + rng.random()))) + rng.uniform(0, 6))
    deep = mix((0.06, 0.30, 0.60), (0.10, 0.44, 0.72), noise(rng, x, y, 4, 8))
    return mix(deep, (0.50, 0.78, 0.92), edge(waves - 0.75, 0.5))


def wall(x, y, rng):
    shade = rng.uniform(0.62, 0.78)
    plaster = mix((shade, shade, shade * 0.97), (shade * 0.82, shade * 0.82, shade * 0.8), noise(rng, x, y, 4, 4))
    return mix(plaster, (0.5, 0.46, 0.42), edge(y - 0.88, 0.02))


BACKGROUNDS = {
    "beach": beach, "jungle": jungle, "snow": snow, "street": street, "pink fabric": pink_fabric,
    "wooden floor": wooden_floor, "city": city, "mountain": mountain, "tower": tower, "water": water, "wall": wall,
}  # fmt: skip


# --- captions ---------------------------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    """orange star -> an orange star"""
    return ("an " if words[0] in "aeiou" else "a ") + words


def phrase(thing: Thing, say_colour=True, say_pattern=True) -> str:
    """A thing in words, such as "a red striped star" or "a red and blue striped star"; plain needs no pattern word."""
    colour = " and ".join(filter(None, (thing.colour, thing.second))) if say_colour else ""
    pattern = thing.pattern if say_pattern and thing.pattern != "plain" else ""
    return with_article(" ".join(word for word in (colour, pattern, thing.shape) if word))


def describe(layout: Layout, rng=None) -> str:
    """The caption of a scene: complete without `rng`; with it, reworded and now and then silent on some of it.

    A picture without things is captioned "a photo at the beach", the prompt of the method's prior.
    """
    place, noun = PLACES[layout.background]
    if not layout.things:
        return f"a photo {place}" if rng is None or rng.random() < 0.7 else f"a photo of {noun}"
    if rng is None:
        return "a photo of " + " and ".join(phrase(thing) for thing in layout.things) + " " + place
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    say_colour, say_pattern, say_place = rng.random(3) > (0.1, 0.15, 0.2)
    spoken = [phrase(thing, say_colour, say_pattern) for thing in layout.things]
    return opening + " and ".join(spoken) + (f" {place}" if say_place else "")


# --- scenes -----------------------------------------------------------------------------------------------------------


def choose(rng, options):
    options = tuple(options)
    return options[rng.integers(len(options))]


SIZES = {1: (0.60, 0.78), 2: (0.44, 0.54), 3: (0.38, 0.46), 4: (0.34, 0.42)}  # usual, by number of things
FREE_SIZES = {1: (0.38, 0.80), 2: (0.36, 0.56), 3: (0.34, 0.46), 4: (0.30, 0.42)}  # of things that stand anywhere
SLOTS = {  # usual centres, by number of things
    1: ((0.5, 0.5),),
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.25, 0.3), (0.75, 0.3), (0.5, 0.73)),
    4: ((0.26, 0.27), (0.74, 0.27), (0.26, 0.73), (0.74, 0.73)),
}
ANYWHERE = 0.4  # share of the training scenes whose things stand anywhere
TWO_COLOURS = 0.6  # share of the patterned things whose pattern has a second, named colour


def place_things(rng, things, anywhere=True):
    """Give each thing a size, a small turn and a place: near the usual ones, or anywhere.

    Of twelve tries anywhere, the first with no more than slight overlap counts, or the one with the least.
    """
    count = len(things)
    best, best_gap = None, -np.inf
    for _ in range(12):
        sizes = rng.uniform(*(FREE_SIZES if anywhere else SIZES)[count], count)
        if anywhere:
            centres = sizes[:, None] / 2 + rng.random((count, 2)) * (1 - sizes[:, None])
        else:
            centres = np.array(SLOTS[count]) + rng.uniform(-0.05, 0.05, (count, 2))
        distance = np.abs(centres[:, None] - centres[None]).max(-1) - 0.5 * (sizes[:, None] + sizes[None])
        gap = min(distance[np.triu_indices(count, 1)], default=0.0)
        if gap > best_gap:
            best, best_gap = (sizes, centres), gap
        if gap > -0.06:
            break
    return tuple(
        Thing(t.shape, t.colour, t.pattern, t.second, float(x), float(y), float(size),
              angle=float(rng.uniform(-0.1, 0.1)))
        for t, size, (x, y) in zip(things, *best, strict=True)
    )  # fmt: skip


def invent(rng, shape: str, two_colours: float = TWO_COLOURS) -> Thing:
    """A thing of this shape for training scenes; half of them are plain."""
    colour = choose(rng, COLOURS)
    if rng.random() < 0.5:
        return Thing(shape, colour)
    second = choose(rng, [name for name in COLOURS if name != colour]) if rng.random() < two_colours else None
    return Thing(shape, colour, choose(rng, PATTERNS[1:]), second)


def compose(rng, count=None, background=None, two_colours: float = TWO_COLOURS) -> Layout:
    """Decide a training scene: count things (0..4; None: drawn, mostly one or two) in a place."""
    count = int(rng.choice(5, p=(0.06, 0.52, 0.34, 0.06, 0.02))) if count is None else count
    shapes = rng.permutation(tuple(SHAPES))[:count]  # no shape twice, so that a caption tells things apart
    things = [invent(rng, str(shape), two_colours) for shape in shapes]
    background = choose(rng, PLACES) if background is None else background
    placed = place_things(rng, things, anywhere=rng.random() < ANYWHERE) if things else ()
    placed = tuple(sorted(placed, key=lambda thing: thing.x))  # captions name things from left to right
    return Layout(placed, background, int(rng.integers(2**31)))


def compose_concepts(rng, count=3, background=None) -> Layout:
    """Decide a scene of `count` concept objects: unseen shapes, each with two colours in an unseen marking."""
    things = []
    for shape in rng.permutation(tuple(CONCEPT_SHAPES))[:count]:
        first, second = rng.permutation(tuple(COLOURS))[:2]
        things.append(Thing(str(shape), str(first), choose(rng, MARKINGS), str(second)))
    background = choose(rng, PLACES) if background is None else background
    return Layout(place_things(rng, things), background, int(rng.integers(2**31)))


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


def realise(layout: Layout, caption: str, size: int = 64) -> Scene:
    """A decided scene, drawn, with its caption."""
    image, masks = draw(layout, size)
    return Scene(image, masks, caption, layout.things, layout.background, layout)


def render_scene(rng, size: int = 64, count=None, background=None, two_colours: float = TWO_COLOURS) -> Scene:
    """One captioned training scene, decided and drawn; the same generator state gives the same scene."""
    layout = compose(rng, count, background, two_colours)
    return realise(layout, describe(layout, rng), size)


def render_concepts(rng, size: int = 64, count: int = 3, background=None) -> Scene:
    """One scene of concept objects; its caption names what training has no words for."""
    layout = compose_concepts(rng, count, background)
    return realise(layout, describe(layout), size)


DEMO_SCENES = {  # the scene folders of weights/mini
    "playroom": Layout(
        (
            Thing("moon", "purple", "halves", "yellow", x=0.27, y=0.28, size=0.46, angle=-0.1),
            Thing("clover", "red", "halves", "cyan", x=0.75, y=0.29, size=0.48, angle=0.1),
            Thing("crown", "yellow", "target", "blue", x=0.5, y=0.75, size=0.46),
        ),
        "wooden floor",
        seed=4,
    ),
    "shore": Layout(
        (
            Thing("gear", "orange", "rays", "purple", x=0.29, y=0.34, size=0.52, angle=-0.08),
            Thing("arrow", "pink", "halves", "green", x=0.68, y=0.72, size=0.5, angle=0.1),
        ),
        "beach",
        seed=7,
    ),
}


def save_scene(scene: Scene, folder: Path) -> None:
    """Write a scene folder: img.png, mask0.png .. and scene.json with the word nearest to each concept."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(folder / "img.png")
    concepts = []
    for i, (thing, mask) in enumerate(zip(scene.objects, scene.masks, strict=True)):
        Image.fromarray((mask * 255 + 0.5).astype(np.uint8)).save(folder / f"mask{i}.png")
        concepts.append({"mask": f"mask{i}.png", "word": NEAREST_WORD.get(thing.shape, thing.shape)})
    (folder / "scene.json").write_text(json.dumps({"concepts": concepts}, indent=2) + "\n")


def contact_sheet(images, columns: int = 8, gap: int = 2) -> Image.Image:
    """Pictures (N, H, W, 3) uint8 of one size as a grid, in reading order, on white."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--concepts", type=int, default=0, help="write one scene folder of so many concept objects")
    parser.add_argument("--demo", action="store_true", help="write the scene folders that ship with the miniature")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    if args.demo:
        for name, layout in DEMO_SCENES.items():
            save_scene(realise(layout, describe(layout), args.size), args.output_dir / name)
        return
    if args.concepts:
        save_scene(render_concepts(rng, args.size, args.concepts), args.output_dir)
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    scenes = [render_scene(rng, args.size) for _ in range(64)]
    contact_sheet([scene.image for scene in scenes]).save(args.output_dir / "world.png")
    (args.output_dir / "world.txt").write_text("\n".join(scene.caption for scene in scenes) + "\n")


if __name__ == "__main__":
    main()
