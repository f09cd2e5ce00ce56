"""Checkpoints: saved, found, loaded and removed; each complete or absent."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bas.config import TrainConfig
from bas.training.checkpoints import (
    MANIFEST,
    NOTE,
    STATE,
    Checkpoint,
    check_tensors,
    describe_file,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    optimizer_tensors,
    remove_later,
    restore_optimizer,
    save_checkpoint,
)
from bas.training.optimizer import build_optimizer
from tests.helpers.tiny import refused

META = torch.device("meta")


def state_of(step: int, **changes) -> dict:
    """What state.json holds at a step."""
    facts = {"config": {"output_dir": "run"}, "handles": ["<ü>"], "base": "x", "version": "1"}
    return {"step": step, "metrics": 7, "scaler": {"scale": 2.0}, "overflows": 3, "facts": facts} | changes


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
        save_checkpoint(tmp_path, step, tensors, state_of(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000010", "step-000020"]
    assert find_checkpoint(tmp_path, "latest").name == "step-000020"
    assert find_checkpoint(tmp_path, None) is None
    read = load_checkpoint(tmp_path / "checkpoints" / "step-000010")
    assert read.tensors.keys() == tensors.keys()
    assert all(torch.equal(read.tensors[name], tensors[name]) for name in tensors)
    assert (read.step, read.metrics, read.scaler, read.overflows) == (10, 7, {"scale": 2.0}, 3)
    assert read.metadata["handles"] == ["<ü>"]


def test_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, {"a": torch.tensor([value])}, state_of(5, metrics=int(value)), keep=1)
    read = load_checkpoint(tmp_path / "checkpoints" / "step-000005")
    assert (read.tensors["a"].item(), read.metrics) == (2.0, 2)


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
    monkeypatch.setattr("bas.training.checkpoints._is_own", lambda path: False)
    remove_later(tmp_path, 0)
    assert (tmp_path / "checkpoints" / "step-000001" / "state.safetensors").exists()
    assert list_checkpoints(tmp_path) == []


# --- Damaged checkpoints ----------------------------------------------------------------------------------------------


def edited(run, name: str, edit) -> None:
    """Change the JSON of a checkpoint's file and make its manifest anew, as somebody does by hand."""
    folder = list_checkpoints(run)[-1]
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(edit(content)))
    if name != MANIFEST:
        names = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({name: describe_file(folder / name) for name in names}))


