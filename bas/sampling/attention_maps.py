"""Where each handle looks while an image is generated: cross-attention averaged over steps, heads and layers.

The maps are those that the attention loss reads in training (paper, eq. 2): the same layers, on the same grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from bas.config import SampleConfig
from bas.data.batches import attention_grid
from bas.errors import InputError
from bas.io.figures import grid, overlay_attention
from bas.io.images import save_image, to_images
from bas.io.json_files import write_json
from bas.io.run_files import CONCEPTS, read_concepts
from bas.io.tensors import write_array
from bas.losses import handle_maps
from bas.models.bundle import Models, ModelSpec
from bas.models.text import find_words, known_handles, tokenize
from bas.pretrained.hub import read_model_row
from bas.runtime.progress import ImageProgress
from bas.sampling.prompt_strength import read_prompt
from bas.sampling.sampler import check_settings, decode, generate_with_maps, latent_shape

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CELL = 192  # pixels of one image on the sheet


@dataclass(frozen=True)
class Attention:
    """One image, and where the words of its prompt looked while it was generated."""

    image: Image.Image
    names: tuple[str, ...]  # n handles or words
    maps: np.ndarray  # (n, gh, gw) float32: the mean share of a cell's attention that goes to each


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

    side: cells along the shorter side of the maps; None is as the model was trained, else a quarter of the latent's.
    InputError as in `plan_maps`, NotFiniteError as in `denoise`.
    """
    places, size = plan_maps(models.spec, prompt, config, side, words)
    latents, average = generate_with_maps([prompt], [config.seed], models, config, size, progress)
    (image,) = to_images(decode(models, latents))
    columns = [
        handle_maps(average, torch.tensor([positions], device=average.device))[0].mean(dim=0)
        for positions in places.values()
    ]
    return Attention(image, tuple(places), torch.stack(columns).cpu().numpy())


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
    side = side or (trained_grid(spec.source) if spec.source else None)
    return places, attention_grid(spec, latent_shape(spec, config)[1:], side)


def trained_grid(path: Path) -> int | None:
    """The `side` of the maps that the attention loss of a model read, from its run or from its own settings."""
    if (path / CONCEPTS).is_file():
        _, metadata = read_concepts(path)
        return metadata["config"]["attention_grid"]
    return (read_model_row(path) or {}).get("attention_grid")


def find_places(tokenizer: CLIPTokenizer, ids: list[int], words: bool) -> dict[str, list[int]]:
    """Find where each handle of a prompt stands, with `words` each word too. ids: (77,) -> token positions by name

    A word of several pieces has several positions, and so have a handle of several vectors and a name that stands
    twice.
    """
    handles = known_handles(tokenizer)
    found: dict[str, list[int]] = {}
    for name, positions in find_words(tokenizer, ids):
        if words or name in handles:
            found.setdefault(name, []).extend(positions)
    return found


def write_attention(attention: Attention, handles: tuple[str, ...], folder: Path, settings: dict) -> Path:
    """Write picture.png with its settings, for each name mapN.npy and its overlay mapN.png, maps.json and sheet.png.

    A handle has the colour that it has in all figures of its run. Returns the path of the sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_image(attention.image, folder / "picture.png", settings)
    others = [name for name in attention.names if name not in handles]
    colours = [(*handles, *others).index(name) for name in attention.names]
    overlays = [overlay_attention(m, attention.image, c) for m, c in zip(attention.maps, colours, strict=True)]
    for i, (values, overlay) in enumerate(zip(attention.maps, overlays, strict=True)):
        write_array(folder / f"map{i}.npy", values)
        save_image(overlay, folder / f"map{i}.png")
    write_json(folder / "maps.json", {f"map{i}": name for i, name in enumerate(attention.names)})
    labels = ["image", *attention.names]
    save_image(grid([[attention.image, *overlays]], [labels], CELL), folder / "sheet.png")
    return folder / "sheet.png"
