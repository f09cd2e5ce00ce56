"""The draws of a training step: what is cached, what belongs together, what is random and how."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from bas.config import TrainConfig
from bas.data import batches
from bas.data.batches import attention_grid, check_scene, handle_positions, sample_batch
from bas.data.scene_folder import load_scene
from bas.evaluation.generation import check_maps
from bas.losses import resize_mask
from bas.models.text import tokenize
from bas.pretrained.folder import load, read_spec
from bas.pretrained.hub import find
from bas.training.setup import check_input
from tests.helpers.tiny import refused, write_scene


@pytest.fixture(scope="module")
def prepared(bench):
    """Models and data of the tiny scene of three concepts, with two class images."""
    return bench.prepared(bench.config())


def draw(bench, prepared, seed=0, phase=1, **changes):
    """One batch. Phase 1 of the plan, counted from 0, is the one with class images."""
    models, data = prepared
    config = bench.config(**changes)
    return sample_batch(data, models, config.phases[phase], config, torch.Generator().manual_seed(seed))


def chosen_in(data, batch, row) -> list[int]:
    """The concepts that a row's prompt names, in its order."""
    ids = batch.input_ids[row].tolist()
    return [data.handle_ids.index(i) for i in ids if i in data.handle_ids]


@pytest.mark.parametrize("concepts", [36, 37])
def test_all_handles_must_fit_one_prompt(bench, tmp_path, concepts):
    """Start and end, `a photo of`, the handles and an `and` between them: 2 n + 4 of 77 tokens."""
    scene = write_scene(tmp_path / "scene", concepts, size=(8 * concepts, 32))
    config = bench.config(instance_data_dir=str(scene))
    expected = refused("37 concepts: a prompt of this model has room for 36 handles: use fewer masks")
    with expected if concepts == 37 else nullcontext():
        check_scene(load(bench.model).spec, load_scene(config), config)


def test_masks_that_lie_in_each_other_are_told(bench, tmp_path, caplog):
    """Not those that touch, as here at their soft edges."""
    scene = write_scene(tmp_path / "scene", concepts=2)
    config = bench.config(instance_data_dir=str(scene))
    models = load(bench.model)
    assert check_scene(models.spec, load_scene(config), config) == (32, 32)
    assert caplog.messages == []
    small = np.array(Image.open(scene / "mask0.png"))
    small[:, :8] = 0
    Image.fromarray(small).save(scene / "mask1.png")
    check_scene(models.spec, load_scene(config), config, warn=False)
    assert caplog.messages == []
    check_scene(models.spec, load_scene(config), config)
    share, rest = "their handles will share what is there", "of the mask of <asset{}> lies in the mask of <asset{}>"
    assert caplog.messages == [f"48 % {rest.format(0, 1)}: {share}", f"100 % {rest.format(1, 0)}: {share}"]


def test_mirrored_view_is_the_mirrored_image_encoded(bench, prepared):
    """The posterior of the flipped pixels, not the flipped posterior: the encoder isn't symmetric."""
    models, data = prepared
    image, masks = load_scene(bench.config()).tensors(32, models.size_multiple)
    with torch.no_grad():
        straight, mirrored = (models.vae.encode(pixels[None]) for pixels in (image, image.flip(-1)))
    for view, posterior, layers in zip(
        data.images[0].views, (straight, mirrored), (masks, masks.flip(-1)), strict=True
    ):
        assert torch.equal(view.posterior.mean, posterior.mean[0])
        assert torch.equal(view.posterior.logvar, posterior.logvar[0])
        assert torch.equal(view.latent_masks, resize_mask(layers, 16, 16))
        assert torch.equal(view.attention_masks, resize_mask(layers, 4, 4))
    assert not torch.allclose(mirrored.mean, straight.mean.flip(-1))


def test_flip_probability_moves_image_and_masks_together(bench, prepared):
    """0 never, 1 always, 1/2 in half of the draws; latents and masks always come from the same view."""
    _, data = prepared
    (image,) = data.images
    silent = torch.full_like(image.views[0].posterior.logvar, -80.0)  # a posterior without spread
    views = tuple(replace(view, posterior=view.posterior._replace(logvar=silent)) for view in image.views)
    quiet = replace(data, images=(replace(image, views=views),))
    flips = []
    for seed in range(60):
        batch = draw(bench, (prepared[0], quiet), seed)
        chosen = chosen_in(data, batch, 0)
        latents = [view.posterior.mean * data.scaling_factor for view in data.images[0].views]
        matches = [torch.allclose(batch.z0[0], z0, atol=1e-6) for z0 in latents]
        assert sum(matches) == 1
        flips.append(matches[1])
        view = data.images[0].views[matches.index(True)]
        assert torch.equal(batch.union[0, 0], view.latent_masks[chosen].amax(dim=0))
        assert torch.equal(batch.masks[0, : len(chosen)], view.attention_masks[chosen])
    assert 15 < sum(flips) < 45
    for probability, view in ((0.0, 0), (1.0, 1)):
        batches = [draw(bench, prepared, seed, flip_probability=probability) for seed in range(10)]
        for batch in batches:
            chosen = chosen_in(data, batch, 0)
            assert torch.equal(batch.union[0, 0], data.images[0].views[view].latent_masks[chosen].amax(dim=0))


