"""The tool of the documentation's images: what its commands leave is what it reads, in its order."""

import json

import numpy as np
import pytest
from PIL import Image

from bas.pretrained.folder import save_model
from tests.helpers.tiny import taught, write_model, write_scene
from tools import make_pictures


@pytest.fixture
def sheets(monkeypatch):
    """The (rows, labels) of every grid that the tool draws."""
    drawn = []
    real = make_pictures.grid

    def grid(rows, labels, cell):
        drawn.append((rows, labels))
        return real(rows, labels, cell)

    monkeypatch.setattr(make_pictures, "grid", grid)
    return drawn


def settings(image):
    """Those that travel with an image's file."""
    return json.loads(image.info["bas"])


def test_each_row_below_the_image_is_of_its_own_prompt(tmp_path, sheets):
    """Twelve images: their files are numbered with two digits."""
    scene, prompts = write_scene(tmp_path / "scene", 2), ["a photo", "a dog", "snow"]
    make_pictures.draw_beside([scene], write_model(tmp_path / "model"), prompts, tmp_path, "one")
    ((first, *rows), labels) = sheets[0]
    assert [len(row) for row in (first, *rows)] == [2, 4, 4, 4]
    assert labels[1:] == [[prompt] * 4 for prompt in prompts]
    assert [[settings(image)["prompt"] for image in row] for row in rows] == labels[1:]
    assert (tmp_path / "one.png").exists()


@pytest.mark.slow
def test_the_edit_shows_each_handle_in_the_same_box(tmp_path, sheets):
    models = taught(write_model(tmp_path / "base"), ("<asset0>", "<asset1>", "<asset2>"))
    save_model(models, tmp_path / "model")
    make_pictures.draw_edit(tmp_path / "model", tmp_path)
    ((images,), (labels,)) = sheets[0]
    assert len(images) == len(labels) == 5
    assert [settings(image)["prompts"] for image in images[2:]] == [[label] for label in labels[2:]]
    where = np.asarray(Image.open(tmp_path / "where.png"))
    assert 0.3 < (where == 255).mean() < 0.8
    for image in images[2:]:
        assert np.array_equal(np.asarray(image)[where == 0], np.asarray(images[0])[where == 0])
        assert not np.array_equal(np.asarray(image)[where == 255], np.asarray(images[0])[where == 255])
    assert [label.split()[3] for label in labels[2:]] == ["<asset0>", "<asset1>", "<asset2>"]
