"""Whether a checkpoint fits the run: its step, the metrics up to it, and what is left to do in a finished run."""

import json
import math
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import bas
from bas.cli.entry import main
from bas.config import TrainConfig
from bas.errors import RunError
from bas.io.files import cache_dir
from bas.io.run_files import CONCEPTS, TUNED
from bas.runtime.signals import Interrupted
from bas.schedulers import NoiseSchedule
from bas.training import loop as training
from bas.training.checkpoints import Checkpoint, checkpoint_folder, describe_file, list_checkpoints
from bas.training.nonfinite import OVERFLOWS
from bas.training.resume import check_progress, check_resumable
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step, resume
from tests.helpers.tiny import file_hashes, refused

# --- Metrics ----------------------------------------------------------------------------------------------------------

LINES = b"".join(json.dumps({"phase": "phase1", "step": step}).encode() + b"\n" for step in (1, 2, 3))


def checkpoint_at(run: Path, step: int, metrics: int = len(LINES)) -> Checkpoint:
    """A checkpoint that says so much of itself."""
    return Checkpoint(checkpoint_folder(run, step), step, {}, metrics, {}, 0, {})


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES + b'{"phase": "phase1", "step": 4}\n{"ph',  # steps that are done again
    ],
)
def test_metrics_that_reach_the_checkpoint_are_taken(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    check_progress(checkpoint_at(tmp_path, 3), tmp_path, 6)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "0 bytes up to step 0 here"),
        (b"", "0 bytes up to step 0 here"),
        (LINES[:-31], "62 bytes up to step 2 here"),
        (LINES[:-1], "92 bytes up to step 2 here"),
        (LINES.replace(b"3", b"4"), "93 bytes up to step unknown here"),
        (LINES.replace(b'"step": 1', b'"step": 0'), "93 bytes up to step unknown here"),
        (LINES.replace(b'"step": 2', b'"step": x'), "93 bytes up to step unknown here"),
        (LINES.replace(b'"phase"', b'"stage"', 1), "93 bytes up to step unknown here"),
        (LINES.replace(b"\n", b" "), "93 bytes up to step 0 here"),
        (LINES[:-2] + b"!\n", "93 bytes up to step unknown here"),
        (LINES[:-31] + b"[" * 30 + b"\n", "93 bytes up to step unknown here"),
    ],
)
def test_metrics_that_do_not_reach_the_checkpoint_are_refused(tmp_path, content, told):
    """Shorter, missing, of other steps, of other lines."""
    assert len(LINES) == 93
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with refused("metrics.jsonl does not reach", told, "93 bytes up to step 3 there"):
        check_progress(checkpoint_at(tmp_path, 3), tmp_path, 6)


def test_a_checkpoint_of_another_folder_needs_no_metrics(tmp_path):
    check_progress(checkpoint_at(tmp_path / "other", 3), tmp_path / "run", 6)


