"""Local editing by example: Blended Latent Diffusion (Avrahami, Fried and Lischinski 2023) with learnt concepts.

Inside the mask the latents follow the prompt. Outside, after every step, they are those of the image itself, noised to
the level of that step (algorithm 1 there). At the end the pixels outside are restored exactly.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bas.config import EditConfig
from bas.data.mask_formats import mask_in_file
from bas.data.scene_folder import match_size, warn_if_turned
from bas.errors import MAX_SIDE, InputError
from bas.io.images import fit, pixels, read_orientation, to_floats, to_images
from bas.io.json_files import read_content
from bas.io.settings_file import read_toml
from bas.models.bundle import Models, ModelSpec
from bas.models.unet import AttentionMap
from bas.runtime.progress import ImageProgress
from bas.sampling.layout import cells_inside, read_layout
from bas.sampling.prompt_strength import encode_negative, encode_prompts
from bas.sampling.sampler import (
    check_request,
    decode,
    denoise,
    denoising_timesteps,
    encode,
    latent_shape,
    standard_normal,
)
from bas.sampling.steer import Steer, plan_steering, read_steer
from bas.schedulers import add_noise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Region:
    """One place to edit, and the prompt for it."""

    mask: np.ndarray  # (H, W) float32 in [0, 1] at the image's size, 1 where it may change
    prompt: str
    file: Path | None = None  # of the mask


# --- Reading the regions ------------------------------------------------------------------------------------------


def read_region(mask: Path, prompt: str, file: Path, image: Image.Image) -> Region:
    """Read a region from its mask file, resized to the image. InputError for a mask that marks nothing."""
    found = mask_in_file(mask)
    layer = match_size(found.values, mask, image.size, file)
    warn_if_turned(file, image.size, read_orientation(file), [found])
    if layer.max() == 0:
        raise InputError(f"{mask} is black all over: paint white what may change")
    return Region(to_floats(layer), prompt, mask)


def read_regions(path: Path, file: Path, image: Image.Image) -> list[Region]:
    """Read the regions of a JSON file, in order: [{"mask": "mask0.png", "prompt": "a photo of <asset0>"}, ...]

    In a file that ends in .toml they are tables [[regions]]. Mask files are named relative to the list.
    InputError for anything else.
    """
    rows = read_toml(path).get("regions") if path.suffix.lower() == ".toml" else read_content(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f'--regions {path} is not a list [{{"mask": ..., "prompt": ...}}, ...]')
    for row in rows:
        if not isinstance(row, dict) or row.keys() != {"mask", "prompt"} or {*map(type, row.values())} != {str}:
            raise InputError(f'--regions {path}: {json.dumps(row)[:60]} is not {{"mask": FILE, "prompt": TEXT}}')
    return [read_region(path.parent / row["mask"], row["prompt"], file, image) for row in rows]


# --- Editing ------------------------------------------------------------------------------------------------------


def edit(
    models: Models, image: Image.Image, regions: list[Region], config: EditConfig | None = None, **overrides
) -> list[Image.Image]:
    """Edit the regions one after another, each in the result of the one before. -> `num_images` images of its size

    Result i depends on seed + i alone, and editing two regions at once equals editing one in the other's result.
    InputError for unknown handles, sizes that the model cannot take, and masks too small for its grid;
    NotFiniteError for numbers that are not.
    """
    config = (config or EditConfig()).changed(**overrides)
    check_edit(models.spec, image, regions, config)
    return list(edit_each(models, image, regions, config))


def edit_each(
    models: Models,
    image: Image.Image,
    regions: list[Region],
    config: EditConfig,
    progress: ImageProgress | None = None,
) -> Iterator[Image.Image]:
    """Yield the images of `edit`, after its checks, each as soon as its batch is done. `progress` counts the steps."""
    seeds = [config.seed + i for i in range(config.num_images)]
    for first in range(0, len(seeds), config.batch_size):
        batch = seeds[first : first + config.batch_size]
        images = [image] * len(batch)
        for region in regions:
            images = edit_region(models, images, region, batch, config, progress)
        yield from images


def check_edit(spec: ModelSpec, image: Image.Image, regions: list[Region], config: EditConfig) -> None:
    """Check a request of `edit` before any weight is read. InputError for what is wrong."""
    width, height = working_size(spec, image.size, config)
    grid = height // spec.vae.factor, width // spec.vae.factor
    if config.own_pixels:
        raise InputError("own_pixels: an edit starts from the image that it edits, so leave this out")
    check_request(spec, [region.prompt for region in regions], replace(config, width=width, height=height))
    if (config.separate or config.layout) and skipped_steps(config) >= Steer().until * config.num_inference_steps:
        log.warning(
            "--separate and --layout move no latents: they do so in the first half of the steps, which "
            "--blending_start_percentage %g leaves out",
            config.blending_start_percentage,
        )
    layout = read_layout(Path(config.layout)) if config.layout else {}
    for region in regions:
        inside = latent_mask(region.mask, grid)[0, 0]
        for handle, where in layout.items():
            if handle in region.prompt and not (cells_inside(where, *grid) & inside).any():
                raise InputError(f"the layout puts {handle} where {region.prompt!r} may change nothing: move it inside")


@torch.inference_mode()
def edit_region(
    models: Models,
    images: list[Image.Image],
    region: Region,
    seeds: list[int],
    config: EditConfig,
    progress: ImageProgress | None = None,
) -> list[Image.Image]:
    """Edit one region of images of one size, each with its own seed, all with the region's prompt."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    width, height = working_size(models.spec, images[0].size, config)
    source = encode(models, [pixels(fit(image, (width, height), Image.Resampling.BICUBIC)) for image in images])
    inside = latent_mask(region.mask, (source.shape[-2], source.shape[-1])).to(models.device)

    def blend(_i: int, prev_t: float, z: Tensor, _maps: list[AttentionMap]) -> Tensor:
        if progress:
            progress.step(len(z))
        return torch.where(inside, z, noised(models, source, prev_t, generators))

    context = encode_prompts(models.text_encoders, models.tokenizer, [region.prompt] * len(images))
    negative = encode_negative(models, config.negative_prompt, len(images))
    timesteps = denoising_timesteps(models.schedule, config)
    start = skipped_steps(config)
    z = noised(models, source, timesteps[start], generators)
    steering = None
    if steer := read_steer(config):
        steering = plan_steering(models.spec, [region.prompt] * len(images), steer, (z.shape[-2], z.shape[-1]))
        steering.editable = inside
    z = denoise(models, z, context, negative, config, generators, blend, start, steering=steering)
    results = [fit(result, images[0].size, Image.Resampling.LANCZOS) for result in to_images(decode(models, z))]
    if not config.composite:
        return results
    return [composite(old, new, region.mask) for old, new in zip(images, results, strict=True)]


