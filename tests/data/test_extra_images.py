"""Several images of the same concepts: which are read, what is drawn from them, and one alone stays as it was."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import bas
from bas.config import TrainConfig
from bas.data.batches import sample_batch, sample_example
from bas.data.mask_report import view_scene, warnings
from bas.data.scene import sample_subset
from bas.data.scene_folder import load_scene
from bas.losses import resize_mask
from bas.pretrained.folder import read_spec
from bas.training.setup import check_input
from tests.helpers.tiny import refused, write_scene


def add_shot(scene, name, boxes, size=(32, 32), seed=1):
    """A extra image of noise. boxes: (left, top, right, bottom) by concept, white in its mask."""
    folder = scene / name
    folder.mkdir()
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "img.png")
    for i, box in boxes.items():
        mask = Image.new("L", size, 0)
        mask.paste(255, box)
        mask.save(folder / f"mask{i}.png")
    return folder


@pytest.fixture
def scene(tmp_path):
    """Three concepts; a second image shows the first and the last, a third the one in the middle."""
    folder = write_scene(tmp_path / "scene")
    add_shot(folder, "2", {0: (0, 0, 16, 16), 2: (16, 16, 32, 32)})
    add_shot(folder, "10", {1: (8, 0, 24, 32)}, seed=2)
    return folder


def load(folder, **changes):
    return load_scene(TrainConfig(instance_data_dir=str(folder), **changes))


def test_extra_images_are_read_by_number_each_with_the_concepts_it_shows(scene):
    (scene / "notes").mkdir()
    loaded = load(scene)
    assert [(shot.name, sorted(shot.masks)) for shot in loaded.extra_images] == [("2", [0, 2]), ("10", [1])]
    assert loaded.extra_images[0].masks[2].sum() == 256 * 255
    with Image.open(scene / "10" / "img.png") as image:
        assert np.array_equal(loaded.extra_images[1].image, image)
    assert load(write_scene(scene.parent / "alone")).extra_images == ()


def test_each_is_cut_to_the_shape_of_the_first(scene):
    add_shot(scene, "11", {1: (32, 0, 96, 64)}, size=(128, 64))
    shot = load(scene).extra_images[2]
    image, masks = shot.tensors(32, 32, 3)
    assert image.shape == (3, 32, 32)
    assert masks.shape == (3, 32, 32)
    # Half as large, the middle 32 columns of 64: just the white box, its edge softened. Other concepts have nothing.
    assert (masks[1, :, 1:-1] == 1).all()
    assert (masks[1] > 0.5).all()
    assert masks[[0, 2]].max() == 0
    small = np.asarray(shot.image.resize((64, 32), Image.Resampling.BICUBIC))[:, 16:48]
    assert torch.equal(image, torch.from_numpy(small.copy()).permute(2, 0, 1).float() / 127.5 - 1)


def test_an_image_is_drawn_first_then_a_subset_of_what_it_shows(bench, scene):
    config = bench.config(instance_data_dir=str(scene), with_prior_preservation=False)
    models, data = bench.prepared(config)
    loaded, generator, counts = load(scene), torch.Generator().manual_seed(0), {}
    boxes = [resize_mask(shot.tensors(32, 32, 3)[1], 16, 16) for shot in loaded.extra_images]
    for _ in range(300):
        batch = sample_batch(data, models, config.phases[0], config, generator)
        chosen = [data.handle_ids.index(i) for i in batch.input_ids[0].tolist() if i in data.handle_ids]
        unions = [m[chosen].amax(dim=0) for m in boxes]
        here = [
            i for i, union in enumerate(unions) for u in (union, union.flip(-1)) if torch.equal(batch.union[0, 0], u)
        ]
        place = here[0] if here else None
        counts[place] = counts.get(place, 0) + 1
        if place is not None:
            assert set(chosen) <= set(loaded.extra_images[place].masks)
            assert batch.present.sum() == len(chosen)
    assert counts.keys() == {None, 0, 1}  # None: the first image
    assert all(75 <= count <= 125 for count in counts.values())


def test_one_image_alone_costs_no_draw(bench):
    """A scene without extra images takes random numbers for the subset and the flip alone, as in the official code."""
    config = bench.config(with_prior_preservation=False)
    models, data = bench.prepared(config)
    generator, same = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    (only,) = data.images
    assert only.shown == (0, 1, 2)
    view = sample_example(data, models, config, generator).view
    assert any(view is known for known in only.views)
    sample_subset(3, config.subset_sampling, same)
    torch.rand((), generator=same)
    assert torch.equal(generator.get_state(), same.get_state())


def test_extra_images_that_cannot_be_used_are_refused(scene):
    with refused("mask3.png", "concepts 0 to 2"):
        load(add_shot(scene, "3", {3: (0, 0, 8, 8)}).parent)
    (scene / "3" / "mask3.png").unlink()
    with refused(str(scene / "3"), "has no mask0.png"):
        load(scene)
    Image.new("L", (32, 32)).save(scene / "3" / "mask0.png")
    with refused("3/mask0.png", "black all over"):
        load(scene)
    Image.new("L", (32, 16), 255).save(scene / "3" / "mask0.png")
    with refused("3/mask0.png is 32x16", "same shape"):
        load(scene)
    (scene / "3" / "img.png").unlink()
    with refused(str(scene / "3"), "exactly one image"):
        load(scene)


def test_a_concept_that_the_cut_leaves_out_is_refused_by_name(bench, scene):
    add_shot(scene, "3", {1: (0, 0, 16, 32)}, size=(96, 32))
    cut_off = "the mask of <asset1> in extra image 3 lies outside the crop of 32x32 pixels: "
    config = bench.config(instance_data_dir=str(scene), with_prior_preservation=False, initializer_tokens=("bowl",) * 3)
    advice = "crop the image around the concept or move its folder away"
    with refused(cut_off + advice):
        check_input(config)
    lines = warnings(view_scene(load_scene(config), read_spec(bench.model), config))
    assert [line for line in lines if "extra image 3" in line] == [cut_off + advice]
    with refused(f"{cut_off}leave out --center_crop, {advice}"):
        check_input(replace(config, center_crop=True))


def test_a_concept_beside_the_middle_of_a_wide_image_is_refused(bench, tmp_path):
    """With --center_crop. A mask that is only too small is not said to be outside."""
    folder = write_scene(tmp_path / "wide", size=(96, 32))
    config = bench.config(instance_data_dir=str(folder), with_prior_preservation=False)
    check_input(config)
    cut_off = "the mask of <asset0> lies outside the crop of 32x32 pixels"
    with refused(f"{cut_off}: leave out --center_crop or crop the image around the concept"):
        check_input(replace(config, center_crop=True))
    speck = Image.new("L", (32, 32))
    speck.paste(255, (1, 1, 2, 2))
    speck.save(write_scene(folder) / "mask0.png")
    with refused("the mask of <asset0> vanishes on the loss grid of 16x16 cells: make it larger"):
        check_input(replace(config, center_crop=True))


def test_each_image_has_its_own_background(scene):
    add_shot(scene, "11", {0: (0, 0, 16, 32), 1: (16, 0, 32, 32)})
    loaded = load(scene, background_handle="bg")
    assert [sorted(shot.masks) for shot in loaded.extra_images] == [[0, 2, 3], [1, 3], [0, 1]]
    assert loaded.extra_images[0].masks[3].sum() == (1024 - 2 * 256) * 255


def test_a_run_trains_on_all_and_keeps_them(bench, scene, tmp_path):
    config = bench.config(tmp_path / "run", instance_data_dir=str(scene), phase1_train_steps=3, phase2_train_steps=1)
    run = bas.train(config)
    kept, given = load(run / "scene"), load(scene)
    assert [shot.name for shot in kept.extra_images] == ["2", "10"]
    for ours, theirs in zip(kept.extra_images, given.extra_images, strict=True):
        for a, b in zip(ours.tensors(32, 32, 3), theirs.tensors(32, 32, 3), strict=True):
            assert torch.equal(a, b)
