"""The demo begins anew, goes on where it stopped, or only draws: told from what the folder holds."""

import re
from functools import partial

import pytest
from PIL import Image

from bas.cli.commands import demo
from bas.cli.entry import main
from bas.pretrained.hub import train_config
from bas.training.loop import train
from tests.helpers.tiny import write_scene


class Asked(Exception):
    """Ends the demo where the training would begin."""


@pytest.mark.parametrize(("begun", "resume"), [(False, None), (True, "latest")])
def test_an_interrupted_demo_goes_on(tmp_path, monkeypatch, begun, resume):
    asked = []

    def trained(config):
        asked.append((config.resume_from_checkpoint, config.output_dir))
        raise Asked

    if begun:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(demo, "train", trained)
    with pytest.raises(Asked):
        demo.demo(tmp_path)
    assert asked == [(resume, str(tmp_path))]


def test_the_demo_prints_its_figures_and_its_page_begins_with_its_sheet(bench, tmp_path, monkeypatch, capsys):
    """On the tiny model: one attention IoU for each handle, then the paths of the sheet and of the page."""
    write_scene(tmp_path / "base" / demo.SCENE, concepts=3)
    short = {"phase1_train_steps": 1, "phase2_train_steps": 1, "num_class_images": 1, "img_log_steps": 0}
    monkeypatch.setattr(demo, "find", lambda name: tmp_path / "base")
    monkeypatch.setattr(demo, "SHORTER", short)
    monkeypatch.setattr(demo, "train_config", partial(train_config, weights=str(bench.model)))
    run = tmp_path / "run"
    assert main(["demo", "--output_dir", str(run), "--device", "cpu"]) == 0
    *figures, sheet, page = capsys.readouterr().out.splitlines()
    assert (sheet, page) == (str(run / "demo.png"), str(run / "report.html"))
    found = [re.fullmatch(r"attention IoU of <asset(\d)> +(\d\.\d\d)", line) for line in figures]
    assert [match[1] for match in found] == ["0", "1", "2"]
    assert all(0 <= float(match[2]) <= 1 for match in found)
    with Image.open(sheet) as image:
        first = re.search(r'<img width="(\d+)" height="(\d+)"', (run / "report.html").read_text())
        assert first.groups() == tuple(map(str, image.size))


def test_another_run_is_left_alone(bench, tmp_path, monkeypatch, capsys):
    """A finished run of other settings is not the demo's, so no figure is drawn into it."""
    train(bench.config(tmp_path / "run"))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    capsys.readouterr()
    assert main(["demo", "--output_dir", str(tmp_path / "run"), "--device", "cpu"]) == 2
    told = f"bas: --output_dir {tmp_path / 'run'} holds another run than the demo's: name a new folder\n"
    assert capsys.readouterr().err == told
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before
