"""The page's masks, run by Node where it is there: strokes equal a NumPy reference, fill and undo are exact."""

import base64
import json
import shutil
import subprocess

import numpy as np
import pytest

from bas.web.studio.app import STATIC
from bas.web.studio.tiles import lay, unpack

W, H = 300, 280
SCRIPT = """
import { Mask } from "./tiles.mjs";
const { strokes, fill, polygon } = JSON.parse(process.argv[2]);
const mask = new Mask(300, 280), start = new Map();
let saved = new Map();
for (const [x0, y0, x1, y1, radius, erase] of strokes) mask.stroke(x0, y0, x1, y1, radius, erase, saved);
if (polygon) mask.polygon(polygon, saved);
if (fill) mask.fill(...fill, saved);
const share = mask.share(), packed = await mask.pack([...mask.tiles.keys()]);
const again = await Mask.unpack(packed.buffer);
const same = [...mask.tiles].every(([key, tile]) => Buffer.from(tile).equals(Buffer.from(again.tiles.get(key))));
const redo = mask.swap(saved), empty = mask.share();
mask.swap(redo);
console.log(JSON.stringify({ share, empty, same, back: mask.share(), packed: Buffer.from(packed).toString("base64") }));
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Run the page's masks on strokes -> what the script prints, with the mask as the server reads it."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(STATIC / "tiles.js", folder / "tiles.mjs")
    (folder / "run.mjs").write_text(SCRIPT)

    def run(strokes, fill=None, polygon=None):
        words = [program, str(folder / "run.mjs"), json.dumps({"strokes": strokes, "fill": fill, "polygon": polygon})]
        told = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        mask = np.zeros((H, W), np.uint8)
        lay(mask, unpack(base64.b64decode(told["packed"]), (W, H)))
        return told, mask

    return run


def reference(strokes):
    """Each pixel by its distance from the line of each stroke: 255 inside, 0 outside, an edge of one pixel between."""
    mask = np.zeros((H, W))
    centres = np.stack(np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5), axis=-1)
    for x0, y0, x1, y1, radius, erase in strokes:
        along = np.array([x1 - x0, y1 - y0])
        length = max(along @ along, 1e-12)
        part = ((centres - (x0, y0)) @ along / length).clip(0, 1)
        away = np.linalg.norm(centres - (np.array([x0, y0]) + part[..., None] * along), axis=-1)
        value = np.floor(255 * (radius + 0.5 - away).clip(0, 1) + 0.5)
        mask = np.minimum(mask, 255 - value) if erase else np.maximum(mask, value)
    return mask


def test_strokes_are_those_of_the_reference(node):
    """200 random strokes: short and long, thin and wide, along the axes, beyond the edges, painted and erased."""
    random = np.random.default_rng(0)
    strokes = []
    for i in range(200):
        x0, y0 = random.uniform(-20, 320), random.uniform(-20, 300)
        turn = i % 5
        x1 = x0 if turn == 1 else x0 + random.uniform(-60, 60) * (turn != 3)
        y1 = y0 if turn == 2 else y0 + random.uniform(-60, 60) * (turn != 3)
        strokes.append([x0, y0, x1, y1, float(random.choice([0.5, 1, 2.5, 9, 40])), bool(i % 3 == 2)])
    told, mask = node(strokes)
    assert np.abs(mask - reference(strokes)).max() <= 1  # the rounding of a half
    assert told["share"] == pytest.approx(mask.mean() / 255)
    assert told["empty"] == 0  # all undone
    assert told["back"] == told["share"]
    assert told["same"]


def test_fill_stays_inside_its_outline(node):
    ring = [
        [100, 60, 200, 60, 2, False],
        [200, 60, 200, 200, 2, False],
        [200, 200, 100, 200, 2, False],
        [100, 200, 100, 60, 2, False],
    ]
    _, mask = node(ring, [150, 100])
    assert (mask[62:199, 102:199] == 255).all()
    assert mask[:56].max() == mask[205:].max() == mask[:, :96].max() == mask[:, 205:].max() == 0
    _, mask = node(ring, [10, 10])
    assert (mask[63:197, 103:197] == 0).all()
    assert (mask[:50] == 255).all()


@pytest.mark.parametrize(
    "corners",
    [
        [(10.2, 20.7), (280.5, 5.1), (265.9, 262.3), (130.4, 90.8)],  # over all four squares, not convex
        [(-40, 30), (200, -50), (340, 300), (100.5, 150.5)],  # beyond the image
        [(20, 20), (250, 240), (250, 20), (20, 240)],  # crosses itself: its middle lies outside twice
    ],
)
def test_a_polygon_fills_the_pixels_whose_centre_it_holds(node, corners):
    """By the even-odd rule, counted for each pixel alone; and undo takes it away."""
    told, mask = node([], polygon=corners)
    x, y = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    inside = np.zeros((H, W), bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        inside ^= ((y0 <= y) != (y1 <= y)) & (x >= x0 + (y - y0) * (x1 - x0) / (y1 - y0 or 1))
    assert np.array_equal(mask, inside * np.uint8(255))
    assert 0.05 < inside.mean() < 0.9
    assert told["same"]
    assert told["empty"] == 0
