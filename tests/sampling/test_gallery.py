"""Galleries: which prompts are drawn, in which order, and where each image lands."""

import json

import numpy as np
import pytest
from PIL import Image

import bas
from bas.cli.entry import main
from bas.config import SampleConfig
from bas.io.figures import MARGIN
from bas.io.files import new_folder
from bas.pretrained.folder import load, save_model
from bas.sampling.gallery import CELL, CONTEXTS, explore, subsets, vary
from bas.sampling.sampler import sample
from tests.helpers.tiny import refused, taught, write_model

FAST = SampleConfig(num_inference_steps=2, batch_size=8)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return taught(write_model(tmp_path_factory.mktemp("gallery") / "model"))


def note(path):
    """The settings that an image was saved with."""
    with Image.open(path) as image:
        return json.loads(image.text["bas"])


def columns(path):
    """How many cells a grid is wide."""
    with Image.open(path) as image:
        return (image.width - MARGIN) / (CELL + MARGIN)


def levels(path, image):
    """How far a file is from an image: the largest difference of 255 levels."""
    with Image.open(path) as drawn:
        return np.abs(np.asarray(drawn, int) - np.asarray(image, int)).max()


def test_the_papers_ten_contexts():
    assert len(set(CONTEXTS)) == 10
    assert CONTEXTS[0] == "at the beach"
    assert CONTEXTS[-1] == "floating on top of water"


def test_every_subset_comes_once_single_ones_first():
    a, b, c = "<a>", "<b>", "<c>"
    assert subsets((a, b, c)) == [(a,), (b,), (c,), (a, b), (a, c), (b, c), (a, b, c)]


def test_explore_draws_every_subset_in_every_context(models, tmp_path):
    path = explore(models, tmp_path / "new", ("at the beach", "at a"), FAST)
    files = sorted((tmp_path / "new").glob("0*.png"))
    ones = [
        f"a photo of {h} {c}"
        for h in ("<asset0>", "<asset1>", "<asset0> and <asset1>")
        for c in ("at the beach", "at a")
    ]
    assert [note(file)["prompt"] for file in files] == ones
    assert path == tmp_path / "new" / "grid.png"
    assert columns(path) == 2
    (alone,) = sample(models, ones[3], FAST)
    assert levels(files[3], alone) <= 1
    assert min(levels(file, alone) for file in files[:3] + files[4:]) > 1


def test_vary_draws_all_handles_with_new_seeds(models, tmp_path):
    path = vary(models, tmp_path, SampleConfig(num_inference_steps=2, num_images=5, seed=3, batch_size=5))
    notes = [note(file) for file in sorted(tmp_path.glob("0*.png"))]
    assert [n["seed"] for n in notes] == [3, 4, 5, 6, 7]
    assert {n["prompt"] for n in notes} == {"a photo of <asset0> and <asset1>"}
    assert columns(path) == 3


def test_a_base_model_has_nothing_to_show(models, tmp_path):
    base = load(models.source)
    for run in (lambda: vary(base, tmp_path, FAST), lambda: explore(base, tmp_path, CONTEXTS, FAST)):
        with refused(str(models.source), "has no handles"):
            run()


def test_a_folder_in_use_is_refused_before_weights_are_read(tmp_path, capsys):
    (tmp_path / "old.txt").touch()
    with refused("--output_dir", "is not empty"):
        new_folder(str(tmp_path))
    with refused("--output_dir", "old.txt"):
        new_folder(str(tmp_path / "old.txt" / "below"))
    assert main(["vary", str(tmp_path), "--output_dir", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["vary", "explore"])
def test_a_gallery_that_was_not_finished_is_told_from_another_folder(command, tmp_path, capsys):
    """Its images may be wanted: nothing is replaced."""
    (tmp_path / "0000.png").write_text("kept")
    assert main([command, str(tmp_path), "--output_dir", str(tmp_path)]) == 2
    error = f"bas: --output_dir {tmp_path} holds images of a gallery that was not finished: move the folder away or "
    assert capsys.readouterr().err == f"{error}remove it, or name a new one\n"
    assert (tmp_path / "0000.png").read_text() == "kept"


def test_without_a_folder_the_grid_goes_into_the_run_and_onto_its_page(bench, tmp_path, capsys):
    run = tmp_path / "run"
    bas.train(bench.config(run, phase1_train_steps=1, phase2_train_steps=1))
    assert main(["report", str(run)]) == 0
    before = (run / "report.html").read_text()
    assert f"<code>bas explore {run}</code>" in before
    capsys.readouterr()
    fast = ["--num_inference_steps", "1", "--device", "cpu"]
    assert main(["explore", str(run), "--contexts", "at the beach", *fast]) == 0
    assert capsys.readouterr().out.split() == [str(run / "exploration" / "grid.png"), str(run / "report.html")]
    page = (run / "report.html").read_text()
    assert "bas explore" not in page
    assert page.count("<img") == before.count("<img") + 1


def test_the_commands_print_where_the_grid_is(models, tmp_path, capsys):
    save_model(models, tmp_path / "run")
    fast = ["--num_inference_steps", "2", "--device", "cpu"]
    assert main(["vary", str(tmp_path / "run"), "--output_dir", str(tmp_path / "v"), "--num_images", "2", *fast]) == 0
    assert main(
        ["explore", str(tmp_path / "run"), "--output_dir", str(tmp_path / "e"), "--contexts", "at the beach", *fast]
    ) == 0  # fmt: skip
    assert capsys.readouterr().out.split() == [str(tmp_path / name / "grid.png") for name in "ve"]
    assert len(list((tmp_path / "v").iterdir())) == 3
    assert len(list((tmp_path / "e").iterdir())) == 4