@pytest.mark.parametrize("phase", [0, 1])
def test_rows_of_a_batch_hold_subsets_of_different_sizes(bench, prepared, phase):
    """Six rows: positions point at the handles' tokens, padding is marked absent, unions and masks fit the prompt."""
    _, data = prepared
    batch = draw(bench, prepared, phase=phase, train_batch_size=6, flip_probability=0.0)
    rows = 12 if phase else 6
    assert batch.z0.shape == batch.eps.shape == (rows, 4, 16, 16)
    assert batch.input_ids.shape == (rows, 77)
    assert batch.t.shape == (rows,)
    assert batch.union.shape == (6, 1, 16, 16)
    assert batch.masks.shape == (6, 3, 4, 4)
    sizes = set()
    for row in range(6):
        chosen = chosen_in(data, batch, row)
        sizes.add(len(chosen))
        assert batch.present[row].tolist() == [1.0] * len(chosen) + [0.0] * (3 - len(chosen))
        ids = batch.input_ids[row, batch.positions[row, : len(chosen)]]
        assert ids.tolist() == [data.handle_ids[i] for i in chosen]
        assert torch.equal(batch.masks[row, : len(chosen)], data.images[0].views[0].attention_masks[chosen])
        assert torch.equal(batch.union[row, 0], data.images[0].views[0].latent_masks[chosen].amax(dim=0))
    assert len(sizes) > 1


