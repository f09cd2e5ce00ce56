"""times.json: a session per start; a damaged one is replaced with a warning."""

import json

import pytest
import torch

from bas.io.run_files import read_sessions
from bas.training.timing import Timing

CPU = torch.device("cpu")


def test_sessions_and_stages_are_kept(tmp_path):
    (tmp_path / "times.json").write_text(
        json.dumps({"sessions": [{"started": "before", "device": "cpu", "versions": {}, "stages": []}]})
    )
    timing = Timing()
    timing.note("preparation", tmp_path, CPU)
    timing.note("phase1", tmp_path, CPU)
    first, second = read_sessions(tmp_path)
    assert first["started"] == "before"
    assert [stage["stage"] for stage in second["stages"]] == ["preparation", "phase1"]
    assert second["device"] == "cpu"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "{}", '{"sessions": 3}', '{"sessions": [1]}', '{"sessions": {}}', "\x00"]
)
def test_a_damaged_file_is_named_and_replaced(tmp_path, caplog, content):
    (tmp_path / "times.json").write_text(content)
    Timing().note("preparation", tmp_path, CPU)
    assert caplog.text.count("times.json") == 1
    assert len(json.loads((tmp_path / "times.json").read_text())["sessions"]) == 1
