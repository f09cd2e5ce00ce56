"""The losses of Break-A-Scene (Avrahami et al. 2023, section 3): masked reconstruction, prior, cross-attention."""

from math import ceil, log2

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from bas.models.unet import AttentionMap

ATTENTION_FLOOR = 1e-6  # smallest divisor of a map: a map of zeros gives 0, not nan


def resize_mask(mask: Tensor, h: int, w: int) -> Tensor:
    """Resize by nearest neighbour, which takes the first pixel of each cell. (..., H, W) -> (..., h, w)

    A grid that the UNet halved and rounded up has cells of a power of two of pixels, the last one cut by the border:
    its strided convolutions put them there. Nearest neighbour alone would spread them evenly.
    """
    steps = [2 ** max(0, ceil(log2(side / cells))) for side, cells in zip(mask.shape[-2:], (h, w), strict=True)]
    if [-(-side // step) for side, step in zip(mask.shape[-2:], steps, strict=True)] == [h, w]:
        return mask[..., :: steps[0], :: steps[1]].clone(memory_format=torch.contiguous_format)
    flat = mask.reshape(1, -1, *mask.shape[-2:])
    return F.interpolate(flat, size=(h, w), mode="nearest").reshape(*mask.shape[:-2], h, w)


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor, normalize: bool = False) -> Tensor:
    """Return the reconstruction loss inside the mask (paper, eq. 1).

    prediction, target: (b, c, h, w); mask: (b, 1, h, w) in 0..1 -> scalar. The mean runs over all cells, so a small
    mask gives a small loss; `normalize` divides each sample's loss by its masked share. A soft mask enters squared,
    because it multiplies both sides of the difference.
    """
    # eq. 1: || eps * M - eps_theta(z_t, t, p) * M ||^2
    prediction, target = prediction.float() * mask, target.float() * mask
    if not normalize:
        return F.mse_loss(prediction, target)
    errors = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    return (errors / mask.square().mean(dim=(1, 2, 3)).clamp(min=1e-6)).mean()


def average_maps(maps: list[AttentionMap], places: tuple[str, ...] = ("down", "up")) -> Tensor:
    """Return the mean over heads and layers of the maps from these places of the UNet (CA of eq. 2). -> (b, h, w, k)

    Each head of each layer has the same weight. Raises ValueError for maps on several grids, or none.
    """
    chosen = [m.probs for m in maps if m.place in places]
    if not chosen:
        raise ValueError(f"no attention map from {' or '.join(places)} was returned on this grid")
    if len(grids := {tuple(probs.shape[2:4]) for probs in chosen}) > 1:
        raise ValueError(f"maps on several grids cannot be averaged: ask the UNet for one of {sorted(grids)}")
    heads = sum(probs.shape[1] for probs in chosen)
    first, *others = (reduce(probs, "b heads h w k -> b h w k", "sum") for probs in chosen)
    return sum(others, first) / heads


def handle_maps(average: Tensor, positions: Tensor) -> Tensor:
    """Select the maps of the handles' tokens. average: (b, h, w, k), positions: (b, n) token indices -> (b, n, h, w)"""
    index = positions[:, None, None, :].expand(-1, *average.shape[1:3], -1)
    return rearrange(average.gather(-1, index), "b h w n -> b n h w")


def attention_loss(average: Tensor, positions: Tensor, masks: Tensor, present: Tensor) -> Tensor:
    """Return the distance between each handle's attention map and its mask (paper, eq. 2). -> scalar

    average: (b, h, w, k) from `average_maps`; positions: (b, n) token indices of the handles; masks: (b, n, h, w) in
    0..1; present: (b, n) 1 for a handle in the prompt, 0 for padding. Each map is divided by its maximum, through which
    the gradient flows. Squared errors are averaged over cells, summed over handles and averaged over the batch.
    """
    # eq. 2: || CA(v_i, z_t) - M_i ||^2
    maps = handle_maps(average, positions)
    maps = maps / maps.amax(dim=(-2, -1), keepdim=True).clamp(min=ATTENTION_FLOOR)
    errors = (maps - masks).square().mean(dim=(-2, -1))
    return (errors * present).sum(dim=1).mean()


def attention_cross_entropy(average: Tensor, positions: Tensor, masks: Tensor, present: Tensor) -> Tensor:
    """Return the cross-entropy of the handles' shares of each cell and the masks (PartCraft, Ng et al. 2024). -> scalar

    Arguments as for `attention_loss`. A cell's attention to the handles, divided by its sum, gives the handles'
    probabilities; the cross-entropy with the masks is averaged over all cells and the batch. Handles compete for cells;
    cells outside all masks add nothing. The loss of a single handle is 0, because its share is 1 everywhere.
    """
    maps = handle_maps(average, positions) * present[:, :, None, None]
    shares = maps / maps.sum(dim=1, keepdim=True).clamp(min=ATTENTION_FLOOR)
    chosen = masks * present[:, :, None, None]
    return -(chosen * shares.clamp(min=ATTENTION_FLOOR).log()).sum(dim=1).mean()


ATTENTION_LOSSES = {"mse": attention_loss, "cross_entropy": attention_cross_entropy}
