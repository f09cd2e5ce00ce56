"""Seg-Mix: concepts cut out of the scene at other places and sizes, and how often a step samples them."""

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bas.data.batches import sample_batch, sample_example
from bas.data.scene import ExtraImage, Scene
from bas.data.scene_folder import load_scene
from bas.data.seg_mix import SEG_MIX_SIDES, SegMix, place, place_named
from bas.io.images import to_floats
from tests.helpers.tiny import refused

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]])


def mix(scene: Scene, side: int, seed: int, count: int = 64, move: float = 1, cell: int = 0) -> list[ExtraImage]:
    """Images of Seg-Mix on plain colours."""
    generator, seg_mix = torch.Generator().manual_seed(seed), SegMix(scene, (side, side), move=move, cell=cell)
    return [seg_mix.sample(generator)[0] for _ in range(count)]


@pytest.fixture
def squares() -> Scene:
    """Three squares of 8 pixels, each of its own colour, in an image of 64."""
    image, masks = np.zeros((64, 64, 3), np.uint8), []
    for i, left in enumerate((4, 24, 44)):
        mask = np.zeros((64, 64), np.uint8)
        mask[20:28, left : left + 8] = 255
        image[mask == 255] = COLOURS[i]
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
            assert (pixels[mask == 255] == COLOURS[concept]).all()
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
    large = np.zeros((64, 64), np.uint8)
    large[:16, :16] = 255
    scene = Scene(squares.image, [large, squares.masks[2]], ("<a>", "<c>"), (None,) * 2)
    both = [extra.masks for extra in mix(scene, 64, 0) if len(extra.masks) == 2]
    assert len(both) > 20
    ratios = [to_floats(masks[0]).max(axis=0).sum() / to_floats(masks[1]).max(axis=0).sum() for masks in both]
    near = [abs(ratio - 2) < 0.2 for ratio in ratios]
    assert sum(near) > 0.8 * len(near)  # not where one covers a part of the other


def test_in_whole_cells_concepts_keep_their_size_and_reach_every_place(squares):
    """cell=16: corners lie multiples of 16 from the concept's own, inside the image, and all such places occur."""
    corners: dict[int, set] = {0: set(), 1: set(), 2: set()}
    for extra in mix(squares, 64, seed=2, count=200, cell=16):
        for concept, mask in extra.masks.items():
            rows, columns = np.nonzero(mask)
            if mask.astype(bool).sum() == 64:  # no other covers it
                corners[concept].add((int(columns.min()), int(rows.min())))
            assert len(extra.masks) > 1 or (np.ptp(columns) + 1, np.ptp(rows) + 1) == (8, 8)
    tops = (4, 20, 36, 52)
    for concept, lefts in enumerate(((4, 20, 36, 52), (8, 24, 40, 56), (12, 28, 44))):
        assert corners[concept] == {(left, top) for left in lefts for top in tops}
    still = mix(squares, 64, 0, 8, move=0, cell=16)
    assert all(np.array_equal(mask, squares.masks[i]) for extra in still for i, mask in extra.masks.items())


def test_each_place_in_whole_cells_comes_equally_often():
    """A square of 8 pixels in an image of 48 goes to 4, 20 or 36 along each side: 14400 draws of nine places."""
    generator, draws = torch.Generator().manual_seed(0), 14400
    found = Counter(place(np.ones((8, 8)), (48, 48), (8, 8), [], generator, 1, 16) for _ in range(draws))
    assert set(found) == {(left, top) for left in (4, 20, 36) for top in (4, 20, 36)}
    assert all(abs(count - draws / 9) < 5 * (draws * 8 / 81) ** 0.5 for count in found.values())
    stays = Counter(place(np.ones((8, 8)), (48, 48), (8, 8), [], generator, 0.25, 16) for _ in range(900))[4, 4]
    assert abs(stays / 900 - (0.75 + 0.25 / 9)) < 5 * (0.78 * 0.22 / 900) ** 0.5


def test_the_cells_are_those_of_the_whole_network(bench):
    """The tiny VAE halves once and its UNet twice: 8 pixels."""
    config = bench.config(with_prior_preservation=False, seg_mix_probability=1.0, seg_mix_cells=True)
    assert bench.prepared(config)[1].seg_mix.cell == 8
    assert bench.prepared(replace(config, seg_mix_cells=False))[1].seg_mix.cell == 0


def test_without_a_move_concepts_stay_where_they_are(squares):
    """move=0: the masks are the scene's own. move=0.1: centres move by a tenth of the way to a random place at most."""
    still = mix(squares, 64, 0, 8, move=0)
    for extra in still:
        for concept, mask in extra.masks.items():
            assert np.array_equal(mask, squares.masks[concept])
    half = mix(squares, 32, 0, 8, move=0)
    assert {float(to_floats(mask).sum()) for extra in half for mask in extra.masks.values()} == {16.0}
    shifts = []
    for extra in mix(squares, 64, 0, move=0.1):
        for concept, mask in extra.masks.items():
            centres = [np.mean(np.nonzero(layer > 127), axis=1) for layer in (mask, squares.masks[concept])]
            shifts.append(np.abs(centres[0] - centres[1]).max())
    assert 2 < max(shifts) <= 6


