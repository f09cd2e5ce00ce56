"""Colours of the miniature world's objects, and the patterns in which a second colour lies over the first."""

import numpy as np

from tools.mini_world.shapes import polar

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


def mix(a, b, weight):
    """Linear blend of two colours or images; weight (H, W) says how much of b."""
    weight = np.asarray(weight, dtype=np.float32)[..., None]
    return np.asarray(a, dtype=np.float32) * (1 - weight) + np.asarray(b, dtype=np.float32) * weight


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
