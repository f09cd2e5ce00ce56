"""The small evaluation: what is kept of a cell, how two runs are compared, and that its page shows the recorded one."""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bas.evaluation.baselines import PAPER
from tools.checks import methods as check_methods
from tools.checks.adapters import KINDS
from tools.checks.methods import RECORDED, by_settings, condense, differences, left, markdown, with_run, write_scenes

RUN = {"date": "", "torch": "", "base": "", "settings": {}}


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
    assert "| 0.667 |" in markdown(RUN | {"cells": [cell | {"right": 2 / 3}]})


def test_kinds_of_training_are_evaluated_at_their_own_rates():
    assert by_settings(["bas", "lora", "cross-attention", "token", "single"], {}) == {
        (): ["bas", "cross-attention", "single"],
        (("learning_rate", KINDS["lora-16"].rate),): ["lora"],  # 16 is the rank of `--train lora`
        (("learning_rate", KINDS["token"].rate),): ["token"],
    }


def test_a_setting_may_be_of_one_method_alone():
    texts = ["cd-m.learning_rate=0.0001", "phase2_train_steps=9", "learning_rate=0.5"]
    changes = dict(map(check_methods.read_change, texts))
    assert changes == {"cd-m.learning_rate": 0.0001, "phase2_train_steps": 9, "learning_rate": 0.5}
    assert by_settings(["bas", "cd-m", "db-m"], changes) == {
        (): ["bas", "db-m"],
        (("learning_rate", 0.0001),): ["cd-m"],
    }
    assert by_settings(["lora"], changes) == {(): ["lora"]}  # what --set gives to all goes before the rate of a kind


def test_only_the_same_cells_are_compared(evaluation):
    (cell,) = condense(evaluation)
    recorded = [cell | {"leakage": 0.5, "confused": 0.4}, cell | {"seed": 4, "leakage": 9.0}]
    assert differences([cell], recorded) == [pytest.approx(0.25)]
    assert differences([cell], [cell]) == [0.0]
    assert differences([cell | {"scene": "b"}], recorded) == []


def test_a_recorded_run_of_another_miniature_is_named(evaluation, tmp_path, monkeypatch, capsys):
    """The cells agree, yet a run is told from one with other weights."""
    cells = condense(evaluation)
    recorded = {"base": "0" * 64, "cells": cells}
    recorded["settings"] = check_methods.TRAINING | {"class_image_guidance": 3.0}  # the shipped miniature's own
    monkeypatch.setattr(check_methods, "read_json", lambda path: {"runs": [recorded]})
    monkeypatch.setattr(check_methods, "evaluate", lambda *args: None)
    monkeypatch.setattr(check_methods, "condense", lambda folder: cells)
    monkeypatch.setattr(sys, "argv", ["check_methods.py", "--output_dir", str(tmp_path), "--first_scenes", "0"])
    agree = "1 cells compared with the recorded run; the largest difference is 0\n"
    other = "no cell compared: the recorded run has none of these trials\n"
    other += f"no recorded run is of this miniature, {'f' * 12}, and these settings\n"
    for base, told, not_told in (("f", other, agree), ("0", agree, "no recorded run")):
        monkeypatch.setattr(check_methods, "weights_hash", lambda path, base=base: base * 64)
        check_methods.main()
        output = capsys.readouterr().out
        assert told in output
        assert not_told not in output


def test_a_record_grows_by_runs_of_the_same_miniature_and_settings(evaluation):
    (cell,) = condense(evaluation)
    base = {"base": "a", "settings": {"rank": 4}}
    recorded = [{**base, "date": "before", "cells": [cell | {"leakage": 0.5}, cell | {"seed": 4}]}]
    other = {**base, "settings": {"rank": 8}, "date": "now", "cells": [cell]}
    assert with_run(recorded, other) == [other, *recorded]
    grown = {**base, "date": "now", "cells": [cell, cell | {"seed": 4}]}
    assert with_run([other, *recorded], {**base, "date": "now", "cells": [cell]}) == [grown, other]


def test_runs_of_the_usual_settings_stand_first(evaluation):
    """The first is the one that is plotted: an experiment with --set never takes its place."""
    usual = {"base": "a", "settings": check_methods.TRAINING | {"class_image_guidance": 3.0}, "cells": []}
    for change in ({"phase2_train_steps": 9}, {"learning_rate": 0.1}):
        trial = usual | {"settings": usual["settings"] | change}
        assert with_run([usual], trial) == [usual, trial]
        assert with_run([trial], usual) == [usual, trial]


def test_settings_are_those_of_the_tool_or_as_set(tmp_path, monkeypatch):
    """Each evaluation gets a file of settings: the tool's, the rate of its kind, and those of --set, which go first."""
    monkeypatch.setattr(check_methods.subprocess, "run", lambda command, **_: None)
    monkeypatch.setattr(check_methods, "condense", lambda folder: [])
    for more in ([], ["--set", "phase2_train_steps=9", "close_ups=true", "token.rank=2"]):
        words = ["--output_dir", str(tmp_path), "--methods", "bas", "token", "--seeds", "7", "--first_scenes", "1"]
        monkeypatch.setattr(sys, "argv", ["check_methods.py", *words, *more])
        check_methods.main()
        plain = tomllib.loads((tmp_path / "evaluation.toml").read_text())
        end = "-rank-2" if more else ""
        kind = tomllib.loads((tmp_path / f"evaluation-learning_rate-{KINDS['token'].rate}{end}.toml").read_text())
        wanted = check_methods.TRAINING | ({"phase2_train_steps": 9, "close_ups": True} if more else {})
        assert plain == wanted
        assert kind == wanted | {"learning_rate": KINDS["token"].rate} | ({"rank": 2} if more else {})


def test_what_is_recorded_is_not_trained_again():
    """Scenes are grouped by what they lack: one evaluation takes all with the same methods and seed."""
    scenes = [Path(f"s{i}") for i in range(3)]
    cells = [{"scene": "s0", "method": "bas", "seed": 0}, {"scene": "s1", "method": "db", "seed": 1}]
    cells += [{"scene": "s2", "method": method, "seed": 0} for method in ("bas", "db")]
    assert left(scenes, ["bas", "db"], [0, 1], cells) == {
        (("db",), 0): scenes[:1],
        (("bas", "db"), 0): scenes[1:2],
        (("bas", "db"), 1): [scenes[0], scenes[2]],
        (("bas",), 1): scenes[1:2],
    }


def test_the_plot_is_that_of_the_recorded_run(tmp_path, monkeypatch):
    """docs/pictures/comparison.png, as this machine draws it."""
    monkeypatch.setattr(sys, "argv", ["check_methods.py", "--scatter", str(tmp_path / "plot.png")])
    check_methods.main()
    with Image.open(tmp_path / "plot.png") as ours, Image.open(RECORDED.parent / "pictures/comparison.png") as shown:
        different = np.abs(np.asarray(ours, float) - np.asarray(shown, float)).max(axis=-1) > 16
        assert different.mean() < 1e-4  # a point is some 500 of 518,400 pixels


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


def test_the_first_recorded_run_is_whole():
    """Twelve scenes of two to four concepts, ten methods and three options, three seeds; three images a subset."""
    cells = json.loads(RECORDED.read_text(encoding="utf-8"))["runs"][-1]["cells"]
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
    assert table == "\n".join(map(markdown, json.loads(RECORDED.read_text(encoding="utf-8"))["runs"]))
