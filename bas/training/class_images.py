"""Class images for the prior preservation loss (Ruiz et al. 2023), L_prior of the official code: generated and cached.

They depend on the weights, the prompts, the size and the sampling settings, not on the scene. The cache folder is named
by a hash of exactly these, so every run with the same base and settings finds them.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock
from PIL import Image, ImageOps
from torch import Tensor

from bas.config import STEERING, SampleConfig, TrainConfig
from bas.data.batches import ClassImages, encode_images
from bas.data.mask_exports import unread_masks
from bas.data.mask_formats import mask_file
from bas.data.scene_folder import images_in
from bas.errors import InputError
from bas.io.files import cache_dir, check_length, clear_leftovers, reading, require_writable
from bas.io.images import SUFFIXES, open_image, pixels, read_image, save_image, to_images
from bas.io.json_files import read_record, write_json
from bas.models.bundle import Models, ModelSpec
from bas.models.unet import AttentionMap
from bas.runtime.device import autocast
from bas.runtime.progress import ImageProgress
from bas.sampling.sampler import decode, generate
from bas.schedulers import NoiseSchedule
from bas.training.resume import of_training

log = logging.getLogger(__name__)

KEY_FILE = "key.json"
SIDECARS = (".json", ".jsonl", ".txt", ".caption", ".md", ".csv", ".xml", ".xmp", ".yaml", ".toml", ".html")
NO_MATTER = ("batch_size", "num_images", "guidance_rescale", *STEERING)  # settings that no class image depends on
CACHE = ("the cache", "set BAS_CACHE to a folder that can be written, or name --class_data_dir")
LOCK = ".lock"  # held while class images are made
GENERATED = re.compile(r"(\d{5})\.png")
WRITTEN = re.compile(rf"{GENERATED.pattern}|{re.escape(KEY_FILE)}")


def cache_key(config: TrainConfig, base_hash: str, schedule: NoiseSchedule, settings: SampleConfig) -> dict:
    """Everything that a generated class image depends on. Image i has prompt i, cyclic, and seed + i."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in NO_MATTER}
    prompts = list(config.class_prompt)
    return {
        "base": base_hash,
        "schedule": schedule.to_json(),
        "prompts": prompts,
        "precision": config.mixed_precision,
        **chosen,
    }


def find_folder(config: TrainConfig, key: dict) -> Path:
    """Find the folder of the class images: the one that is named, else that of their key in the cache."""
    if config.class_data_dir is not None:
        return Path(config.class_data_dir)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "class_images" / digest


def _check_key(folder: Path, key: dict, complete: bool) -> None:
    """Raise InputError for class images that were made with another key.

    If all images are there (`complete`), their timesteps do not matter: no image is added with other timesteps.
    """
    made_with = read_record(folder / KEY_FILE, {}, "remove it if all images are your own, else name another folder")
    if complete:
        made_with, key = ({name: of_training(value) for name, value in each.items()} for each in (made_with, key))
    differs = [name for name in key if made_with.get(name) != key[name]]
    if differs:
        raise InputError(f"{folder} holds class images made with another {', '.join(differs)}: name another folder")


def check_class_folder(config: TrainConfig, model: ModelSpec | Models, size: tuple[int, int]) -> None:
    """Check --class_data_dir as far as possible without the weights.

    size: rows and columns of pixels. Raises InputError for what is no folder, for a scene folder, for images that
    cannot be read, and for class images that were made with other settings.
    """
    if config.class_data_dir is None:
        cached = cache_dir() / "class_images"
        if not any(len(_images(folder)) >= config.num_class_images for folder in cached.glob("*")):
            require_writable(cached, *CACHE)
        return
    folder = Path(config.class_data_dir)
    check_length(folder / KEY_FILE, "--class_data_dir")
    with reading(folder):
        present = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        if not present.is_dir():
            raise InputError(f"--class_data_dir {folder}: {present} is not a folder")
        if len(_images(folder)) < config.num_class_images:
            require_writable(folder, "--class_data_dir")
        if not folder.exists():
            return
        if masks := mask_file(folder) or (images_in(folder) and unread_masks(folder)):
            found = masks.name if isinstance(masks, Path) else "masks of another tool"
            raise InputError(f"--class_data_dir {folder} is a scene, it has {found}: name a folder of class images")
        images = _images(folder)
        for path in images[: config.num_class_images]:
            open_image(path)
        if len(images) < config.num_class_images and (inside := _folder_of_images(folder)):
            raise InputError(
                f"--class_data_dir {folder} has {len(images)} of {config.num_class_images} class images, and others "
                f"in {inside.name}, a folder that is not read: name it with --class_data_dir, or move it away"
            )
        if unread := _unread(folder):
            names = f"{', '.join(unread[:3])}{', ...' if len(unread) > 3 else ''}"
            if len(images) < config.num_class_images:
                raise InputError(
                    f"--class_data_dir {folder} has {len(images)} of {config.num_class_images} class images, but "
                    f"{names} cannot be read: convert them to PNG, or move them away so that the others are generated"
                )
            log.warning("%s: %s are not read as class images", folder, names)
        keyed = (folder / KEY_FILE).exists()
    if keyed:
        key = cache_key(config, "", model.schedule, sampling_of(config, model, size))
        known = {name: value for name, value in key.items() if name != "base"}
        _check_key(folder, known, complete=len(images) >= config.num_class_images)


