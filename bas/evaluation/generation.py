"""What a trained model shows: the pictures that a trial asks for, and where its handles look.

FOLDER/0000.png ...          pictures, each with its settings
FOLDER/0000-mask0.png ...    where concept 0 is in it, when its segments are kept: white inside
"""

from dataclasses import asdict, dataclass
from pathlib import Path

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
from bas.models.text import tokenize
from bas.runtime.device import autocast
from bas.runtime.signals import Interrupted
from bas.sampling.sampler import decode, generate, generate_with_maps, latent_shape
from bas.training.preview import scene_attention
from bas.training.setup import Run


@dataclass(frozen=True)
class Request:
    """One picture to draw."""

    prompt: str
    concepts: tuple[int, ...]  # of the scene, in the order of the prompt
    noise: int  # the seed of the picture


def photograph(config: TrainConfig, resolution: int, multiple: int) -> tuple[Scene, Tensor, Tensor]:
    """The scene as it is, whatever the method was shown: scene, image (3, H, W) in [-1, 1], masks (N, H, W) in 0..1"""
    scene = load_scene(config)
    return scene, *scene.tensors(config.resolution or resolution, multiple, config.center_crop)


def look(run: Run) -> list[float]:
    """How well each handle's attention covers its mask, on the photograph itself: N values in 0..1."""
    scene, image, masks = photograph(run.config, run.models.resolution, run.models.size_multiple)
    with autocast(run.models.device, run.precision), torch.compiler.set_stance("force_eager"):
        maps = scene_attention(run.models, scene.handles, image, run.config)
    return [round(value, 4) for value in attention_iou(maps, masks)]


def draw(
    run: Run, requests: tuple[Request, ...], folder: Path, sampling: SampleConfig, segments: bool = False
) -> list[dict]:
    """Draw and save pictures; returns what each is. Raises Interrupted after a signal that came meanwhile."""
    entries = []
    for start in range(0, len(requests), sampling.batch_size):
        batch = requests[start : start + sampling.batch_size]
        with autocast(run.models.device, run.precision), torch.compiler.set_stance("force_eager"):
            pictures, average = draw_together(run, batch, sampling, segments)
        for i, (request, picture) in enumerate(zip(batch, pictures, strict=True)):
            name = f"{start + i:04d}.png"
            save_image(picture, folder / name, asdict(sampling) | {"prompt": request.prompt, "seed": request.noise})
            entries.append({"file": name, **asdict(request)})
            if average is not None:
                save_segments(run, request, average[i], picture.size[::-1], folder / name)
        if run.interrupts.asked:
            raise Interrupted("stopped while it was drawing", run.interrupts.asked)
    return entries


def draw_together(
    run: Run, batch: tuple[Request, ...], sampling: SampleConfig, segments: bool
) -> tuple[list[Image.Image], Tensor | None]:
    """Pictures, and with `segments` the attention maps (b, gh, gw, 77), averaged over steps, heads and layers."""
    models = run.models
    prompts, seeds = [request.prompt for request in batch], [request.noise for request in batch]
    if not segments:
        return to_images(decode(models, generate(prompts, seeds, models, sampling))), None
    grid = attention_grid(models.spec, latent_shape(models.spec, sampling)[1:], run.config.attention_grid)
    latents, average = generate_with_maps(prompts, seeds, models, sampling, grid)
    return to_images(decode(models, latents)), average


def save_segments(run: Run, request: Request, average: Tensor, size: tuple[int, int], picture: Path) -> None:
    """Beside a picture, one file for each concept of its prompt. average: (gh, gw, 77); size: (H, W) of the picture"""
    tokenizer = run.models.tokenizer
    ids = tokenizer.convert_tokens_to_ids([run.scene.handles[i] for i in request.concepts])
    positions = torch.tensor([handle_positions(tokenize(tokenizer, [request.prompt])[0], ids)])
    maps = handle_maps(average[None].cpu(), positions)[0].numpy()
    for concept, values in zip(request.concepts, maps, strict=True):
        inside = segment_by_attention(values, size)
        save_image(Image.fromarray((255 * inside).astype(np.uint8)), segment_path(picture, concept))


def segment_path(picture: Path, concept: int) -> Path:
    """Where the segment of a concept in a picture lies."""
    return picture.with_name(f"{picture.stem}-mask{concept}.png")
