"""Steering: while images are generated, handles' attention is kept apart, or drawn into the regions of a layout.

Before a denoising step, the latents move a little down the gradient of a loss on the attention maps. These are outputs
of the UNet, the same ones that the attention loss reads in training (paper, eq. 2). As in Attend-and-Excite (Chefer et
al. 2023) the weights stay and the latents move. Unlike there, maps are not sharpened, and a step is a share of the
latents' norm. The overlap loss follows A-STAR (Agarwal et al. 2023), the loss of a layout is that of Chen et al.
(2023).
"""

import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from bas.config import SampleConfig
from bas.data.batches import attention_grid
from bas.errors import InputError
from bas.losses import ATTENTION_FLOOR, average_maps
from bas.models.bundle import Models, ModelSpec
from bas.models.text import Conditioning, find_places, known_handles, tokenize
from bas.models.unet import Hide
from bas.pretrained.hub import trained_grid
from bas.sampling.layout import Layout, cells_inside, check_layout, read_layout
from bas.sampling.own_pixels import Segment, read_segments
from bas.sampling.prompt_strength import read_prompt

log = logging.getLogger(__name__)

SEPARATE_STEP, LAYOUT_STEP = 0.02, 0.05  # of the latents' norm
LOSS_SCALE = 2.0**10  # keeps gradients of the loss within fp16; the length of a step does not depend on it


# --- The losses ---------------------------------------------------------------------------------------------------


def overlap_loss(maps: Tensor, present: Tensor) -> Tensor:
    """Measure how much the attention of handles lies on the same cells. -> (b,) in 0..1: 0 apart, 1 on each other

    maps: (b, n, h, w), 0 or more; present: (b, n) bool, False for a handle that does not count. The mean over pairs of
    sum min(p_i, p_j), where p is a smoothed map divided by its sum. 0 for fewer than two handles.
    """
    p = smooth(maps)
    p = p / p.sum(dim=(-2, -1), keepdim=True).clamp(min=ATTENTION_FLOOR)
    i, j = torch.triu_indices(maps.shape[1], maps.shape[1], offset=1)
    both = (present[:, i] & present[:, j]).to(maps.dtype)
    shared = torch.minimum(p[:, i], p[:, j]).sum(dim=(-2, -1))
    return (shared * both).sum(dim=1) / both.sum(dim=1).clamp(min=1)


def inside_loss(maps: Tensor, regions: Tensor, present: Tensor) -> Tensor:
    """Return how much of the handles' attention lies outside their regions (Chen et al. 2023). -> (b,) in 0..1

    maps: (b, n, h, w), 0 or more; regions: (n, h, w) bool; present: (b, n) bool. The mean over handles of
    (1 - sum of the map inside / sum of the map)^2. 0 without a handle.
    """
    total = maps.sum(dim=(-2, -1)).clamp(min=ATTENTION_FLOOR)
    errors = (1 - (maps * regions).sum(dim=(-2, -1)) / total).square()
    counted = present.to(maps.dtype)
    return (errors * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)


def smooth(maps: Tensor) -> Tensor:
    """Blur maps (b, n, h, w) by a 3x3 Gaussian of sigma 1, reflected at the border."""
    row = torch.exp(torch.tensor([-0.5, 0.0, -0.5], dtype=maps.dtype, device=maps.device))
    kernel = torch.outer(row, row) / row.sum() ** 2
    padded = F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None]).view_as(maps)


# --- What is asked for --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Steer:
    """What to steer images to, and how. The defaults of `bas sample --separate` and `--layout`."""

    separate: bool = False  # keep the attention of different handles apart
    layout: Layout | None = None  # draw the attention of these handles into their regions
    own_pixels: bool = False  # start from the concepts' own pixels in the layout's regions
    hide: bool = True  # let no cell outside its region look at a handle of the layout
    step_size: float | None = None  # of an update, as a share of the latents' norm; None: 0.02, with a layout 0.05
    updates: int = 1  # before each denoising step
    until: float = 0.5  # share of the denoising steps that have updates
    stop: float = 0.05  # loss at which an image needs no further update


def read_steer(config: SampleConfig) -> Steer | None:
    """Return what the settings ask for, None if nothing. InputError for a layout file that cannot be read."""
    if not (config.separate or config.layout or config.own_pixels):
        return None
    layout = read_layout(Path(config.layout)) if config.layout else None
    return Steer(config.separate, layout, config.own_pixels)