@pytest.mark.parametrize(
    ("name", "edit", "told"),
    [
        (NOTE, lambda state: [], "state.json"),
        (NOTE, lambda state: {}, "state.json is not as bas wrote it (it has no step)"),
        (NOTE, lambda state: state | {"step": "5"}, "state.json is not as bas wrote it (step is '5')"),
        (NOTE, lambda state: state | {"step": 0}, "state.json: step is 0"),
        (NOTE, lambda state: state | {"step": 6}, "state.json says step 6"),
        (NOTE, lambda state: state | {"metrics": -1}, "state.json: metrics is -1"),
        (NOTE, lambda state: state | {"metrics": None}, "(metrics is None)"),
        (NOTE, lambda state: state | {"overflows": 1.5}, "state.json: overflows is 1.5"),
        (NOTE, lambda state: state | {"scaler": [1]}, "(scaler is [1])"),
        (NOTE, lambda state: state | {"scaler": {"scale": "big"}}, "(scale is 'big')"),
        (NOTE, lambda state: state | {"facts": None}, "(facts is None)"),
        (NOTE, lambda state: state | {"facts": state["facts"] | {"config": {"seed": "x"}}}, "seed is 'x'"),
        (MANIFEST, lambda _: {}, "manifest.json is not as bas wrote it (it has no state.json)"),
        (MANIFEST, lambda manifest: manifest | {"../../x": {}}, "manifest.json lists ../../x"),
        (MANIFEST, lambda manifest: manifest | {STATE: {}}, "state.safetensors is not what was written"),
        (MANIFEST, lambda manifest: [STATE], "manifest.json"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(tmp_path, name, edit, told):
    save_checkpoint(tmp_path, 5, {"a": torch.zeros(1)}, state_of(5), keep=1)
    edited(tmp_path, name, edit)
    with refused(told):
        load_checkpoint(list_checkpoints(tmp_path)[-1])


# --- Tensors that do not fit the run ----------------------------------------------------------------------------------


def fitting() -> tuple[dict, dict]:
    """The parameters of a phase, on the meta device, and the tensors of its checkpoint."""
    parameters = {name: torch.nn.Parameter(torch.empty(shape, device=META)) for name, shape in SHAPES.items()}
    tensors = {f"trained.{name}": torch.zeros(shape) for name, shape in SHAPES.items()}
    for i, shape in enumerate(SHAPES.values()):
        tensors |= {f"optimizer.{i}.exp_avg": torch.zeros(shape), f"optimizer.{i}.exp_avg_sq": torch.zeros(shape)}
        tensors |= {f"optimizer.{i}.step": torch.tensor(3.0)}
    return parameters, tensors | {"generator": torch.Generator().get_state()}


SHAPES = {"handles": (2, 4), "embedding": (5, 4)}
SCALER = torch.amp.GradScaler("cpu").state_dict()


def checkpoint_of(tensors: dict, precision: str = "no") -> Checkpoint:
    """A checkpoint in memory, with a loss scale in fp16 alone."""
    return Checkpoint(Path("c"), 1, tensors, 0, SCALER if precision == "fp16" else {}, 0, {})


def test_a_checkpoint_of_the_same_parameters_fits():
    """A parameter that never had a gradient has no state."""
    parameters, tensors = fitting()
    del tensors["optimizer.1.exp_avg"], tensors["optimizer.1.exp_avg_sq"], tensors["optimizer.1.step"]
    check_tensors(checkpoint_of(tensors), parameters, adam=True, done=3, precision="no")


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("trained.handles", None, "trained.handles is missing there and (2, 4) here"),
        ("trained.handles", torch.zeros(3, 4), "trained.handles is (3, 4) there and (2, 4) here"),
        ("trained.handles", torch.zeros(2, 4, dtype=torch.float16), "trained.handles is torch.float16 there"),
        ("trained.unet.conv_in.bias", torch.zeros(8), "trained.unet.conv_in.bias is (8,) there and not trained here"),
        ("optimizer.0.exp_avg", torch.zeros(4), "optimizer.0.exp_avg is (4,) there and (2, 4) here"),
        ("optimizer.0.exp_avg", None, "optimizer.0 is exp_avg_sq, step there and exp_avg, exp_avg_sq, step here"),
        (
            "optimizer.2.step",
            torch.tensor(1.0),
            "optimizer.2.step is present there and of none of the 2 parameters here",
        ),
        ("optimizer.x.step", torch.tensor(1.0), "optimizer.x.step is present there"),
        ("generator", None, "generator is missing there"),
        ("generator", torch.zeros(3), "generator is (3,) torch.float32 there"),
        ("generator", torch.zeros(5056, dtype=torch.uint8), "generator is no state of one there and one here"),
        ("optimizer.0.exp_avg", torch.zeros(2, 4).half(), "optimizer.0.exp_avg is torch.float16 there"),
        ("optimizer.1.exp_avg_sq", torch.zeros(5, 4).int(), "optimizer.1.exp_avg_sq is torch.int32 there"),
    ],
)
def test_a_checkpoint_of_other_parameters_names_both_sides(name, tensor, told):
    parameters, tensors = fitting()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with refused("checkpoint c does not fit this run", told):
        check_tensors(checkpoint_of(tensors), parameters, adam=True, done=3, precision="no")


@pytest.mark.parametrize(
    ("steps", "precision", "told"),
    [
        (4.0, "no", "the optimizer's step is 4 there and 3 here"),
        (2.0, "bf16", "the optimizer's step is 2 there and 3 here"),
        (-1.0, "no", "the optimizer's step is -1 there and 3 here"),
        (float("nan"), "no", "the optimizer's step is nan there and 3 here"),
        (None, "no", "the optimizer's step is missing there and 3 here"),
        (4.0, "fp16", "the optimizer's step is 4 there and 3 here"),
        (0.0, "fp16", None),
        (None, "fp16", None),
    ],
)
def test_the_optimizer_has_done_the_steps_of_the_phase(steps, precision, told):
    """After 3 steps of it; in fp16 some of them, or all, may have overflowed."""
    parameters, tensors = fitting()
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        if steps is None:
            del tensors[name]
        elif name.endswith("step"):
            tensors[name] = torch.tensor(steps)
    with refused("checkpoint c does not fit this run", told) if told else nullcontext():
        check_tensors(checkpoint_of(tensors, precision), parameters, adam=True, done=3, precision=precision)


@pytest.mark.parametrize(
    ("scaler", "precision", "told"),
    [
        ({}, "fp16", "the loss scale is missing there and scale,"),
        ({"scale": 2.0}, "fp16", "the loss scale is scale there and scale, growth_factor,"),
        (SCALER, "no", "here"),
        (SCALER | {"scale": float("nan")}, "fp16", "c/state.json: scale is nan"),
        (SCALER | {"scale": 0.0}, "fp16", "c/state.json: scale is 0.0"),
    ],
)
def test_a_loss_scale_that_fp16_cannot_use_is_refused(scaler, precision, told):
    parameters, tensors = fitting()
    with refused(told):
        check_tensors(
            Checkpoint(Path("c"), 1, tensors, 0, scaler, 0, {}), parameters, adam=True, done=3, precision=precision
        )
