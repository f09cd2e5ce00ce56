"""Images with all but the concept black: what identity is measured on (Break-A-Scene, appendix)."""

import numpy as np
from PIL import Image


def blacken(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """Multiply an image by its mask, (H, W) in 0..1. Raises ValueError for a mask of another size."""
    if mask.shape != (image.height, image.width):
        raise ValueError(f"a mask of {mask.shape} for an image of {(image.height, image.width)}")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) * mask[..., None].astype(np.float32)
    return Image.fromarray(pixels.round().astype(np.uint8))


def blacken_each(images: list[Image.Image], segments: list[np.ndarray] | None) -> list[Image.Image]:
    """Multiply each image by its segment; without segments return the images as they are."""
    if segments is None:
        return images
    return [blacken(image, segment) for image, segment in zip(images, segments, strict=True)]
