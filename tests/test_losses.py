"""The losses by hand-computed numbers, and what must not change them."""

import math

import pytest
import torch

from bas.losses import attention_cross_entropy, attention_loss, average_maps, handle_maps, masked_mse, resize_mask
from bas.models.unet import AttentionMap
from tools.reference.measure import uniform

# --- Masks --------------------------------------------------------------------------------------------------------


def test_masks_are_resized_to_the_first_pixel_of_each_cell():
    """8x8 to 2x2 takes pixels (0, 0), (0, 4), (4, 0), (4, 4): no averaging, soft values kept."""
    mask = torch.arange(64.0).view(1, 8, 8) / 63
    assert torch.equal(resize_mask(mask, 2, 2), mask[:, ::4, ::4])
    assert torch.equal(resize_mask(mask, 4, 2), mask[:, ::2, ::4])
    assert resize_mask(torch.zeros(2, 3, 16, 24), 2, 3).shape == (2, 3, 2, 3)


@pytest.mark.parametrize(("side", "cells", "pixels"), [(520, 17, 32), (520, 65, 8), (34 * 8, 9, 32), (512, 16, 32)])
def test_a_mask_is_read_where_the_cells_of_a_rounded_grid_lie(side, cells, pixels):
    """A grid of 65 latents that is halved twice has 17 cells of 32 pixels: the last one begins at pixel 512."""
    mask = torch.arange(side * side, dtype=torch.float32).view(1, side, side)
    assert torch.equal(resize_mask(mask, cells, cells), mask[:, ::pixels, ::pixels])


@pytest.mark.parametrize(("side", "cells"), [(100, 3), (10, 4), (5, 7), (5, 10)])
def test_a_mask_of_another_size_is_spread_evenly(side, cells):
    mask = torch.rand(2, side, side)
    spread = torch.nn.functional.interpolate(mask[None], size=(cells, cells), mode="nearest")[0]
    assert torch.equal(resize_mask(mask, cells, cells), spread)


# --- Masked reconstruction (eq. 1) --------------------------------------------------------------------------------


def test_masked_mse_by_hand():
    """Differences 1, 2, 3, 4 under the mask 1, 0, 0.5, 0: the mean over all four cells of (d m)^2 is 3.25 / 4."""
    target = torch.tensor([[[[5.0, -6.0], [7.0, 8.0]]]])
    prediction = target + torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]]])
    assert masked_mse(prediction, target, mask).item() == pytest.approx(0.8125)
    # With normalisation it is divided by the mean of the squared mask, (1 + 0.25) / 4.
    assert masked_mse(prediction, target, mask, normalize=True).item() == pytest.approx(0.8125 / 0.3125)


def test_normalised_loss_does_not_depend_on_the_size_of_the_object():
    """A constant error of 2 costs 4, whether the mask covers one cell or all."""
    prediction, target = torch.full((1, 4, 8, 8), 2.0), torch.zeros(1, 4, 8, 8)
    small, large = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    small[..., 0, 0] = 1
    assert masked_mse(prediction, target, small, normalize=True).item() == pytest.approx(4.0)
    assert masked_mse(prediction, target, large, normalize=True).item() == pytest.approx(4.0)
    assert masked_mse(prediction, target, small).item() == pytest.approx(4.0 / 64)


