"""What a trained model generates: the images that a trial asks for, and where its handles attend.

FOLDER/0000.png ...          images, each with its settings
FOLDER/0000-mask0.png ...    where concept 0 is in it, when its segments are kept: white inside
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bas.config import SampleConfig, TrainConfig
from bas.data.batches import attention_grid, handle_positions
from bas.data.scene import Scene
from bas.data.scene_folder import load_scene
from bas.evaluation.metrics import attention_iou
from bas.evaluation.segments import segment_by_attention
from bas.io.images import save_image, to_images
from bas.losses import handle_maps
from bas.models.bundle import ModelSpec
from bas.models.text import tokenize
from bas.runtime.device import autocast
from bas.runtime.signals import Interrupted
from bas.sampling.sampler import decode, generate, generate_with_maps, latent_shape
from bas.training.preview import scene_attention
from bas.training.setup import Run


@dataclass(frozen=True)
class Request:
    """One image to generate."""

    prompt: str
    concepts: tuple[int, ...]  # of the scene, in the order of the prompt
    noise: int  # the seed of the image


def read_scene(config: TrainConfig, resolution: int, multiple: int) -> tuple[Scene, Tensor, Tensor]:
    """Read the scene itself, not the collage that a baseline trains on.

    Returns the scene, its image (3, H, W) in [-1, 1] and masks (N, H, W) in 0..1. Raises InputError as `load_scene`.
    """
    scene = load_scene(config)
    return scene, *scene.tensors(config.resolution or resolution, multiple, config.center_crop)


def check_maps(config: TrainConfig, spec: ModelSpec) -> None:
    """Raise InputError where the maps that `measure_attention` reads do not exist: training itself may read none."""
    _, image, _ = read_scene(config, spec.resolution, spec.size_multiple)
    height, width = image.shape[1:]
    attention_grid(spec, (height // spec.vae.factor, width // spec.vae.factor), config.attention_grid)


def measure_attention(run: Run) -> list[float]:
    """Return the IoU of each handle's attention map on the scene with its mask: N values in 0..1."""
    scene, image, masks = read_scene(run.config, run.models.resolution, run.models.size_multiple)
    with autocast(run.models.device, run.precision), torch.compiler.set_stance("force_eager"):
        maps = scene_attention(run.models, scene.handles, image, run.config)
    return [round(value, 4) for value in attention_iou(maps, masks)]


def generate_images(
    run: Run, requests: tuple[Request, ...], folder: Path, sampling: SampleConfig, segments: bool = False
) -> list[dict]:
    """Generate and save images; returns file, prompt, concepts and noise of each.

    segments: also save where each handle attended. Raises Interrupted after a signal.
    """
    entries = []
    for start in range(0, len(requests), sampling.batch_size):
        batch = requests[start : start + sampling.batch_size]
        with autocast(run.models.device, run.precision), torch.compiler.set_stance("force_eager"):
            images, average = generate_batch(run, batch, sampling, segments)
        for i, (request, image) in enumerate(zip(batch, images, strict=True)):
            name = f"{start + i:04d}.png"
            save_image(image, folder / name, asdict(sampling) | {"prompt": request.prompt, "seed": request.noise})
            entries.append({"file": name, **asdict(request)})
            if average is not None:
                save_segments(run, request, average[i], (image.height, image.width), folder / name)
        if run.interrupts.asked:
            raise Interrupted("stopped while it generated images", run.interrupts.asked)
    return entries


def generate_batch(
    run: Run, batch: tuple[Request, ...], sampling: SampleConfig, segments: bool
) -> tuple[list[Image.Image], Tensor | None]:
    """Return images and, with `segments`, attention maps (b, gh, gw, 77) averaged over steps, heads and layers."""
    models = run.models
    prompts, seeds = [request.prompt for request in batch], [request.noise for request in batch]
    if not segments:
        return to_images(decode(models, generate(prompts, seeds, models, sampling))), None
    grid = attention_grid(models.spec, latent_shape(models.spec, sampling)[1:], run.config.attention_grid)
    latents, average = generate_with_maps(prompts, seeds, models, sampling, grid)
    return to_images(decode(models, latents)), average


def save_segments(run: Run, request: Request, average: Tensor, size: tuple[int, int], image: Path) -> None:
    """Save a segment beside an image for each concept of its prompt. average: (gh, gw, 77); size: the image's (H, W)"""
    tokenizer = run.models.tokenizer
    ids = cast(list[int], tokenizer.convert_tokens_to_ids([run.scene.handles[i] for i in request.concepts]))
    positions = torch.tensor([handle_positions(tokenize(tokenizer, [request.prompt])[0], ids)])
    maps = handle_maps(average[None].cpu(), positions)[0].numpy()
    for concept, values in zip(request.concepts, maps, strict=True):
        inside = segment_by_attention(values, size)
        save_image(Image.fromarray((255 * inside).astype(np.uint8)), segment_path(image, concept))


def segment_path(image: Path, concept: int) -> Path:
    """Return the file of a concept's segment in an image."""
    return image.with_name(f"{image.stem}-mask{concept}.png")
