"""Where each handle looks while a picture is drawn: cross-attention maps, averaged over steps, heads and layers.

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
from bas.io.files import write_json
from bas.io.images import save_image, to_images
from bas.io.run_files import CONCEPTS, read_concepts
from bas.losses import handle_maps
from bas.models.bundle import Models, ModelSpec
from bas.models.text import known_handles, tokenize
from bas.pretrained.hub import read_model_row
from bas.sampling.prompt_strength import read_strengths
from bas.sampling.sampler import check_settings, decode, generate_with_maps, latent_shape

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CELL = 192  # pixels of one picture on the sheet


@dataclass(frozen=True)
class Attention:
    """One picture, and where the words of its prompt looked while it was drawn."""

    picture: Image.Image
    names: tuple[str, ...]  # n handles or words
    maps: np.ndarray  # (n, gh, gw) float32: the mean share of a cell's attention that goes to each


@torch.inference_mode()
def attend(
    models: Models, prompt: str, config: SampleConfig, side: int | None = None, words: bool = False
) -> Attention:
    """Draw one picture and keep the attention of each handle of the prompt, with `words` that of every word.

    side: cells along the shorter side of the maps; None is as the model was trained, else a quarter of the latent's.
    Raises InputError as `plan_maps` does.
    """
    places, size = plan_maps(models.spec, prompt, config, side, words)
    latents, average = generate_with_maps([prompt], [config.seed], models, config, size)
    (picture,) = to_images(decode(models, latents))
    columns = [
        handle_maps(average, torch.tensor([positions], device=average.device))[0].mean(dim=0)
        for positions in places.values()
    ]
    return Attention(picture, tuple(places), torch.stack(columns).cpu().numpy())


def plan_maps(
    spec: ModelSpec, prompt: str, config: SampleConfig, side: int | None, words: bool
) -> tuple[dict[str, list[int]], tuple[int, int]]:
    """Token positions by name, and (gh, gw) of the maps. Reads no weight.

    Raises InputError for a prompt without a handle, unknown handles, and a grid without cross-attention.
    """
    check_settings(spec, config)
    (ids,) = tokenize(spec.tokenizer, [read_strengths(prompt)[0]])
    places = find_places(spec.tokenizer, ids.tolist(), words)
    if not places:
        raise InputError(f"{prompt!r} holds no handle: name one, or ask for all --words")
    side = side or (trained_grid(spec.source) if spec.source else None)
    return places, attention_grid(spec, latent_shape(spec, config)[1:], side)


def trained_grid(path: Path) -> int | None:
    """The `side` of the maps that a model's attention loss reads, as its run or its own row of settings notes them."""
    if (path / CONCEPTS).is_file():
        _, note = read_concepts(path)
        return note["config"]["attention_grid"]
    return (read_model_row(path) or {}).get("attention_grid")


def find_places(tokenizer: CLIPTokenizer, ids: list[int], words: bool) -> dict[str, list[int]]:
    """Where each handle of a prompt stands, with `words` each word too. ids: (77,) -> token positions by name

    A word of several pieces has several positions; so has a name that comes twice.
    """
    handles, found, word = known_handles(tokenizer), {}, []
    tokens = tokenizer.convert_ids_to_tokens(ids[: ids.index(tokenizer.eos_token_id)])
    for i, token in enumerate(tokens[1:], start=1):
        word.append(i)
        if token in handles or token.endswith("</w>"):
            name = "".join(tokens[j] for j in word).removesuffix("</w>")
            if words or token in handles:
                found[name] = found.get(name, []) + word
            word = []
    return found


def write_attention(attention: Attention, handles: tuple[str, ...], folder: Path, settings: dict) -> Path:
    """Write picture.png with the settings that made it, for each name mapN.npy and its overlay, maps.json, sheet.png.

    A handle has the colour that it has in all pictures of its run. Returns the path of the sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_image(attention.picture, folder / "picture.png", settings)
    others = [name for name in attention.names if name not in handles]
    colours = [(*handles, *others).index(name) for name in attention.names]
    overlays = [overlay_attention(m, attention.picture, c) for m, c in zip(attention.maps, colours, strict=True)]
    for i, (values, overlay) in enumerate(zip(attention.maps, overlays, strict=True)):
        np.save(folder / f"map{i}.npy", values, allow_pickle=False)
        save_image(overlay, folder / f"map{i}.png")
    write_json(folder / "maps.json", {f"map{i}": name for i, name in enumerate(attention.names)})
    labels = ["picture", *attention.names]
    save_image(grid([[attention.picture, *overlays]], [labels], CELL), folder / "sheet.png")
    return folder / "sheet.png"
