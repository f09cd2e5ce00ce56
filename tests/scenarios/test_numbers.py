"""Numbers that are not finite end a training within their step; the same seed gives the same numbers again."""

import json
import math
import os
import random
import signal

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bas
from bas.errors import NotFiniteError, RunError
from bas.io.run_files import read_rows
from bas.runtime.device import deterministic
from bas.runtime.signals import Interrupted
from bas.training.checkpoints import list_checkpoints
from bas.training.nonfinite import OVERFLOWS, flush_and_check, is_finite
from bas.training.setup import Run
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step, resume, training
from tests.helpers.tiny import file_hashes

# --- Numbers that are not finite --------------------------------------------------------------------------------------


def spoil(tensor, value):
    with torch.no_grad():
        tensor.view(-1)[0] = value


def handles(models):
    return models.text_encoder.get_input_embeddings().handles


def last_query(models):
    return models.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight


SPOILT = {  # the place: its tensor, from models and optimizer; the value; the step; what the message says
    "a weight of the UNet, phase 1": (
        lambda m, o: m.unet.conv_in.weight, torch.nan, 1, "phase1 step 1: reconstruction is nan"
    ),
    "a weight of the UNet, phase 2": (
        lambda m, o: m.unet.conv_in.weight, torch.nan, 5, "phase2 step 5: reconstruction is nan"
    ),
    "a handle's row": (lambda m, o: handles(m), torch.nan, 2, "phase1 step 2: reconstruction is nan"),
    "an infinite handle": (lambda m, o: handles(m), torch.inf, 3, "after step 3 handles is not finite"),
    "the text encoder": (
        lambda m, o: m.text_encoder.final_layer_norm.weight, torch.nan, 4, "phase2 step 4: reconstruction is nan"
    ),
    "a bias of the last layer": (
        lambda m, o: m.unet.conv_out.bias, torch.inf, 6, "phase2 step 6: reconstruction is nan"
    ),
    "a query of the attention": (lambda m, o: last_query(m), torch.inf, 5, "phase2 step 5: reconstruction is nan"),
    "a mean of the optimizer": (
        lambda m, o: next(iter(o.state.values()))["exp_avg"], torch.nan, 5, "after step 5 handles is not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "place",
    some_fast(
        SPOILT,
        "a weight of the UNet, phase 1",
        "an infinite handle",
        "a bias of the last layer",
        "a mean of the optimizer",
    ),
)
def test_a_number_that_is_not_finite_stops_the_run_within_its_step(bench, tmp_path, monkeypatch, whole, place):
    tensor, value, step, message = SPOILT[place]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda models, optimizer: spoil(tensor(models, optimizer), value))
        with pytest.raises(RunError) as caught:
            bas.train(bench.config(run, checkpointing_steps=1, log_steps=100))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    kept = f"step-{step - 1:06d} is kept; " if step > 1 else "; no checkpoint was saved yet; "
    assert f"{kept}start again, in another --output_dir, with a lower learning rate" in str(caught.value)
    assert [path.name for path in list_checkpoints(run)] == ([f"step-{step - 1:06d}"] if step > 1 else [])
    assert not (run / "concepts.safetensors").exists()
    assert file_hashes(resume(bench, run, checkpointing_steps=1)) == whole


@pytest.mark.parametrize("term", ["reconstruction", "prior", "attention", "grad_norm"])
def test_the_term_that_went_wrong_is_named(bench, tmp_path, monkeypatch, term):
    original = training.optimizer_step

    def wrong(*args):
        values = original(*args)
        spoilt = {term, "grad_norm" if term == "grad_norm" else "loss"}  # a term spoils their sum
        return {**values, **dict.fromkeys(spoilt, torch.tensor(torch.inf))} if "prior" in values else values

    monkeypatch.setattr(training, "optimizer_step", wrong)
    with pytest.raises(RunError, match=f"phase2 step 4: {term} is inf"):
        bas.train(bench.config(tmp_path / "run"))


