"""Each file of JSON that a run and the cache hold is damaged in many ways: one line says so, and what to do.

Damage that does not matter, of times and of caches, is told and passed over.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bas
from bas.cli.entry import main
from bas.evaluation.study import read_list
from bas.io.run_files import read_rows, read_sessions, read_settings
from bas.io.settings_file import read_toml
from tests.helpers.faults import before_step
from tests.helpers.small_runs import write_base, write_small_run
from tests.helpers.tiny import refused

DAMAGE = {
    "empty": b"",
    "cut off": b'{"step": 1, "sess',
    "no JSON": b"<html>",
    "another kind": b"[]\n",
    "null": b"null\n",
    "no entries": b"{}\n",
    "nested": b"[" * 100_000 + b"\n",
    "no text": b"\xff\xfe\x00\x01\n",
    "twice": b'{"step": 1, "step": 1}\n',
    "other values": b'{"config": 1, "sessions": {"a": 1}, "step": "x", "phase": 1, "metrics": -1, "handles": 1}\n',
    "deep": b'{"config": {"log_steps": []}, "sessions": [{"stages": [1]}], "facts": {"config": 1}, "handles": ["a"]}\n',
}


@pytest.fixture(scope="module")
def stopped(bench, tmp_path_factory) -> Path:
    """A run that was stopped before its sixth step, with a checkpoint of step 4."""

    def stop(*args):
        raise KeyboardInterrupt

    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, 6, stop)
        with pytest.raises(KeyboardInterrupt):
            bas.train(bench.config(run, checkpointing_steps=2))
    return run


def one_line(capsys, path: Path) -> str:
    """The last line of standard error, which names the file and holds no trace."""
    lines = capsys.readouterr().err.splitlines()
    assert not any(line.startswith("Traceback") for line in lines)
    assert str(path) in lines[-1]
    return lines[-1]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    """A run that keeps its trained weights alone, beside its base."""
    place = tmp_path_factory.mktemp("small")
    return write_small_run(place / "run", write_base(place / "base", "sd1"), train="lora", rank=1)


def change_rows(run: Path, rows: torch.Tensor) -> None:
    """Give a run other rows of its handles."""
    with safe_open(run / "concepts.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(run / "concepts.safetensors") | {"handles": rows}
    save_file(tensors, run / "concepts.safetensors", metadata)


SMALL_RUNS = {  # what is damaged, the command, its exit code, what it says
    "no weights": (lambda run: (run / "tuned.safetensors").unlink(), "info", 0, "is a run whose weights are missing"),
    "rows of another width": (
        lambda run: change_rows(run, torch.zeros(2, 5)),
        "merge",
        2,
        "rows of the shapes [(2, 5)] for its handles",
    ),
    "rows that are no numbers": (
        lambda run: change_rows(run, torch.full((2, 64), torch.nan)),
        "export",
        2,
        "not finite",
    ),
}


@pytest.mark.parametrize("kind", SMALL_RUNS)
def test_a_damaged_small_run_is_one_line(kind, small_run, tmp_path, capsys):
    damage, command, code, said = SMALL_RUNS[kind]
    run = shutil.copytree(small_run, tmp_path / "other")
    damage(run)
    others = {
        "merge": [str(small_run), "--output_dir", str(tmp_path / "new")],
        "export": [str(tmp_path / "new.safetensors")],
    }
    assert main([command, str(run), *others.get(command, [])]) == code
    printed = capsys.readouterr()
    assert said in printed.out + printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["settings.json", "metrics.jsonl"])
def test_a_report_names_the_damaged_file(name, damage, stopped, tmp_path, capsys):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    (run / name).write_bytes(DAMAGE[damage])
    harmless = name == "metrics.jsonl" and damage in ("empty", "cut off", "no JSON")  # a line that is not finished
    assert main(["report", str(run)]) == (0 if harmless else 2)
    if not harmless:
        line = one_line(capsys, run / name)
        assert "restore it from a copy" in line or "expected" in line


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_times_are_told_and_passed_over(damage, stopped, tmp_path, capsys, caplog):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    (run / "times.json").write_bytes(DAMAGE[damage])
    assert main(["report", str(run)]) == 0
    assert f"{run / 'times.json'} is not " in caplog.text
    assert "the times of earlier sessions are left out" in caplog.text


@pytest.mark.parametrize("peak", ['"8 GB"', "[1]", "{}", "null", "1" + "0" * 400, "1e400", "NaN"])
def test_a_peak_that_is_no_number_is_passed_over(peak, stopped, tmp_path, caplog):
    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    stages = f'[{{"stage": "phase1", "seconds": 1, "process_bytes": {peak}}}]'
    session = f'{{"started": "now", "device": "cpu", "versions": {{}}, "stages": {stages}}}'
    (run / "times.json").write_text(f'{{"sessions": [{session}]}}')
    assert main(["report", str(run)]) == 0
    assert f"{run / 'times.json'} is not as bas wrote it (" in caplog.text


def test_records_of_gigabytes_are_not_read(tmp_path, caplog):
    """A file of 3 GB without content, as a disk leaves it after a power cut: the refusal names its size."""
    readers = {
        "settings.json": read_settings,
        "metrics.jsonl": lambda run: read_rows(run / "metrics.jsonl"),
        "config.toml": lambda run: read_toml(run / "config.toml"),
        "list.jsonl": lambda run: [*read_list(run / "list.jsonl")],
    }
    for name in (*readers, "times.json"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(3_000_000_000)
    for name, read in readers.items():
        with refused(f"{tmp_path / name} has 3.0 GB, files of its kind have less"):
            read(tmp_path)
    assert read_sessions(tmp_path) == []
    assert f"{tmp_path / 'times.json'} has 3.0 GB" in caplog.text


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_refused_before_weights_are_read(
    name, damage, bench, stopped, tmp_path, capsys, monkeypatch
):
    """Also where the manifest was made anew, so that it agrees with the damage."""
    from bas.training.checkpoints import describe_file

    run = Path(shutil.copytree(stopped, tmp_path / "run"))
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    (checkpoint / name).write_bytes(DAMAGE[damage])
    if name == "state.json":
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        manifest[name] = describe_file(checkpoint / name)
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    words = [*bench.command(run), "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    assert main(words) == 2
    line = one_line(capsys, checkpoint)
    assert line.startswith("bas: ")


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_key_of_class_images_is_named(damage, bench, tmp_path, capsys, monkeypatch):
    folder = Path(shutil.copytree(bench.class_images, tmp_path / "class"))
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    (folder / "key.json").write_bytes(DAMAGE[damage])
    words = bench.command(tmp_path / "run")
    words[words.index("--class_data_dir") + 1] = str(folder)
    assert main(words) == 2
    assert "name another folder" in one_line(capsys, folder)
