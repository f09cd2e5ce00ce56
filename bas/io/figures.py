"""Figures: labelled grids of images, masks and attention maps laid over an image."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# One colour per concept, distinct for every kind of colour vision (Okabe and Ito 2008).
CONCEPT_COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
PAPER, INK = (255, 255, 255), (30, 30, 30)
MARGIN = 8


def grid(rows: list[list[Image.Image]], labels: list[list[str]], cell: int, title: str = "") -> Image.Image:
    """Arrange images in rows of square cells with a label below each; rows may differ in length."""
    font, wrapped, heights, top = lay_out(labels, cell, title)
    sheet = Image.new("RGB", grid_size(labels, cell, title), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, font)
    for images, texts, height in zip(rows, wrapped, heights, strict=True):
        for column, (image, lines) in enumerate(zip(images, texts, strict=True)):
            left = MARGIN + column * (cell + MARGIN)
            sheet.paste(enlarge(image, cell), (left, top))
            draw.multiline_text((left, top + cell + 2), "\n".join(lines), INK, font, spacing=0)
        top += height
    return sheet


def grid_size(labels: list[list[str]], cell: int, title: str = "") -> tuple[int, int]:
    """Return the (width, height) of a grid with these labels, in pixels."""
    _, _, heights, top = lay_out(labels, cell, title)
    return MARGIN + max(map(len, labels)) * (cell + MARGIN), top + sum(heights)


def lay_out(
    labels: list[list[str]], cell: int, title: str
) -> tuple[ImageFont.FreeTypeFont, list[list[list[str]]], list[int], int]:
    """Lay out a grid. -> the font, each label in lines, the height of each row, and where the first one begins"""
    font = label_font(max(11, cell // 14))
    line = sum(font.getmetrics())
    wrapped = [[wrap(text, font, cell) for text in row] for row in labels]
    heights = [cell + line * max(len(lines) for lines in row) + 2 * MARGIN for row in wrapped]
    return font, wrapped, heights, line + 2 * MARGIN if title else MARGIN


def label_font(size: int) -> ImageFont.FreeTypeFont:
    """Load Pillow's own font, size in pixels."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break a label into lines that fit a width in pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def enlarge(image: Image.Image, cell: int) -> Image.Image:
    """Resize an image to fit a square cell, with its shape kept and the rest in paper colour."""
    scale = cell / max(image.size)
    resampling = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    fitted = image.convert("RGB").resize([max(1, round(side * scale)) for side in image.size], resampling)
    framed = Image.new("RGB", (cell, cell), PAPER)
    framed.paste(fitted, ((cell - fitted.width) // 2, (cell - fitted.height) // 2))
    return framed


def concept_colour(index: int) -> tuple[int, int, int]:
    """Return the colour of one concept in every image of a run."""
    return CONCEPT_COLOURS[index % len(CONCEPT_COLOURS)]


def as_hex(colour: tuple[int, int, int]) -> str:
    """Write a colour as pages do, #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def tint_masks(image: Image.Image, masks: dict[int, np.ndarray]) -> Image.Image:
    """Tint an image with masks (H, W) in 0..1, by concept index, in their concepts' colours.

    A mask of another size, as in a run whose files were edited, is stretched over the image.
    """
    canvas = np.asarray(image.convert("RGB"), dtype=np.float32)
    for index, mask in masks.items():
        if mask.shape != canvas.shape[:2]:
            mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
        alpha = 0.5 * mask[..., None]
        canvas = canvas * (1 - alpha) + np.array(concept_colour(index), dtype=np.float32) * alpha
    return Image.fromarray(canvas.round().astype(np.uint8))


def overlay_attention(values: np.ndarray, image: Image.Image, index: int) -> Image.Image:
    """Lay a concept's attention map (h, w), scaled to its maximum, over the darkened image in the concept's colour."""
    peak = values.max()
    scaled = values / peak if peak > 0 else np.zeros_like(values)
    light = Image.fromarray((scaled * 255).round().astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    alpha = np.asarray(light, dtype=np.float32)[..., None] / 255
    base = np.asarray(image.convert("L").convert("RGB"), dtype=np.float32) * 0.35
    glow = np.array(concept_colour(index), dtype=np.float32)
    return Image.fromarray((base * (1 - alpha) + glow * alpha).round().astype(np.uint8))
