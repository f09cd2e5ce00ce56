"""The training scenes of the miniature: drawn once, read from disk, and turned into tensors and back."""

import pickle
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tools.mini_world.drawing import draw
from tools.mini_world.layouts import compose
from tools.train_mini.presets import SEED, Preset


def draw_scene(job):
    index, size = job
    layout = compose(np.random.default_rng((SEED, index)))
    image, masks = draw(layout, size)
    return layout, image, (255 * masks.sum(0)).round().astype(np.uint8)


def make_world(preset: Preset, run: Path) -> None:
    """Draw the training scenes, on all cores.

    run/images.npy (N, H, W, 3) uint8; run/covers.npy (N, H, W) uint8, how much of a pixel is a thing's, 255 for all of
    it; run/layouts.pkl for the captions.
    """
    if (run / "layouts.pkl").exists():
        return
    shape = (preset.scenes, preset.resolution, preset.resolution)
    images = np.lib.format.open_memmap(run / "images.npy", mode="w+", dtype=np.uint8, shape=(*shape, 3))
    covers = np.lib.format.open_memmap(run / "covers.npy", mode="w+", dtype=np.uint8, shape=shape)
    layouts = []
    with Pool() as pool:
        jobs = ((i, preset.resolution) for i in range(preset.scenes))
        for i, (layout, image, cover) in enumerate(pool.imap(draw_scene, jobs, chunksize=64)):
            images[i], covers[i] = image, cover
            layouts.append(layout)
    images.flush()
    covers.flush()
    (run / "layouts.pkl").write_bytes(pickle.dumps(layouts))


def load_world(run: Path):
    """Images (N, H, W, 3) uint8, mapped from disk, and their layouts."""
    return np.load(run / "images.npy", mmap_mode="r"), pickle.loads((run / "layouts.pkl").read_bytes())


def to_tensor(images: np.ndarray, device) -> Tensor:
    """(b, H, W, 3) uint8 -> (b, 3, H, W) float32 in [-1, 1]"""
    images = images if images.flags.writeable else np.array(images)  # what is mapped from disk is read-only
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> np.ndarray:
    """(b, 3, H, W) in [-1, 1] -> (b, H, W, 3) uint8"""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
