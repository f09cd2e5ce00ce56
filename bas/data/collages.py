"""What a method learns from: the scene itself, or the collection of pictures that a baseline of the paper is given.

The baselines TI-m, DB-m and CD-m (section 4.1) cannot read masks. For them the masks are used beforehand: random
subsets of the concepts are cut out and pasted on random plain colours, each a picture of its own with its own prompt.
The naive TI and DB (appendix) see the photograph as it is, under one prompt that names every handle.
"""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from bas.config import METHODS, TrainConfig
from bas.data.scene import Scene, Shot, draw_subset, load_scene


def read_scene(config: TrainConfig) -> Scene:
    """The scene of a training, as its method is shown it. Raises InputError as `load_scene` does.

    Close-ups are cut around masks: a collection may draw from them, a naive baseline, which knows no mask, does not.
    """
    if config.method not in METHODS:
        return load_scene(config)
    if METHODS[config.method].collection:
        return collect(load_scene(config), config.collection_size, config.seed)
    return load_scene(replace(config, close_ups=False))


def collect(scene: Scene, count: int, seed: int) -> Scene:
    """A scene of `count` pictures of pasted concepts. The first shows them all, each other a subset as `bas` draws it.

    Of several photographs one is drawn for each picture, then a subset of what it shows.
    """
    generator = torch.Generator().manual_seed(seed)
    sources = scene.photographs
    first = paste(scene.picture, scene.masks, generator)
    shots = []
    for i in range(1, count):
        picture, masks = sources[int(torch.randint(len(sources), (), generator=generator))]
        shown = sorted(masks)
        chosen = {shown[j]: masks[shown[j]] for j in draw_subset(len(shown), "union", generator)}
        shots.append(Shot(str(i), paste(picture, list(chosen.values()), generator), chosen))
    return Scene(first, scene.masks, scene.handles, scene.words, tuple(shots))


def paste(picture: Image.Image, masks: list[np.ndarray], generator: torch.Generator) -> Image.Image:
    """What lies inside any of the masks (H, W), on a plain colour drawn uniformly from RGB; soft edges mix."""
    colour = torch.randint(256, (3,), generator=generator).numpy()
    inside = np.maximum.reduce(masks)[..., None]
    mixed = np.asarray(picture, dtype=np.float32) * inside + colour * (1 - inside)
    return Image.fromarray(mixed.round().astype(np.uint8))
