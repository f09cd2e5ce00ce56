"""Where each handle looks while an image is generated: cross-attention averaged over steps, heads and layers.

The maps are those that the attention loss reads in training (paper, eq. 2): the same layers, on the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bas.config import STEERING, SampleConfig, setting_rows
from bas.data.batches import attention_grid
from bas.errors import InputError
from bas.io.figures import grid, overlay_attention
from bas.io.images import save_image, to_images
from bas.io.json_files import write_json
from bas.io.tensors import write_array
from bas.losses import handle_maps
from bas.models.bundle import Models, ModelSpec
from bas.models.text import find_places, tokenize
from bas.pretrained.hub import trained_grid
from bas.runtime.progress import ImageProgress
from bas.sampling.layout import cells_inside
from bas.sampling.prompt_strength import read_prompt
from bas.sampling.sampler import check_settings, decode, generate_with_maps, latent_shape
from bas.sampling.steer import Steering, overlap_loss, plan_steering, read_steer

CELL = 192  # pixels of one image on the sheet


@dataclass(frozen=True)
class Attention:
    """One image, and where the words of its prompt looked while it was generated."""

    image: Image.Image
    names: tuple[str, ...]  # n handles or words
    maps: np.ndarray  # (n, gh, gw) float32: the mean share of a cell's attention that goes to each
    plain: Attention | None = None  # the same without steering, if there was any
    steering: Steering | None = None


@torch.inference_mode()
def attend(
    models: Models,
    prompt: str,
    config: SampleConfig,
    side: int | None = None,
    words: bool = False,
    progress: ImageProgress | None = None,
) -> Attention:
    """Generate one image and keep the attention of each handle of the prompt, with `words` that of every word.

    An image that is steered is generated without steering too, to compare.

    side: cells along the shorter side of the maps; None is as the model was trained, else a quarter of the latent's.
    InputError as in `plan_maps`, NotFiniteError as in `denoise`.
    """
    places, size = plan_maps(models.spec, prompt, config, side, words)
    steering = plain = None
    if steer := read_steer(config):
        steering = plan_steering(models.spec, [prompt], steer, latent_shape(models.spec, config)[1:])
        plain = attend(models, prompt, without_steering(config), side, words, progress)
    latents, average = generate_with_maps([prompt], [config.seed], models, config, size, progress, steering)
    (image,) = to_images(decode(models, latents))
    columns = [
        handle_maps(average, torch.tensor([positions], device=average.device))[0].mean(dim=0)
        for positions in places.values()
    ]
    return Attention(image, tuple(places), torch.stack(columns).cpu().numpy(), plain, steering)


def without_steering(config: SampleConfig) -> SampleConfig:
    """Return the same settings, without those of steering."""
    return config.changed(**{name: setting_rows(SampleConfig)[name].default for name in STEERING})


def compare(attention: Attention) -> dict[str, Any]:
    """Compare an image with and without steering: the losses before each update, counts of updates, and the maps.

    `overlap` is that of the handles' maps (`overlap_loss`); `inside` the share of each map in its region of the layout.
    """
    plain, steering = attention.plain, attention.steering
    if plain is None or steering is None:
        raise ValueError("the image was not steered")
    handles = [name for name in attention.names if name in steering.handles]
    layout, overlap = steering.steer.layout or {}, {}
    inside = {handle: {} for handle in handles if handle in layout}
    for kind, each in (("plain", plain), ("steered", attention)):
        maps = torch.from_numpy(each.maps[[each.names.index(handle) for handle in handles]])[None]
        present = torch.ones(maps.shape[:2], dtype=torch.bool)
        overlap[kind] = overlap_loss(maps, present).item() if len(handles) > 1 else 0.0
        for handle in inside:
            values = maps[0, handles.index(handle)]
            region = cells_inside(layout[handle], *values.shape)
            inside[handle][kind] = (values[region].sum() / values.sum()).item()
    losses = [losses.item() for losses in steering.losses]
    counts = {"updates": steering.updated, "skipped": steering.skipped}
    return {"losses": losses, **counts, "overlap": overlap, "inside": inside}


def plan_maps(
    spec: ModelSpec, prompt: str, config: SampleConfig, side: int | None, words: bool
) -> tuple[dict[str, list[int]], tuple[int, int]]:
    """Find the token positions by name, and (gh, gw) of the maps, before any weight is read.

    InputError for a prompt without a handle, for unknown handles, and for a grid without cross-attention.
    """
    check_settings(spec, config)
    (ids,) = tokenize(spec.tokenizer, [read_prompt(prompt).text])
    places = find_places(spec.tokenizer, ids.tolist(), words)
    if not places:
        raise InputError(f"{prompt!r} holds no handle: name one, or ask for all --words")
    if side == 0:
        raise InputError("--attention_grid 0: name how many cells the shorter side has, or leave it out")
    side = side or (trained_grid(spec.source) if spec.source else None)
    return places, attention_grid(spec, latent_shape(spec, config)[1:], side)


def write_attention(attention: Attention, handles: tuple[str, ...], folder: Path, settings: dict) -> Path:
    """Write picture.png with its settings, for each name mapN.npy and its overlay mapN.png, maps.json and sheet.png.

    A handle has the colour that it has in all figures of its run. A steered image has a second row on the sheet, of the
    image without steering, and steering.json with the numbers of `compare`. Returns the path of the sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_image(attention.image, folder / "picture.png", settings)
    others = [name for name in attention.names if name not in handles]
    colours = [(*handles, *others).index(name) for name in attention.names]
    overlays = overlay(attention, colours)
    for i, (values, image) in enumerate(zip(attention.maps, overlays, strict=True)):
        write_array(folder / f"map{i}.npy", values)
        save_image(image, folder / f"map{i}.png")
    write_json(folder / "maps.json", {f"map{i}": name for i, name in enumerate(attention.names)})
    rows, labels = [[attention.image, *overlays]], [["image", *attention.names]]
    if attention.plain:
        rows.append([attention.plain.image, *overlay(attention.plain, colours)])
        labels.append([f"{label}, without steering" for label in labels[0]])
        write_json(folder / "steering.json", compare(attention))
    save_image(grid(rows, labels, CELL), folder / "sheet.png")
    return folder / "sheet.png"


def overlay(attention: Attention, colours: list[int]) -> list[Image.Image]:
    """Lay each map over its image, in the colours of these concepts."""
    return [overlay_attention(m, attention.image, c) for m, c in zip(attention.maps, colours, strict=True)]
