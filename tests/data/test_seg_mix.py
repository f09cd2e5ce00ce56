"""Seg-Mix: concepts cut out of the scene at other places and sizes, and how often a step samples them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bas.data.batches import SEG_MIX_IMAGES, sample_batch, sample_image
from bas.data.scene import ExtraImage, Scene
from bas.data.scene_folder import load_scene
from bas.data.seg_mix import SEG_MIX_SIDES, place, place_named, plain, seg_mix
from tests.helpers.tiny import refused

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])


def mix(scene: Scene, side: int, seed: int) -> tuple[ExtraImage, ...]:
    """Seg-Mix on 64 plain colours."""
    return seg_mix(scene, [plain(side, side, i) for i in range(64)], seed)


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
    images = mix(squares, 64, seed=3)
    assert len(images) == 64
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
    assert max(lefts) >= 38
    low, high = SEG_MIX_SIDES
    for k, found in widths.items():
        assert min(found) == pytest.approx(64 * low / k**0.5, abs=4)
        assert max(found) == pytest.approx(64 * high / k**0.5, abs=4)


def test_the_sizes_of_concepts_beside_each_other_are_kept(squares):
    """A square of twice the side stays twice as wide in images that show both."""
    large = np.zeros((64, 64), np.float32)
    large[:16, :16] = 1
    scene = Scene(squares.image, [large, squares.masks[2]], ("<a>", "<c>"), (None,) * 2)
    both = [extra.masks for extra in mix(scene, 64, 0) if len(extra.masks) == 2]
    assert len(both) > 20
    ratios = [masks[0].max(axis=0).sum() / masks[1].max(axis=0).sum() for masks in both]
    near = [abs(ratio - 2) < 0.2 for ratio in ratios]
    assert sum(near) > 0.8 * len(near)  # not where one covers a part of the other


def test_without_a_move_concepts_stay_where_they_are(squares):
    """move=0: the masks are the scene's own. move=0.1: centres move by a tenth of the way to a random place at most."""
    still = seg_mix(squares, [plain(64, 64, 0)] * 8, 0, move=0)
    for extra in still:
        for concept, mask in extra.masks.items():
            assert np.array_equal(mask, squares.masks[concept])
    half = seg_mix(squares, [plain(32, 32, 0)] * 8, 0, move=0)
    assert {float(mask.sum()) for extra in half for mask in extra.masks.values()} == {16.0}
    shifts = []
    for extra in seg_mix(squares, [plain(64, 64, 0)] * 64, 0, move=0.1):
        for concept, mask in extra.masks.items():
            centres = [np.mean(np.nonzero(layer > 0.5), axis=1) for layer in (mask, squares.masks[concept])]
            shifts.append(np.abs(centres[0] - centres[1]).max())
    assert 2 < max(shifts) <= 6


def test_a_close_up_is_cut_rather_than_the_scene(squares):
    """Without a move, a square with a close-up stands as large as there; one without it as large as in the scene."""
    box = np.s_[16:32, :16]
    close = ExtraImage("close-up", squares.image.crop((0, 16, 16, 32)), {0: squares.masks[0][box]})
    scene = replace(squares, extra_images=(close,))
    widths = {}
    for extra in seg_mix(scene, [plain(64, 64, 0)] * 32, 0, move=0):
        for concept, mask in extra.masks.items():
            widths.setdefault((len(extra.masks), concept), set()).add(float(mask.max(axis=0).sum().round()))
    assert widths[1, 0] == {32}
    assert widths[1, 1] == widths[2, 0] == {8}


def test_a_background_is_no_object(squares):
    """A concept that covers more than half of the scene is never cut out. A scene of such concepts gives no image."""
    rest = 1 - np.maximum.reduce(squares.masks)
    scene = Scene(squares.image, [*squares.masks, rest], ("<a>", "<b>", "<c>", "<bg>"), (None,) * 4)
    assert {concept for extra in mix(scene, 64, 0) for concept in extra.masks} == {0, 1, 2}
    assert mix(Scene(squares.image, [rest], ("<bg>",), (None,)), 64, 0) == ()


def test_backgrounds_stay_outside_the_concepts(squares):
    """Image i stands on background i, which is not changed itself."""
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)) for i in range(3)]
    before = [np.array(image) for image in noise]
    for extra, background in zip(seg_mix(squares, noise, 0), before, strict=True):
        outside = np.maximum.reduce(list(extra.masks.values())) == 0
        assert outside.any()
        assert np.array_equal(np.asarray(extra.image)[outside], background[outside])
    assert all(np.array_equal(image, kept) for image, kept in zip(noise, before, strict=True))


def test_places_are_read_from_class_prompts():
    assert place_named("a photo at the beach") == "at the beach"
    assert place_named("a photo of a red star at the beach") == ""
    assert place_named("a photograph at the beach") == ""
    assert place_named("a photo") == ""


def test_on_class_images_the_prompt_names_the_place_and_the_outside_counts(bench):
    """The prompts of such a step end in the place of the class prompt, its union covers all cells."""
    config = bench.config(seg_mix_probability=1.0, class_prompt=("a photo at the beach", "a photo of a dog"))
    models, data = bench.prepared(config)
    assert {image.place for image in data.mixed} == {"at the beach"}
    generator = torch.Generator().manual_seed(0)
    batch = sample_batch(data, models, config.phases[1], config, generator)
    end = models.tokenizer(" at the beach").input_ids[1:-1]
    ids = batch.input_ids[0].tolist()
    last = ids.index(models.tokenizer.eos_token_id, 1)
    assert ids[last - len(end) : last] == end
    assert batch.union.min() == 1


def test_the_same_seed_gives_the_same_images(squares):
    first, again, other = (mix(squares, 64, seed) for seed in (1, 1, 2))
    assert all(
        np.array_equal(a.image, b.image) and a.masks.keys() == b.masks.keys() for a, b in zip(first, again, strict=True)
    )
    assert any(not np.array_equal(a.image, b.image) for a, b in zip(first, other, strict=True))


def test_a_concept_stands_clear_of_others_where_there_is_room():
    """Free places are found within the tries, and where none is free the least covered."""
    generator = torch.Generator().manual_seed(0)
    mask, other = np.ones((4, 2)), np.zeros((4, 12))
    other[:, :6] = 1
    found = [place(mask, (12, 4), (6, 2), [other], generator, 1.0) for _ in range(200)]
    assert sum(left >= 6 for left, _ in found) >= 199
    assert {left for left, _ in found} >= set(range(6, 11))
    full = np.full((4, 12), 1.0)
    full[:, 8:10] = 0.5
    assert sum(place(mask, (12, 4), (6, 2), [full], generator, 1.0)[0] == 8 for _ in range(200)) > 150


def test_covered_parts_belong_to_the_upper_concept(bench):
    """Where concepts overlap, the masks of an image add up to 1 at most. Three that fill it do overlap."""
    scene = load_scene(bench.config())
    for extra in mix(scene, 40, seed=0):
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
