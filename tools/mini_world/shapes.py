"""Outlines of the miniature world's objects: signed distance, negative inside, for x right and y down in -1..1."""

import numpy as np


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


def star_points(tips, inner):
    angles = np.arange(2 * tips) * np.pi / tips - np.pi / 2
    radii = np.where(np.arange(2 * tips) % 2 == 0, 1.0, inner)
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