def test_each_sample_of_a_batch_is_normalised_by_its_own_mask():
    """Errors of 2 under one cell of 64 and of 1 under all cost (4 + 1) / 2; one share for both would give 68 / 65."""
    prediction, target = torch.tensor([2.0, 1.0]).view(2, 1, 1, 1).expand(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    masks = torch.ones(2, 1, 8, 8)
    masks[0] = 0
    masks[0, :, 3, 3] = 1
    assert masked_mse(prediction, target, masks, normalize=True).item() == pytest.approx(2.5)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_outside_the_mask_is_exactly_zero(normalize):
    prediction = uniform("prediction", 2, 4, 8, 8).requires_grad_()
    mask = (uniform("mask", 2, 1, 8, 8) > 0).float() * 0.7
    masked_mse(prediction, uniform("target", 2, 4, 8, 8), mask, normalize).backward()
    outside = (mask == 0).expand_as(prediction)
    assert outside.any()
    assert (prediction.grad[outside] == 0).all()
    assert (prediction.grad[~outside] != 0).all()


def test_an_empty_mask_costs_nothing_and_stays_finite():
    prediction = uniform("prediction", 1, 4, 8, 8).requires_grad_()
    loss = masked_mse(prediction, torch.zeros(1, 4, 8, 8), torch.zeros(1, 1, 8, 8), normalize=True)
    loss.backward()
    assert loss.item() == 0
    assert (prediction.grad == 0).all()


# --- Averaging maps -----------------------------------------------------------------------------------------------


def test_every_head_counts_once_whatever_its_layer():
    """Layers of 1 and 3 heads, values 1 and 5: (1 + 3 x 5) / 4, not the mean of the layers' means."""
    maps = [
        AttentionMap("down", torch.full((1, 1, 2, 2, 3), 1.0)),
        AttentionMap("up", torch.full((1, 3, 2, 2, 3), 5.0)),
    ]
    assert torch.equal(average_maps(maps), torch.full((1, 2, 2, 3), 4.0))


def test_the_middle_of_the_unet_is_left_out():
    """As in the official code, down and up blocks only; other places on request."""
    maps = [AttentionMap(place, torch.full((1, 2, 2, 2, 3), value)) for place, value in (("down", 1.0), ("mid", 100.0))]
    assert average_maps(maps).max() == 1
    assert average_maps(maps, places=("mid",)).min() == 100


def test_maps_of_several_grids_are_not_averaged():
    maps = [AttentionMap("down", torch.ones(1, 2, side, side, 3)) for side in (4, 2)]
    with pytest.raises(ValueError, match=r"ask the UNet for one of \[\(2, 2\), \(4, 4\)\]"):
        average_maps(maps)


def test_no_map_at_all_is_an_error():
    with pytest.raises(ValueError, match="no attention map"):
        average_maps([AttentionMap("mid", torch.ones(1, 2, 2, 2, 3))])


def test_handle_maps_pick_the_tokens_columns_in_order():
    average = uniform("average", 2, 3, 4, 7)
    positions = torch.tensor([[4, 2], [6, 0]])
    maps = handle_maps(average, positions)
    assert maps.shape == (2, 2, 3, 4)
    for b, n in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(maps[b, n], average[b, :, :, positions[b, n]])


# --- The attention loss (eq. 2) -----------------------------------------------------------------------------------


def test_attention_loss_by_hand():
    """A map 0.1, 0.2, 0.3, 0.4 divided by its maximum is 0.25, 0.5, 0.75, 1; against the mask 1, 0, 0, 1 the squared
    errors 0.5625, 0.25, 0.5625, 0 have the mean 0.34375. A second handle that fits its mask adds nothing."""
    average = torch.zeros(1, 2, 2, 5)
    average[0, :, :, 2] = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    average[0, :, :, 4] = torch.tensor([[0.0, 0.3], [0.3, 0.0]])
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]])
    positions, present = torch.tensor([[2, 4]]), torch.ones(1, 2)
    assert attention_loss(average, positions, masks, present).item() == pytest.approx(0.34375)
    swapped = attention_loss(average, positions, masks.flip(1), present).item()
    # The other way round: 0.0625 + 0.25 + 0.0625 + 1 over 4, and 4 over 4: summed over the handles, not averaged.
    assert swapped == pytest.approx(0.34375 + 1.0)


def test_only_the_shape_of_a_map_counts():
    """Scaling by the maximum: half the attention everywhere is the same loss. No minimum is subtracted."""
    average, masks = uniform("a", 1, 4, 4, 3).abs(), (uniform("m", 1, 1, 4, 4) > 0).float()
    args = torch.tensor([[1]]), masks, torch.ones(1, 1)
    assert attention_loss(0.5 * average, *args).item() == pytest.approx(attention_loss(average, *args).item(), rel=1e-5)
    assert attention_loss(average + 1, *args).item() != pytest.approx(attention_loss(average, *args).item(), rel=1e-2)


def test_gradient_flows_through_the_maximum():
    """Checked against finite differences in float64, at the cell that holds the maximum too."""
    average = uniform("average", 1, 3, 3, 4).abs().double().requires_grad_()
    masks = (uniform("mask", 1, 2, 3, 3) > 0).double()
    positions, present = torch.tensor([[1, 3]]), torch.ones(1, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: attention_loss(a, positions, masks, present), average)
    attention_loss(average, positions, masks, present).backward()
    peak = average[0, :, :, 1].argmax()
    assert average.grad[0, :, :, 1].flatten()[peak] != 0
    assert (average.grad[..., [0, 2]] == 0).all()  # other tokens are not touched


