"""The recogniser that reads generated images: what it learns from, and that its figures can be repeated."""

import math

import numpy as np
import torch

from tests.helpers.tiny import refused
from tools.checks import mini
from tools.checks.mini import (
    BATCH,
    COLOUR_NAMES,
    NOTHING,
    SEED,
    SHAPE_NAMES,
    Reading,
    labelled_scene,
    psnr,
    score,
    train_recogniser,
)
from tools.mini_world.layouts import Layout, Object
from tools.mini_world.scenes import render_scene


def test_two_trainings_give_the_same_recogniser(tmp_path):
    """Whatever was drawn from the generator before: its first weights come from the seed too."""
    first = train_recogniser(tmp_path / "first.pt", BATCH, epochs=1).state_dict()
    torch.rand(7)
    second = train_recogniser(tmp_path / "second.pt", BATCH, epochs=1).state_dict()
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_trained_recogniser_is_read_and_not_taken_for_another(tmp_path, monkeypatch):
    """The file says of how many scenes it is; the same call gives it back without a scene."""
    path = tmp_path / "recogniser.pt"
    first = train_recogniser(path, BATCH, epochs=1).state_dict()
    monkeypatch.setattr(mini, "Pool", None)
    again = train_recogniser(path, BATCH, epochs=1).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    with refused("recogniser.pt was trained on 64 scenes and 1 epochs, not 64 and 2: move it away"):
        train_recogniser(path, BATCH, epochs=2)
    named = mini.open_recogniser(path, tmp_path / "none", scenes=8_000, epochs=4).state_dict()
    assert all(torch.equal(named[name], value) for name, value in first.items())
    torch.save(first, path)  # as earlier versions did
    with refused("recogniser.pt is of an earlier version: move it away"):
        train_recogniser(path, BATCH, epochs=1)


def test_a_scene_is_labelled_where_its_objects_are():
    """Cells of which an object covers half have its shape and colour, as the masks say; all others have neither."""
    for index in range(8):
        labels = labelled_scene(index)
        drawn = render_scene(np.random.default_rng((SEED, index)), 64, two_colours=0)
        assert labels.image.shape == (64, 64, 3)
        assert np.array_equal(labels.image, drawn.image)
        for row, column in np.ndindex(16, 16):
            cell = np.s_[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            here = [obj for obj, mask in zip(drawn.objects, drawn.masks, strict=True) if mask[cell].mean() > 0.5]
            shape, colour = labels.shapes[row, column], labels.colours[row, column]
            assert [SHAPE_NAMES[shape]] == [obj.shape for obj in here] if here else shape == NOTHING
            assert [COLOUR_NAMES[colour]] == [obj.colour for obj in here] if here else colour == -1


def test_percentages_by_hand():
    """One of five readings is right: others miss shape, colour, place or most of the object; of two pairs one.

    Of four images of three objects one is right, and three are in their place. Of two an object needs a fifth of the
    cells, of three two fifteenths: a drawn scene of three may hold a small one.
    """
    star, mug, ball = Object("star", "red"), Object("mug", "blue"), Object("ball", "green")
    colours = {"star": "red", "mug": "blue", "ball": "green"}
    right = Reading("beach", {"star": 10}, {"star": "red"})
    readings = [
        right,
        Reading("beach", {"mug": 10, "star": 1}, {"mug": "red", "star": "red"}),
        Reading("beach", {"star": 10}, {"star": "pink"}),
        Reading("snow", {"star": 10}, {"star": "red"}),
        Reading("beach", {"star": 4, "mug": 3, "ball": 3}, {"star": "red", "mug": "blue", "ball": "red"}),
        Reading("snow", {"star": 8, "mug": 2}, {"star": "red", "mug": "blue"}),
        Reading("snow", {"star": 9, "mug": 1}, {"star": "red", "mug": "blue"}),  # too little of the mug
        Reading("jungle", {"star": 10, "mug": 7, "ball": 3}, colours),
        Reading("jungle", {"star": 10, "mug": 8, "ball": 2}, colours),  # too little of the ball
        Reading("jungle", {"star": 5, "mug": 5}, colours),
        Reading("snow", {"star": 5, "mug": 5, "ball": 5}, colours | {"ball": "blue"}),
    ]
    layouts = [Layout((star,), "beach", seed=0)] * 5 + [Layout((star, mug), "snow", seed=0)] * 2
    layouts += [Layout((star, mug, ball), "jungle", seed=0)] * 4
    assert score(layouts, readings) == {
        "shape": 80.0,
        "colour": 80.0,
        "place": 80.0,
        "all three": 20.0,
        "both of two": 50.0,
        "three of three": 25.0,
        "place of two": 100.0,
        "place of three": 75.0,
    }


def test_psnr_of_known_errors():
    """One level of 255 everywhere is 20 log10 255 = 48.13 dB, ten levels 20 dB less; the mean over both images."""
    image = np.full((64, 64, 3), 100, np.uint8)
    assert math.isclose(psnr([image + 1, image + 10], [image] * 2), 20 * math.log10(255) - 10, abs_tol=1e-3)
