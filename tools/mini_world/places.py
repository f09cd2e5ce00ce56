"""Places of the miniature world: their words, and their images (H, W, 3) at image coordinates x, y in 0..1."""

import numpy as np

from tools.mini_world.colours import mix

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
    image = mix((0.60, 0.68, 0.80), ground, edge(hill, 0.03))
    for cx, cy in rng.random((12, 2)):
        image = mix(image, (1, 1, 1), edge(0.02 - np.hypot(x - cx, y - cy), 0.016))
    return image


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
    image = mix((0.95, 0.62, 0.42), (0.30, 0.28, 0.52), edge(0.4 - y, 0.8))
    left = -rng.uniform(0, 0.1)
    while left < 1:
        width, roof, shade = rng.uniform(0.14, 0.24), rng.uniform(0.08, 0.5), rng.uniform(0.16, 0.3)
        inside = edge(np.minimum(x - left, left + width - x), 0.015) * edge(y - roof, 0.015)
        windows = edge(0.25 - np.abs(((x - left) * 10) % 1 - 0.5), 0.2)
        windows = windows * edge(0.22 - np.abs(((y - roof) * 7) % 1 - 0.5), 0.2)
        image = mix(image, mix((shade, shade, shade + 0.08), (0.98, 0.86, 0.46), windows), inside)
        left += width
    return image


def mountain(x, y, rng):
    image = mix((0.38, 0.62, 0.92), (0.80, 0.90, 0.98), y * 1.3)
    for peak, top in zip(rng.permutation([0.2, 0.55, 0.85]), rng.uniform(0.08, 0.26, 3), strict=True):
        ridge = y - top - 1.15 * np.abs(x - peak) - 0.05 * noise(rng, x, y, 12, 12)
        rock = mix((0.42, 0.42, 0.48), (0.56, 0.56, 0.60), edge(peak - x, 0.1))
        image = mix(image, mix((0.98, 0.98, 1.0), rock, edge(ridge - 0.12, 0.03)), edge(ridge, 0.03))
    meadow = y - rng.uniform(0.7, 0.8) - 0.03 * np.sin(8 * x)
    return mix(image, (0.34, 0.60, 0.26), edge(meadow, 0.03))


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