def test_a_dead_map_is_finite():
    """A token that nothing attends to: the loss is its mask's mean square, the gradient no nan."""
    average = torch.zeros(1, 2, 2, 3, requires_grad=True)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    loss = attention_loss(average, torch.tensor([[1]]), mask, torch.ones(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert torch.isfinite(average.grad).all()


def test_padding_handles_change_nothing():
    """present = 0: neither the loss nor the gradient sees their position or mask."""
    average = uniform("average", 1, 4, 4, 7).abs().requires_grad_()
    masks = (uniform("masks", 1, 3, 4, 4) > 0).float()
    alone = attention_loss(average, torch.tensor([[4]]), masks[:, :1], torch.ones(1, 1))
    padded = attention_loss(average, torch.tensor([[4, 0, 2]]), masks, torch.tensor([[1.0, 0.0, 0.0]]))
    assert padded.item() == pytest.approx(alone.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(loss, average)[0] for loss in (padded, alone))
    torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=0)


def test_a_dead_padding_column_brings_no_nan():
    """0 x nan is nan: a padded handle on an unattended token must still give a finite gradient."""
    average = uniform("average", 1, 2, 2, 3).abs()
    average[..., 0] = 0
    average.requires_grad_()
    masks, present = torch.ones(1, 2, 2, 2), torch.tensor([[1.0, 0.0]])
    attention_loss(average, torch.tensor([[1, 0]]), masks, present).backward()
    assert torch.isfinite(average.grad).all()


def test_a_batch_of_different_subsets_is_the_mean_of_its_rows():
    """One, two and three handles side by side, where the official code stops with an error."""
    average = uniform("average", 3, 4, 4, 7).abs()
    masks = (uniform("masks", 3, 3, 4, 4) > 0).float()
    positions = torch.tensor([[4, 0, 0], [4, 6, 0], [2, 4, 6]])
    present = torch.tensor([[1.0, 0, 0], [1, 1, 0], [1, 1, 1]])
    rows = [
        attention_loss(average[[i]], positions[[i], : i + 1], masks[[i], : i + 1], present[[i], : i + 1]).item()
        for i in range(3)
    ]
    assert attention_loss(average, positions, masks, present).item() == pytest.approx(sum(rows) / 3, rel=1e-6)


# --- The attention loss as a choice among handles -----------------------------------------------------------------


def test_attention_cross_entropy_by_hand():
    """Shares 3/4 and 1/4, then 1/2 and 1/2: the cells' own handles cost -log 3/4 and -log 1/2, the other two none."""
    average = torch.zeros(1, 2, 2, 5)
    average[0, :, :, 2] = torch.tensor([[0.3, 0.2], [0.5, 0.0]])
    average[0, :, :, 4] = torch.tensor([[0.1, 0.2], [0.1, 0.0]])
    masks = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]]])
    positions, present = torch.tensor([[2, 4]]), torch.ones(1, 2)
    expected = -(math.log(0.75) + math.log(0.5)) / 4
    assert attention_cross_entropy(average, positions, masks, present).item() == pytest.approx(expected)
    assert attention_cross_entropy(3 * average, positions, masks, present).item() == pytest.approx(expected)


def test_attention_cross_entropy_leaves_padding_out():
    """A handle that is not in the prompt neither takes a share nor asks for one; one alone has no loss."""
    average = uniform("average", 2, 4, 4, 7).abs()
    masks, positions = (uniform("m", 2, 3, 4, 4) > 0).float(), torch.tensor([[1, 3, 0], [2, 0, 0]])
    present = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    pair = attention_cross_entropy(average[:1], positions[:1, :2], masks[:1, :2], torch.ones(1, 2))
    both = attention_cross_entropy(average, positions, masks, present)
    assert pair > 0
    assert both.item() == pytest.approx(pair.item() / 2, rel=1e-5)


def test_attention_cross_entropy_has_a_finite_gradient_for_a_dead_map():
    average = torch.zeros(1, 2, 2, 5, requires_grad=True)
    loss = attention_cross_entropy(average, torch.tensor([[1, 2]]), torch.ones(1, 2, 2, 2), torch.ones(1, 2))
    loss.backward()
    assert loss.isfinite()
    assert average.grad.isfinite().all()
