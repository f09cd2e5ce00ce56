"""Every way to give masks: exact pixels by the stated rules, exact words for what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bas.config import TrainConfig
from bas.data.mask_formats import find_source, read_source
from bas.data.mask_shapes import decode_runs, rasterise_polygon, unpack_counts
from bas.data.scene_folder import load_scene
from bas.io.images import to_floats
from tests.helpers.tiny import refused

W, H = 6, 4
LABELS = np.array([[0, 0, 7, 7, 0, 0], [0, 7, 7, 7, 0, 2], [0, 0, 7, 0, 2, 2], [0, 0, 0, 0, 2, 2]], np.uint8)


@pytest.fixture
def folder(tmp_path):
    """A scene of 6x4 pixels without any masks."""
    Image.new("RGB", (W, H), (10, 20, 30)).save(tmp_path / "img.png")
    return tmp_path


def load(folder, **settings):
    scene = load_scene(TrainConfig(instance_data_dir=str(folder), **settings))
    return replace(scene, masks=[to_floats(mask) for mask in scene.masks])


def masks(folder):
    return [to_floats(mask.values) for mask in read_source(find_source(folder), (W, H))]


def write_json(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


# --- One source per scene -----------------------------------------------------------------------------------------


def test_two_sources_are_an_error_that_names_both(folder):
    Image.fromarray(LABELS).save(folder / "labels.png")
    Image.fromarray((LABELS > 0) * np.uint8(255)).save(folder / "mask0.png")
    with refused(f"{folder} has masks from 2 sources, mask0.png and labels.png: keep one"):
        load(folder)
    (folder / "mask0.png").rename(folder / "cutout0.png")
    np.save(folder / "masks.npy", LABELS)
    with refused(f"{folder} has masks from 3 sources, cutout0.png and labels.png and masks.npy: keep one"):
        load(folder)


def test_a_gap_in_the_cutouts_is_named(folder):
    for i in (0, 3):
        (folder / f"cutout{i}.png").touch()
    with refused(f"{folder} has cutouts up to cutout3.png but lacks cutout1.png, cutout2.png"):
        load(folder)


def test_scene_json_wins_over_names_beside_the_masks_and_says_so(folder, caplog):
    concepts = [{"handle": "<a>", "word": "toy", "box": [0, 0, 2, 2]}, {"word": "bowl", "box": [3, 0, 6, 4]}]
    write_json(folder, "regions.json", concepts=concepts)
    scene = load(folder)
    assert (scene.handles, scene.words) == (("<a>", "<asset1>"), ("toy", "bowl"))
    assert not caplog.messages
    write_json(folder, "scene.json", concepts=[{"handle": "<b>"}, {"handle": "<c>"}])
    scene = load(folder)
    assert (scene.handles, scene.words) == (("<b>", "<c>"), (None, None))
    assert caplog.messages == [f"{folder}/scene.json names the concepts: the names beside the masks are not used"]


# --- Label maps ---------------------------------------------------------------------------------------------------


def save_labels(folder, mode):
    if mode == "P":
        image = Image.fromarray(LABELS, "L").convert("P")
        image.putdata(LABELS.flatten().tolist())
        image.putpalette([255, 255, 255] * 256)  # colours alike: the entries count
    elif mode == "RGB":
        palette = np.zeros((8, 3), np.uint8)
        palette[2], palette[7] = (0, 0, 255), (255, 0, 0)
        image = Image.fromarray(palette[LABELS])
    elif mode == "LA":
        image = Image.fromarray(np.dstack([LABELS, np.full_like(LABELS, 255)]))
    else:
        image = Image.fromarray(LABELS.astype(np.uint16 if mode == "I;16" else np.uint8))
    image.save(folder / "labels.png")
    assert Image.open(folder / "labels.png").mode == mode


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "I;16"])
def test_each_label_is_a_concept_in_rising_order(folder, mode):
    save_labels(folder, mode)
    first, second = read_source(find_source(folder), (W, H))
    assert np.array_equal(first.values, (LABELS == 2) * 255)
    assert np.array_equal(second.values, (LABELS == 7) * 255)
    names = ("colour #0000ff", "colour #ff0000") if mode == "RGB" else ("value 2", "value 7")
    assert (first.name, second.name) == tuple(f"labels.png {name}" for name in names)
    assert [mask.sum() for mask in load(folder).masks] == [5, 6]


def test_a_label_map_in_black_and_white_is_one_concept(folder):
    Image.fromarray(LABELS == 7).save(folder / "labels.png")
    (mask,) = masks(folder)
    assert np.array_equal(mask, LABELS == 7)


def test_a_label_map_follows_its_exif_note(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    Image.fromarray(LABELS).save(folder / "labels.png", exif=exif)
    assert np.array_equal(masks(folder)[0], np.rot90(LABELS == 2, -1))
    with refused("labels.png value 2 is 4x6, img.png is 6x4: they must have the same shape"):
        load(folder)


def test_a_label_map_of_another_size_is_resized_with_a_warning(folder, caplog):
    Image.fromarray(np.kron(LABELS, np.ones((3, 3), np.uint8))).save(folder / "labels.png")
    scene = load(folder)
    assert scene.masks[0].shape == (H, W)
    assert np.array_equal(scene.masks[0] > 0.5, LABELS == 2)
    assert caplog.messages[0] == f"{folder}/labels.png value 2 is 18x12, img.png is 6x4: the mask is resized"


def test_a_label_map_without_background_is_told(folder, caplog):
    """White, or another colour, may be the background of a drawn map; here it would be a concept."""
    Image.fromarray(np.where(LABELS == 0, 200, LABELS).astype(np.uint8)).save(folder / "labels.png")
    assert len(load(folder)) == len(np.unique(LABELS))
    told = f"{folder / 'labels.png'} has no background, which is 0 or black: each of its values is a concept"
    assert caplog.messages.count(told) == 1
    caplog.clear()
    Image.fromarray(LABELS.astype(np.uint8)).save(folder / "labels.png")
    load(folder)
    assert not any("background" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (LABELS * 0, "labels.png holds no label: every pixel is 0, the background"),
        (np.arange(256, dtype=np.uint8).reshape(16, 16), "labels.png holds 255 labels: was it smoothed"),
        (np.dstack([LABELS, LABELS]), "labels.png has transparent pixels: save the label map without an alpha"),
    ],
)
def test_label_maps_that_are_none(folder, array, message):
    Image.fromarray(array).save(folder / "labels.png")
    with refused(message):
        load(folder)


# --- Cut-outs -----------------------------------------------------------------------------------------------------


def test_a_cutout_is_its_alpha_whatever_the_colours(folder):
    alpha = LABELS * np.uint8(30)
    Image.fromarray(np.dstack([LABELS, LABELS * 2, LABELS * 3, alpha])).save(folder / "cutout0.png")
    Image.fromarray(np.dstack([LABELS, 255 - alpha])).save(folder / "cutout1.png")
    first, second = load(folder).masks
    assert np.array_equal(first, alpha.astype(np.float32) / 255)
    assert np.array_equal(second, (255 - alpha).astype(np.float32) / 255)


def test_a_cutout_with_a_transparent_palette_entry(folder):
    image = Image.fromarray(LABELS, "L").convert("P")
    image.putdata((LABELS > 0).astype(int).flatten().tolist())
    image.save(folder / "cutout0.png", transparency=0)
    assert np.array_equal(masks(folder)[0], LABELS > 0)


def test_a_cutout_without_alpha_is_refused(folder):
    Image.fromarray(LABELS).save(folder / "cutout0.png")
    with refused("cutout0.png has no alpha channel: a cut-out is transparent where the concept is not"):
        load(folder)


def test_an_opaque_cutout_is_refused(folder):
    Image.new("RGBA", (W, H), "red").save(folder / "cutout0.png")
    with refused("cutout0.png is white all over"):
        load(folder)


# --- Regions ------------------------------------------------------------------------------------------------------


def test_a_box_holds_the_pixels_between_its_corners(folder):
    write_json(folder, "regions.json", concepts=[{"box": [1, 0, 4, 2]}, {"box": [3.4, 2.6, 99, 99]}])
    first, second = load(folder).masks
    assert first.tolist() == [[0, 1, 1, 1, 0, 0]] * 2 + [[0] * 6] * 2
    assert second.tolist() == [[0] * 6] * 3 + [[0, 0, 0, 1, 1, 1]]


def test_a_triangle_holds_the_pixels_whose_centres_are_inside():
    assert rasterise_polygon(np.array([[0, 0], [4, 0], [0, 4.0]]), (W, H)).astype(int).tolist() == [
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]


def test_a_star_has_a_hole_by_the_even_odd_rule():
    turns = np.deg2rad(np.arange(5) * 144 - 90)
    star = 50 + 45 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    mask = rasterise_polygon(star, (100, 100))
    assert not mask[50, 50]
    assert mask[15, 50]
    assert np.abs(mask.astype(int) - mask[:, ::-1]).sum() == 0


def test_neighbours_share_no_pixel_and_leave_none_out():
    rng = np.random.default_rng(0)
    cut = np.stack([rng.uniform(5, 55, 9), np.linspace(-1, 41, 9)], axis=1)
    left = np.concatenate([[[0, -1]], cut, [[0, 41]]])
    right = np.concatenate([[[60, -1]], cut, [[60, 41]]])
    first, second = (rasterise_polygon(points, (60, 40)) for points in (left, right))
    assert (first ^ second).all()


@pytest.mark.parametrize(
    ("concept", "message"),
    [
        ({}, 'concept 0 needs either "polygon"'),
        ({"box": [0, 0, 1, 1], "polygon": [[0, 0], [1, 0], [1, 1]]}, 'concept 0 needs either "polygon"'),
        ({"box": [0, 0, 1]}, "concept 0: [0, 0, 1] is not 4 numbers"),
        ({"box": [2, 0, 2, 1]}, "concept 0: the box [2.0, 0.0, 2.0, 1.0] is empty: expected x0 < x1 and y0 < y1"),
        ({"box": ["a", 0, 2, 1]}, 'concept 0: ["a", 0, 2, 1] is not 4 numbers'),
        ({"polygon": [[0, 0], [1, 1]]}, "concept 0: [[0, 0], [1, 1]] is not three points [x, y] or more"),
        ({"polygon": [0, 0, 1, 1, 2, 2]}, "concept 0: [0, 0, 1, 1, 2, 2] is not three points"),
        ({"polygon": [[0, 0], [1, 1], [2]]}, "is not three points [x, y] or more"),
        ({"polygon": [[0, 0], [1, 1], [2, 1e999]]}, "is not three points [x, y] or more"),
        ({"polygon": [[0, 0], [1e308, 3], [-1e308, 2]]}, "concept 0: [[0, 0], [1e+308, 3], [-1e+308, 2]] lies beyond"),
        ({"box": [0, 0, 1e308, 2]}, "concept 0: [0, 0, 1e+308, 2] lies beyond any image: give pixels"),
        ({"box": [0, 0, 2, 2], "word": 3}, 'concept 0: "word" is 3, not a string'),
        ({"box": [20, 20, 30, 30]}, "regions.json concept 0 is black all over"),
        ({"box": [0, 0, 2, 2], "handle": "a toy"}, "handle '<a toy>': expected <name>"),
        ({"box": [0, 0, 2, 2], "hanlde": "toy"}, "regions.json: unknown hanlde; did you mean handle?"),
        ({"bbox": [0, 0, 2, 2]}, "regions.json: unknown bbox; did you mean box?"),
        ({"box": [0, 0, 2, 2], "label": "toy"}, "regions.json: unknown label; did you mean handle, or word?"),
    ],
)
def test_regions_that_are_none(folder, concept, message):
    write_json(folder, "regions.json", concepts=[concept])
    with refused(message):
        load(folder)


def test_further_keys_of_regions_are_the_users_own(folder):
    concept = {"box": [0, 0, 2, 2], "handle": "toy", "label": "a toy", "colour": "red", "id": 3}
    write_json(folder, "regions.json", concepts=[concept])
    assert load(folder).handles == ("<toy>",)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"concepts": 3}', '{"concepts": []}', '{"concepts": [1]}', "\xff"])
def test_files_that_hold_no_regions(folder, text):
    (folder / "regions.json").write_bytes(text.encode("latin-1"))
    with refused(f"{folder}/regions.json is not "):
        load(folder)


# --- COCO ---------------------------------------------------------------------------------------------------------


def test_run_lengths_go_down_the_columns():
    assert decode_runs([1, 2, 0, 1, 2], 2, 3, "x").astype(int).tolist() == [[0, 1, 0], [1, 1, 0]]
    assert decode_runs([0, 6], 2, 3, "x").all()
    assert not decode_runs([6], 2, 3, "x").any()


def test_compressed_counts_worked_out_by_hand():
    assert unpack_counts("") == []
    assert unpack_counts("0") == [0]
    assert unpack_counts("?") == [15]  # five bits, the highest of them the sign
    assert unpack_counts("@") == [-16]
    assert unpack_counts("`0") == [16]  # 16 needs a second character for its sign
    assert unpack_counts("351N") == [3, 5, 1, 3]  # the fourth is 5 - 2
    assert unpack_counts("P") is None  # ends within a number
    assert unpack_counts("ooooooooooooooo0") is None
    assert unpack_counts(" ") is None


def test_annotations_are_concepts_and_categories_their_words(folder):
    runs = {"size": [H, W], "counts": [4, 2, 18]}
    packed = {"size": [H, W], "counts": "42b0"}
    squares = [[0, 0, 2, 0, 2, 2, 0, 2], [4, 2, 6, 2, 6, 4, 4, 4]]
    write_json(
        folder,
        "coco.json",
        images=[{"id": 9, "width": W, "height": H}, {"id": 8, "width": 1, "height": 1}],
        categories=[{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        annotations=[
            {"image_id": 9, "category_id": 2, "segmentation": squares},
            {"image_id": 9, "category_id": 1, "segmentation": runs, "iscrowd": 1},
        ],
    )
    scene = load(folder)
    assert scene.words == ("cat", "dog")
    assert scene.masks[0].tolist() == [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1]] * 2
    assert scene.masks[1].tolist() == [[0, 1, 0, 0, 0, 0]] * 2 + [[0] * 6] * 2
    write_json(folder, "coco.json", annotations=[{"segmentation": packed}])
    assert np.array_equal(load(folder).masks[0], scene.masks[1])


def test_polygons_are_drawn_at_the_size_that_coco_states(folder, caplog):
    box = [0, 0, 6, 0, 6, 8, 0, 8]
    write_json(
        folder,
        "coco.json",
        images=[{"id": 1, "width": 2 * W, "height": 2 * H}],
        annotations=[{"image_id": 1, "segmentation": [box]}],
    )
    assert np.array_equal(load(folder).masks[0] > 0.5, [[1, 1, 1, 0, 0, 0]] * 4)
    assert "is 12x8, img.png is 6x4: the mask is resized" in caplog.text


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{}], "annotation 0 has no segmentation: expected polygons or run lengths"),
        ([{"segmentation": [[0, 0, 1, 1]]}], "annotation 0: [0, 0, 1, 1] is not three points [x, y] or more"),
        ([{"segmentation": [[0, 0, 1, 1, 2, 2, 3]]}], "annotation 0: [0, 0, 1, 1, 2, 2, 3] is not three points"),
        ([{"segmentation": {"size": [4, 6], "counts": [23]}}], "the run lengths add up to 23, not to 4x6 pixels"),
        (
            [{"segmentation": {"size": [4, 6], "counts": [25, -1]}}],
            "its counts are not run lengths: expected whole numbers",
        ),
        ([{"segmentation": {"size": [4, 6], "counts": "P"}}], "its counts are not run lengths: expected whole numbers"),
        ([{"segmentation": {"size": [4, 6]}}], "its counts are not run lengths: expected whole numbers"),
        ([{"segmentation": {"size": [4, 6], "counts": [True] * 24}}], "its counts are not run lengths"),
        ([{"segmentation": {"size": [4, 6], "counts": "[12, 12]"}}], "or COCO's compressed string"),
        ([{"segmentation": {"size": [4, 6], "counts": [11.5, 12.5]}}], "its counts are not run lengths"),
        (
            [{"segmentation": {"size": [4, 6], "counts": "b'<<'"}}],
            "Python bytes written as text: write counts.decode()",
        ),
        ([{"segmentation": [{"size": [4, 6], "counts": [12, 12]}]}], "or run lengths without a list"),
        ([{"segmentation": {"size": [4]}}], "annotation 0: [4] is not 2 numbers"),
        ([{"segmentation": {"size": [1e6, 1e6], "counts": [1e12]}}], "annotation 0 is 1000000x1000000 pixels"),
        ([{"segmentation": {"size": [0, 6], "counts": []}}], "annotation 0 is 6x0 pixels: expected sides of 1 or more"),
        ([{"segmentation": [[0, 0, 1e308, 3, -1e308, 2]]}], "annotation 0: [0, 0, 1e+308, 3, -1e+308, 2] lies beyond"),
        ([{"image_id": 1}, {"image_id": [2]}], "coco.json annotates 2 images: keep the annotations of this scene's"),
    ],
)
def test_annotations_that_are_none(folder, annotations, message):
    write_json(folder, "coco.json", annotations=annotations)
    with refused(message):
        load(folder)


def test_two_categories_of_one_number_are_refused(folder):
    """Readers would differ in which word they take; the same category twice is one."""
    annotations = [{"image_id": 1, "category_id": 3, "segmentation": [[0, 0, 2, 0, 2, 2]]}]
    categories = [{"id": 3, "name": "toy"}, {"id": "3", "name": "bowl"}]
    write_json(folder, "coco.json", annotations=annotations, categories=categories)
    with refused("coco.json has two categories of the id 3, toy and bowl: keep one"):
        load(folder)
    write_json(folder, "coco.json", annotations=annotations, categories=[categories[0], categories[0]])
    assert load(folder).words == ("toy",)


@pytest.mark.parametrize("size", [(-5, 4), (0, 4), (6, 0), (0.5, 4), (10**6, 10**6), (6, 10**9)])
def test_sizes_that_no_image_has(folder, size):
    images = [{"id": 1, "width": size[0], "height": size[1]}]
    write_json(folder, "coco.json", images=images, annotations=[{"image_id": 1, "segmentation": [[0, 0, 2, 0, 2, 2]]}])
    expected = "expected sides of 1 or more, and at most 100 megapixels"
    with refused(f"coco.json image is {int(size[0])}x{int(size[1])} pixels: {expected}"):
        load(folder)


def test_run_lengths_and_polygons_against_pycocotools():
    oracle = pytest.importorskip("pycocotools.mask", reason="pycocotools, the test oracle, is not installed")
    rng = np.random.default_rng(3)
    for _ in range(200):
        h, w = rng.integers(1, 70, 2)
        mask = rng.random((h, w)) < rng.random()
        if rng.random() < 0.5:
            mask = np.repeat(mask, 40, axis=1)  # long runs take several characters
        packed = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert np.array_equal(decode_runs(packed["counts"].decode(), *mask.shape, "x"), mask)
    for _ in range(50):
        turns = np.sort(rng.uniform(0, 2 * np.pi, 12))
        points = 100 + np.stack([np.cos(turns), np.sin(turns)], axis=1) * rng.uniform(40, 95, (12, 1))
        theirs = oracle.decode(oracle.merge(oracle.frPyObjects([points.flatten().tolist()], 200, 200))) > 0
        ours = rasterise_polygon(points, (200, 200))
        assert (ours & theirs).sum() / (ours | theirs).sum() > 0.98  # they also take pixels that the edge touches


# --- Arrays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bool, np.float16, np.float32, np.float64, np.uint8])
def test_arrays_of_every_kind_that_has_one_meaning(folder, dtype):
    stack = np.stack([LABELS == 2, LABELS == 7])
    np.save(folder / "masks.npy", stack.astype(dtype) * np.array(255 if dtype == np.uint8 else 1, dtype))
    found = read_source(find_source(folder), (W, H))
    assert [mask.name for mask in found] == ["masks.npy[0]", "masks.npy[1]"]
    assert all(np.array_equal(mask.values, 255 * layer) for mask, layer in zip(found, stack, strict=True))
    assert len(load(folder)) == 2


def test_an_array_keeps_soft_values_and_may_hold_one_mask(folder):
    np.save(folder / "masks.npy", np.asfortranarray(LABELS / 7))
    (mask,) = load(folder).masks
    assert np.array_equal(mask, to_floats(np.rint(LABELS / 7 * 255)))


def test_an_array_of_zeros_and_ones_of_255_is_read_with_a_warning(folder, caplog):
    np.save(folder / "masks.npy", (LABELS[None] == 2).astype(np.uint8))
    assert np.array_equal(load(folder).masks[0], LABELS == 2)
    assert caplog.messages == [f"{folder}/masks.npy holds only the values 0 and 1 of 255: 1 is read as inside"]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "masks.npy is (3,): expected (concepts, rows, columns)"),
        (np.zeros((0, 4, 6)), "masks.npy is (0, 4, 6): expected (concepts, rows, columns)"),
        (np.zeros((1, 1, 4, 6)), "expected (concepts, rows, columns)"),
        (np.zeros((65, 4, 6), bool), "masks.npy has 65 masks: keep those of the concepts, 64 at most"),
        (np.zeros((1, 4, 6), np.int64), "masks.npy holds int64: expected bool, floats in 0..1, or uint8 in 0..255"),
        (np.full((1, 4, 6), 2.0), "masks.npy holds values outside 0..1"),
        (np.full((1, 4, 6), np.nan), "masks.npy holds values outside 0..1"),
        (np.zeros((1, 4, 6)), "masks.npy[0] is black all over"),
        (np.ones((4, 6, 2), bool), "masks.npy is (rows, columns, concepts): save numpy.moveaxis(masks, -1, 0)"),
        (np.eye(6)[None], "masks.npy[0] is 6x6, img.png is 6x4: they must have the same shape"),
        (np.array([{"a": 1}]), "masks.npy is not a readable .npy array: it holds Python objects: save one array"),
    ],
)
def test_arrays_that_are_no_masks(folder, array, message):
    np.save(folder / "masks.npy", array, allow_pickle=True)
    with refused(message):
        load(folder)


def test_files_that_are_no_arrays(folder):
    (folder / "masks.npy").touch()
    with refused("masks.npy is not a readable .npy array"):
        load(folder)
    np.savez(folder / "masks.npz", LABELS)
    (folder / "masks.npz").rename(folder / "masks.npy")
    with refused("masks.npy is no single array: expected (concepts, rows, columns)"):
        load(folder)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1, 4000000, 4000000)}\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (1, 4",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (-1, 4, 6)}\n",
        f"{{'descr': '<f8', 'fortran_order': False, 'shape': (1, 4, {'9' * 40})}}\n",
        f"{'[' * 5000}\n",
    ],
    ids=["terabytes", "cut", "negative", "40 digits", "nested"],
)
def test_headers_of_no_array(folder, header):
    content = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header.encode()
    (folder / "masks.npy").write_bytes(content)
    with refused("masks.npy is not a readable .npy array: "):
        load(folder)
