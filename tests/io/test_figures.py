"""Images for people: grids, tinted masks, attention maps, and the settings that travel with a file."""

import json

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFont

from bas.io.figures import (
    CONCEPT_COLOURS,
    MARGIN,
    PAPER,
    concept_colour,
    enlarge,
    grid,
    overlay_attention,
    tint_masks,
    wrap,
)
from bas.io.images import image_path, save_image, save_images
from tests.helpers.tiny import refused

RED, BLUE = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (16, 8), (0, 0, 255))


def test_grid_places_every_image_in_its_cell():
    """Rows of different lengths; a wide image is framed in paper colour above and below."""
    sheet = np.asarray(grid([[RED, BLUE], [BLUE]], [["one", "two"], ["a long label " * 5]], cell=64, title="title"))
    assert sheet.shape[1] == 2 * 64 + 3 * MARGIN
    middles = [MARGIN + 32, 2 * MARGIN + 96]
    column = [tuple(sheet[y, middles[0]]) for y in range(sheet.shape[0])]
    assert column.count((255, 0, 0)) == 64
    assert column.count((0, 0, 255)) == 32
    top = column.index((255, 0, 0))
    assert tuple(sheet[top + 32, middles[1]]) == (0, 0, 255)
    assert tuple(sheet[top + 8, middles[1]]) == PAPER
    lower = sheet[top + 64 :]
    assert (lower[:, middles[1]] == PAPER).all()
    assert (sheet != np.array(PAPER)).any(axis=-1)[:top].any()  # the title


def test_labels_are_wrapped_to_the_width():
    font = ImageFont.load_default(size=11)
    lines = wrap("a photo of <asset0> and <asset1> at the beach", font, 100)
    assert " ".join(lines) == "a photo of <asset0> and <asset1> at the beach"
    assert len(lines) > 1
    assert all(font.getlength(line) <= 100 for line in lines)
    assert wrap("", font, 100) == [""]


@pytest.mark.parametrize("size", [(100, 50), (50, 100), (3, 3), (64, 64), (500, 1)])
def test_images_fill_their_cell_and_keep_their_shape(size):
    framed = np.asarray(enlarge(Image.new("RGB", size, (0, 0, 0)), 64)) < 128
    black = framed.all(axis=-1)
    rows, columns = black.any(axis=1).sum(), black.any(axis=0).sum()
    assert max(rows, columns) == 64
    assert abs(columns / rows - size[0] / size[1]) < 0.05 * size[0] / size[1] or min(rows, columns) == 1


def test_concepts_keep_their_colours():
    assert [concept_colour(i) for i in (0, 6, 7)] == [CONCEPT_COLOURS[0], CONCEPT_COLOURS[6], CONCEPT_COLOURS[0]]
    assert len(set(CONCEPT_COLOURS)) == 7


def test_masks_are_tinted_half_through():
    """A mask of 1 mixes half and half, of 0.5 a quarter, of 0 nothing; later masks lie on top."""
    photo = Image.new("RGB", (3, 1), (100, 100, 100))
    mask = np.array([[1.0, 0.5, 0.0]], np.float32)
    tinted = np.asarray(tint_masks(photo, {1: mask})).astype(float)[0]
    colour = np.array(concept_colour(1))
    for pixel, alpha in zip(tinted, (0.5, 0.25, 0.0), strict=True):
        assert np.abs(pixel - (100 * (1 - alpha) + colour * alpha)).max() <= 0.5


def test_a_mask_of_another_size_is_stretched_over_the_image():
    photo, small = Image.new("RGB", (8, 4), (100, 100, 100)), np.array([[1.0, 0.0]], np.float32)
    large = np.repeat(np.repeat(small, 4, axis=0), 4, axis=1)
    whole, stretched = (np.asarray(tint_masks(photo, {0: mask})) for mask in (large, small))
    assert np.array_equal(whole, stretched)


def test_heat_shows_the_peak_in_the_concepts_colour():
    photo = Image.new("RGB", (32, 32), (200, 200, 200))
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = 0.03
    shown = np.asarray(overlay_attention(values, photo, 0)).astype(int)
    peak = np.unravel_index((np.abs(shown - np.array(concept_colour(0))).sum(axis=-1)).argmin(), (32, 32))
    assert 8 <= peak[0] < 16
    assert 16 <= peak[1] < 24
    assert (shown[24:, :8] == 70).all()  # 0.35 x 200: the image, darkened
    dead = np.asarray(overlay_attention(np.zeros((4, 4), np.float32), photo, 0))
    assert (dead == 70).all()


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.JPEG"])
def test_settings_travel_with_the_image(tmp_path, name):
    settings = {"prompt": "a photo of <asset0>, ü", "seed": 3, "eta": 0.0}
    save_image(RED, image_path(str(tmp_path / name)), settings)
    with Image.open(tmp_path / name) as image:
        exif = image.getexif()
        note = image.text["bas"] if name.endswith("png") else exif[ExifTags.Base.UserComment]
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - np.asarray(RED)).max() < 10
    assert json.loads(note) == settings


def test_several_images_are_numbered(tmp_path):
    target = tmp_path / "new" / "out.png"
    assert list(save_images([RED], [{}], target)) == [target]
    paths = list(save_images([RED, BLUE], [{"i": 0}, {"i": 1}], target))
    assert [path.name for path in paths] == ["out-0.png", "out-1.png"]
    with Image.open(paths[1]) as image:
        assert image.size == (16, 8)
        assert json.loads(image.text["bas"]) == {"i": 1}


def test_each_image_is_saved_as_it_comes_and_names_sort_as_numbers(tmp_path):
    """What is drawn when the rest is stopped is there."""

    def drawn():
        for i in range(11):
            assert len(list(tmp_path.iterdir())) == i
            yield RED

    names = [path.name for path in save_images(drawn(), [{}] * 11, tmp_path / "x.png")]
    assert names == [f"x-{i:02}.png" for i in range(11)] == sorted(names)


@pytest.mark.parametrize("name", ["image", "image.gif", "x.txt", ".png"])
def test_other_endings_are_refused(name):
    with refused(f"--output_path {name}", ".png, .jpg or .webp"):
        image_path(name)
