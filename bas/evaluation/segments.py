"""Where a concept is in a generated image: from a segmentation model, from files, or from its handle's attention.

The paper segments its images with MaskFormer (Cheng et al. 2021) by the concept's class (appendix).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bas.errors import InputError
from bas.io.images import read_mask, to_floats
from bas.io.json_files import read_json
from bas.pretrained.helper_models import find_helper, load_helper

MASKFORMER = "facebook/maskformer-swin-base-coco"  # hub id
KINDS = {  # model_type of its config.json: class names in transformers
    "maskformer": ("MaskFormerForInstanceSegmentation", "MaskFormerImageProcessorPil"),
    "mask2former": ("Mask2FormerForUniversalSegmentation", "Mask2FormerImageProcessorPil"),
}
ATTENDED = 0.5  # of an attention map's maximum, above which a cell belongs to the segment


class Segmenter:
    """MaskFormer or Mask2Former: the pixels of the classes of a word."""

    def __init__(self, name: str = MASKFORMER, device: torch.device | str = "cpu"):
        folder = find_helper(name, "--segmenter")
        kind = read_json(folder / "config.json").get("model_type")
        if not isinstance(kind, str) or kind not in KINDS:
            raise InputError(f"{folder} is a model of type {kind}: segments need {' or '.join(KINDS)}")
        model, self.processor = load_helper(folder, kind, *KINDS[kind])
        self.model: Any = model.to(device)  # of transformers, whose classes are loaded by name
        self.labels: dict[str, list[int]] = {}  # by word: COCO has wall-brick, wall-stone, wall-other-merged, ...
        for i, name in self.model.config.id2label.items():
            self.labels.setdefault(plain(name), []).append(int(i))

    @torch.inference_mode()
    def segments(self, images: list[Image.Image], word: str) -> list[np.ndarray]:
        """Return the semantic segment of a word in each image, (H, W) of 0 and 1; all 0 where the model finds none.

        A word stands for all classes that have it before their suffixes.

        Raises InputError for a word that the model has no class for.
        """
        if plain(word) not in self.labels:
            raise InputError(f"the segmentation model has no class {word!r}: it has {', '.join(self.labels)[:200]} ...")
        found = []
        for image in images:
            outputs = self.model(**self.processor(image, return_tensors="pt").to(self.model.device))
            size = image.height, image.width
            (classes,) = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
            found.append(np.isin(classes.cpu().numpy(), self.labels[plain(word)]).astype(np.float32))
        return found


def plain(word: str) -> str:
    """Return a class name without its suffixes: COCO names stuff as wall-other-merged."""
    return word.split("-")[0].strip().lower()


def read_segments(paths: list[Path], images: list[Image.Image]) -> list[np.ndarray]:
    """Read one segment for each image, white inside. -> (H, W) in 0..1 each

    Raises InputError for a file that cannot be read or has another size than its image.
    """
    found = []
    for path, image in zip(paths, images, strict=True):
        mask = read_mask(path)
        if mask.shape != (image.height, image.width):
            raise InputError(f"{path} is {mask.shape[1]}x{mask.shape[0]}, its image {image.width}x{image.height}")
        found.append(to_floats(mask))
    return found


def segment_by_attention(attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Turn a handle's map (gh, gw) into a segment at the image's size (H, W): 1 above half its maximum.

    The map is one of `bas.sampling.attention_maps`. It is enlarged first, bilinearly, so that the segment's
    border does not follow the map's cells.
    """
    large = F.interpolate(torch.from_numpy(attention)[None, None].float(), size, mode="bilinear")[0, 0]
    return (large > ATTENDED * large.max()).float().numpy()
