"""Steering: losses by hand and by central differences, updates that lower them, and nothing else that changes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bas.config import EditConfig, SampleConfig
from bas.losses import average_maps
from bas.models.text import tokenize
from bas.pretrained.folder import load
from bas.sampling import steer as steering_module
from bas.sampling.attention_maps import attend, write_attention
from bas.sampling.blended_diffusion import Region, edit
from bas.sampling.prompt_strength import encode_prompts
from bas.sampling.sampler import check_request, denoise, generate, sample
from bas.sampling.steer import Steer, inside_loss, overlap_loss, plan_steering, smooth
from bas.schedulers import NoiseSchedule
from tests.helpers.tiny import refused, taught, write_model
from tools.reference.measure import uniform

BOTH = "a photo of <asset0> and <asset1>"
SIDES = {"<asset0>": (0.0, 0.0, 0.5, 1.0), "<asset1>": (0.5, 0.0, 1.0, 1.0)}
FAST = {"num_inference_steps": 4, "guidance_scale": 2.0}
NEVER_STOP = -1.0  # for networks that are not trained: their losses may be small


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The tiny model with the handles <asset0> and <asset1>; its maps have 4x4 cells."""
    return taught(write_model(tmp_path_factory.mktemp("steer") / "model"))


def latents(models, steer=None, prompts=(BOTH,), seeds=(0,), **changes):
    """Clean latents of one batch, with or without steering, and the steering."""
    steering = plan_steering(models.spec, list(prompts), steer, (16, 16)) if steer else None
    config = SampleConfig(**FAST | changes)
    return generate(list(prompts), list(seeds), models, config, steering=steering), steering


def context_of(models, *prompts):
    with torch.no_grad():
        return encode_prompts(models.text_encoders, models.tokenizer, list(prompts))


# --- The losses ---------------------------------------------------------------------------------------------------


def one_cell(*cells, side=4):
    """Maps (1, n, side, side) with all attention on one cell each."""
    maps = torch.zeros(1, len(cells), side, side)
    for i, (row, column) in enumerate(cells):
        maps[0, i, row, column] = 0.3 + i  # a map's own sum does not count
    return maps


def test_overlap_is_one_on_each_other_and_zero_apart():
    """A third handle far from both counts in two of three pairs."""
    together, apart = ((1, 1), (1, 1)), ((0, 0), (3, 3))
    two, three = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    assert overlap_loss(one_cell(*together), two).item() == pytest.approx(1)
    assert overlap_loss(one_cell(*apart), two).item() == 0
    assert overlap_loss(one_cell(*together, (7, 7), side=8), three).item() == pytest.approx(1 / 3)


