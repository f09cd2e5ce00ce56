"""The tool that measures the applications: its scenes are what it says, and its figures tell good from bad."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tools.checks import applications as check
from tools.mini_world.drawing import draw
from tools.mini_world.layouts import DEMO_SCENES

SIDE = 64
SHORE = DEMO_SCENES["shore"]


@pytest.fixture
def learnt():
    """A run that never was, of the shipped shore: its looks and handles, no model."""
    image, masks = draw(SHORE, SIDE)
    models = SimpleNamespace(handles=("<a>", "<b>", "<bg>"))
    return check.Learnt(models, None, Image.fromarray(image), masks, ("<a>", "<b>"))


def paste(target: np.ndarray, layout, index: int, top: int, left: int) -> None:
    """Put an object of a layout into an image, its box at (top, left)."""
    image, masks = draw(layout, SIDE)
    rows, columns = np.nonzero(masks[index])
    box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    h, w = masks[index][box].shape
    weight = masks[index][box][..., None]
    spot = target[top : top + h, left : left + w]
    spot[:] = image[box] * weight + spot * (1 - weight)


def test_all_images_show_the_same_objects_apart():
    for layout in (check.SCENE, *check.FURTHER, check.UNSEEN):
        assert [(t.shape, t.colour, t.second) for t in layout.objects] == [
            (t.shape, t.colour, t.second) for t in check.SCENE.objects
        ]
        _, masks = draw(layout, SIDE)
        assert (masks.mean(axis=(1, 2)) > 0.05).all()
        assert masks.prod(axis=0).max() == 0
    assert len({layout.background for layout in (check.SCENE, *check.FURTHER, check.UNSEEN)}) == 4


def test_the_part_lies_within_the_object():
    """More than three fifths of it lie on the object, and the object's own mask lacks what it hides."""
    _, (obj, part) = draw(check.PARTS, SIDE)
    alone = draw(check.Layout(check.PARTS.objects[:1], check.PARTS.background, 0), SIDE)[1][0]
    assert part.sum() > 100
    assert (part > 0.5)[alone > 0.5].sum() > 0.6 * (part > 0.5).sum()
    assert obj.sum() < alone.sum() - 50


def test_an_edit_is_measured_inside_and_outside(learnt, tmp_path, monkeypatch):
    def edited(_models, photo, regions, num_images, batch_size):
        """The first result shows the object in the region; the second changed one pixel elsewhere."""
        top, left = (int(places.min()) for places in np.nonzero(regions[0].mask))
        good = np.array(photo)
        paste(good, SHORE, 0, top, left)
        good[regions[0].mask == 0] = np.asarray(photo)[regions[0].mask == 0]
        bad = good.copy()
        bad[-1, 0] = 255 - bad[-1, 0]
        return [Image.fromarray(array) for array in (good, bad)[:num_images]]

    monkeypatch.setattr(check, "edit", edited)
    clean = check.check_edit(learnt, 1, tmp_path / "sheet.png")
    assert clean["outside"] == 0
    assert clean["after"] > 0.75 > 0.45 > clean["before"]  # the house is unlike a gear
    assert check.check_edit(learnt, 2, tmp_path / "sheet.png")["outside"] == 1


def test_places_are_counted_prompt_by_prompt(learnt, tmp_path, monkeypatch):
    asked = []

    def sampled(_models, prompts, config):
        asked.extend(prompts)
        return [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(len(prompts) * config.num_images)]

    def read(_recogniser, images):  # the beach in images 0 and 5 alone
        numbers = [image.getpixel((0, 0))[0] for image in images]
        return [SimpleNamespace(place="beach" if number in (0, 5) else "snow") for number in numbers]

    monkeypatch.setattr(check, "sample", sampled)
    monkeypatch.setattr(check, "recognise_images", read)
    shares = check.check_background(learnt, None, 2, tmp_path / "sheet.png")
    assert asked == [
        "a photo at <bg>",
        "a photo of <b> at <bg>",
        "a photo of <b> in the snow",
        "a photo of a red ball at <bg>",
    ]
    assert list(shares.values()) == [0.5, 0.0, 0.5, 0.0]


def test_strengths_are_measured_for_both_objects(learnt, tmp_path, monkeypatch):
    """Images that show the first object where its strength is 1 or more, and the second always."""

    def sampled(_models, prompts, config):
        drawn = []
        for prompt in prompts:
            image = np.full((SIDE, SIDE, 3), 128, np.uint8)
            paste(image, SHORE, 1, 36, 30)
            if float(prompt.partition(":")[2].partition(")")[0]) >= 1:
                paste(image, SHORE, 0, 2, 2)
            drawn += [Image.fromarray(image)] * config.num_images
        return drawn

    monkeypatch.setattr(check, "sample", sampled)
    found = check.check_strength(learnt, 1, tmp_path / "sheet.png")
    assert list(found) == ["0", "0.5", "1", "1.3"]
    first, second = zip(*found.values(), strict=True)
    assert min(first[2:]) > 0.75 > 0.3 > max(first[:2])
    assert min(second) > 0.9
