"""The scene as a method sees it: unchanged, or as the collages that the paper's baselines are trained on.

The baselines TI-m, DB-m and CD-m (section 4.1) cannot read masks. For them random subsets of the concepts are cut out
and pasted on random plain colours, each an image with its own prompt. The naive TI and DB (appendix) see the image
unchanged, with one prompt that names every handle.
"""

from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from bas.config import TrainConfig
from bas.data.scene import ExtraImage, Scene, sample_subset, union
from bas.data.scene_folder import load_scene
from bas.io.images import strips, to_floats
from bas.presets import METHODS


def scene_for_method(config: TrainConfig) -> Scene:
    """Return the scene of a training, as its method sees it. Raises InputError as `load_scene` does.

    Close-ups are cut around masks. A collection may sample them; a naive baseline uses no mask and so no close-up.
    """
    if config.method not in METHODS:
        return load_scene(config)
    if METHODS[config.method].collection:
        return collect(load_scene(config), config.collection_size, config.seed)
    return load_scene(replace(config, close_ups=False))


def collect(scene: Scene, count: int, seed: int) -> Scene:
    """Return a scene of `count` collages. The first shows all concepts, each other one a subset from union sampling.

    Of several images one is sampled for each collage, then a subset of the concepts that it shows.
    """
    generator = torch.Generator().manual_seed(seed)
    sources = scene.images
    first = paste(scene.image, scene.masks, generator)
    collages = []
    for i in range(1, count):
        image, masks = sources[int(torch.randint(len(sources), (), generator=generator))]
        shown = sorted(masks)
        chosen = {shown[j]: masks[shown[j]] for j in sample_subset(len(shown), "union", generator)}
        collages.append(ExtraImage(str(i), paste(image, list(chosen.values()), generator), chosen))
    return Scene(first, scene.masks, scene.handles, scene.words, tuple(collages))


def paste(image: Image.Image, masks: list[np.ndarray], generator: torch.Generator) -> Image.Image:
    """Paste what lies inside any of the masks, (H, W) uint8, on a plain colour, sampled uniformly from RGB.

    Soft edges mix.
    """
    colour, mixed = torch.randint(256, (3,), generator=generator).numpy(), image.copy()
    for top, strip in strips(image):
        inside = to_floats(union(mask[top : top + strip.height] for mask in masks))[..., None]
        pasted = np.asarray(strip, dtype=np.float32) * inside + colour * (1 - inside)
        mixed.paste(Image.fromarray(pasted.round().astype(np.uint8)), (0, top))
    return mixed
