"""The measure of the kinds of training: it trains, merges, measures, writes its tables, and goes on."""

import json
import sys

import pytest

from tools.checks import adapters, runs
from tools.checks.mini import Recogniser


def test_the_command_measures_kinds_alone_and_merged(bench, tmp_path, monkeypatch, capsys):
    """On the tiny model: a row for each kind and one for two merged scenes; a second call trains and merges no more."""
    monkeypatch.setattr(adapters, "open_recogniser", lambda *args, **kwargs: Recogniser().eval())
    page = tmp_path / "page.md"
    page.write_text(f"before\n{adapters.MARKS[0]}| old |\n{adapters.MARKS[1]}\nbehind\n")
    monkeypatch.setattr(adapters, "PAGE", page)
    monkeypatch.setattr(adapters, "KINDS", {"token": adapters.KINDS["token"]})
    settings = ("phase1_train_steps=1", "phase2_train_steps=1", "num_class_images=1", "device=cpu")
    flags = ["--kinds", "token", "--weights", str(bench.model), "--output_dir", str(tmp_path)]
    flags += ["--places", "1", "--scenes", "2"]
    flags += ["--seeds", "1", "--num_inference_steps", "1", "--record", "--set", *settings]
    monkeypatch.setattr(sys, "argv", ["adapters", *flags])
    adapters.main()
    table = (tmp_path / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")] == [
        *("| `--train`", "| token", "| merged", "| token")
    ]
    assert page.read_text() == f"before\n{adapters.MARKS[0]}{table}{adapters.MARKS[1]}\nbehind\n"
    assert table.splitlines()[4].split(" | ")[1] == "0.01"  # the rate of the kind's own row
    scores = json.loads((tmp_path / "token" / "scores.json").read_text())
    merged = scores["merged"]["2"]
    assert len(scores["scene"]["concepts"]) == 2
    assert len(merged["before"]) == len(merged["after"]) == len(merged["drift"]) == 5
    assert merged["after"] == pytest.approx(merged["before"], abs=1e-4)  # adapters of single tokens touch no other
    assert max(merged["drift"]) < 1e-5
    assert len(merged["pairs"]) == 2 * 3
    assert scores["costs"]["bytes"] == (tmp_path / "token" / "seed0-00" / "run" / "tuned.safetensors").stat().st_size
    assert scores["costs"]["memory"] > 0
    monkeypatch.setattr(runs, "train", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(adapters, "merge_runs", lambda *args: pytest.fail("merged again"))
    capsys.readouterr()
    adapters.main()
    assert page.read_text().count(table) == 1
    assert table in capsys.readouterr().out


def test_a_part_of_the_kinds_is_not_recorded(tmp_path, monkeypatch, capsys):
    """The page's table would lose the rows of the others."""
    words = ["adapters", "--kinds", "token", "--output_dir", str(tmp_path / "out"), "--record"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        adapters.main()
    assert stopped.value.code == 2
    assert "--record takes all kinds" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_has_one_place_for_the_tables_and_every_rate_a_reason():
    page = adapters.PAGE.read_text(encoding="utf-8")
    assert [page.count(mark) for mark in adapters.MARKS] == [1, 1]
    assert adapters.put_into_page(page, page.split(adapters.MARKS[0])[1].split(adapters.MARKS[1])[0]) == page
    assert {*adapters.MERGED} < {*adapters.KINDS}
    assert all(row.reason for row in adapters.KINDS.values())