@pytest.mark.parametrize("step", [2, 5])
def test_a_loss_that_is_not_finite_ends_the_run(bench, tmp_path, monkeypatch, step):
    """Named by phase, step and term; the last good checkpoint stays, and no finished run is pretended."""
    original, count = training.training_step, iter(range(1, 100))

    def spoilt(*args):
        loss, parts = original(*args)
        if next(count) == step:
            parts["attention"] = parts["attention"] * float("nan")
            loss = loss + parts["attention"]
        return loss, parts

    monkeypatch.setattr(training, "training_step", spoilt)
    phase = "phase1" if step < 4 else "phase2"
    with pytest.raises(RunError, match=rf"{phase} step {step}: attention is nan"):
        bas.train(bench.config(tmp_path / "run", checkpointing_steps=1))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == [f"step-{step - 1:06d}"]
    assert not (tmp_path / "run" / "concepts.safetensors").exists()


def test_a_gradient_that_is_not_finite_ends_the_run(bench, tmp_path, monkeypatch):
    """The loss is still sound, but the weights are gone: no checkpoint of them may replace the last good one."""
    original, count = training.training_step, iter(range(1, 100))

    def spoilt(models, batch, config):
        loss, parts = original(models, batch, config)
        if next(count) == 2:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return loss, parts

    monkeypatch.setattr(training, "training_step", spoilt)
    with pytest.raises(RunError, match="phase1 step 2: grad_norm is nan"):
        bas.train(bench.config(tmp_path / "run", checkpointing_steps=1))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-000001"]


def rows_with(norms):
    return [{"phase": "phase1", "step": i, "lr": 1e-3, "loss": 1.0, "grad_norm": norm} for i, norm in enumerate(norms)]


@pytest.mark.parametrize(("precision", "stops"), [("fp16", False), ("bf16", True), ("no", True)])
def test_only_fp16_may_leave_steps_out(precision, stops):
    (row,) = rows_with([float("inf")])
    assert is_finite(row, precision) is not stops
    assert not is_finite({**row, "loss": float("nan")}, precision)


def test_fp16_that_always_overflows_stops(tmp_path):
    def run_of(norms):
        class Log:
            def flush(self):
                return rows_with(norms)

        return Run(None, tmp_path, None, None, "fp16", *[None] * 5, Log(), None)

    overflow, fine = [float("inf")] * (OVERFLOWS - 1), [1.0]
    run = run_of(overflow + fine + overflow)
    flush_and_check(run)
    assert run.overflows == OVERFLOWS - 1
    with pytest.raises(RunError, match=f"phase1 step {OVERFLOWS - 1}: fp16 overflowed in 25 steps in a row"):
        flush_and_check(run_of([*overflow, float("inf")]))


def test_metrics_of_a_stopped_run_end_with_the_bad_step(bench, tmp_path, monkeypatch):
    before_step(monkeypatch, 2, lambda models, optimizer: spoil(models.unet.conv_in.weight, torch.nan))
    with pytest.raises(RunError):
        bas.train(bench.config(tmp_path / "run", log_steps=100))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert math.isfinite(rows[0]["loss"])
    assert math.isnan(rows[1]["loss"])


def overflow_in(monkeypatch, *steps):
    """Let the gradient of these steps, counted from 1, be beyond fp16."""
    original, count = training.training_step, iter(range(1, 100))

    def overflowing(models, batch, config):
        loss, parts = original(models, batch, config)
        if next(count) in steps:
            loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, parts

    monkeypatch.setattr(training, "training_step", overflowing)


def test_fp16_leaves_out_the_steps_that_overflow_and_counts_them(bench, tmp_path, monkeypatch, caplog):
    """Nothing moves in such a step, the loss scale is halved, the other steps are as ever."""
    rows = []
    overflow_in(monkeypatch, 2, 3, 5)
    for step in (2, 3, 4):
        before_step(monkeypatch, step, lambda models, optimizer: rows.append(handles(models).detach().clone()))
    run = bas.train(bench.config(tmp_path / "run", mixed_precision="fp16"))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[1], rows[2])
    norms = [row["grad_norm"] for row in read_rows(run / "metrics.jsonl")]
    assert [math.isfinite(norm) for norm in norms] == [True, False, False, True, False, True]
    told = [message for message in caplog.messages if "fp16" in message]
    assert told == [f"phase{i}: fp16 overflowed in {n} of 3 steps, which changed nothing" for i, n in ((1, 2), (2, 1))]
    for name in ("unet", "text_encoder"):
        assert all(tensor.isfinite().all() for tensor in getattr(bas.load(run), name).state_dict().values())