@pytest.mark.parametrize(("step", "fits"), [(1, False), (2, False), (3, False), (4, True)])
def test_a_checkpoint_without_metrics_keeps_those_of_its_steps(tmp_path, step, fits):
    """A run that was continued in a new folder and saved there at once has none; what follows is done again."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"phase": "phase1", "step": step}) + "\n")
    with nullcontext() if fits else refused("metrics.jsonl does not reach", "0 bytes up to step 3 there"):
        check_progress(checkpoint_at(tmp_path, 3, metrics=0), tmp_path, 6)


@pytest.mark.parametrize(("name", "value", "fits"), [("steps_offset", 0, True), ("beta_end", 0.02, False)])
def test_of_the_noise_schedule_only_what_training_reads_is_compared(name, value, fits):
    """Steps of sampling were counted from 0 in folders whose file gave no offset; no training step depends on it."""
    schedule = NoiseSchedule(steps_offset=1).to_json()
    ours = {"config": asdict(TrainConfig()), "schedule": schedule}
    theirs = {**ours, "schedule": schedule | {name: value}}
    with nullcontext() if fits else refused("c was made with another noise schedule"):
        check_resumable(Path("c"), ours, theirs)


def test_a_step_beyond_the_run_is_refused(tmp_path):
    with refused("step-000007 is of step 7, this run has 6"):
        check_progress(checkpoint_at(tmp_path, 7), tmp_path, 6)


def test_a_run_whose_metrics_were_cut_is_refused_before_weights_are_read(bench, tmp_path, monkeypatch):
    """Nothing is written, so the file can be copied back."""
    run = stopped(bench, tmp_path / "run", monkeypatch, step=4)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-40])
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with refused("metrics.jsonl does not reach"):
        resume(bench, run)
    assert (run / "metrics.jsonl").read_bytes() == whole[:-40]


def stopped(bench, run: Path, monkeypatch, step: int, **changes) -> Path:
    """A run that a signal stopped after this step."""
    with monkeypatch.context() as patch:
        before_step(patch, step, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            bas.train(bench.config(run, **changes))
    return run


@pytest.mark.parametrize(
    ("file", "told"),
    [("state.json", "is of step 9, this run has 6"), ("state.safetensors", "trained.handles is (3, 16) there")],
)
def test_a_checkpoint_of_another_run_is_refused_though_its_manifest_is_made_anew(
    bench, tmp_path, monkeypatch, file, told
):
    from safetensors.torch import load_file, save_file

    run = stopped(bench, tmp_path / "run", monkeypatch, step=2)
    (folder,) = list_checkpoints(run)
    if file == "state.json":
        state = json.loads((folder / file).read_text()) | {"step": 9}
        (folder / file).write_text(json.dumps(state))
        folder = folder.rename(folder.with_name("step-000009"))
    else:
        tensors = load_file(folder / file)
        save_file(tensors | {"trained.handles": tensors["trained.handles"][:2].clone()}, folder / file)
        told = "trained.handles is (2, 16) there and (3, 16) here"
    names = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({name: describe_file(folder / name) for name in names}))
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    with refused(told):
        resume(bench, run)


@pytest.mark.parametrize("cached", some_fast((True, False), False))
def test_a_run_of_another_steps_offset_keeps_its_class_images(bench, tmp_path, monkeypatch, cached):
    """Earlier versions counted from 0 where the file gave no offset, and generated class images so.

    The resumed run finds them, or generates them anew as they were: the same bits as without a stop.
    """
    monkeypatch.setenv("BAS_CACHE", str(tmp_path / "cache"))
    changes = {"class_data_dir": None, "num_class_images": 1, "checkpointing_steps": 2}
    with monkeypatch.context() as patch:
        patch.setattr("bas.pretrained.folder.SD_STEPS_OFFSET", 0)
        bas.train(bench.config(tmp_path / "whole", **changes))
        run = stopped(bench, tmp_path / "run", monkeypatch, step=2, **changes)
    (folder,) = (cache_dir() / "class_images").glob("*/")
    if not cached:
        shutil.rmtree(folder)
    with monkeypatch.context() as patch:  # a run that was resumed can be resumed again
        before_step(patch, 2, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            resume(bench, run, **changes)
    resume(bench, run, **changes)
    assert list((cache_dir() / "class_images").glob("*/")) == [folder]
    assert file_hashes(run) == file_hashes(tmp_path / "whole")


# --- What a kill left to do -------------------------------------------------------------------------------------------


def test_a_kill_before_the_checkpoints_go_is_made_good(bench, tmp_path, monkeypatch):
    """All is saved: the same command clears the checkpoints and writes the page, and trains nothing."""
    assert main([*bench.command(tmp_path / "whole"), "--checkpointing_steps", "2"]) == 0
    words = [*bench.command(tmp_path / "run"), "--checkpointing_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "remove_all", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    run = tmp_path / "run"
    assert list_checkpoints(run)
    assert not (run / "report.html").exists()
    assert main(words) == 2  # it would be another run's, and says how to go on
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 0
    assert not (run / "checkpoints").exists()
    assert (run / "report.html").exists()
    assert file_hashes(run) == file_hashes(tmp_path / "whole")
    assert main([*words, "--resume_from_checkpoint", "latest"]) == 2  # already finished


def test_a_finished_run_without_its_page_gets_one(bench, tmp_path, monkeypatch):
    words = [*bench.command(tmp_path / "run"), "--resume_from_checkpoint", "latest"]
    assert main(words) == 0
    (tmp_path / "run" / "report.html").unlink()
    assert main([*words, "--seed", "1"]) == 2  # another run
    assert not (tmp_path / "run" / "report.html").exists()
    assert main(words) == 0
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("settings", [{}, {"train": "lora", "rank": 2}])
def test_checkpoints_of_a_run_whose_model_is_lost_stay(bench, tmp_path, settings):
    """The file of a finished run says that all is saved. If it is not, the checkpoint is all that is left."""
    config = bench.config(tmp_path / "run", checkpointing_steps=2, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bas.training.loop.remove_all", lambda folder: None)  # as if it were killed before
        bas.train(config)
    run = tmp_path / "run"
    lost = run / (TUNED if settings else "unet/diffusion_pytorch_model.safetensors")
    lost.unlink()
    kept = sorted(path for path in (run / "checkpoints").rglob("*"))
    assert kept
    again = replace(config, resume_from_checkpoint="latest")
    with refused("has the file of a finished run, but", f"or remove {run / CONCEPTS} to resume"):
        bas.train(again)
    assert sorted(path for path in (run / "checkpoints").rglob("*")) == kept
    (run / CONCEPTS).unlink()
    bas.train(again)
    assert lost.is_file()


def test_a_finished_run_is_not_resumed_for_ever(bench, tmp_path):
    """It has nothing left to do, and the advice is not the command that was just given."""
    run = bas.train(bench.config(tmp_path / "run"))
    before = file_hashes(run)
    with refused("already holds a finished run: choose another --output_dir or remove it"):
        resume(bench, run)
    assert file_hashes(run) == before


@pytest.mark.parametrize("step", some_fast((3, 6), 3))
def test_a_preview_that_a_kill_prevented_is_written_on_resume(bench, tmp_path, monkeypatch, step):
    """After the last step of phase 1, and of the run: the same sheet as in a run that was not killed."""
    flags = {"checkpointing_steps": 3, "img_log_steps": 3, "preview_inference_steps": 1}
    whole = bas.train(bench.config(tmp_path / "whole", **flags))
    original = training.write_preview

    def dying(*args):
        if args[-1] == step:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_preview", dying)
        with pytest.raises(KeyboardInterrupt):
            bas.train(bench.config(tmp_path / "run", **flags))
    run = resume(bench, tmp_path / "run", **flags)
    sheets = [sorted((folder / "previews").glob("*.png")) for folder in (run, whole)]
    assert [path.name for path in sheets[0]] == ["step-000003.png", "step-000006.png"]
    assert [path.read_bytes() for path in sheets[0]] == [path.read_bytes() for path in sheets[1]]


# --- fp16 -------------------------------------------------------------------------------------------------------------


def test_overflows_in_a_row_are_counted_on_after_a_resume(bench, tmp_path, monkeypatch):
    """Ten before the stop, the fifteenth after it ends the run."""
    flags = {"mixed_precision": "fp16", "phase1_train_steps": 40, "log_steps": 1}
    original = training.training_step

    def overflowing(*args):
        loss, parts = original(*args)
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss, parts

    monkeypatch.setattr(training, "training_step", overflowing)
    run = stopped(bench, tmp_path / "run", monkeypatch, step=10, **flags)
    state = json.loads((list_checkpoints(run)[-1] / "state.json").read_text())
    assert state["overflows"] == 10
    with pytest.raises(RunError, match=f"phase1 step {OVERFLOWS}: fp16 overflowed in {OVERFLOWS} steps in a row"):
        resume(bench, run, **flags)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == OVERFLOWS
    assert not any(math.isfinite(json.loads(row)["grad_norm"]) for row in rows)
