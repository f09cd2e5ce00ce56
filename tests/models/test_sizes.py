"""Sizes that the UNet does not halve without rounding, and sizes that are too small for it."""

import numpy as np
import pytest
import torch
from PIL import Image

import bas
from bas.config import SampleConfig
from bas.data.batches import attention_grid, check_scene
from bas.data.scene_folder import load_scene
from bas.models.layers import Upsample
from bas.sampling.sampler import latent_shape
from tests.helpers import tiny
from tests.helpers.tiny import refused


@pytest.mark.parametrize("size", [(9, 9), (10, 7), (13, 16), (5, 3), (1, 1)])
def test_odd_latents_are_computed_as_in_diffusers(tmp_path, size):
    diffusers = pytest.importorskip("diffusers", reason="diffusers, the test oracle, is not installed")
    model = tiny.write_model(tmp_path / "model")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    ours = bas.load(model, device="cpu").unet
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, *size, generator=generator)
    context = torch.randn(2, 77, tiny.WIDTH, generator=generator)
    with torch.no_grad():
        expected = theirs(latents, torch.tensor([3, 700]), context).sample
        found = ours(latents, torch.tensor([3, 700]), context).sample
    assert found.shape == latents.shape
    assert torch.allclose(found, expected, atol=1e-5)


def test_an_upsampler_keeps_the_first_rows_and_columns():
    upsample = Upsample(1)
    torch.nn.init.dirac_(upsample.conv.weight)
    torch.nn.init.zeros_(upsample.conv.bias)
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert upsample(x, (3, 5))[0, 0].tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return bas.load(tiny.write_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.mark.parametrize(
    ("latent", "grids", "quarter"),
    [
        ((16, 16), [(16, 16), (8, 8), (4, 4)], (4, 4)),
        ((17, 17), [(17, 17), (9, 9), (5, 5)], (5, 5)),
        ((9, 14), [(9, 14), (5, 7), (3, 4)], (3, 4)),
    ],
)
def test_grids_are_halved_and_rounded_up(models, latent, grids, quarter):
    assert models.spec.grids(*latent) == grids
    assert attention_grid(models.spec, latent, None) == quarter
    assert attention_grid(models.spec, latent, min(grids[1])) == grids[1]


def test_images_of_whole_latents_are_generated(models):
    (image,) = bas.sample(models, "a photo", height=34, width=22, num_inference_steps=2)
    assert image.size == (22, 34)


def test_sides_of_half_latents_are_refused(models):
    with refused("--width 33: this model takes multiples of 2 pixels"):
        latent_shape(models.spec, SampleConfig(width=33))
    with refused("--height 1: this model takes multiples of 2 pixels"):
        latent_shape(models.spec, SampleConfig(height=1))


def test_a_scene_is_trained_at_a_resolution_of_whole_latents(bench, tmp_path):
    """At 34 pixels both sides are multiples of 2; at 32 they stay multiples of 8, as ever."""
    folder = tiny.write_scene(tmp_path / "wide", size=(47, 32))
    for resolution, expected in ((34, (34, 50)), (32, (32, 40)), (36, (36, 52))):
        config = bench.config(instance_data_dir=str(folder), resolution=resolution)
        assert check_scene(bas.load(bench.model).spec, load_scene(config), config) == expected
    config = bench.config(instance_data_dir=str(folder), resolution=33)
    with refused("--resolution 33: this model takes multiples of 2 pixels"):
        check_scene(bas.load(bench.model).spec, load_scene(config), config)


def test_a_run_at_an_odd_grid_trains_and_learns(bench, tmp_path):
    config = bench.config(tmp_path / "run", resolution=34, phase1_train_steps=2, phase2_train_steps=1)
    run = bas.train(config)
    with Image.open(run / "scene" / "img.png") as image:
        assert image.size == (34, 34)
    (image,) = bas.sample(bas.load(run), "a photo of <asset0>", height=34, width=34, num_inference_steps=1)
    assert np.asarray(image).std() > 0


def test_latents_that_a_normalization_sees_as_one_value_are_refused(tmp_path):
    """PyTorch would raise "Expected more than 1 value per channel when training" within the network."""
    from dataclasses import replace

    one = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",)}
    small = replace(tiny.UNET, **one, up_block_types=("CrossAttnUpBlock2D",), sample_size=1, norm_num_groups=8)
    models = bas.load(tiny.write_model(tmp_path / "model", unet=small), device="cpu")
    with refused("images of 2x2 pixels are too small for this model: ask for larger ones"):
        bas.sample(models, "a photo", num_inference_steps=1)
    (image,) = bas.sample(models, "a photo", height=4, num_inference_steps=1)
    assert image.size == (2, 4)
