"""Preview of a run in training: what each handle draws, and where it looks; on one sheet and as separate pictures.

RUN/scene/                          what is trained on, as a scene folder of its own
RUN/previews/step-NNNNNN.png        the sheet
RUN/previews/pictures/step-NNNNNN/  sample-K.png: what handle K draws alone (sample-all.png: all of them together);
                                    attention-K.png: where it looks
"""

from pathlib import Path

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
from bas.sampling.sampler import sample, standard_normal
from bas.schedulers import add_noise

PICTURES = f"{PREVIEWS}/pictures"  # of a run folder: each cell of the sheets by itself
CELL = 192  # pixels of one picture on the sheet
LOOK_AT = 0.5  # the share of the noise schedule at which attention is looked at


def write_preview(
    folder: Path,
    models: Models,
    handles: tuple[str, ...],
    image: Tensor,
    masks: Tensor,
    config: TrainConfig,
    step: int,
) -> Path:
    """Write a sheet of the scene, each handle alone, all together, attention beside masks; and its pictures.

    Returns the sheet's path. image: (3, H, W) in [-1, 1]; masks: (N, H, W) in [0, 1].
    """
    photo = to_image(image)
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
        drawn = sample(models, prompts, settings)
        maps = scene_attention(models, handles, image, config)
    layers = dict(enumerate(masks.numpy()))
    wanted = [tint_masks(photo, {i: layer}) for i, layer in layers.items()]
    looks = [overlay_attention(values, photo, i) for i, values in enumerate(maps.numpy())]
    pairs = [picture for pair in zip(wanted, looks, strict=True) for picture in pair]
    names = [name for handle in handles for name in (f"mask of {handle}", f"attention of {handle}")]
    scene = [tint_masks(photo, layers), *drawn]
    sheet = grid([scene, pairs], [["scene and masks", *prompts], names], CELL, title=f"step {step}")
    separate = folder / PICTURES / f"step-{step:06d}"
    separate.mkdir(parents=True, exist_ok=True)
    for place, picture in zip([*layers, "all"][: len(prompts)], drawn, strict=True):
        save_image(picture, separate / f"sample-{place}.png")
    for place, picture in enumerate(looks):
        save_image(picture, separate / f"attention-{place}.png")
    path = sheet_path(folder, step)
    save_image(sheet, path)
    return path


def sheet_path(run: Path, step: int) -> Path:
    """Where the preview of a step lies; it is written last, so a preview that has it is complete."""
    return run / PREVIEWS / f"step-{step:06d}.png"


def write_scene(folder: Path, scene: Scene, image: Tensor, masks: Tensor) -> None:
    """Write RUN/scene, resized and cropped as the training sees it. image: (3, H, W) in [-1, 1]; masks: (N, H, W)"""
    folder = folder / SCENE
    write_shot(folder, image, dict(enumerate(masks)))
    for shot in scene.extra_images:
        view, layers = shot.tensors(*image.shape[1:], len(scene))
        write_shot(folder / shot.name, view, {i: layers[i] for i in shot.masks})
    concepts = [{"handle": handle, "word": word} for handle, word in zip(scene.handles, scene.words, strict=True)]
    write_json(folder / "scene.json", {"concepts": concepts})


def write_shot(folder: Path, image: Tensor, masks: dict[int, Tensor]) -> None:
    """One photograph as img.png, with masks by concept as maskN.png. image: (3, H, W) in [-1, 1]; masks: (H, W) each"""
    folder.mkdir(exist_ok=True)
    save_image(to_image(image), folder / "img.png")
    for i, mask in masks.items():
        save_image(Image.fromarray((mask * 255).round().to(torch.uint8).numpy()), folder / f"mask{i}.png")


@torch.no_grad()
def scene_attention(models: Models, handles: tuple[str, ...], image: Tensor, config: TrainConfig) -> Tensor:
    """Each handle's averaged attention map on the scene itself, half noised. image: (3, H, W) -> (N, gh, gw) on CPU"""
    schedule, device = models.schedule, models.device
    z0 = encode_images(models, image[None]).mean * models.vae.config.scaling_factor
    eps = standard_normal(z0.shape[1:], [torch.Generator().manual_seed(config.seed)])
    t = torch.tensor([int(LOOK_AT * schedule.num_train_timesteps)])
    ids = tokenize(models.tokenizer, [subset_prompt(handles)])
    positions = handle_positions(ids[0], models.tokenizer.convert_tokens_to_ids(list(handles)))
    context = encode_ids(models.text_encoder, ids.to(device))
    z_t = add_noise(schedule, z0, eps, t).to(device)
    grid_size = attention_grid(models.spec, tuple(z0.shape[-2:]), config.attention_grid)
    maps = models.unet(z_t, t.to(device), context, return_maps=grid_size).maps
    return handle_maps(average_maps(maps), torch.tensor([positions], device=device))[0].cpu()