def test_concepts_are_cut_out_of_all_images_but_close_ups(squares):
    """Without a move, a concept is as large as in the scene or in an extra image; a close-up shows nothing new."""
    box = np.s_[16:32, :16]
    near = ExtraImage("1", squares.image.crop((0, 16, 16, 32)), {0: squares.masks[0][box]})
    for close_up, found in ((False, {8, 32}), (True, {8})):
        scene = replace(squares, extra_images=(replace(near, close_up=close_up),))
        widths = {}
        for extra in mix(scene, 64, 0, 48, move=0):
            for concept, mask in extra.masks.items():
                widths.setdefault((len(extra.masks), concept), set()).add(round(mask.max(axis=0).sum() / 255))
        assert widths[1, 0] == found
        assert widths[1, 1] == widths[2, 0] == {8}


def test_a_background_is_no_object(squares):
    """A concept that covers more than half of the scene is never cut out. A scene of such concepts has none to move."""
    rest = 255 - np.maximum.reduce(squares.masks)
    scene = Scene(squares.image, [*squares.masks, rest], ("<a>", "<b>", "<c>", "<bg>"), (None,) * 4)
    assert {concept for extra in mix(scene, 64, 0) for concept in extra.masks} == {0, 1, 2}
    assert SegMix(Scene(squares.image, [rest], ("<bg>",), (None,)), (64, 64)).movable == []


def test_backgrounds_stay_outside_the_concepts(squares):
    """An image stands on the background that its place names, which is not changed itself."""
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)) for i in range(3)]
    before = [np.array(image) for image in noise]
    seg_mix = SegMix(squares, (64, 64), [(image, str(i)) for i, image in enumerate(noise)])
    generator, places = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        extra, place = seg_mix.sample(generator)
        outside = np.maximum.reduce(list(extra.masks.values())) == 0
        assert outside.any()
        assert np.array_equal(np.asarray(extra.image)[outside], before[int(place)][outside])
        places.add(place)
    assert places == {"0", "1", "2"}
    assert all(np.array_equal(image, kept) for image, kept in zip(noise, before, strict=True))


def test_places_are_read_from_class_prompts():
    assert place_named("a photo at the beach") == "at the beach"
    assert place_named("a photo of a red star at the beach") == ""
    assert place_named("a photograph at the beach") == ""
    assert place_named("a photo") == ""


def test_on_class_images_the_prompt_names_the_place_and_all_that_is_shown(bench):
    """The prompt ends in the place of the class prompt. It names each concept shown; the loss covers all cells."""
    config = bench.config(seg_mix_probability=1.0, class_prompt=("a photo at the beach", "a photo of a dog"))
    models, data = bench.prepared(config)
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(12):
        example = sample_example(data, models, config, generator)
        assert example.place == "at the beach"
        assert example.whole
        shown = [i for i, mask in enumerate(example.view.latent_masks) if mask.any()]
        assert example.chosen == shown
        sizes.add(len(shown))
    assert len(sizes) > 1
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
        assert np.sum([*extra.masks.values()], axis=0).max() <= 255


def test_the_probability_is_that_of_a_row(bench):
    """None: nothing is cut out. All: only mixed images. A half: half of them, to 4 sigma of 7."""

    def scenes(probability: float, count: int) -> int:
        config = bench.config(with_prior_preservation=False, seg_mix_probability=probability)
        models, data = bench.prepared(config)
        views = {id(view) for image in data.images for view in image.views}
        generator = torch.Generator().manual_seed(0)
        return sum(id(sample_example(data, models, config, generator).view) in views for _ in range(count))

    assert scenes(1.0, 20) == 0
    assert 72 < scenes(0.5, 200) < 128
    _, data = bench.prepared(bench.config(with_prior_preservation=False))
    assert data.seg_mix is None


def test_a_background_is_learnt_from_the_image(bench, tmp_path):
    """It is never cut out. So a share of 3 of 4 rows is mixed at a probability of 1, and the others may name it."""
    scene = shutil.copytree(bench.scene, tmp_path / "scene")
    ground = np.full((32, 32), 255, np.uint8)
    ground[:4] = 0
    Image.fromarray(ground).save(scene / "mask3.png")
    config = bench.config(instance_data_dir=str(scene), with_prior_preservation=False, seg_mix_probability=1.0)
    models, data = bench.prepared(config)
    views = {id(view) for image in data.images for view in image.views}
    generator = torch.Generator().manual_seed(0)
    examples = [sample_example(data, models, config, generator) for _ in range(200)]
    plain = [example for example in examples if id(example.view) in views]
    assert 25 < len(plain) < 75
    assert any(3 in example.chosen for example in plain)
    assert not any(3 in example.chosen for example in examples if id(example.view) not in views)


def test_on_plain_colours_only_the_inside_counts(bench):
    """Without class images no place is named. The setting for subsets decides how many concepts an image shows."""
    for sampling, sizes in (("union", {1, 2, 3}), ("single", {1}), ("all", {3})):
        config = bench.config(with_prior_preservation=False, seg_mix_probability=1.0, subset_sampling=sampling)
        models, data = bench.prepared(config)
        generator = torch.Generator().manual_seed(0)
        examples = [sample_example(data, models, config, generator) for _ in range(20)]
        assert {(example.place, example.whole) for example in examples} == {("", False)}
        shown = [sum(bool(mask.any()) for mask in example.view.latent_masks) for example in examples]
        assert shown == [len(example.chosen) for example in examples]
        assert max(shown) == max(sizes)
        assert (1 in shown) == (1 in sizes)


def test_a_probability_above_one_is_refused(bench):
    with refused("seg_mix_probability", "1"):
        bench.config(seg_mix_probability=1.5)