def test_the_loss_scale_of_fp16_is_resumed(bench, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        overflow_in(patch, 1, 2)
        before_step(patch, 3, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            bas.train(bench.config(run, mixed_precision="fp16", phase1_train_steps=6))
    note = json.loads((list_checkpoints(run)[-1] / "state.json").read_text())
    assert note["scaler"]["scale"] == 65536 / 4
    scales = []
    original = torch.amp.GradScaler.load_state_dict
    monkeypatch.setattr(
        torch.amp.GradScaler, "load_state_dict", lambda s, state: (scales.append(state["scale"]), original(s, state))
    )
    resume(bench, run, mixed_precision="fp16", phase1_train_steps=6)
    assert scales == [65536 / 4]


# --- The same numbers again -------------------------------------------------------------------------------------------


def test_the_seed_is_the_only_source_of_chance(bench, tmp_path, whole):
    """So a checkpoint needs no more than one generator: those of Python, NumPy and PyTorch may stand anywhere."""
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    assert file_hashes(bas.train(bench.config(tmp_path / "run"))) == whole


def modes():
    """What PyTorch has been told about repeatability."""
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark


def test_deterministic_mode_holds_while_the_run_lasts(bench, tmp_path, monkeypatch, whole):
    seen = []
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before_step(monkeypatch, 4, lambda *args: seen.append((*modes(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))))
    run = bas.train(bench.config(tmp_path / "run", deterministic=True))
    assert seen == [(True, False, ":4096:8")]
    assert modes() == (False, True)
    assert file_hashes(run) == whole  # nothing else changes on a CPU


def test_deterministic_mode_ends_with_an_error_too(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # another choice that cuBLAS repeats itself with
    before = modes()
    with pytest.raises(RuntimeError, match="deterministic"), deterministic(True):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # an operation without a repeatable kernel
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert modes() == before
    with deterministic(False):
        assert modes() == before


UNREPEATABLE = (  # beginnings of what PyTorch has no repeatable GPU kernel for (torch.use_deterministic_algorithms)
    *("upsample_linear1d_b", "upsample_bilinear2d_b", "upsample_bicubic2d_b", "upsample_trilinear3d_b"),
    *("_upsample_bi", "avg_pool3d_b", "_adaptive_avg_pool2d_b", "adaptive_max_pool2d_b", "reflection_pad", "nll_loss"),
    *(
        "grid_sampler",
        "cumsum",
        "cumprod",
        "put_",
        "put.",
        "histc",
        "bincount",
        "median",
        "scatter_reduce",
        "max_unpool",
    ),
)


class Noted(TorchDispatchMode):
    """The names of all operations within the block, of the backward pass too."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(str(operation).removeprefix("aten."))
        return operation(*args, **(kwargs or {}))


def test_a_step_uses_nothing_that_a_gpu_cannot_repeat(bench, monkeypatch, tmp_path):
    noted, original = Noted(), training.optimizer_step

    def stepping(*args):
        with noted:
            return original(*args)

    monkeypatch.setattr(training, "optimizer_step", stepping)
    bas.train(bench.config(tmp_path / "run", phase1_train_steps=1, phase2_train_steps=1))
    assert {"convolution_backward.default", "gather.default"} <= noted.names  # the loss's maps, the UNet's gradient
    assert [name for name in sorted(noted.names) if name.startswith(UNREPEATABLE)] == []


def test_a_preview_that_is_not_finite_is_left_out(bench, tmp_path, monkeypatch, caplog):
    """It overflows alone, in float16 or under guidance: the training goes on, to the same bits."""
    original, calls = training.write_preview, []

    def overflow(folder, *args):
        calls.append(args[-1])
        if len(calls) == 1:
            raise NotFiniteError("denoising in float16 gives numbers that are not finite")
        return original(folder, *args)

    monkeypatch.setattr(training, "write_preview", overflow)
    run = bas.train(bench.config(tmp_path / "run", img_log_steps=2, preview_inference_steps=1))
    assert calls == [2, 4, 6]
    assert [path.name for path in sorted((run / "previews").glob("*.png"))] == ["step-000004.png", "step-000006.png"]
    assert "no preview after step 2: denoising in float16 gives numbers that are not finite" in caplog.messages
