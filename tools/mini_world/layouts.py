"""Scenes of the miniature world before they are drawn: what stands where, in training, of concepts, in the demo."""

from dataclasses import dataclass

import numpy as np

from tools.mini_world.colours import COLOURS, MARKINGS, PATTERNS
from tools.mini_world.places import PLACES
from tools.mini_world.shapes import CONCEPT_SHAPES, SHAPES


@dataclass(frozen=True)
class Object:
    """One object: what it looks like, and where it stands (fractions of the image's side)."""

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
    """A scene before it is drawn; later objects stand in front of earlier ones."""

    objects: tuple[Object, ...]
    background: str  # a key of PLACES
    seed: int  # of the background's own randomness


def choose(rng, options):
    options = tuple(options)
    return options[rng.integers(len(options))]


SIZES = {1: (0.60, 0.78), 2: (0.44, 0.54), 3: (0.38, 0.46), 4: (0.34, 0.42)}  # usual, by number of objects
FREE_SIZES = {1: (0.38, 0.80), 2: (0.36, 0.56), 3: (0.34, 0.46), 4: (0.30, 0.42)}  # of objects that stand anywhere
SLOTS = {  # usual centres, by number of objects
    1: ((0.5, 0.5),),
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.25, 0.3), (0.75, 0.3), (0.5, 0.73)),
    4: ((0.26, 0.27), (0.74, 0.27), (0.26, 0.73), (0.74, 0.73)),
}
COUNTS = (0.03, 0.25, 0.39, 0.23, 0.10)  # shares of the training scenes with 0 to 4 objects
ANYWHERE = 0.6  # share of the training scenes whose objects stand anywhere
TWO_COLOURS = 0.6  # share of the patterned objects whose pattern has a second, named colour


def place_objects(rng, objects, anywhere=True):
    """Give each object a size, a small turn and a place: near the usual ones, or anywhere.

    Of twelve tries anywhere, the first with no more than slight overlap counts, or the one with the least.
    """
    count = len(objects)
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
        Object(t.shape, t.colour, t.pattern, t.second, float(x), float(y), float(size),
              angle=float(rng.uniform(-0.1, 0.1)))
        for t, size, (x, y) in zip(objects, *best, strict=True)
    )  # fmt: skip


def invent(rng, shape: str, two_colours: float = TWO_COLOURS) -> Object:
    """An object of this shape for training scenes; half of them are plain."""
    colour = choose(rng, COLOURS)
    if rng.random() < 0.5:
        return Object(shape, colour)
    second = choose(rng, [name for name in COLOURS if name != colour]) if rng.random() < two_colours else None
    return Object(shape, colour, choose(rng, PATTERNS[1:]), second)


def compose(rng, count=None, background=None, two_colours: float = TWO_COLOURS) -> Layout:
    """Decide a training scene: count objects (0..4; None: drawn by COUNTS) in a place."""
    count = int(rng.choice(5, p=COUNTS)) if count is None else count
    shapes = rng.permutation(tuple(SHAPES))[:count]  # no shape twice, so that a caption tells objects apart
    objects = [invent(rng, str(shape), two_colours) for shape in shapes]
    background = choose(rng, PLACES) if background is None else background
    placed = place_objects(rng, objects, anywhere=rng.random() < ANYWHERE) if objects else ()
    placed = tuple(sorted(placed, key=lambda obj: obj.x))  # captions name objects from left to right
    return Layout(placed, background, int(rng.integers(2**31)))


def compose_concepts(rng, count: int) -> Layout:
    """Decide a scene of `count` concept objects: unseen shapes, each with two colours in an unseen marking."""
    objects = []
    for shape in rng.permutation(tuple(CONCEPT_SHAPES))[:count]:
        first, second = rng.permutation(tuple(COLOURS))[:2]
        objects.append(Object(str(shape), str(first), choose(rng, MARKINGS), str(second)))
    background = choose(rng, PLACES)
    return Layout(place_objects(rng, objects), background, int(rng.integers(2**31)))


DEMO_SCENES = {  # the scene folders of weights/mini
    "playroom": Layout(
        (
            Object("moon", "purple", "halves", "yellow", x=0.27, y=0.28, size=0.46, angle=-0.1),
            Object("clover", "red", "halves", "cyan", x=0.75, y=0.29, size=0.48, angle=0.1),
            Object("crown", "yellow", "target", "blue", x=0.5, y=0.75, size=0.46),
        ),
        "wooden floor",
        seed=4,
    ),
    "shore": Layout(
        (
            Object("gear", "orange", "rays", "purple", x=0.29, y=0.34, size=0.52, angle=-0.08),
            Object("arrow", "pink", "halves", "green", x=0.68, y=0.72, size=0.5, angle=0.1),
        ),
        "beach",
        seed=7,
    ),
}
