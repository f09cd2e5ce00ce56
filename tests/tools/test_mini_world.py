"""The miniature world: what a caption says is what the image shows, and the masks are exact."""

import json

import numpy as np
import pytest
from PIL import Image

from tools.mini_world.captions import describe, phrase
from tools.mini_world.colours import COLOURS, MARKINGS, PATTERNS
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import Layout, Object
from tools.mini_world.places import PLACES
from tools.mini_world.scenes import render_concepts, render_scene, save_scene
from tools.mini_world.shapes import CONCEPT_SHAPES, SHAPES


def scene(seed, **choices):
    return render_scene(np.random.default_rng(seed), **choices)


def test_one_seed_gives_one_scene():
    first, second, other = scene(7), scene(7), scene(8)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.masks, second.masks)
    assert first.caption == second.caption
    assert not np.array_equal(first.image, other.image)


def test_a_layout_is_the_same_scene_at_any_size():
    layout = scene(3, count=2).layout
    small, _ = draw(layout, 64)
    large, _ = draw(layout, 256)
    shrunk = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BOX), dtype=float)
    assert np.abs(shrunk - small).mean() < 8  # of 255: only anti-aliasing differs


@pytest.mark.parametrize("shape", [*SHAPES, *CONCEPT_SHAPES])
def test_every_shape_fills_its_square_and_no_more(shape):
    obj = Object(shape, "red", size=0.6)
    _, masks = draw(Layout((obj,), "wall", 0), 128)
    rows, columns = np.nonzero(masks[0] > 0.5)
    for low, high in ((rows.min(), rows.max()), (columns.min(), columns.max())):
        assert 0.2 * 128 - 2 <= low
        assert high <= 0.8 * 128 + 2
    assert 0.12 < masks[0].sum() / (0.6 * 128) ** 2 < 0.95
    assert max(np.ptp(rows), np.ptp(columns)) > 0.78 * 0.6 * 128


@pytest.mark.parametrize("background", PLACES)
def test_outside_the_masks_the_image_is_the_background(background):
    layout = scene(11, count=3, background=background).layout
    image, masks = draw(layout)
    empty, none = draw(Layout((), layout.background, layout.seed))
    assert len(none) == 0
    outside = masks.sum(0) == 0
    assert np.array_equal(image[outside], empty[outside])
    assert (image != empty).any(-1)[masks.sum(0) > 0.9].mean() > 0.95


def test_masks_share_no_pixel_beyond_its_whole():
    for seed in range(40):
        masks = scene(seed, count=4).masks
        assert masks.min() >= 0
        assert masks.sum(0).max() <= 1 + 1e-5


def test_the_one_in_front_hides_the_one_behind():
    behind = Object("cube", "red", x=0.4, size=0.5)
    front = Object("ball", "blue", x=0.6, size=0.5)
    image, masks = draw(Layout((behind, front), "wall", 0))
    assert masks[1, 32, 38] == 1
    assert masks[0, 32, 38] == 0
    assert image[32, 38, 2] > image[32, 38, 0]
    assert image[32, 14, 0] > image[32, 14, 2]


def test_colours_are_those_that_were_asked_for():
    for name, colour in COLOURS.items():
        image, masks = draw(Layout((Object("ball", name, size=0.8),), "wall", 0))
        mean = image[masks[0] == 1].mean(0) / 255
        distances = {other: np.abs(mean - rgb).sum() for other, rgb in COLOURS.items()}
        assert min(distances, key=distances.get) == name, (name, colour, mean)


def test_complete_captions_name_everything():
    for seed in range(60):
        drawn = scene(seed)
        caption = describe(drawn.layout)
        assert caption.endswith(PLACES[drawn.background][0])
        for obj in drawn.objects:
            assert phrase(obj) in caption


def test_captions_say_nothing_false():
    vocabulary = {*SHAPES, *COLOURS, *PATTERNS[1:]}
    rng = np.random.default_rng(0)
    silent = 0
    for _ in range(300):
        drawn = render_scene(rng)
        truth = {word for t in drawn.objects for word in (t.shape, t.colour, t.second, t.pattern)}
        truth |= set(PLACES[drawn.background][0].split())
        said = vocabulary.intersection(drawn.caption.split())
        assert said <= truth, drawn.caption
        assert all(obj.shape in drawn.caption for obj in drawn.objects)
        silent += PLACES[drawn.background][0] not in drawn.caption
    assert 20 < silent < 150  # short captions keep "a photo of <asset0>" inside what was learnt


def test_both_colours_of_a_pattern_are_named():
    obj = Object("star", "red", "striped", "blue")
    assert phrase(obj) == "a red and blue striped star"
    assert phrase(obj, say_colour=False) == "a striped star"
    seconds = [obj.second for seed in range(80) for obj in scene(seed, count=2, two_colours=1).objects]
    assert 60 < len(list(filter(None, seconds))) < 100  # of 160: half are plain
    assert not any(obj.second for seed in range(80) for obj in scene(seed, count=2, two_colours=0).objects)


def test_an_empty_scene_is_captioned_as_the_prior_of_the_method():
    layout = Layout((), "beach", 0)
    assert describe(layout) == "a photo at the beach"


def test_concepts_are_unseen_in_training():
    assert not set(SHAPES) & set(CONCEPT_SHAPES)
    assert not set(PATTERNS) & set(MARKINGS)
    concepts = render_concepts(np.random.default_rng(5), count=3)
    for obj in concepts.objects:
        assert obj.shape in CONCEPT_SHAPES
        assert obj.pattern in MARKINGS
        assert obj.second not in (None, obj.colour)


def test_a_scene_folder_holds_image_masks_and_words(tmp_path):
    concepts = render_concepts(np.random.default_rng(1), count=2)
    save_scene(concepts, tmp_path / "scene")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "scene/img.png")), concepts.image)
    listed = json.loads((tmp_path / "scene/scene.json").read_text())["concepts"]
    assert [row["mask"] for row in listed] == ["mask0.png", "mask1.png"]
    for row, mask in zip(listed, concepts.masks, strict=True):
        assert row["word"] in SHAPES
        assert np.abs(np.asarray(Image.open(tmp_path / "scene" / row["mask"])) / 255 - mask).max() < 0.01
