"""Seg-Mix: concepts cut out of the scene at other places and sizes, and how often a step samples them."""

import numpy as np
import pytest
import torch
from PIL import Image

from bas.data.batches import sample_batch, sample_image
from bas.data.collages import SEG_MIX_IMAGES, SEG_MIX_SIDES, place, seg_mix
from bas.data.scene import Scene
from bas.data.scene_folder import load_scene
from tests.helpers.tiny import refused

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])


@pytest.fixture
def squares() -> Scene:
    """Three squares of 8 pixels, each of its own colour, in an image of 64."""
    image, masks = np.zeros((64, 64, 3), np.uint8), []
    for i, left in enumerate((4, 24, 44)):
        mask = np.zeros((64, 64), np.float32)
        mask[20:28, left : left + 8] = 1
        image[mask == 1] = COLOURS[i]
        masks.append(mask)
    return Scene(Image.fromarray(image), masks, ("<a>", "<b>", "<c>"), (None,) * 3)


def test_images_hold_cut_outs_on_plain_colours(squares):
    """Inside a mask its concept, outside all one colour; each number of concepts as often; all places, all sizes."""
    images = seg_mix(squares, 64, 64, seed=3)
    assert len(images) == SEG_MIX_IMAGES
    lefts, widths = [], {1: [], 2: [], 3: []}
    for extra in images:
        pixels, union = np.asarray(extra.image), np.maximum.reduce(list(extra.masks.values()))
        assert len(np.unique(pixels[union == 0], axis=0)) == 1
        for concept, mask in extra.masks.items():
            assert (pixels[mask == 1] == COLOURS[concept]).all()
            columns = np.nonzero(mask.max(axis=0))[0]
            lefts.append(columns.min())
            widths[len(extra.masks)].append(np.ptp(columns) + 1)
    assert all(0.2 < len(widths[k]) / k / len(images) < 0.47 for k in widths)
    assert min(lefts) <= 2
    assert max(lefts) >= 42
    low, high = SEG_MIX_SIDES
    for k, found in widths.items():
        assert min(found) == pytest.approx(64 * low / k**0.5, abs=4)
        assert max(found) == pytest.approx(64 * high / k**0.5, abs=4)


def test_the_sizes_of_concepts_beside_each_other_are_kept(squares):
    """A square of twice the side stays twice as wide in every image that shows both."""
    large = np.zeros((64, 64), np.float32)
    large[:16, :16] = 1
    scene = Scene(squares.image, [large, squares.masks[2]], ("<a>", "<c>"), (None,) * 2)
    both = [extra.masks for extra in seg_mix(scene, 64, 64, 0) if len(extra.masks) == 2]
    assert len(both) > 20
    for masks in both:
        wide, narrow = (masks[i].max(axis=0).sum() for i in (0, 1))
        assert wide / narrow == pytest.approx(2, rel=0.1)


def test_the_same_seed_gives_the_same_images(squares):
    first, again, other = (seg_mix(squares, 64, 64, seed) for seed in (1, 1, 2))
    assert all(
        np.array_equal(a.image, b.image) and a.masks.keys() == b.masks.keys() for a, b in zip(first, again, strict=True)
    )
    assert any(not np.array_equal(a.image, b.image) for a, b in zip(first, other, strict=True))


def test_a_concept_stands_clear_of_others_where_there_is_room():
    """Free places are found within the tries, and where none is free the least covered."""
    generator = torch.Generator().manual_seed(0)
    mask, other = np.ones((4, 2)), np.zeros((4, 12))
    other[:, :6] = 1
    found = [place(mask, (12, 4), [other], generator) for _ in range(200)]
    assert sum(left >= 6 for left, _ in found) >= 199
    assert {left for left, _ in found} >= set(range(6, 11))
    full = np.full((4, 12), 1.0)
    full[:, 8:10] = 0.5
    assert sum(place(mask, (12, 4), [full], generator)[0] == 8 for _ in range(200)) > 150


def test_covered_parts_belong_to_the_upper_concept(bench):
    """Where concepts overlap, the masks of an image add up to 1 at most. Three that fill it do overlap."""
    scene = load_scene(bench.config())
    for extra in seg_mix(scene, 40, 40, seed=0):
        assert sum(extra.masks.values()).max() <= 1 + 1e-6


def test_the_probability_is_that_of_a_step(bench):
    """None: no image is made, no random number is taken. All: only those. A half: half of the steps, to 4 sigma."""
    _, plain = bench.prepared(bench.config(with_prior_preservation=False))
    assert plain.mixed == ()
    config = bench.config(with_prior_preservation=False, seg_mix_probability=0.5)
    models, data = bench.prepared(config)
    assert len(data.mixed) <= SEG_MIX_IMAGES
    assert all(view.latent_masks[list(image.shown)].any() for image in data.mixed for view in image.views)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert sample_image(data, 0.0, generator) is data.images[0]
    assert torch.equal(generator.get_state(), before)
    known = {id(image) for image in data.mixed}
    assert all(id(sample_image(data, 1.0, generator)) in known for _ in range(20))
    hits = sum(id(sample_image(data, 0.5, generator)) in known for _ in range(400))
    assert 160 < hits < 240
    batch = sample_batch(data, models, config.phases[0], config, generator)
    assert batch.union.max() > 0


def test_a_probability_above_one_is_refused(bench):
    with refused("seg_mix_probability", "1"):
        bench.config(seg_mix_probability=1.5)
