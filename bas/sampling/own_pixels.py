"""Starting images from the concepts' own pixels: a run's scene cut into segments, which are pasted into a layout.

The noisiest steps are left out, as in SDEdit (Meng et al. 2022): the walk starts from the pasted segments with the
noise of its first step, and from noise alone elsewhere.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bas.config import SampleConfig
from bas.errors import InputError
from bas.io.images import pixels, read_image, read_mask, to_floats
from bas.io.run_files import SCENE, SETTINGS, read_settings, scene_mask
from bas.models.bundle import ModelSpec
from bas.sampling.layout import Layout, bounding_box

LEFT_OUT = 0.4  # share of the denoising steps that are left out


@dataclass(frozen=True)
class Segment:
    """One concept, cut out of the scene's image."""

    image: Tensor  # (3, h, w) in [-1, 1]
    mask: Tensor  # (1, h, w) in 0..1


def left_out(steps: int) -> int:
    """Return how many of the noisiest denoising steps are left out."""
    return int(LEFT_OUT * steps)


def steps_taken(config: SampleConfig) -> int:
    """Return how many denoising steps an image takes."""
    steps = config.num_inference_steps
    return steps - left_out(steps) if config.own_pixels else steps


def read_segments(spec: ModelSpec, handles: tuple[str, ...]) -> dict[str, Segment]:
    """Read these concepts' segments from the scene in the run folder. InputError where the run does not hold them."""
    folder = None if spec.source is None else spec.source / SCENE
    if folder is None or not (folder / "img.png").is_file():
        raise InputError(f"{spec.source} holds no scene, which --own_pixels takes pixels from: leave it out")
    # Handles of the base, for a run on top of another one, are not in its scene.
    own = read_settings(folder.parent)["handles"] if (folder.parent / SETTINGS).is_file() else spec.handles
    segments = {}
    for handle in handles:
        if handle not in own:
            raise InputError(
                f"{folder} does not show {handle}, so --own_pixels has no pixels of it: leave out one of them"
            )
        path = scene_mask(folder, own.index(handle))
        image = pixels(read_image(path.with_name("img.png")))
        mask = torch.from_numpy(to_floats(read_mask(path)))
        if mask.shape != image.shape[1:] or not mask.any():
            image_path = path.with_name("img.png")
            raise InputError(f"{path} is not a mask of {image_path}: leave out --own_pixels, or train again")
        ys, xs = (mask >= min(0.5, float(mask.max()))).nonzero().T
        box = slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1)
        segments[handle] = Segment(image[:, *box], mask[None, *box])
    return segments


def paste(segments: dict[str, Segment], layout: Layout, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Paste segments on mid grey, each scaled to fit its region's box and centred there.

    -> image (3, H, W) in [-1, 1], union of the masks (1, H, W) in 0..1
    """
    canvas, union = torch.zeros(3, height, width), torch.zeros(1, height, width)
    for handle, segment in segments.items():
        left, top, right, bottom = bounding_box(layout[handle])
        (h, w), (rows, columns) = segment.mask.shape[1:], ((bottom - top) * height, (right - left) * width)
        scale = min(rows / h, columns / w)
        size = max(1, min(height, round(scale * h))), max(1, min(width, round(scale * w)))
        both = torch.cat([segment.image, segment.mask])[None]
        both = F.interpolate(both, size, mode="bilinear", antialias=True)[0]
        y = min(round((top + bottom) / 2 * height - size[0] / 2), height - size[0])
        x = min(round((left + right) / 2 * width - size[1] / 2), width - size[1])
        spot = slice(None), slice(max(0, y), max(0, y) + size[0]), slice(max(0, x), max(0, x) + size[1])
        image, mask = both[:3], both[3:].clamp(0, 1)
        canvas[spot] = canvas[spot] * (1 - mask) + image * mask
        union[spot] = torch.maximum(union[spot], mask)
    return canvas, union