def count_missing(config: TrainConfig) -> int:
    """Return how many class images are to be generated, at most: what the cache holds is found with the weights."""
    there = 0 if config.class_data_dir is None else len(_images(Path(config.class_data_dir)))
    return max(0, config.num_class_images - there)


def sampling_of(config: TrainConfig, model: ModelSpec | Models, size: tuple[int, int]) -> SampleConfig:
    """Return how class images of these rows and columns are generated: at the guidance of the model's other images.

    The prior loss and Seg-Mix teach the look of the class images. A stronger guidance than the model's own would give
    every later image its colours.
    """
    return SampleConfig(height=size[0], width=size[1], seed=config.seed, guidance_scale=model.guidance_scale)


def class_images(
    models: Models,
    config: TrainConfig,
    base_hash: str,
    size: tuple[int, int],
) -> tuple[ClassImages, str]:
    """Return `num_class_images` class images, encoded on the CPU, generating what is missing.

    size: rows and columns of pixels. -> the images; and the sha256, in hex, over their files. InputError if bas
    generated images of this folder with another key.
    """
    settings = sampling_of(config, models, size)
    key = cache_key(config, base_hash, models.schedule, settings)
    folder = find_folder(config, key)
    if config.class_data_dir is None and len(_images(folder)) < config.num_class_images:
        require_writable(folder, *CACHE)  # with images of other settings the check before loading passes
    folder.mkdir(parents=True, exist_ok=True)
    with taking_turns(folder):
        clear_leftovers(folder, WRITTEN)
        found = len(_images(folder))
        if keyed := (folder / KEY_FILE).exists():
            _check_key(folder, key, complete=found >= config.num_class_images)
        if found < config.num_class_images:
            if not keyed:
                write_json(folder / KEY_FILE, key)
                keyed = True
            log.info("generating %d class images into %s", config.num_class_images - found, folder)
            _generate_missing(models, config, settings, folder, found)
    chosen = _images(folder)[: config.num_class_images]
    images = [ImageOps.fit(read_image(path), (size[1], size[0]), Image.Resampling.BICUBIC) for path in chosen]
    content = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in chosen)).hexdigest()
    with autocast(models.device, "no"):  # in float32 like the scene's image, whatever precision generated them
        posterior = encode_images(models, torch.stack([pixels(image) for image in images]))
    return ClassImages(posterior, prompts_of(chosen, keyed)), content


def prompts_of(paths: list[Path], keyed: bool) -> tuple[int, ...]:
    """Return the number of each image's prompt: that in a name as bas gives it, for other images their place.

    keyed: whether bas generated any image of the folder.
    """
    matches = (GENERATED.fullmatch(path.name) if keyed else None for path in paths)
    return tuple(int(match[1]) if match else place for place, match in enumerate(matches))


@contextmanager
def taking_turns(folder: Path) -> Iterator[None]:
    """Let one process in at a time: a second one waits, and finds the first one's images. Without locks none waits."""
    lock = FileLock(folder / LOCK)
    with suppress(OSError):  # a folder that is only read from, or a drive without locks
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _generate_missing(models: Models, config: TrainConfig, settings: SampleConfig, folder: Path, found: int) -> None:
    """Generate class images until there are as many as the settings ask for; those that exist stay."""
    total, prompts = config.num_class_images, config.class_prompt
    progress = ImageProgress(total, settings.num_inference_steps, stage="class images", done=found)

    def count(_i: int, _t: float, z: Tensor, _maps: list[AttentionMap]) -> Tensor:
        progress.step(len(z))
        return z

    missing = [i for i in range(total) if not (folder / f"{i:05d}.png").exists()][: total - found]
    for start in range(0, len(missing), config.sample_batch_size):
        batch = missing[start : start + config.sample_batch_size]
        texts, seeds = [prompts[i % len(prompts)] for i in batch], [settings.seed + i for i in batch]
        images = to_images(decode(models, generate(texts, seeds, models, settings, count)))
        for i, image in zip(batch, images, strict=True):
            save_image(image, folder / f"{i:05d}.png")


def _images(folder: Path) -> list[Path]:
    """Return the image files in a folder, by name."""
    return sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def _folder_of_images(folder: Path) -> Path | None:
    """Return the first folder in a folder that holds images, None if there is none."""
    inside = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    return next((path for path in inside if _images(path)), None)


def _unread(folder: Path) -> list[str]:
    """Return the names of files that may be images but are not read, without captions and metadata beside images."""
    files = (p for p in folder.glob("[!.]*") if p.is_file() and p.suffix.lower() not in (*SUFFIXES, *SIDECARS))
    return sorted(path.name for path in files)
