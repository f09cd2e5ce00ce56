"""What a training does when told to stop, when the disk is full, when another run comes, when numbers go wrong."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from importlib import import_module

import pytest
import torch
from kills import child
from tiny import file_hashes, refused

import bas
from bas import run_folder
from bas.config import InputError, RunError
from bas.interrupts import Interrupted, Interrupts
from bas.run_folder import list_checkpoints, locked

training = import_module("bas.train")  # the module: bas.train is its function


@pytest.fixture(scope="module")
def whole(bench, tmp_path_factory):
    """The hashes of the standard run of 3 + 3 steps."""
    return file_hashes(bas.train(bench.config(tmp_path_factory.mktemp("whole") / "run")))


def resume(bench, run, **changes):
    return bas.train(bench.config(run, resume_from_checkpoint="latest", **changes))


def before_step(monkeypatch, step, act):
    """Let `act(models, optimizer)` happen just before this step of the session, counted from 1."""
    original, steps = training.optimizer_step, iter(range(1, 1000))

    def stepping(models, batches, config, optimizer, scaler, clipped, precision):
        if next(steps) == step:
            act(models, optimizer)
        return original(models, batches, config, optimizer, scaler, clipped, precision)

    monkeypatch.setattr(training, "optimizer_step", stepping)


# --- Signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 3, 4, 6])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_ends(bench, tmp_path, monkeypatch, whole, name, step):
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda *args: os.kill(os.getpid(), number))
        with pytest.raises(
            Interrupted, match=f"stopped after step {step} of 6.*--resume_from_checkpoint latest"
        ) as stop:
            bas.train(bench.config(tmp_path / "run"))
    assert stop.value.exit_code == 128 + number
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{step:06d}"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


def test_the_command_ends_with_the_code_that_shells_expect(bench, tmp_path, monkeypatch, capsys):
    from bas.cli import main

    before_step(monkeypatch, 1, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    flags = {"output_dir": tmp_path / "run", "pretrained_model_name_or_path": bench.model, "phase2_train_steps": 0}
    command = ["train", str(bench.scene), *(word for k, v in flags.items() for word in (f"--{k}", str(v)))]
    assert main([*command, "--phase1_train_steps", "3", "--device", "cpu"]) == 143
    assert capsys.readouterr().err.splitlines()[-1].startswith("bas: stopped after step 1 of 3, saved in ")


def stubborn(bench, run):
    """Train, be asked to stop before step 3, and be asked again while that is under way."""
    saving = run_folder.write_json

    def again(path, content):
        os.kill(os.getpid(), signal.SIGTERM)
        saving(path, content)

    before_step(pytest.MonkeyPatch(), 3, lambda *args: os.kill(os.getpid(), signal.SIGINT))
    run_folder.write_json = again
    bas.train(bench.config(run, checkpointing_steps=0))


def test_a_second_signal_ends_the_process_at_once_and_harms_nothing(bench, tmp_path, whole):
    assert child(stubborn, bench, tmp_path / "run") == -signal.SIGTERM
    assert list_checkpoints(tmp_path / "run") == []
    assert file_hashes(resume(bench, tmp_path / "run")) == whole
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Interrupts() as interrupts:
            seen.append((signal.getsignal(signal.SIGTERM), interrupts.asked))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


# --- Two runs in one folder -------------------------------------------------------------------------------------------


def test_the_second_of_two_runs_is_refused_and_the_first_goes_on(bench, tmp_path, monkeypatch, whole):
    answers = []

    def race(*args):
        answers.append(child(expect_refusal, bench, tmp_path / "run"))

    before_step(monkeypatch, 2, race)
    bas.train(bench.config(tmp_path / "run"))
    assert answers == [0]
    assert file_hashes(tmp_path / "run") == whole
    assert not (tmp_path / "run" / ".lock").exists()


def expect_refusal(bench, run):
    training.load = lambda *args, **kwargs: pytest.fail("weights were read")
    for wanted in (None, "latest"):
        with refused(f"another run is writing to {run}"):
            bas.train(bench.config(run, resume_from_checkpoint=wanted))


def test_of_racing_processes_one_holds_the_folder(tmp_path):
    """Eight processes at once, twenty times: never two hold it, and the lock of a dead one is free."""
    held, most = tmp_path / "held", 0

    def hold():
        with locked(tmp_path / "run"):
            handle = os.open(held, os.O_CREAT | os.O_EXCL)  # fails where another one holds the folder
            os.close(handle)
            held.unlink()
            os._exit(3)

    for _ in range(20):
        children = []
        for _ in range(8):
            if not (pid := os.fork()):
                try:
                    hold()
                except InputError:
                    os._exit(4)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(pid)
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert set(ended) <= {3, 4}
        assert 3 in ended
        most = max(most, ended.count(4))
    assert most


# --- A full disk ------------------------------------------------------------------------------------------------------


class full_disk:
    """Within the block no file can grow beyond so many bytes: the kernel refuses to write on, as on a full disk."""

    def __init__(self, room: int):
        self.room = room

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999])
def test_a_full_disk_keeps_the_old_checkpoint(bench, tmp_path, monkeypatch, whole, share):
    run, original = tmp_path / "run", run_folder.write_tensors
    size = {}

    def write(path, tensors, *rest):
        if path.parent.name == ".step-000005.tmp":
            before = list_checkpoints(run)[-1] / "state.safetensors"
            size["room"] = int(share * before.stat().st_size)
            with full_disk(size["room"]):
                return original(path, tensors, *rest)
        return original(path, tensors, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_tensors", write)
        with pytest.raises(RunError, match=r"writing to .* failed: .*(large|space).*make room") as caught:
            bas.train(bench.config(run, checkpointing_steps=1))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]
    assert file_hashes(resume(bench, run)) == whole


def test_a_disk_that_fills_at_the_metrics_or_at_the_end_loses_nothing(bench, tmp_path, monkeypatch, whole):
    run, no_space = tmp_path / "run", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*args, **kwargs):
        raise no_space

    for module, name in ((run_folder.MetricsLog, "flush"), (training, "save_model"), (training, "save_concepts")):
        with monkeypatch.context() as patch:
            if name == "flush":
                original, calls = run_folder.MetricsLog.flush, iter(range(100))
                patch.setattr(module, name, lambda log, f=original, c=calls: refuse() if next(c) == 9 else f(log))
            else:
                patch.setattr(module, name, refuse)
            with pytest.raises(RunError, match=r"No space left on device.*make room"):
                resume(bench, run, checkpointing_steps=1)
        assert list_checkpoints(run)
    assert file_hashes(resume(bench, run, checkpointing_steps=1)) == whole


# --- Numbers that are not finite --------------------------------------------------------------------------------------


def spoil(tensor, value):
    with torch.no_grad():
        tensor.view(-1)[0] = value


def handles(models):
    return models.text_encoder.get_input_embeddings().handles


def last_query(models):
    return models.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight


SPOILT = {  # the place: its tensor, from models and optimizer; the value; the step; what the message says
    "a weight of the UNet, phase 1": (lambda m, o: m.unet.conv_in.weight, torch.nan, 1, "phase1 step 1: loss is nan"),
    "a weight of the UNet, phase 2": (lambda m, o: m.unet.conv_in.weight, torch.nan, 5, "phase2 step 5: loss is nan"),
    "a handle's row": (lambda m, o: handles(m), torch.nan, 2, "phase1 step 2: loss is nan"),
    "an infinite handle": (lambda m, o: handles(m), torch.inf, 3, "after step 3 handles is not finite"),
    "the text encoder": (
        lambda m, o: m.text_encoder.final_layer_norm.weight, torch.nan, 4, "phase2 step 4: loss is nan"
    ),
    "a bias of the last layer": (lambda m, o: m.unet.conv_out.bias, torch.inf, 6, "phase2 step 6: loss is nan"),
    "a query of the attention": (lambda m, o: last_query(m), torch.inf, 5, "phase2 step 5: loss is nan"),
    "a mean of the optimizer": (
        lambda m, o: next(iter(o.state.values()))["exp_avg"], torch.nan, 5, "after step 5 handles is not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", SPOILT)
def test_a_number_that_is_not_finite_stops_the_run_within_its_step(bench, tmp_path, monkeypatch, whole, place):
    tensor, value, step, message = SPOILT[place]
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda models, optimizer: spoil(tensor(models, optimizer), value))
        with pytest.raises(RunError) as caught:
            bas.train(bench.config(run, checkpointing_steps=1, log_steps=100))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "last whole checkpoint is kept" in str(caught.value)
    assert [path.name for path in list_checkpoints(run)] == ([f"step-{step - 1:06d}"] if step > 1 else [])
    assert not (run / "concepts.safetensors").exists()
    assert file_hashes(resume(bench, run, checkpointing_steps=1)) == whole


@pytest.mark.parametrize("term", ["reconstruction", "prior", "attention", "grad_norm"])
def test_the_term_that_went_wrong_is_named(bench, tmp_path, monkeypatch, term):
    original = training.optimizer_step

    def wrong(*args):
        values = original(*args)
        return {**values, term: torch.tensor(torch.inf)} if "prior" in values else values

    monkeypatch.setattr(training, "optimizer_step", wrong)
    with pytest.raises(RunError, match=f"phase2 step 4: {term} is inf"):
        bas.train(bench.config(tmp_path / "run"))


def rows_with(norms):
    return [{"phase": "phase1", "step": i, "lr": 1e-3, "loss": 1.0, "grad_norm": norm} for i, norm in enumerate(norms)]


@pytest.mark.parametrize(("precision", "stops"), [("fp16", False), ("bf16", True), ("no", True)])
def test_only_fp16_may_leave_steps_out(precision, stops):
    (row,) = rows_with([float("inf")])
    assert training.is_finite(row, precision) is not stops
    assert not training.is_finite({**row, "loss": float("nan")}, precision)


def test_fp16_that_always_overflows_stops(tmp_path):
    def run_of(norms):
        class Log:
            def flush(self):
                return rows_with(norms)

        return training.Run(*[None] * 2, *[None] * 1, None, "fp16", *[None] * 5, Log())

    overflow, fine = [float("inf")] * (training.OVERFLOWS - 1), [1.0]
    run = run_of(overflow + fine + overflow)
    training.read_metrics(run)
    assert run.overflows == training.OVERFLOWS - 1
    with pytest.raises(RunError, match=f"phase1 step {training.OVERFLOWS - 1}: fp16 overflowed in 25 steps in a row"):
        training.read_metrics(run_of([*overflow, float("inf")]))


def test_metrics_of_a_stopped_run_end_with_the_bad_step(bench, tmp_path, monkeypatch):
    before_step(monkeypatch, 2, lambda models, optimizer: spoil(models.unet.conv_in.weight, torch.nan))
    with pytest.raises(RunError):
        bas.train(bench.config(tmp_path / "run", log_steps=100))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == rows[0]["loss"] != rows[1]["loss"]


# --- Nobody reads the output ------------------------------------------------------------------------------------------


def test_a_closed_pipe_ends_a_command_quietly(bench):
    command = [sys.executable, "-m", "bas", "info", str(bench.model)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def train_unread(bench, run):
    """Train while nobody reads standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
    bas.train(bench.config(run))


def test_training_goes_on_when_nobody_reads_its_progress(bench, tmp_path, whole):
    assert child(train_unread, bench, tmp_path / "run") == 0
    assert file_hashes(tmp_path / "run") == whole


def test_a_file_that_cannot_be_written_is_one_line(bench, tmp_path, capsys, monkeypatch):
    from bas.cli import main

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.safetensors")

    monkeypatch.setattr("bas.commands.export.run", full)
    assert main(["export", str(bench.model), str(tmp_path / "out.safetensors")]) == 1
    assert capsys.readouterr().err == "bas: out.safetensors cannot be written: No space left on device\n"
