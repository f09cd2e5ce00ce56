"""The concepts file of a run, and the rights of written files."""

import json
from dataclasses import asdict

import pytest
import torch

from bas.config import TrainConfig
from bas.io.run_files import read_concepts, save_concepts
from bas.io.tensors import write_tensors
from tests.helpers.tiny import refused


def test_concepts_round_trip(tmp_path):
    rows, masks = torch.randn(2, 16), torch.rand(2, 4, 6)
    written = {"config": asdict(TrainConfig()), "handles": ["<a>", "<b>"], "base": "x", "version": "1"}
    save_concepts(tmp_path, [rows], masks, ("<a>", "<b>"), written)
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
    with refused(f"{tmp_path / 'concepts.safetensors'} is not as bas wrote it"):
        read_concepts(tmp_path)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    """safetensors writes files for their owner alone; a run folder is shared like any other file."""
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
