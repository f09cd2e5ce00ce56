"""The run folder's own files: metrics, checkpoints, concepts; each whole or absent."""

import errno
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bas.config import TrainConfig
from bas.io.run_files import read_concepts, save_concepts
from bas.io.tensors import write_tensors
from bas.training.optimizer import build_optimizer
from bas.training.run_folder import (
    MetricsLog,
    drop_later,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    locked,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from tests.helpers.tiny import refused


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


@pytest.mark.parametrize("kind", ["adamw", "adam", "adamw8bit"])
def test_optimizer_comes_back_to_the_bit(kind):
    """Two steps, saved, restored into a new optimizer: the third step is the same."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="8-bit moments are an extra that is not installed")

    def fresh():
        parameters = [torch.nn.Parameter(torch.arange(n, dtype=torch.float32)) for n in (3, 5000, 5000)]
        return parameters, build_optimizer(parameters, TrainConfig(optimizer=kind))

    def step(parameters, optimizer, seed):
        optimizer.param_groups[0]["lr"] = 0.1
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + i))
        optimizer.step()

    ours, optimizer = fresh()
    for seed in (1, 2):
        step(ours, optimizer, seed)
    found = optimizer_tensors(optimizer)
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)  # safetensors saves no shared memory
    saved = {name: tensor.clone() for name, tensor in found.items()}
    if kind != "adamw8bit":
        assert set(saved) == {f"optimizer.{i}.{name}" for i in (0, 1, 2) for name in ("step", "exp_avg", "exp_avg_sq")}
    theirs, other = fresh()
    restore_optimizer(other, saved | {"trained.x": torch.zeros(1)})
    for source, target in zip(ours, theirs, strict=True):
        target.data.copy_(source.data)
    step(ours, optimizer, 3)
    step(theirs, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_checkpoint_round_trip_and_pruning(tmp_path):
    tensors = {"trained.a": torch.randn(3), "generator": torch.Generator().get_state()}
    for step in (5, 20, 10):
        save_checkpoint(tmp_path, step, tensors, {"step": step, "note": "ü"}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010", "step-000020"]
    assert find_checkpoint(tmp_path, "latest").name == "step-000020"
    assert find_checkpoint(tmp_path, None) is None
    read, note = load_checkpoint(tmp_path / "checkpoints" / "step-000010")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in read)
    assert note == {"step": 10, "note": "ü"}


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, {"a": torch.tensor([value])}, {"value": value}, keep=1)
    tensors, note = load_checkpoint(tmp_path / "checkpoints" / "step-000005")
    assert (tensors["a"].item(), note["value"]) == (2.0, 2.0)


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    """Six digits are no limit, and a copy that someone has put aside is no checkpoint of the run."""
    for step in (999_800, 1_000_000):
        save_checkpoint(tmp_path, step, {"a": torch.zeros(1)}, {}, keep=2)
    shutil.copytree(tmp_path / "checkpoints" / "step-999800", tmp_path / "checkpoints" / "step-999800 kept")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999800", "step-1000000"]
    assert find_checkpoint(tmp_path, "latest").name == "step-1000000"


def test_the_checkpoint_just_written_is_never_the_one_that_goes(tmp_path):
    for step in (40, 30):
        saved = save_checkpoint(tmp_path, step, {"a": torch.zeros(1)}, {}, keep=1)
    assert list_checkpoints(tmp_path) == [saved]
    assert saved.name == "step-000030"


def test_a_checkpoint_that_is_being_removed_does_not_count(tmp_path, monkeypatch):
    """Cut off before its first file is gone."""
    save_checkpoint(tmp_path, 1, {"a": torch.zeros(1)}, {}, keep=1)
    monkeypatch.setattr("bas.training.run_folder.shutil.rmtree", lambda *args, **kwargs: None)
    drop_later(tmp_path, 0)
    assert list_checkpoints(tmp_path) == []


def test_concepts_round_trip(tmp_path):
    rows, masks = torch.randn(2, 16), torch.rand(2, 4, 6)
    written = {"config": asdict(TrainConfig()), "handles": ["<a>", "<b>"], "base": "x", "version": "1"}
    save_concepts(tmp_path, rows, masks, ("<a>", "<b>"), written)
    tensors, note = read_concepts(tmp_path)
    assert torch.equal(tensors["handles"], rows)
    assert (tensors["masks"] / 255 - masks).abs().max() <= 0.5 / 255 + 1e-6
    assert note == json.loads(json.dumps(written))


def test_other_safetensors_are_no_concepts(tmp_path):
    write_tensors(tmp_path / "concepts.safetensors", {"a": torch.zeros(1)})
    with refused("concepts.safetensors was not written by bas"):
        read_concepts(tmp_path)


NOTE = {"config": {}, "handles": ["<a>"], "base": "x", "version": "1"}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"handles": '["<a>"]'},
        {"handles": '["<a>"]', "note": "[" * 100_000},
        {"handles": '["<a>"]', "note": "[]"},
        {"handles": '["<a>"]', "note": json.dumps(NOTE | {"config": None})},
        {"handles": '["<a>"', "note": json.dumps(NOTE)},
        {"handles": "[]", "note": json.dumps(NOTE)},
        {"note": json.dumps(NOTE)},
    ],
)
def test_concepts_without_their_notes_are_refused(tmp_path, metadata):
    tensors = {"handles": torch.zeros(1, 4), "masks": torch.zeros(1, 4, 6)}
    write_tensors(tmp_path / "concepts.safetensors", tensors, {"bas": "concepts-1", **metadata})
    with refused(f"{tmp_path / 'concepts.safetensors'} does not hold what bas notes of a run"):
        read_concepts(tmp_path)


def test_read_only_output_is_refused(tmp_path, monkeypatch):
    def denied(path, **how):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with refused(f"cannot write to --output_dir {tmp_path / 'run'}: Permission denied"), locked(tmp_path / "run"):
        pass


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with refused("cannot write to --output_dir"), locked(tmp_path / "run"):
        pass


def test_new_folder_is_made_and_left_empty(tmp_path):
    with locked(tmp_path / "deep" / "run"):
        pass
    assert list((tmp_path / "deep" / "run").iterdir()) == []


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    """safetensors writes files for their owner alone; a run folder is shared like any other file."""
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