def check_steer(spec: ModelSpec, prompts: list[str], steer: Steer, latent: tuple[int, int]) -> None:
    """Check what is asked for before any weight is read. latent: (h, w). InputError for what is wrong.

    Warn of prompts in which there is nothing to do.
    """
    if steer.own_pixels and not steer.layout:
        raise InputError("--own_pixels needs a --layout: it says where to put the concepts' own pixels")
    steering = plan_steering(spec, prompts, steer, latent)
    placed = steering.placed.any(dim=1).tolist()
    for handle in steer.layout or ():
        if handle not in steering.handles:
            texts = repr(prompts[0]) if len(prompts) == 1 else "any prompt"
            removed = any(read_prompt(prompt).handles.get(handle) == 0 for prompt in prompts)
            missing = "has strength 0: give it another" if removed else f"is not in {texts}: name it"
            raise InputError(f"the layout has a region for {handle}, which {missing}, or leave it out")
    if steer.own_pixels and not all(placed):
        prompt = prompts[placed.index(False)]
        raise InputError(f"{prompt!r} names no handle of the layout, so --own_pixels has no pixels to start from")
    if steer.separate:
        pairs = (steering.present.sum(dim=1) > 1).tolist()
        warn_of_idle("--separate", prompts, pairs, "it names fewer than two handles")
    if steer.layout:
        warn_of_idle("--layout", prompts, placed, "it names no handle of the layout")


def warn_of_idle(flag: str, prompts: list[str], busy: list[bool], reason: str) -> None:
    """Warn of the prompts in which a flag has nothing to do, in one line."""
    if idle := [prompt for prompt, works in zip(prompts, busy, strict=True) if not works]:
        more = f" and in {len(idle) - 1} more prompts" if len(idle) > 1 else ""
        log.warning("%s has nothing to do in %r%s: %s", flag, idle[0], more, reason)


# --- One batch ----------------------------------------------------------------------------------------------------


@dataclass
class Steering:
    """The steering of one batch of prompts, and a record of its updates."""

    steer: Steer
    handles: tuple[str, ...]  # n, those that any of the prompts names
    columns: Tensor  # (b, n, k) 1 for the tokens of a handle, else 0
    regions: dict[tuple[int, int], Tensor]  # (n, h, w) bool for each grid of the UNet; all False without a region
    grid: tuple[int, int]  # of the maps that are read
    segments: dict[str, Segment] | None = None  # the concepts' own pixels, by handle
    editable: Tensor | None = None  # (1, 1, h, w) bool: the latents that may move; None: all
    losses: list[Tensor] = field(default_factory=list)  # (b,) before each update
    updated: int = 0  # updates that moved an image's latents
    skipped: int = 0  # updates left out because their gradient was not finite

    @torch.inference_mode(False)
    def to(self, device: torch.device) -> None:
        """Move the tensors to a device, in place."""
        self.columns = self.columns.to(device)
        self.regions = {grid: inside.to(device) for grid, inside in self.regions.items()}

    @property
    def present(self) -> Tensor:
        """Which handles the prompts name. (b, n) bool"""
        return self.columns.any(dim=-1)

    @property
    def placed(self) -> Tensor:
        """Which of them have a region. (b, n) bool"""
        return self.present & self.regions[self.grid].flatten(1).any(dim=1)

    def due(self, i: int, steps: int) -> bool:
        """Return whether denoising step i of `steps` has an update, for any image of the batch."""
        pairs = self.steer.separate and bool((self.present.sum(dim=1) > 1).any())
        return i < self.steer.until * steps and (pairs or bool(self.placed.any()))

    @cached_property
    def hide(self) -> Hide | None:
        """Mark the handles' tokens that each cell may not look at, by grid: those of a layout, outside their regions.

        A region that covers no cell of a coarse grid hides nothing there.
        """
        hidden = {}
        for grid, inside in self.regions.items() if self.steer.hide else ():
            outside = ~inside.flatten(1) & inside.flatten(1).any(dim=1, keepdim=True)
            tokens = torch.einsum("bnk,nc->bck", self.columns, outside.to(self.columns.dtype)) > 0
            if tokens.any():
                hidden[grid] = tokens
        return hidden or None

    def update(self, models: Models, z: Tensor, t: int, context: Conditioning) -> Tensor:
        """Move latents down the gradient of their loss, each image by a share of its own norm. -> (b, c, h, w) float32

        z: (b, c, h, w); context: b rows. An image stays where its loss is at `stop` or below, and where its gradient
        is not finite.
        """
        share = self.steer.step_size
        if share is None:
            share = LAYOUT_STEP if self.steer.layout else SEPARATE_STEP
        for _ in range(self.steer.updates):
            losses, gradient = self.gradient(models, z, t, context)
            if self.editable is not None:
                gradient = gradient * self.editable
            length = gradient.flatten(1).norm(dim=1)
            norm = (z if self.editable is None else z * self.editable).flatten(1).norm(dim=1)
            finite = losses.isfinite() & length.isfinite()
            moves = finite & (losses > self.steer.stop) & (length > 0)
            step = (share * norm / length)[:, None, None, None] * gradient
            z = torch.where(moves[:, None, None, None], z - step, z)
            self.losses.append(losses.cpu())
            self.updated += int(moves.sum())
            self.skipped += int((~finite).sum())
        return z

    def gradient(self, models: Models, z: Tensor, t: int, context: Conditioning) -> tuple[Tensor, Tensor]:
        """Return the losses (b,) of latents at timestep t, and their gradient (b, c, h, w), LOSS_SCALE times as large.

        The weights take part without a gradient. Inference tensors are cloned: no backward pass can save them.
        """
        dtype = models.unet.conv_in.weight.dtype
        with torch.inference_mode(False), torch.enable_grad():
            z = z.clone().requires_grad_()
            states, pooled = context.each(lambda tensor: tensor.clone().to(dtype))
            weights = {n: p.clone() if p.is_inference() else p.detach() for n, p in models.unet.named_parameters()}
            timesteps = torch.full((len(z),), t, device=z.device)
            inputs = (z.to(dtype), timesteps, states, self.grid, None, pooled)
            losses = self.loss(average_maps(functional_call(models.unet, weights, inputs).maps))
            (gradient,) = torch.autograd.grad(LOSS_SCALE * losses.sum(), z)
        return losses.detach(), gradient

    def loss(self, average: Tensor) -> Tensor:
        """Return the loss of each image, those that are asked for added. average: (b, h, w, k) -> (b,)"""
        maps = torch.einsum("bhwk,bnk->bnhw", average, self.columns.to(average.dtype))
        losses = maps.new_zeros(len(maps))
        if self.steer.separate:
            losses = losses + overlap_loss(maps, self.present)
        if self.steer.layout:
            losses = losses + inside_loss(maps, self.regions[self.grid], self.placed)
        return losses


