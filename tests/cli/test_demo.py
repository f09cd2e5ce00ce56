"""The demo begins anew, goes on where it stopped, or only draws: told from what the folder holds."""

import pytest

from bas.cli.commands import demo


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
