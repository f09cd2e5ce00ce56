"""What the losses see of a scene's masks: their size on both grids, and where they overlap, as a table and an image.

Reconstruction (paper, eq. 1) reads the masks on the latent grid, attention (eq. 2) on a quarter of it. Both take one
pixel for each cell (nearest neighbour), so a thin or small concept can vanish there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from torch import Tensor

from bas.config import TrainConfig
from bas.data.batches import attention_grid, crop_message, overlap_message, vanishing_message
from bas.data.scene import LARGE_OVERLAP, Scene, overlaps
from bas.io.figures import grid, tint_masks
from bas.io.images import to_image
from bas.losses import resize_mask
from bas.models.bundle import ModelSpec
from bas.models.text import check_handles, word_pieces

CELL = 256  # pixels of one image on the sheet
TITLES = ("", "handle", "word", "pieces", "coverage", "loss grid", "attention grid", "overlaps")


@dataclass(frozen=True)
class MaskView:
    """One concept in one image, as the model sees it."""

    number: int  # of the concept
    handle: str
    word: str | None
    pieces: tuple[str, ...]  # of the word, as the tokenizer cuts it
    coverage: float  # share of the image
    latent: np.ndarray  # (h, w) the mask on the loss grid
    attention: np.ndarray  # (gh, gw) the mask on the attention grid
    vanishes: tuple[str, ...]  # grids on which nothing is left of it, in the image or its mirror image
    overlaps: dict[int, float]  # other concept -> share of this mask that lies in the other
    cut_off: str | None  # what is said of it if it lies outside the crop


@dataclass(frozen=True)
class SceneView:
    """An image with the concepts that it shows, as the model sees it. The first image has the extra ones."""

    name: str  # of an extra image's folder; "" for the first
    image: Image.Image  # resized and cropped as for training
    masks: np.ndarray  # (N, H, W) the same, one for each of its concepts
    concepts: tuple[MaskView, ...]
    extra: tuple["SceneView", ...] = ()


def view_scene(scene: Scene, spec: ModelSpec, config: TrainConfig) -> SceneView:
    """Bring a scene to a model as training does, without its weights.

    Raises InputError for what training would reject: a size, a grid, a handle or a word.
    """
    side = config.resolution or spec.resolution
    spec.check_side("--resolution", side)
    pixels, masks = scene.tensors(side, spec.size_multiple, config.center_crop)
    check_handles(spec.tokenizer, scene.handles)
    views = []
    height, width = pixels.shape[1:]
    for extra in scene.extra_images:
        other, layers = extra.tensors(height, width, len(scene))
        views.append(_view_image(extra.name, extra.image.size, other, layers, sorted(extra.masks), scene, spec, config))
    first = _view_image("", scene.image.size, pixels, masks, range(len(scene)), scene, spec, config)
    return replace(first, extra=tuple(views))


def _view_image(
    name: str,
    size: tuple[int, int],
    pixels: Tensor,
    masks: Tensor,
    shown: Iterable[int],
    scene: Scene,
    spec: ModelSpec,
    config: TrainConfig,
) -> SceneView:
    """Return one image of (W, H) `size`, cropped as for training.

    pixels: (3, H, W) in [-1, 1]; masks: (N, H, W) of all concepts; shown: those that it shows.
    """
    shown = list(shown)
    pieces = [word_pieces(spec.tokenizer, word) if word else [] for word in scene.words]
    h, w = (side // spec.vae.factor for side in pixels.shape[-2:])
    grids = {"loss grid": (h, w), "attention grid": attention_grid(spec, (h, w), config.attention_grid)}
    latent, attention = (resize_mask(masks, *size).numpy() for size in grids.values())
    concepts = tuple(
        MaskView(
            number=i,
            handle=scene.handles[i],
            word=scene.words[i],
            pieces=tuple(p.removesuffix("</w>") for p in spec.tokenizer.convert_ids_to_tokens(pieces[i])),
            coverage=float(masks[i].mean()),
            latent=latent[i],
            attention=attention[i],
            vanishes=tuple(name for name, size in grids.items() if _vanishes(masks[i], size)),
            overlaps=overlaps(masks.numpy(), i),
            cut_off=crop_message(masks[i], size, _named(scene.handles[i], name), config, extra=bool(name)),
        )
        for i in shown
    )
    return SceneView(name, to_image(pixels), masks.numpy()[shown], concepts)


def _vanishes(mask: Tensor, size: tuple[int, int]) -> bool:
    """Return whether a mask (H, W) is empty on a grid, as it is or mirrored, as half of the steps see it."""
    return any(resize_mask(view, *size).max() == 0 for view in (mask, mask.flip(-1)))


def _named(handle: str, image: str) -> str:
    """Return a handle for messages, with the extra image that it stands in."""
    return f"{handle} in extra image {image}" if image else handle


def warnings(view: SceneView) -> list[str]:
    """List what is allowed but likely to give a bad result, a line each. Words are judged in the first image alone."""
    lines, handles = [], {concept.number: concept.handle for concept in view.concepts}
    for concept in view.concepts:
        name = _named(concept.handle, view.name)
        if concept.cut_off:
            lines.append(concept.cut_off)
        for where in () if concept.cut_off else concept.vanishes:
            h, w = (concept.latent if where == "loss grid" else concept.attention).shape
            lines.append(vanishing_message(name, where, h, w))
        for j, share in concept.overlaps.items():
            if share >= LARGE_OVERLAP:
                lines.append(overlap_message(name, handles[j], share))
        if view.name:
            continue
        if len(concept.pieces) > 1:
            lines.append(f"'{concept.word}' is {len(concept.pieces)} pieces: {concept.handle} starts from their mean")
        if concept.word is None:
            lines.append(f"{concept.handle} has no initial word: it starts from a random row; name one in scene.json")
    return lines + [line for other in view.extra for line in warnings(other)]


def table(view: SceneView) -> str:
    """Return one aligned row for each concept, and a further table for each extra image.

    Cells are counted by the mask's value, so soft edges count in part.
    """
    rows: list[tuple[str, ...]] = [TITLES]
    for c in view.concepts:
        cells = [f"{grid.sum():.4g} of {grid.size}" for grid in (c.latent, c.attention)]
        overlaps = ", ".join(f"{share:.0%} in {j}" for j, share in c.overlaps.items()) or "-"
        pieces = "|".join(c.pieces) or "-"
        rows.append((str(c.number), c.handle, c.word or "-", pieces, f"{c.coverage:.1%}", *cells, overlaps))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return lines + "".join(f"\n\nextra image {other.name}\n{table(other)}" for other in view.extra)


def sheet(view: SceneView) -> Image.Image:
    """Draw all masks over their image: as they were given, on the loss grid, and on the attention grid."""
    rows, labels = [], []
    for part in (view, *view.extra):
        handles = {c.number: c.handle for c in part.concepts}
        kinds = [
            ("", dict(zip(handles, part.masks, strict=True))),
            ("loss grid", {c.number: c.latent for c in part.concepts}),
            ("attention grid", {c.number: c.attention for c in part.concepts}),
        ]
        for kind, masks in kinds:
            h, w = next(iter(masks.values())).shape
            size = f"{kind}, {w}x{h} cells" if kind else f"{w}x{h} pixels"
            title = f"extra image {part.name}: all, {size}" if part.name else f"all, {size}"
            rows.append([_overlay(part.image, masks), *(_overlay(part.image, {i: m}) for i, m in masks.items())])
            labels.append([title, *(f"{handles[i]}: {mask.mean():.1%}" for i, mask in masks.items())])
    return grid(rows, labels, CELL)


def _overlay(image: Image.Image, masks: dict[int, np.ndarray]) -> Image.Image:
    """Masks of any grid over the image, enlarged so that each cell is a visible square."""
    scale = -(-CELL // min(image.size))
    size = (image.width * scale, image.height * scale)
    cells = {i: np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for i, mask in masks.items()}
    return tint_masks(image.resize(size, Image.Resampling.BICUBIC), cells)