@torch.inference_mode(False)  # its tensors take part in backward passes
def plan_steering(spec: ModelSpec, prompts: list[str], steer: Steer, latent: tuple[int, int]) -> Steering:
    """Find the handles' tokens in a batch of prompts, and the layout's regions on all grids. latent: (h, w)

    A handle that a prompt names several times is one handle; one of strength 0 is not named. InputError if no layer
    has the maps' grid at this size, for a wrong layout, and if the run does not hold the pixels that are asked for.
    """
    grid, size = maps_grid(spec, latent), (latent[1] * spec.vae.factor, latent[0] * spec.vae.factor)
    layout, known = steer.layout or {}, known_handles(spec.tokenizer)
    check_layout(layout, known, size, grid)
    reads = [read_prompt(prompt) for prompt in prompts]
    rows = tokenize(spec.tokenizer, [read.text for read in reads])
    found = [find_places(spec.tokenizer, row.tolist(), words=False) for row in rows]
    named = [
        {handle: positions for handle, positions in places.items() if read.handles.get(handle) != 0}
        for places, read in zip(found, reads, strict=True)
    ]
    handles = tuple(handle for handle in known if any(handle in places for places in named))
    columns = torch.zeros(len(prompts), len(handles), rows.shape[1])
    for row, places in enumerate(named):
        for handle, positions in places.items():
            columns[row, handles.index(handle), positions] = 1
    regions = {grid: torch.zeros(len(handles), *grid, dtype=torch.bool) for grid in spec.grids(*latent)}
    for i, handle in enumerate(handles):
        for (h, w), inside in regions.items() if handle in layout else ():
            inside[i] = cells_inside(layout[handle], h, w)
    segments = read_segments(spec, tuple(h for h in handles if h in layout)) if steer.own_pixels else None
    return Steering(steer, handles, columns, regions, grid, segments)


def maps_grid(spec: ModelSpec, latent: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) of the maps that the attention loss read. InputError if no layer has them here."""
    try:
        grid = attention_grid(spec, latent, trained_grid(spec.source) if spec.source else None)
    except InputError:
        grid = None
    if grid is None or min(grid) < 2:
        size = f"{latent[1] * spec.vae.factor}x{latent[0] * spec.vae.factor}"
        raise InputError(
            f"--separate and --layout read attention on the grid of training, which images of {size} do not have: "
            "ask for another --height and --width"
        )
    return grid