def test_overlap_of_neighbours_by_hand():
    """Two points two cells apart share one column of the blurred map: e^-0.5 / (1 + 2 e^-0.5)."""
    edge = math.exp(-0.5)
    found = overlap_loss(one_cell((3, 2), (3, 4), side=8), torch.ones(1, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(edge / (1 + 2 * edge))


def test_the_blur_keeps_a_constant_map_and_spreads_a_point():
    assert torch.allclose(smooth(torch.full((1, 2, 5, 3), 0.7)), torch.full((1, 2, 5, 3), 0.7))
    edge, blurred = math.exp(-0.5), smooth(one_cell((2, 2), side=5))[0, 0] / 0.3
    assert blurred.sum().item() == pytest.approx(1)
    assert (blurred[2, 3] / blurred[2, 2]).item() == pytest.approx(edge)
    assert (blurred[3, 3] / blurred[2, 2]).item() == pytest.approx(edge**2)


def test_inside_is_the_squared_share_outside():
    """A quarter outside for one handle, everything for the other: (1/16 + 1) / 2. A handle that is not there: 1/16."""
    maps, regions = torch.zeros(2, 2, 2, 2), torch.zeros(2, 2, 2, dtype=torch.bool)
    maps[:, 0] = torch.tensor([[3.0, 1.0], [0, 0]])
    maps[:, 1, 1, 1] = 5
    regions[:, 0, 0] = True
    present = torch.tensor([[True, True], [True, False]])
    assert inside_loss(maps, regions, present).tolist() == pytest.approx([17 / 32, 1 / 16])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_padding_does_not_count(n):
    """Handles that are not present change neither loss; fewer than two have no overlap, none have no loss."""
    maps = uniform("maps", 1, 3, 4, 4).abs()
    regions, present = torch.ones(3, 4, 4, dtype=torch.bool), torch.tensor([[i < n for i in range(3)]])
    regions[:, 2:] = False
    few = torch.ones(1, n, dtype=torch.bool)
    for loss, more in ((overlap_loss, ()), (inside_loss, (regions,))):
        only = loss(maps[:, :n], *(r[:n] for r in more), few)
        assert torch.equal(loss(maps, *more, present), only)
        assert loss(maps, *more, torch.zeros(1, 3, dtype=torch.bool)).item() == 0
        assert (only.item() == 0) == (n == 1 and loss is overlap_loss)


def test_gradients_are_finite_for_maps_of_zeros():
    maps = torch.zeros(1, 2, 4, 4, requires_grad=True)
    present = torch.ones(1, 2, dtype=torch.bool)
    loss = overlap_loss(maps, present) + inside_loss(maps, torch.ones(2, 4, 4, dtype=torch.bool), present)
    assert torch.autograd.grad(loss.sum(), maps)[0].isfinite().all()


@pytest.mark.parametrize("steer", [Steer(separate=True), Steer(layout=SIDES), Steer(separate=True, layout=SIDES)])
def test_the_gradient_agrees_with_central_differences(models, steer, monkeypatch):
    """In float64 through the whole UNet, in random directions: within 1e-6 of the directional derivative.

    The layers force the softmax to float32, which would leave 1e-2: here it stays float64.
    """
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    unet = load(models.source).unet.double()
    double = replace(models, unet=unet)
    steering = plan_steering(models.spec, [BOTH], steer, (16, 16))
    steering.columns = steering.columns.double()
    z, context = uniform("z", 1, 4, 16, 16).double(), context_of(models, BOTH).each(torch.Tensor.double)
    losses, gradient = steering.gradient(double, z, 500, context)
    assert losses.item() > 0.01

    def loss(latent):
        with torch.no_grad():
            maps = unet(latent, torch.tensor([500]), context.states, steering.grid).maps
            return steering.loss(average_maps(maps)).item()

    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        direction = torch.randn(z.shape, generator=generator).double()
        along = (gradient * direction).sum().item() / steering_module.LOSS_SCALE
        h = 1e-5
        measured = (loss(z + h * direction) - loss(z - h * direction)) / (2 * h)
        assert measured == pytest.approx(along, rel=1e-6)


# --- The updates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steer", [Steer(separate=True), Steer(layout=SIDES), Steer(separate=True, layout=SIDES)])
def test_an_update_lowers_its_loss_and_keeps_the_norm(models, steer):
    """Small steps, for each of three images, from the noise of three seeds."""
    steer = replace(steer, step_size=1e-3, updates=4, stop=NEVER_STOP)
    steering = plan_steering(models.spec, [BOTH] * 3, steer, (16, 16))
    z = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    moved = steering.update(models, z, 700, context_of(models, *[BOTH] * 3))
    losses = torch.stack(steering.losses)
    assert (losses.diff(dim=0) < 0).all()
    assert (steering.updated, steering.skipped) == (12, 0)
    distance = (moved - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)
    assert ((distance > 1e-4) & (distance <= 4.01e-3)).all()
    assert (moved.flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1) - 1).abs().max() < 0.02


@pytest.mark.parametrize(("steer", "share"), [(Steer(separate=True), 0.02), (Steer(True, SIDES), 0.05)])
def test_a_step_is_a_share_of_the_latents_norm(models, steer, share):
    steering = plan_steering(models.spec, [BOTH], replace(steer, stop=NEVER_STOP), (16, 16))
    z = 3 * uniform("z", 1, 4, 16, 16)
    moved = steering.update(models, z, 500, context_of(models, BOTH))
    assert ((moved - z).norm() / z.norm()).item() == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("off", [{"step_size": 0.0}, {"stop": 1.0}, {"until": 0.0}, {"updates": 0}])
def test_off_means_off(models, off):
    """Bit for bit the plain latents, and without flags too."""
    plain, _ = latents(models)
    steered, steering = latents(models, replace(Steer(layout=SIDES, hide=False), **off))
    assert torch.equal(plain, steered)
    assert (steering.updated > 0) == ("step_size" in off)
    assert (latents(models, Steer(layout=SIDES, hide=False, stop=NEVER_STOP))[0] - plain).abs().max() > 1e-3


def test_updates_end_at_half_of_the_steps(models):
    steered, steering = latents(models, Steer(separate=True, stop=NEVER_STOP), num_inference_steps=7)
    assert len(steering.losses) == steering.updated == 4
    assert steered.isfinite().all()
    assert torch.equal(steered, latents(models, Steer(separate=True, stop=NEVER_STOP), num_inference_steps=7)[0])


CASES = [(s, p) for s in ("ddim", "ddpm", "dpmpp_2m") for p in ("epsilon", "v_prediction")]


@pytest.mark.parametrize(("sampler", "prediction"), CASES)
def test_a_batch_equals_its_single_images(models, sampler, prediction):
    """Two prompts, one of them without a pair: each image is moved by its own loss alone."""
    predicting = replace(models, schedule=NoiseSchedule(steps_offset=1, prediction_type=prediction))
    prompts, seeds = [BOTH, "a photo of <asset1>", BOTH], [3, 4, 5]
    steer = Steer(separate=True, layout={"<asset0>": SIDES["<asset0>"]}, stop=NEVER_STOP)
    together, _ = latents(predicting, steer, prompts, seeds, sampler=sampler)
    for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone, _ = latents(predicting, steer, [prompt], [seed], sampler=sampler)
        assert (together[i] - alone[0]).abs().max() < 2e-5 * alone.abs().max()
    plain, _ = latents(predicting, None, prompts, seeds, sampler=sampler)
    moved = (together - plain).flatten(1).abs().amax(dim=1) / plain.abs().max()
    assert (moved[[0, 2]] > 1e-3).all()
    assert moved[1] < 1e-6


def test_no_weight_gets_a_gradient_and_none_changes(models):
    before = {name: p.clone() for name, p in models.unet.named_parameters()}
    assert all(p.requires_grad for p in models.unet.parameters())
    latents(models, Steer(separate=True, layout=SIDES, stop=NEVER_STOP))
    for name, parameter in models.unet.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_weights_that_were_loaded_in_inference_mode(models):
    with torch.inference_mode():
        loaded = replace(models, unet=load(models.source).unet)
    assert next(loaded.unet.parameters()).is_inference()
    steer = Steer(separate=True, stop=NEVER_STOP)
    assert torch.equal(latents(loaded, steer)[0], latents(models, steer)[0])


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(models, monkeypatch, caplog):
    """Of two images the one whose gradient is broken stays as plain, the other moves."""
    original = steering_module.Steering.gradient

    def broken(self, *args):
        losses, gradient = original(self, *args)
        gradient[1, 0, 0, 0] = math.nan
        return losses, gradient

    prompts, seeds, steer = [BOTH] * 2, [0, 1], Steer(separate=True, stop=NEVER_STOP)
    whole = latents(models, steer, prompts, seeds)[0]
    monkeypatch.setattr(steering_module.Steering, "gradient", broken)
    steered, steering = latents(models, steer, prompts, seeds)
    plain, _ = latents(models, None, prompts, seeds)
    assert torch.equal(steered[0], whole[0])
    assert torch.allclose(steered[1], plain[1], atol=1e-6)
    assert (steering.updated, steering.skipped) == (2, 2)
    assert caplog.messages == ["2 updates of steering were skipped: their gradient is not finite"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_latents_in_float32(models, dtype):
    half = replace(models, unet=load(models.source).unet.to(dtype))
    steered, steering = latents(half, Steer(separate=True, layout=SIDES, stop=NEVER_STOP), num_inference_steps=3)
    assert steered.dtype == torch.float32
    assert steered.isfinite().all()
    assert (steering.updated, steering.skipped) == (2, 0)


# --- Prompts ------------------------------------------------------------------------------------------------------


def test_tokens_of_a_handle_are_summed(models):
    """A handle that stands twice is one handle; one of strength 0 is not there; padding rows are empty."""
    prompts = ["<asset1> and <asset0> and <asset1>", "(<asset0>:0) and <asset1>", "a bowl"]
    steering = plan_steering(models.spec, prompts, Steer(separate=True), (16, 16))
    assert steering.handles == ("<asset0>", "<asset1>")
    ids = tokenize(models.tokenizer, prompts[:1])[0]
    wanted = models.tokenizer.convert_tokens_to_ids("<asset1>")
    assert steering.columns[0, 1].nonzero().flatten().tolist() == (ids == wanted).nonzero().flatten().tolist()
    assert steering.columns.sum(dim=-1).tolist() == [[1, 2], [0, 1], [0, 0]]
    average = uniform("average", 3, 4, 4, 77).abs()
    maps = torch.einsum("bhwk,bnk->bnhw", average, steering.columns)
    assert torch.allclose(maps[0, 1], average[0, :, :, [1, 5]].sum(dim=-1))


def test_a_handle_alone_has_nothing_to_separate(models, caplog):
    prompts = ["a photo of <asset0>", "a photo of <asset0> and <asset0>"]
    check_request(models.spec, prompts, SampleConfig(separate=True))
    assert caplog.messages == [
        "--separate has nothing to do in 'a photo of <asset0>' and in 1 more prompts: it names fewer than two handles"
    ]
    plain, _ = latents(models, None, prompts[:1])
    steered, steering = latents(models, Steer(separate=True, stop=NEVER_STOP), prompts[:1])
    assert torch.equal(plain, steered)
    assert steering.losses == []


def test_the_grid_is_that_of_training_and_refused_where_a_size_does_not_have_it(models, tmp_path):
    """Images of 24x24 have maps of 12, 6 and 3 cells a side, not of 8; without a trained grid, a quarter: 3."""
    (tmp_path / "bas.json").write_text(json.dumps({"train": {"attention_grid": 8}}))
    spec = replace(models.spec, source=tmp_path)
    assert plan_steering(spec, [BOTH], Steer(separate=True), (16, 16)).grid == (8, 8)
    with refused("images of 24x24 do not have", "--height"):
        check_request(spec, [BOTH], SampleConfig(separate=True, height=24, width=24))
    assert plan_steering(models.spec, [BOTH], Steer(separate=True), (12, 12)).grid == (3, 3)


# --- What is built on it ------------------------------------------------------------------------------------------


def test_python_takes_a_steer_or_the_settings(models, tmp_path):
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps(SIDES))
    by_settings = sample(models, BOTH, separate=True, layout=str(layout), **FAST)
    by_steer = sample(models, BOTH, SampleConfig(**FAST), steer=Steer(separate=True, layout=SIDES))
    assert by_settings == by_steer
    assert by_settings != sample(models, BOTH, **FAST)
    with refused("unknown handle", "<asset7>"):
        sample(models, BOTH, steer=Steer(layout={"<asset7>": (0, 0, 1, 1)}))


def test_an_edit_moves_nothing_outside_its_mask(models, monkeypatch):
    """Neither pixels nor, within a step, latents; inside it differs from a plain edit."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = np.zeros((32, 32), np.float32)
    mask[:, :16] = 1
    moves, original = [], steering_module.Steering.update

    def spy(self, models, z, *args):
        moved = original(self, models, z, *args)
        moves.append((moved - z).abs().amax(dim=(0, 1)))
        return moved

    monkeypatch.setattr(steering_module.Steering, "update", spy)
    config = EditConfig(**FAST, separate=True)
    (steered,) = edit(models, image, [Region(mask, BOTH)], config)
    (plain,) = edit(models, image, [Region(mask, BOTH)], config.changed(separate=False))
    assert (np.asarray(steered)[:, 16:] == np.asarray(image)[:, 16:]).all()
    assert (np.asarray(steered)[:, :16] != np.asarray(plain)[:, :16]).any()
    assert len(moves) == 1  # of four steps the first is skipped, the second has an update
    assert (moves[0][:, :8] > 0).all()
    assert (moves[0][:, 8:] == 0).all()


def test_attend_shows_the_image_without_steering_too(models, tmp_path):
    """steering.json has the losses and counts; inside a region's map everything is left once the rest is hidden."""
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps(SIDES))
    config = SampleConfig(**FAST, separate=True, layout=str(layout))
    attention = attend(models, BOTH, config)
    assert attention.plain.image == sample(models, BOTH, **FAST)[0]
    assert attention.image == sample(models, BOTH, config)[0]
    sheet = write_attention(attention, models.handles, tmp_path / "out", {})
    found = json.loads((tmp_path / "out" / "steering.json").read_text())
    assert found.keys() == {"losses", "updates", "skipped", "overlap", "inside"}
    assert len(found["losses"]) == found["updates"] == 2
    assert found["overlap"]["steered"] < found["overlap"]["plain"]
    for each in found["inside"].values():
        assert each["plain"] < 0.9
        assert each["steered"] == pytest.approx(1)
    with Image.open(sheet) as steered:
        write_attention(attention.plain, models.handles, tmp_path / "plain", {})
        with Image.open(tmp_path / "plain" / "sheet.png") as plain:
            assert steered.height > 1.8 * plain.height
    assert not (tmp_path / "plain" / "steering.json").exists()


def test_denoise_starts_at_a_later_step_with_its_updates(models):
    """Steps that are left out have no update: 5 of 8 are left, of which one is in the first half."""
    steering = plan_steering(models.spec, [BOTH], Steer(separate=True, stop=NEVER_STOP), (16, 16))
    config, context = SampleConfig(num_inference_steps=8), context_of(models, BOTH)
    with torch.no_grad():
        denoise(models, uniform("z", 1, 4, 16, 16), context, context, config, [], start=3, steering=steering)
    assert len(steering.losses) == 1
