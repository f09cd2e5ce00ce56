"""The measure of the kinds of training: it trains, merges, measures, writes its tables, and goes on."""

import json
import sys

import pytest

from tools.checks import adapters, combine
from tools.checks.mini import Recogniser


def test_the_command_measures_kinds_alone_and_merged(bench, tmp_path, monkeypatch, capsys):
    """On the tiny model: a row for each kind and one for two merged scenes; a second call trains and merges no more."""
    monkeypatch.setattr(adapters, "train_recogniser", lambda *args, **kwargs: Recogniser().eval())
    monkeypatch.setattr(adapters, "SCENES", 2)
    settings = ("phase1_train_steps=1", "phase2_train_steps=1", "num_class_images=1", "device=cpu")
    flags = ["--kinds", "token-4", "--weights", str(bench.model), "--output_dir", str(tmp_path), "--places", "1"]
    flags += ["--seeds", "1", "--num_inference_steps", "1", "--set", *settings]
    monkeypatch.setattr(adapters, "MERGED", ("token-4",))
    monkeypatch.setattr(sys, "argv", ["adapters", *flags])
    adapters.main()
    table = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")] == [
        *("| `--train`", "| token-4", "| merged", "| token-4")
    ]
    scores = json.loads((tmp_path / "token-4" / "scores.json").read_text())
    merged = scores["merged"]["2"]
    assert len(scores["scene"]["concepts"]) == 2
    assert len(merged["before"]) == len(merged["after"]) == len(merged["drift"]) == 5
    assert merged["after"] == pytest.approx(merged["before"], abs=1e-4)  # adapters of single tokens touch no other
    assert max(merged["drift"]) < 1e-5
    assert len(merged["pairs"]) == 2 * 3
    assert scores["costs"]["bytes"] == (tmp_path / "token-4" / "seed0-00" / "run" / "tuned.safetensors").stat().st_size
    assert scores["costs"]["memory"] > 0
    monkeypatch.setattr(combine, "train", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(adapters, "merge_runs", lambda *args: pytest.fail("merged again"))
    capsys.readouterr()
    adapters.main()
    assert table in capsys.readouterr().out
