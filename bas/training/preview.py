"""Previews of a run: images of each handle and its attention map, on one sheet and as separate images.

RUN/scene/                          what is trained on, as a scene folder of its own
RUN/previews/step-NNNNNN.png        the sheet
RUN/previews/pictures/step-NNNNNN/  sample-K.png: an image of handle K alone (sample-all.png: of all handles);
                                    attention-K.png: the attention map of handle K
"""

from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from bas.config import SampleConfig, TrainConfig
from bas.data.batches import attention_grid, encode_images, handle_positions
from bas.data.scene import Scene, subset_prompt
from bas.io.figures import grid, overlay_attention, tint_masks
from bas.io.images import save_image, to_image
from bas.io.json_files import write_json
from bas.io.run_files import PREVIEWS, SCENE
from bas.losses import average_maps, handle_maps
from bas.models.bundle import Models
from bas.models.text import encode_ids, tokenize
from bas.runtime.progress import ImageProgress
from bas.sampling.sampler import sample_each, standard_normal
from bas.schedulers import add_noise

PICTURES = f"{PREVIEWS}/pictures"  # of a run folder: the images of the sheets, one by one
CELL = 192  # pixels of one image on the sheet
ATTENTION_AT = 0.5  # the share of the noise schedule at which attention maps are taken


def write_preview(
    folder: Path,
    models: Models,
    handles: tuple[str, ...],
    image: Tensor,
    masks: Tensor,
    config: TrainConfig,
    step: int,
) -> Path:
    """Write a sheet: the scene, an image of each handle and of all, attention maps beside masks; and each by itself.

    image: (3, H, W) in [-1, 1]; masks: (N, H, W) in [0, 1]. Returns the sheet's path.
    """
    scene_image = to_image(image)
    prompts = [subset_prompt([handle]) for handle in handles]
    if len(handles) > 1:
        prompts.append(subset_prompt(handles))
    settings = SampleConfig(
        num_inference_steps=config.preview_inference_steps,
        height=image.shape[1],
        width=image.shape[2],
        seed=config.seed,
    )
    with torch.compiler.set_stance("force_eager"):  # other batch sizes than training's would compile anew
        progress = ImageProgress(len(prompts), settings.num_inference_steps, stage=f"preview of step {step}:")
        images = list(sample_each(models, prompts, settings, progress))
        maps = scene_attention(models, handles, image, config)
    layers = dict(enumerate(masks.numpy()))
    wanted = [tint_masks(scene_image, {i: layer}) for i, layer in layers.items()]
    looks = [overlay_attention(values, scene_image, i) for i, values in enumerate(maps.numpy())]
    pairs = [cell for pair in zip(wanted, looks, strict=True) for cell in pair]
    names = [name for handle in handles for name in (f"mask of {handle}", f"attention of {handle}")]
    scene = [tint_masks(scene_image, layers), *images]
    sheet = grid([scene, pairs], [["scene and masks", *prompts], names], CELL, title=f"step {step}")
    separate = folder / PICTURES / f"step-{step:06d}"
    separate.mkdir(parents=True, exist_ok=True)
    for place, generated in zip([*layers, "all"][: len(prompts)], images, strict=True):
        save_image(generated, separate / f"sample-{place}.png")
    for place, overlay in enumerate(looks):
        save_image(overlay, separate / f"attention-{place}.png")
    path = sheet_path(folder, step)
    save_image(sheet, path)
    return path


def sheet_path(run: Path, step: int) -> Path:
    """Return where the preview of a step lies; it is written last, so a preview that has it is complete."""
    return run / PREVIEWS / f"step-{step:06d}.png"


def write_scene(folder: Path, scene: Scene, image: Tensor, masks: Tensor) -> None:
    """Write RUN/scene, resized and cropped as the training sees it. image: (3, H, W) in [-1, 1]; masks: (N, H, W)"""
    folder = folder / SCENE
    write_image(folder, image, dict(enumerate(masks)))
    for extra in scene.extra_images:
        view, layers = extra.tensors(image.shape[1], image.shape[2], len(scene))
        write_image(folder / extra.name, view, {i: layers[i] for i in extra.masks})
    concepts = [{"handle": handle, "word": word} for handle, word in zip(scene.handles, scene.words, strict=True)]
    write_json(folder / "scene.json", {"concepts": concepts})


def write_image(folder: Path, image: Tensor, masks: dict[int, Tensor]) -> None:
    """Write an image as img.png, its masks by concept as maskN.png. image: (3, H, W) in [-1, 1]; masks: (H, W) each"""
    folder.mkdir(exist_ok=True)
    save_image(to_image(image), folder / "img.png")
    for i, mask in masks.items():
        save_image(Image.fromarray((mask * 255).round().to(torch.uint8).numpy()), folder / f"mask{i}.png")


@torch.no_grad()
def scene_attention(models: Models, handles: tuple[str, ...], image: Tensor, config: TrainConfig) -> Tensor:
    """Return the averaged attention map of each handle on the scene's image, half noised (eq. 2).

    image: (3, H, W) in [-1, 1] -> (N, gh, gw) on the CPU
    """
    schedule, device = models.schedule, models.device
    z0 = encode_images(models, image[None]).mean * models.vae.config.scaling_factor
    eps = standard_normal(z0.shape[1:], [torch.Generator().manual_seed(config.seed)])
    t = torch.tensor([int(ATTENTION_AT * schedule.num_train_timesteps)])
    ids = tokenize(models.tokenizer, [subset_prompt(handles)])
    positions = handle_positions(ids[0], cast("list[int]", models.tokenizer.convert_tokens_to_ids(list(handles))))
    context = encode_ids(models.text_encoders, ids.to(device))
    z_t = add_noise(schedule, z0, eps, t).to(device)
    grid_size = attention_grid(models.spec, (z0.shape[-2], z0.shape[-1]), config.attention_grid)
    maps = models.unet(z_t, t.to(device), context.states, return_maps=grid_size, pooled=context.pooled).maps
    return handle_maps(average_maps(maps), torch.tensor([positions], device=device))[0].cpu()
