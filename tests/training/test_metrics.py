"""The metrics log: numbers leave the device together, and a resumed run cuts the file back."""

import json

import torch

from bas.training.metrics import MetricsLog


def test_metrics_are_read_together_and_continued_at_their_length(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        values = {"loss": torch.tensor(step / 2, dtype=torch.bfloat16), "grad_norm": torch.tensor(3)}
        log.add("phase1", step, 0.5, values)
    assert log.length == 0
    rows = log.flush()
    assert rows[1] == {"phase": "phase1", "step": 2, "lr": 0.5, "loss": 1.0, "grad_norm": 3.0}
    assert log.flush() == []
    length = log.length
    log.add("phase2", 3, 0.1, {"loss": torch.tensor(float("nan"))})
    log.flush()
    assert len(log.path.read_text().splitlines()) == 3
    MetricsLog(log.path, length)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == rows
    MetricsLog(log.path, 10 * length)  # longer than the file: nothing is made up
    assert log.length == length
    MetricsLog(log.path)
    assert log.length == 0
