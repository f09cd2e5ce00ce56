"""Polygons and run lengths against what their file says of them: bbox, area, and the units of coordinates."""

import json

import numpy as np
import pytest
from PIL import Image

from bas.config import TrainConfig
from bas.data.scene_folder import load_scene
from bas.io.images import to_floats
from tests.helpers.tiny import refused

W, H = 60, 40
MASK = np.zeros((H, W), dtype=bool)
MASK[5:15, 8:38] = True  # 30 wide, 10 high
MASK[15:25, 8:18] = True
BBOX, AREA = [8, 5, 30, 20], 400


@pytest.fixture
def folder(tmp_path):
    """A scene of 60x40 pixels without any masks."""
    Image.new("RGB", (W, H), (10, 20, 30)).save(tmp_path / "img.png")
    return tmp_path


def load(folder):
    return [to_floats(mask) for mask in load_scene(TrainConfig(instance_data_dir=str(folder))).masks]


def runs(flat):
    """The lengths of equal values in a row, the first of which counts pixels outside."""
    changes = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff([0, *changes, len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths


def pack(counts):
    """COCO's compressed string."""
    text = ""
    for i, count in enumerate(counts):
        number = count - counts[i - 2] if i > 2 else count
        while True:
            low, number = number & 31, number >> 5
            more = number != (-1 if low & 16 else 0)
            text += chr(48 + low + 32 * more)
            if not more:
                break
    return text


DOWN = runs(MASK.T.flatten())
ALONG = runs(MASK.flatten())


def write(folder, counts, size=(H, W), **annotation):
    annotation |= {"image_id": 1, "segmentation": {"size": list(size), "counts": counts}}
    (folder / "coco.json").write_text(json.dumps({"annotations": [annotation]}))


@pytest.mark.parametrize("pack_them", [list, pack])
def test_run_lengths_that_agree_are_read_without_a_word(folder, caplog, pack_them):
    write(folder, pack_them(DOWN), bbox=BBOX, area=AREA)
    assert np.array_equal(load(folder)[0], MASK)
    assert caplog.messages == []


@pytest.mark.parametrize("pack_them", [list, pack])
@pytest.mark.parametrize(
    ("counts", "size", "stated", "reading"),
    [
        (DOWN, (H, W), {}, None),
        ([*DOWN[1:-1], DOWN[-1] + DOWN[0]], (H, W), {"bbox": BBOX}, ""),  # the first run is lost
        ([0, *DOWN], (H, W), {"bbox": BBOX}, "its run lengths are inverted"),
        ([0, *DOWN], (H, W), {"area": AREA}, "its run lengths are inverted"),
        (ALONG, (H, W), {"bbox": BBOX}, "its run lengths go along the rows, COCO's go down the columns"),
        (ALONG, (H, W), {"bbox": BBOX, "area": AREA}, "its run lengths go along the rows"),
        (
            [0, *ALONG],
            (H, W),
            {"bbox": BBOX},
            "along the rows, COCO's go down the columns and its run lengths are inverted",
        ),
        (DOWN, (W, H), {"bbox": BBOX}, "its size is [width, height], write [40, 60]"),
        (
            ALONG,
            (W, H),
            {"bbox": BBOX},
            "its size is [width, height], write [40, 60] and its run lengths go along the rows",
        ),
        (DOWN, (H, W), {"bbox": [30, 20, 20, 10]}, "export it again"),
        (DOWN, (H, W), {"area": 40}, "export it again"),
    ],
)
def test_run_lengths_that_contradict_their_bbox_or_area_are_refused(folder, pack_them, counts, size, stated, reading):
    write(folder, pack_them(counts), size, **stated)
    if reading is None:
        assert np.array_equal(load(folder)[0], MASK)
        return
    with refused("coco.json annotation 0: its mask ", reading):
        load(folder)


@pytest.mark.parametrize(
    "stated",
    [
        {"bbox": [8.4, 5.3, 29.5, 20.1], "area": 391.5},
        {"bbox": [8, 5, 38, 25]},  # as corners
        {"bbox": BBOX, "area": 30 * 20},  # some exports write the area of the box
        {"bbox": [], "area": 0},
        {"bbox": [1, 2, "x", 4], "area": "?"},
        {"bbox": [float("nan")] * 4, "area": float("nan")},
        {"bbox": None, "area": None},
        {"bbox": [0, 0, 0, 0], "area": True},
    ],
)
def test_what_agrees_up_to_rounding_or_says_nothing_is_taken(folder, caplog, stated):
    write(folder, DOWN, **stated)
    assert np.array_equal(load(folder)[0], MASK)
    assert caplog.messages == []


def test_polygons_that_contradict_their_bbox_are_read_with_a_warning(folder, caplog):
    shape = [[8, 5, 38, 5, 38, 25, 8, 25]]
    annotation = {"segmentation": shape, "bbox": [16, 10, 60, 40], "area": 2400}
    (folder / "coco.json").write_text(json.dumps({"annotations": [annotation]}))
    assert load(folder)[0].sum() == 600
    assert caplog.messages == [
        f"{folder}/coco.json annotation 0: its mask lies in [8, 5, 38, 25], but its bbox is [16, 10, 60, 40]: "
        "were they made for another size of the image?"
    ]


@pytest.mark.parametrize(
    "polygon",
    [
        [8, 5, 38, 5, 38, 25, 8, 25],
        [[8, 5], [38, 5], [38, 25], [8, 25]],
        [[[8, 5], [38, 5], [38, 25], [8, 25], [8, 5]]],
        [["8", "5", "38", "5", "38", "25", "8", "25"]],
    ],
    ids=["without a list", "points without a list", "points, closed", "numbers as text"],
)
def test_one_polygon_may_be_written_in_several_ways(folder, polygon):
    (folder / "coco.json").write_text(json.dumps({"annotations": [{"segmentation": polygon}]}))
    assert load(folder)[0].sum() == 600


def test_run_lengths_may_be_written_as_decimals(folder):
    write(folder, [float(count) for count in DOWN], bbox=BBOX, area=AREA)
    assert np.array_equal(load(folder)[0] > 0.5, MASK)


# --- Units --------------------------------------------------------------------------------------------------------


def write_shapes(folder, kind, shapes, size):
    """Polygons of one kind of file on an image of this size."""
    Image.new("RGB", size).save(folder / "img.png")
    if kind == "polygon":
        content = {"concepts": [{"polygon": shape} for shape in shapes]}
    elif kind == "box":
        content = {
            "concepts": [{"box": np.ravel([np.min(shape, axis=0), np.max(shape, axis=0)]).tolist()} for shape in shapes]
        }
    else:
        content = {"annotations": [{"segmentation": [np.ravel(shape).tolist()]} for shape in shapes]}
    (folder / ("coco.json" if kind == "coco" else "regions.json")).write_text(json.dumps(content))


TRIANGLES = [[[0.1, 0.2], [0.6, 0.25], [0.3, 0.9]], [[0.5, 0.5], [0.95, 0.55], [0.7, 1.0]]]


@pytest.mark.parametrize("kind", ["polygon", "box", "coco"])
def test_fractions_are_told_from_pixels(folder, kind):
    write_shapes(folder, kind, TRIANGLES, (640, 480))
    with refused(".json gives fractions of the sides, not pixels: multiply x by 640 and y by 480"):
        load(folder)


@pytest.mark.parametrize("kind", ["polygon", "box", "coco"])
def test_percent_is_told_from_pixels(folder, kind):
    """Label Studio's, with its many decimals."""
    shapes = (100 * np.array(TRIANGLES) + 0.37).clip(0, 100).tolist()
    write_shapes(folder, kind, shapes, (640, 480))
    with refused(".json gives percent of the sides, not pixels: multiply x by 6.4 and y by 4.8"):
        load(folder)


@pytest.mark.parametrize("kind", ["polygon", "box", "coco"])
def test_whole_numbers_below_100_may_be_pixels(folder, kind, caplog):
    shapes = (100 * np.array(TRIANGLES)).round().astype(int).tolist()
    write_shapes(folder, kind, shapes, (640, 480))
    assert len(load(folder)) == 2
    assert any(
        "has no coordinate above 100, and the image is 640x480: give pixels, not percent" in m for m in caplog.messages
    )


@pytest.mark.parametrize("kind", ["polygon", "box", "coco"])
@pytest.mark.parametrize("size", [(128, 96), (640, 480)])
def test_pixels_need_no_word(folder, kind, size, caplog):
    shapes = (np.array(TRIANGLES) * size).tolist()
    write_shapes(folder, kind, shapes, size)
    assert len(load(folder)) == 2
    assert caplog.messages == []


def test_shapes_of_a_larger_image_are_said(folder, caplog):
    write_shapes(folder, "polygon", (np.array(TRIANGLES) * (1280, 960)).tolist(), (640, 480))
    with refused("black all over"):  # the second triangle lies outside
        load(folder)
    assert f"{folder}/regions.json reaches beyond the image of 640x480: what lies outside is cut off" in caplog.messages