def test_class_rows_are_class_images_under_the_class_prompt(bench, prepared):
    models, data = prepared
    batch = draw(bench, prepared, train_batch_size=8)
    expected = models.tokenizer(["a photo at the beach"], padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(batch.input_ids[8:], expected.expand(8, -1))
    means, spreads = data.class_posterior.mean, (0.5 * data.class_posterior.logvar).exp()
    used = set()
    for z in batch.z0[8:]:
        distances = ((z / data.scaling_factor - means) / spreads).square().mean(dim=(1, 2, 3))
        used.add(int(distances.argmin()))
        assert 0.8 < min(distances) < 1.25  # standard normal around one of them
    assert used == {0, 1}


def test_several_class_prompts_take_turns(bench):
    prompts = ("a photo at the beach", "a bowl")
    models, data = bench.prepared(bench.config(class_prompt=prompts))
    ids = models.tokenizer(list(prompts), padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert torch.equal(data.class_ids, ids)


def test_latents_are_posterior_samples_times_the_scaling_factor(bench, prepared):
    """(z0 / 0.18215 - mean) / deviation is standard normal, drawn anew for each row."""
    _, data = prepared
    batch = draw(bench, prepared, phase=0, train_batch_size=40, flip_probability=0.0)
    posterior = data.images[0].views[0].posterior
    normal = (batch.z0 / 0.18215 - posterior.mean) / (0.5 * posterior.logvar).exp()
    for values in (normal, batch.eps):
        assert abs(values.mean()) < 0.02
        assert abs(values.std() - 1) < 0.02
        rows = rearrange(values, "b c h w -> b (c h w)")
        assert (torch.corrcoef(rows) - torch.eye(40)).abs().max() < 0.2
    assert abs((normal * batch.eps).mean()) < 0.02


def test_new_images_are_encoded_together_up_to_a_number_of_pixels(prepared, monkeypatch):
    """Five of 32 pixels a side, with one that is encoded already: two, two, one; or one at a time."""
    models, data = prepared
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    known = data.images[0].views[0]
    views = [batches.NewView(known.latent_masks, known.attention_masks, image) for image in images]
    alone = [models.vae.encode(image[None]).mean[0] for image in images]
    encode, counts = type(models.vae).encode, []
    monkeypatch.setattr(type(models.vae), "encode", lambda vae, some: counts.append(len(some)) or encode(vae, some))
    for pixels, expected in ((2 * 32 * 32 + 1, [2, 2, 1]), (1000, [1] * 5)):
        monkeypatch.setattr(batches, "TOGETHER", pixels)
        found = batches.posteriors_of(models, [*views[:2], known, *views[2:]])
        assert counts == expected
        assert found[2] is known.posterior
        torch.testing.assert_close([each.mean for each in [*found[:2], *found[3:]]], alone, rtol=1e-5, atol=1e-6)
        counts.clear()


def test_timesteps_are_independent_and_cover_the_whole_range(bench, prepared):
    batch = draw(bench, prepared, train_batch_size=600)
    assert batch.t.min() < 20
    assert batch.t.max() > 979
    assert batch.t.max() < 1000
    counts = torch.bincount(batch.t // 100, minlength=10).float()
    assert ((counts - 120) ** 2 / 120).sum() < 27.9  # chi-square of 10 bins, one seed in a thousand
    instance, prior = batch.t[:600].float(), batch.t[600:].float()
    assert abs(torch.corrcoef(torch.stack([instance, prior]))[0, 1]) < 0.15
    assert abs(torch.corrcoef(torch.stack([instance[1:], instance[:-1]]))[0, 1]) < 0.15


def test_a_seed_decides_and_the_generator_moves_on(bench, prepared):
    first, again, other = (draw(bench, prepared, seed) for seed in (3, 3, 4))
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.eps, other.eps)


def test_each_subset_is_tokenized_once(bench, prepared, monkeypatch):
    """Three concepts make 15 subsets, counted by their order too; what is kept gives the same batch again."""
    asked = []
    monkeypatch.setattr(
        "bas.data.batches.tokenize", lambda tokenizer, prompts: asked.extend(prompts) or tokenize(tokenizer, prompts)
    )
    models, data = prepared
    fresh = replace(data)
    first, again = (draw(bench, (models, fresh), train_batch_size=200) for _ in range(2))
    assert len(asked) == len(set(asked)) == 15
    for name in vars(first):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_a_handle_must_stand_in_a_prompt_once():
    ids = torch.tensor([0, 7, 9, 7, 8])
    assert handle_positions(ids, [8, 9]) == [4, 2]
    for wanted, times in ((7, 2), (5, 0)):
        with refused(f"{times} times"):
            handle_positions(ids, [8, wanted])


def test_attention_grid_is_a_quarter_of_the_latents_or_as_asked(prepared):
    """The tiny UNet attends on half of the latent grid and on its quarter."""
    models, _ = prepared
    assert attention_grid(models.spec, (16, 16), None) == (4, 4)
    assert attention_grid(models.spec, (16, 24), None) == (4, 6)
    assert attention_grid(models.spec, (16, 24), 8) == (8, 12)
    assert attention_grid(models.spec, (24, 16), 8) == (12, 8)  # cells along the shorter side, whichever that is
    with refused("no cross-attention on 5 cells", "--attention_grid 8 or 4"):
        attention_grid(models.spec, (16, 16), 5)


def test_a_training_without_maps_needs_no_grid(bench):
    """The miniature has no attention on a quarter of its latents; a baseline without previews reads no maps."""
    plain = {"instance_data_dir": str(bench.scene), "num_class_images": 1, "device": "cpu"}
    for given in (
        {},
        {"method": "ti"},
        {"img_log_steps": 0},
        {"method": "ti", "img_log_steps": 0, "attention_grid": 5},
    ):
        with refused("no cross-attention on ", "use --attention_grid "):
            check_input(TrainConfig.resolve(plain | given))
    alone = TrainConfig.resolve(plain | {"method": "ti", "img_log_steps": 0})
    check_input(alone)
    with refused("no cross-attention on ", "use --attention_grid "):
        check_maps(alone, read_spec(find(None)))  # an evaluation reads maps of every run


def test_mask_that_vanishes_on_the_grids_is_noticed(bench, tmp_path, caplog):
    """Nearest neighbour takes every second pixel for the latents and every eighth for the attention maps."""
    scene = write_scene(tmp_path / "scene", concepts=2)
    mask = np.zeros((32, 32), np.uint8)
    mask[1, 1] = 255
    Image.fromarray(mask).save(scene / "mask1.png")
    with refused("<asset1>", "vanishes"):
        check_input(bench.config(instance_data_dir=str(scene)))
    mask[2:5, 2:5] = 255
    Image.fromarray(mask).save(scene / "mask1.png")
    check_input(bench.config(instance_data_dir=str(scene)))
    assert "the mask of <asset1> vanishes on the attention grid of " in caplog.text
