"""How the tools end when their input is wrong."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bas.errors import InputError
from tests.helpers.tiny import Bench, refused, write_scene
from tools.checks import runs
from tools.command_line import run

ROOT = Path(__file__).parents[2]


def test_wrong_input_is_one_line_and_exit_code_2(capsys):
    """Anything else than wrong input stays what it is."""

    def wrong():
        raise InputError("there is no such scene")

    def broken():
        raise ZeroDivisionError

    with pytest.raises(SystemExit) as stopped:
        run(wrong)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(": there is no such scene")
    with pytest.raises(ZeroDivisionError):
        run(broken)
    run(lambda: None)


def test_a_tool_names_itself():
    command = [sys.executable, "-m", "tools.checks.combine", "--output_dir", "nowhere", "--weights", "no such model"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("python -m tools.checks.combine: ")
    assert not (ROOT / "nowhere").exists()


def test_a_run_is_trained_once_and_not_taken_for_another(bench: Bench, tmp_path, monkeypatch):
    """The second call trains nothing; one with other settings, or of another base, is refused by what differs."""
    calls, original = [], runs.train
    monkeypatch.setattr(runs, "train", lambda config: calls.append(config) or original(config))
    config, noted = bench.config(tmp_path / "run"), tmp_path / "trained.json"
    for _ in range(2):
        runs.train_once(config, noted)
    assert len(calls) == 1
    monkeypatch.chdir(tmp_path)
    runs.train_once(replace(config, output_dir="run", log_steps=7), noted)  # the same
    assert len(calls) == 1
    with refused("was trained with another phase2_train_steps: name another folder"):
        runs.train_once(bench.config(tmp_path / "run", phase2_train_steps=9), noted)
    with refused("was trained with another scene: name another folder"):
        runs.train_once(replace(config, instance_data_dir=str(write_scene(tmp_path / "other", 1))), noted)
    with pytest.MonkeyPatch.context() as patch, refused("was trained with another base: name another folder"):
        patch.setattr(runs, "weights_hash", lambda path: "0" * 64)
        runs.train_once(config, noted)
    noted.unlink()
    with refused("was trained without a note of how, trained.json: name another folder"):
        runs.train_once(config, noted)
    assert len(calls) == 1
