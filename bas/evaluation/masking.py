"""Black masks: what identity is measured on (Break-A-Scene, appendix): the concept alone, all else black."""

import numpy as np
from PIL import Image


def blacken(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture times its mask, (H, W) in 0..1: where the mask is 0, black. ValueError for another size."""
    if mask.shape != (picture.height, picture.width):
        raise ValueError(f"a mask of {mask.shape} for a picture of {(picture.height, picture.width)}")
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32) * mask[..., None].astype(np.float32)
    return Image.fromarray(pixels.round().astype(np.uint8))


def blacken_each(pictures: list[Image.Image], segments: list[np.ndarray] | None) -> list[Image.Image]:
    """Each picture times its segment; without segments the pictures as they are."""
    if segments is None:
        return pictures
    return [blacken(picture, segment) for picture, segment in zip(pictures, segments, strict=True)]
