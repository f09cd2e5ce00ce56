"""Figure 5 of the paper: identity against prompt similarity, a point for each method with its confidence intervals.

Drawn twice from one geometry: as a PNG, and as SVG for the page, where a point leads to its pictures.
"""

import html
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from bas.evaluation.baselines import VARIANTS
from bas.evaluation.tables import Interval
from bas.io.figures import INK, PAPER, as_hex, concept_colour

WIDTH, HEIGHT = 960, 640
LEFT, RIGHT, TOP, BOTTOM = 90, 30, 30, 80  # margins
RADIUS = 7
QUIET = (150, 150, 150)
FIRST_COLOUR = 4  # of the concepts' colours, for the first method: a dark blue
X, Y = "prompt_similarity", "identity_similarity"
TITLES = {X: "prompt similarity", Y: "identity similarity"}


@dataclass(frozen=True)
class Point:
    """A method on the canvas, in pixels."""

    method: str
    x: float
    y: float
    across: tuple[float, float] | None  # the interval of x
    along: tuple[float, float] | None  # and of y
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, about five of them."""
        rough = (self.high - self.low) / 5
        power = 10 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def axis(intervals: list[Interval], start: float, end: float) -> Axis:
    """An axis that holds all intervals, with some air."""
    ends = [v for i in intervals for v in (i.mean, i.low, i.high) if v is not None]
    air = 0.08 * (max(ends) - min(ends)) or 0.05
    return Axis(min(ends) - air, max(ends) + air, start, end)


def layout(summary: dict[str, dict[str, Interval]]) -> tuple[Axis, Axis, list[Point]]:
    """Both axes, and where each method stands. summary: of `bas.evaluation.tables.summarise`"""
    x = axis([columns[X] for columns in summary.values()], LEFT, WIDTH - RIGHT)
    y = axis([columns[Y] for columns in summary.values()], HEIGHT - BOTTOM, TOP)
    points = []
    for method, columns in summary.items():
        across, along = columns[X], columns[Y]
        points.append(
            Point(
                method,
                x.at(across.mean),
                y.at(along.mean),
                None if across.low is None else (x.at(across.low), x.at(across.high)),
                None if along.low is None else (y.at(along.low), y.at(along.high)),
                colour_of(method),
            )
        )
    return x, y, points


def colour_of(method: str) -> tuple[int, int, int]:
    """Methods in colours that everyone can tell apart; ablations and options of `bas` in greys."""
    methods = [name for name, row in VARIANTS.items() if row.kind == "method"]
    return concept_colour(FIRST_COLOUR + methods.index(method)) if method in methods else (110, 110, 110)


def label_places(points: list[Point], height: float) -> list[tuple[float, float]]:
    """Where the labels stand, left and top: at that corner of their point where they lie on nothing else, or least."""
    taken = [(p.x - RADIUS, p.y - RADIUS, p.x + RADIUS, p.y + RADIUS) for p in points]
    places = []
    for point in points:
        width, beside = 0.6 * height * len(point.method), RADIUS + 4
        corners = [
            (left, top, left + width, top + height)
            for top in (point.y - height - 2, point.y + 2)
            for left in (point.x + beside, point.x - beside - width)
        ]
        free = min(corners, key=lambda box: sum(overlap(box, other) for other in taken))
        taken.append(free)
        places.append(free[:2])
    return places


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes (left, top, right, bottom) share."""
    wide, high = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    return max(wide, 0.0) * max(high, 0.0)


def scatter_png(summary: dict[str, dict[str, Interval]]) -> Image.Image:
    """The plot as a picture."""
    x, y, points = layout(summary)
    font = ImageFont.load_default(size=16)
    height = sum(font.getmetrics())
    sheet = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=QUIET)
    for value in x.ticks():
        draw.line((x.at(value), HEIGHT - BOTTOM, x.at(value), HEIGHT - BOTTOM + 5), QUIET)
        draw.text((x.at(value), HEIGHT - BOTTOM + 8), f"{value:.3g}", INK, font, anchor="ma")
    for value in y.ticks():
        draw.line((LEFT - 5, y.at(value), LEFT, y.at(value)), QUIET)
        draw.text((LEFT - 9, y.at(value)), f"{value:.3g}", INK, font, anchor="rm")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 30), TITLES[X], INK, font, anchor="mm")
    draw.text((8, 8), TITLES[Y], INK, font)
    for point, (left, top) in zip(points, label_places(points, height), strict=True):
        if point.across:
            draw.line((point.across[0], point.y, point.across[1], point.y), point.colour, 2)
        if point.along:
            draw.line((point.x, point.along[0], point.x, point.along[1]), point.colour, 2)
        box = (point.x - RADIUS, point.y - RADIUS, point.x + RADIUS, point.y + RADIUS)
        draw.ellipse(box, point.colour, PAPER)
        draw.text((left, top), point.method, INK, font)
    return sheet


def scatter_svg(summary: dict[str, dict[str, Interval]]) -> str:
    """The plot as SVG; each point is a link to the element whose id is the method's name."""
    x, y, points = layout(summary)
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{x.end - x.start}" height="{y.start - y.end}"/>']
    for value in x.ticks():
        parts.append(text(x.at(value), HEIGHT - BOTTOM + 24, f"{value:.3g}", "middle"))
    for value in y.ticks():
        parts.append(text(LEFT - 9, y.at(value) + 5, f"{value:.3g}", "end"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 24, f"{TITLES[X]} →", "middle"))
    parts.append(text(8, 20, f"{TITLES[Y]} ↑", "start"))
    for point, (left, top) in zip(points, label_places(points, 20), strict=True):
        colour = as_hex(point.colour)
        bars = []
        if point.across:
            bars.append(f"M{point.across[0]:.1f} {point.y:.1f}H{point.across[1]:.1f}")
        if point.along:
            bars.append(f"M{point.x:.1f} {point.along[0]:.1f}V{point.along[1]:.1f}")
        help = html.escape(VARIANTS[point.method].help)
        parts.append(
            f'<a href="#{point.method}"><title>{help}</title><path d="{"".join(bars)}" stroke="{colour}"/>'
            f'<circle cx="{point.x:.1f}" cy="{point.y:.1f}" r="{RADIUS}" fill="{colour}"/>'
            f"{text(left, top + 16, point.method, 'start')}</a>"
        )
    label = f"{TITLES[Y]} against {TITLES[X]}"
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def text(x: float, y: float, words: str, anchor: str) -> str:
    """One SVG text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
