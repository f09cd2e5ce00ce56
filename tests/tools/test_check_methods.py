"""The small evaluation: what is kept of a cell, how two runs are compared, and that its page shows the recorded one."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bas.evaluation.baselines import PAPER
from bas.evaluation.protocol import PLAN
from bas.io.json_files import write_json
from tools.checks import methods as check_methods
from tools.checks.adapters import KINDS
from tools.checks.methods import RECORDED, by_rate, condense, differences, markdown, merged, write_scenes


@pytest.fixture
def evaluation(tmp_path) -> Path:
    """What `bas evaluate` leaves of one cell with two images of one handle and one of the other."""
    common = {"scene": "a", "method": "bas", "seed": 3}
    images = [(0.2, 0.5), (0.4, 0.6), (0.9, 0.1)]
    rows = [
        {"row": "picture", **common, "prompt_similarity": prompt, "identity_similarity": identity}
        for prompt, identity in images
    ]
    handles = {"<asset0>": 0.5, "<asset1>": 0.7}
    rows.append({"row": "cell", **common, "attention_iou": handles, "leakage": 0.25, "confused": 0.5})
    cell = tmp_path / "cells" / "a" / "bas" / "seed-3"
    cell.mkdir(parents=True)
    (cell / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    note = common | {"pictures": images, "seconds": {"training": 20.0, "drawing": 3.5}}
    (cell / "cell.json").write_text(json.dumps(note))
    return tmp_path


def test_a_cell_is_its_means(evaluation):
    (cell,) = condense(evaluation)
    assert (cell["scene"], cell["method"], cell["seed"]) == ("a", "bas", 3)
    assert cell["prompt_similarity"] == pytest.approx(0.5)
    assert cell["identity_similarity"] == pytest.approx(0.4)
    assert cell["attention_iou"] == pytest.approx(0.6)
    assert (cell["leakage"], cell["confused"], cell["pictures"], cell["seconds"]) == (0.25, 0.5, 3, 23.5)
    assert "right" not in cell  # its measure does not say when a concept is shown
    assert "| 0.667 |" in markdown({"date": "", "torch": "", "cells": [cell | {"right": 2 / 3}]})


def test_kinds_of_training_are_evaluated_at_their_own_rates():
    assert by_rate(["bas", "lora", "cross-attention", "token", "single"]) == {
        None: ["bas", "cross-attention", "single"],
        KINDS["lora-16"].rate: ["lora"],  # 16 is the rank of `--train lora`
        KINDS["token"].rate: ["token"],
    }


def test_only_the_same_cells_are_compared(evaluation):
    (cell,) = condense(evaluation)
    recorded = [cell | {"leakage": 0.5, "confused": 0.4}, cell | {"seed": 4, "leakage": 9.0}]
    assert differences([cell], recorded) == [pytest.approx(0.25)]
    assert differences([cell], [cell]) == [0.0]
    assert differences([cell | {"scene": "b"}], recorded) == []


def test_a_recorded_run_of_another_miniature_is_named(evaluation, tmp_path, monkeypatch, capsys):
    """The cells agree, yet a run is told from one with other weights."""
    cells = condense(evaluation)
    recorded = tmp_path / "recorded.json"
    recorded.write_text(json.dumps({"base": "0" * 64, "cells": cells}))
    monkeypatch.setattr(check_methods, "RECORDED", recorded)
    (tmp_path / "evaluation").mkdir()
    write_json(tmp_path / "evaluation" / PLAN, {"base": "f" * 64})
    monkeypatch.setattr(check_methods, "evaluate", lambda *args: None)
    monkeypatch.setattr(check_methods, "condense", lambda folder: cells)
    monkeypatch.setattr(sys, "argv", ["check_methods.py", "--output_dir", str(tmp_path), "--first_scenes", "0"])
    check_methods.main()
    told = capsys.readouterr().out
    assert "1 cells compared with the recorded run; the largest difference is 0\n" in told
    assert f"the recorded run is of another miniature: {'0' * 12}, here {'f' * 12}\n" in told


def test_a_record_grows_by_runs_of_the_same_miniature(evaluation):
    (cell,) = condense(evaluation)
    recorded = {"base": "a", "date": "before", "cells": [cell | {"leakage": 0.5}, cell | {"seed": 4}]}
    assert merged({"base": "b", "date": "now", "cells": [cell]}, recorded)["cells"] == [cell]
    grown = merged({"base": "a", "date": "now", "cells": [cell]}, recorded)
    assert grown == {"base": "a", "date": "now", "cells": [cell, cell | {"seed": 4}]}


def test_the_plot_is_that_of_the_recorded_run(tmp_path, monkeypatch):
    """docs/pictures/comparison.png, as this machine draws it."""
    monkeypatch.setattr(sys, "argv", ["check_methods.py", "--scatter", str(tmp_path / "plot.png")])
    check_methods.main()
    with Image.open(tmp_path / "plot.png") as ours, Image.open(RECORDED.parent / "pictures/comparison.png") as shown:
        assert np.abs(np.asarray(ours, float) - np.asarray(shown, float)).mean() < 1


def test_scenes_are_those_of_the_world_and_stay(tmp_path):
    """Two to four masks in turn, 256 pixels wide; a second call changes nothing."""
    scenes = write_scenes(tmp_path, 4)
    assert [len(list(scene.glob("mask*.png"))) for scene in scenes] == [2, 3, 4, 2]
    with Image.open(scenes[0] / "img.png") as image:
        assert image.size == (256, 256)
        assert np.asarray(image).std() > 10
    (scenes[0] / "img.png").write_bytes(b"mine")
    write_scenes(tmp_path, 1)
    assert (scenes[0] / "img.png").read_bytes() == b"mine"


def test_the_recorded_run_is_whole():
    """Twelve scenes of two to four concepts, ten methods and three options, three seeds; three images a subset."""
    cells = json.loads(RECORDED.read_text(encoding="utf-8"))["cells"]
    for method in (*PAPER, "cross-entropy", "no-close-ups", "uniform"):
        mine = [cell for cell in cells if cell["method"] == method]
        assert {(cell["scene"], cell["seed"]) for cell in mine} == {
            (f"world-{i}", seed) for i in range(check_methods.SCENES) for seed in range(3)
        }
        assert sum(cell["pictures"] for cell in mine) == 3 * 4 * 3 * (3 + 7 + 15)


def test_the_page_shows_the_recorded_run():
    """docs/comparison.md holds, between its marks, what `tools.checks.methods --markdown` prints."""
    page = RECORDED.with_suffix(".md").read_text(encoding="utf-8")
    table = page.split("<!-- methods -->\n")[1].split("<!-- end of methods -->")[0]
    assert table == markdown(json.loads(RECORDED.read_text(encoding="utf-8")))