def skipped_steps(config: EditConfig) -> int:
    """Return how many of the noisiest steps an edit leaves out."""
    return int(config.num_inference_steps * config.blending_start_percentage + 1e-9)  # 29 % of 100 is 28.999... else


def noised(models: Models, source: Tensor, t: float, generators: list[torch.Generator]) -> Tensor:
    """Bring clean latents (b, c, h, w) to timestep t by fresh noise; below 0 is the end, where they stay clean."""
    if t < 0:
        return source
    eps = standard_normal(source.shape[1:], generators).to(source.device)
    return add_noise(models.schedule, source, eps, torch.full((len(source),), round(t)))


def latent_mask(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Mark the latent cells that may change: those at least half inside. mask: (H, W) -> (1, 1, h, w) bool

    InputError if there is none, because the mask is too small or too thin.
    """
    inside = F.adaptive_avg_pool2d(torch.from_numpy(mask)[None, None], grid) >= 0.5
    if not inside.any():
        raise InputError(
            f"a mask covers no cell of the {grid[1]}x{grid[0]} grid that the model edits on: paint it larger or whiter"
        )
    return inside


def composite(old: Image.Image, new: Image.Image, mask: np.ndarray) -> Image.Image:
    """Put the new image inside the mask and the old one outside, mixed where the mask is soft; exactly the old at 0."""
    weight = mask[..., None]
    mixed = np.asarray(new, np.float32) * weight + np.asarray(old, np.float32) * (1 - weight)
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def working_size(spec: ModelSpec, size: tuple[int, int], config: EditConfig) -> tuple[int, int]:
    """Return the (W, H) at which an image of this size is edited: the flags', or the nearest that the model takes.

    The shorter side is what the model was trained for; both are rounded to its multiple, so nothing is cut off.
    InputError if a side would pass MAX_SIDE.
    """
    multiple, scale = spec.size_multiple, spec.resolution / min(size)
    width, height = (max(multiple, round(side * scale / multiple) * multiple) for side in size)
    width, height = config.width or width, config.height or height
    if max(width, height) > MAX_SIDE:
        raise InputError(f"an image of {size[0]}x{size[1]} would become {width}x{height} for the model: crop it")
    latent_shape(spec, replace(config, width=width, height=height))  # raises for what the model cannot take
    return width, height
