"""Galleries of a run: all its concepts under new seeds, and every combination of them in many contexts.

These are the paper's image variations and entangled scene decomposition (section 4), and the prompts of its
evaluation (appendix).
"""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from bas.config import SampleConfig
from bas.data.scene import subset_prompt
from bas.errors import InputError
from bas.io.figures import grid
from bas.io.images import save_image
from bas.models.bundle import Models, ModelSpec
from bas.runtime.progress import ImageProgress
from bas.sampling.own_pixels import steps_taken
from bas.sampling.sampler import as_record, sample_each

CONTEXTS = (  # they follow "a photo of <asset0> and <asset1>" in the paper's evaluation
    "at the beach",
    "in the jungle",
    "in the snow",
    "in the street",
    "on top of a pink fabric",
    "on top of a wooden floor",
    "with a city in the background",
    "with a mountain in the background",
    "with the Eiffel tower in the background",
    "floating on top of water",
)
GRID, FIRST_IMAGE = "grid.png", "0000.png"
CELL = 192  # pixels of one image on the grid


def subsets(handles: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return every non-empty subset of the handles, single ones first."""
    return [subset for size in range(1, len(handles) + 1) for subset in combinations(handles, size)]


def vary(models: Models, folder: Path, config: SampleConfig, **about: Any) -> Path:
    """Generate all concepts of a run together, `num_images` times, as single files and on one near-square grid.

    about: further settings of the images. Returns the grid's path. InputError for a model without handles.
    """
    prompt = all_together(models)
    images = generate_files(models, [prompt], folder, config, **about)
    columns = math.ceil(math.sqrt(len(images)))
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    labels = [[f"seed {config.seed + i}" for i in row] for row in rows]
    return save_grid([[images[i] for i in row] for row in rows], labels, prompt, folder)


def explore(models: Models, folder: Path, contexts: tuple[str, ...], config: SampleConfig, **about: Any) -> Path:
    """Generate every non-empty subset of a run's concepts in every context, as files and on a grid, a row per subset.

    about: further settings of the images. Returns the grid's path. InputError for a model without handles.
    """
    prompts = combinations_in(models, contexts)
    images = generate_files(models, prompts, folder, config, **about)
    texts = [prompt for prompt in prompts for _ in range(config.num_images)]
    columns = len(contexts) * config.num_images
    starts = range(0, len(images), columns)
    rows, labels = [images[i : i + columns] for i in starts], [texts[i : i + columns] for i in starts]
    return save_grid(rows, labels, f"{len(prompts) // len(contexts)} combinations in {len(contexts)} contexts", folder)


def combinations_in(models: Models | ModelSpec, contexts: tuple[str, ...]) -> list[str]:
    """Return the prompts of `explore`, context by context within each subset."""
    return [f"{subset_prompt(subset)} {context}" for subset in subsets(handles_of(models)) for context in contexts]


def all_together(models: Models | ModelSpec) -> str:
    """Return the prompt of `vary`."""
    return subset_prompt(handles_of(models))


def handles_of(models: Models | ModelSpec) -> tuple[str, ...]:
    """Return the learnt concepts of a model. InputError if there are none."""
    if not models.handles:
        raise InputError(f"{models.source} has no handles: give the folder of a finished `bas train`")
    return models.handles


def generate_files(
    models: Models, prompts: list[str], folder: Path, config: SampleConfig, **about: Any
) -> list[Image.Image]:
    """Generate images and save each with its settings as soon as it is done: FOLDER/0000.png, 0001.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(prompt, config.seed + i) for prompt in prompts for i in range(config.num_images)]
    progress, images = ImageProgress(len(jobs), steps_taken(config)), []
    for (prompt, seed), image in zip(jobs, sample_each(models, prompts, config, progress), strict=True):
        record = as_record(models, config) | {"prompt": prompt, "seed": seed, **about}
        save_image(image, folder / f"{len(images):04d}.png", record)
        images.append(image)
    return images


def save_grid(rows: list[list[Image.Image]], labels: list[list[str]], title: str, folder: Path) -> Path:
    """Write FOLDER/grid.png and return its path."""
    save_image(grid(rows, labels, CELL, title), folder / GRID)
    return folder / GRID
