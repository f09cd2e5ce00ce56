"""A run that was cut off and resumed ends with the same bits as one that was not, or is refused with the reason."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import bas
from bas.training import checkpoints, run_folder
from bas.training import loop as training
from tests.helpers.cases import some_fast
from tests.helpers.tiny import WEIGHTS, file_hashes, refused


class CutOff(Exception):
    """Stands for a power cut."""


def cut_off(config, step: int) -> None:
    """Train until the run dies in the middle of this step, counted from 1 in this session."""
    original, steps = training.optimizer_step, iter(range(1, 1000))

    def dying(models, batches, *args):
        if next(steps) == step:
            next(iter(batches))  # the step's draws have begun
            raise CutOff
        return original(models, batches, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "optimizer_step", dying)
        with pytest.raises(CutOff):
            bas.train(config)


@pytest.fixture(scope="module")
def interrupted(bench, tmp_path_factory):
    """`interrupted(folder, step)`: the standard run with a checkpoint a step, cut off in this step, in a new folder."""

    @cache
    def made(step: int) -> Path:
        run = tmp_path_factory.mktemp("interrupted") / "run"
        cut_off(bench.config(run, checkpointing_steps=1), step)
        return run

    return lambda folder, step: shutil.copytree(made(step), folder)


def resume(bench, run, **changes):
    """Go on from the newest checkpoint."""
    return bas.train(bench.config(run, resume_from_checkpoint="latest", **changes))


# --- The same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", some_fast((3, 4, 5), 4))
def test_resumed_run_equals_an_uninterrupted_one(bench, tmp_path, interrupted, whole, step):
    """Cut off in phase 1, in the first step of phase 2, and within it."""
    interrupted(tmp_path / "run", step)
    assert [p.name for p in checkpoints.list_checkpoints(tmp_path / "run")] == [f"step-{step - 1:06d}"]
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("step", [2, 3, 4, 5, 6])
def test_resumed_run_equals_an_uninterrupted_one_wherever_it_stopped(bench, tmp_path, whole, step, every):
    cut_off(bench.config(tmp_path / "run", checkpointing_steps=every), step)
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


def test_steps_since_the_checkpoint_are_done_again(bench, tmp_path, whole):
    """Cut off in step 6 with a checkpoint of step 4: the metrics of step 5 are cut back, then written once more."""
    cut_off(bench.config(tmp_path / "run", checkpointing_steps=2, log_steps=1), 6)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


def test_three_cuts_in_one_run(bench, tmp_path, interrupted, whole):
    run = tmp_path / "run"
    interrupted(run, 3)  # steps 1 and 2 done
    cut_off(bench.config(run, checkpointing_steps=1, resume_from_checkpoint="latest"), 2)  # step 3 done
    cut_off(bench.config(run, checkpointing_steps=1, resume_from_checkpoint="latest"), 3)  # steps 4 and 5 done
    assert file_hashes(resume(bench, run)) == whole


def test_resume_within_gradient_accumulation(bench, tmp_path):
    flags = {"gradient_accumulation_steps": 2, "train_batch_size": 2, "phase1_train_steps": 2, "phase2_train_steps": 2}
    whole = file_hashes(bas.train(bench.config(tmp_path / "whole", **flags)))
    cut_off(bench.config(tmp_path / "run", checkpointing_steps=1, **flags), 4)
    assert file_hashes(resume(bench, tmp_path / "run", **flags)) == whole


def test_what_only_watches_may_change(bench, tmp_path, interrupted, whole):
    """Previews, logging, checkpoints, and where the model and the scene lie."""
    interrupted(tmp_path / "run", 5)
    moved = {
        "pretrained_model_name_or_path": str(shutil.copytree(bench.model, tmp_path / "model")),
        "instance_data_dir": str(shutil.copytree(bench.scene, tmp_path / "scene")),
        "device": "cpu:0",
    }
    watching = {"img_log_steps": 6, "preview_inference_steps": 1, "log_steps": 3, "checkpoints_total_limit": 3}
    assert file_hashes(resume(bench, tmp_path / "run", **moved, **watching)) == whole


def test_latest_without_a_checkpoint_starts_anew(bench, tmp_path, interrupted, whole, caplog):
    """Also when the first session left metrics behind, and a checkpoint that was never finished."""
    interrupted(tmp_path / "run", 2)
    (tmp_path / "run" / "checkpoints" / "step-000001" / "manifest.json").unlink()
    assert file_hashes(resume(bench, tmp_path / "run")) == whole
    assert "there is no checkpoint" in caplog.text


def test_explicit_checkpoint_into_another_folder(bench, tmp_path, interrupted, whole):
    """The weights come out the same; the new folder's metrics hold the steps done there and nothing else."""
    interrupted(tmp_path / "first", 5)
    (checkpoint,) = checkpoints.list_checkpoints(tmp_path / "first")
    run = bas.train(bench.config(tmp_path / "second", resume_from_checkpoint=str(checkpoint)))
    hashes = file_hashes(run)
    assert {name: hashes[name] for name in WEIGHTS} == {name: whole[name] for name in WEIGHTS}
    written = (run / "metrics.jsonl").read_text()
    assert [line.split('"step": ')[1][0] for line in written.splitlines()] == ["5", "6"]


def test_an_older_checkpoint_takes_the_later_ones_with_it(bench, tmp_path, whole):
    """Gone on from step 2 of 4, to step 3: `latest` is that step, and no row of the metrics is lost."""
    run, saving = tmp_path / "run", {"checkpointing_steps": 1, "checkpoints_total_limit": 3}
    cut_off(bench.config(run, **saving), 5)
    second = run / "checkpoints" / "step-000002"
    cut_off(bench.config(run, resume_from_checkpoint=str(second), **saving), 2)
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["step-000002", "step-000003"]
    assert file_hashes(resume(bench, run)) == whole


@pytest.mark.slow
def test_kill_9(bench, tmp_path):
    """A process of its own, killed without warning once the second phase has left a checkpoint."""
    run = tmp_path / "run"
    flags = {"phase1_train_steps": 10, "phase2_train_steps": 40, "checkpointing_steps": 5}
    config = bench.config(run, **flags)
    command = [sys.executable, "-c", f"import bas; bas.train(bas.TrainConfig(**{vars(config)!r}))"]
    root = Path(bas.__file__).parents[1]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # the order of sums depends on it
    child = subprocess.Popen(command, cwd=root, env=os.environ | threads, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any(p.name > "step-000014" for p in checkpoints.list_checkpoints(run)):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (run / "concepts.safetensors").exists()
    whole = bas.train(bench.config(tmp_path / "whole", **flags | {"checkpointing_steps": 0}))
    assert file_hashes(resume(bench, run, **flags)) == file_hashes(whole)


# --- A save is whole or absent ------------------------------------------------------------------------------------


@pytest.mark.parametrize("writer", some_fast(("write_tensors", "write_json", "sync"), "write_json"))
def test_fault_inside_a_save_leaves_the_old_checkpoint(bench, tmp_path, monkeypatch, whole, writer):
    """The second save dies: in its tensors, in its note, or just after its place was taken."""
    original, saves = getattr(checkpoints, writer), []

    def dying(path, *args):
        if path.parent.name.startswith(".step-000002") or (writer == "sync" and (path / "step-000002").exists()):
            saves.append(path)
            raise CutOff
        return original(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, writer, dying)
        with pytest.raises(CutOff):
            bas.train(bench.config(tmp_path / "run", checkpointing_steps=1))
    assert saves
    left = [path.name for path in checkpoints.list_checkpoints(tmp_path / "run")]
    assert left == (["step-000001", "step-000002"] if writer == "sync" else ["step-000001"])
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


@pytest.mark.parametrize("name", ["state.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors", "state.json"])
def test_damaged_checkpoint_is_refused(bench, tmp_path, interrupted, name):
    interrupted(tmp_path / "run", 3)
    path = tmp_path / "run" / "checkpoints" / "step-000002" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with refused("step-000002 is damaged", name):
        resume(bench, tmp_path / "run")
    path.unlink()
    with refused("step-000002 is damaged", name):
        resume(bench, tmp_path / "run")


def test_limit_keeps_the_newest_checkpoints(bench, tmp_path):
    cut_off(bench.config(tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=2), 5)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000003", "step-000004"]


def test_a_checkpoint_that_was_cut_off_is_named_and_cleared(bench, tmp_path, interrupted, whole, caplog, monkeypatch):
    """As a kill leaves it in the middle of its removal: the tensors without the manifest. Other folders stay."""
    interrupted(tmp_path / "run", 4)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step-000003", checkpoints / "step-000002")
    (checkpoints / "step-000002" / "manifest.json").unlink()
    (checkpoints / "step-of-mine").mkdir()
    original, kept = run_folder.prepare_folder, []

    def prepare(folder, resuming):
        original(folder, resuming)
        kept.extend(sorted(path.name for path in checkpoints.iterdir()))

    monkeypatch.setattr("bas.training.setup.prepare_folder", prepare)
    assert file_hashes(resume(bench, tmp_path / "run", checkpointing_steps=4)) == whole
    told = (
        f"{checkpoints / 'step-000002'} was cut off while it was written or removed: it does not count and is removed"
    )
    assert told in caplog.messages
    assert kept == ["step-000003", "step-of-mine"]


def test_only_whole_checkpoints_are_listed(tmp_path):
    for name in ("step-000001", "step-000002", "step-of-mine"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state.safetensors").touch()
    (tmp_path / "checkpoints" / "step-000001" / "manifest.json").touch()
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == ["step-000001"]


def test_a_checkpoint_of_one_file_goes_on(bench, tmp_path, interrupted, whole):
    """As earlier versions wrote it, moments and all."""
    interrupted(tmp_path / "run", 5)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000004"
    tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, checkpoint / "state.safetensors")
    manifest = {name: checkpoints.describe_file(checkpoint / name) for name in ("state.safetensors", "state.json")}
    checkpoints.write_json(checkpoint / "manifest.json", manifest)
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


def test_a_missing_checkpoint_that_was_named_is_an_error(bench, tmp_path):
    with refused("step-000009", "no complete checkpoint"):
        bas.train(bench.config(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "step-000009")))


# --- What must be the same ----------------------------------------------------------------------------------------


def test_other_settings_handles_or_weights_are_refused_by_name(bench, tmp_path, interrupted, monkeypatch):
    interrupted(tmp_path / "run", 3)
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    other = shutil.copytree(bench.model, tmp_path / "other")
    weights = load_file(other / WEIGHTS[0])
    weights["conv_in.bias"][0] += 1
    save_file(weights, other / WEIGHTS[0])
    cases = [
        ({"learning_rate": 1e-5}, ["--learning_rate"]),
        ({"phase1_train_steps": 4, "seed": 3}, ["--phase1_train_steps", "--seed"]),
        ({"lambda_attention": 0.0}, ["--lambda_attention"]),
        ({"handles": ("<a>", "<b>", "<c>")}, ["handles"]),
        ({"pretrained_model_name_or_path": str(other)}, ["another base"]),
    ]
    for changes, words in cases:
        with refused("step-000002 was made with another", *words):
            resume(bench, tmp_path / "run", **changes)


def other_scene(bench, folder: Path, kind: str) -> Path:
    """A copy of the scene that differs in one part."""
    shutil.copytree(bench.scene, folder)
    if kind == "words":
        concepts = [{"handle": f"<asset{i}>", "word": word} for i, word in enumerate(("bowl", None, None))]
        (folder / "scene.json").write_text(json.dumps({"concepts": concepts}))
    elif kind == "an extra image":
        shutil.copytree(bench.scene, folder / "1")
    else:
        with Image.open(folder / kind) as image:
            image.putpixel((20, 9), 7)
            image.save(folder / kind)
    return folder


@pytest.mark.parametrize(
    ("kind", "told"),
    [("img.png", "scene"), ("mask2.png", "scene"), ("an extra image", "scene"), ("words", "initial words")],
)
def test_another_scene_is_refused(bench, tmp_path, interrupted, monkeypatch, kind, told):
    interrupted(tmp_path / "run", 3)
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    scene = other_scene(bench, tmp_path / "scene", kind)
    with refused(f"step-000002 was made with another {told}: resume with the same, or start again"):
        resume(bench, tmp_path / "run", instance_data_dir=str(scene))


def test_what_auto_came_to_is_compared(bench, tmp_path, interrupted, monkeypatch, whole):
    """On a machine where it would be another precision, the run goes on once the first one is named."""
    interrupted(tmp_path / "run", 3)
    for here in ("fp16", "bf16"):
        monkeypatch.setattr(
            "bas.training.setup.pick_precision", lambda name, *args, here=here: here if name == "auto" else name
        )
        with refused("step-000002 was made with another --mixed_precision (no there)"):
            resume(bench, tmp_path / "run")
    assert file_hashes(resume(bench, tmp_path / "run", mixed_precision="no")) == whole


def test_what_only_spares_memory_may_change(bench, tmp_path, interrupted, whole):
    """The first thing to try when memory ran out. Numbers that are computed again are the same."""
    interrupted(tmp_path / "run", 5)
    assert file_hashes(resume(bench, tmp_path / "run", gradient_checkpointing=True)) == whole


def forget(checkpoint: Path, *facts: str, settings: tuple[str, ...] = ()) -> None:
    """Leave these facts and settings out of a checkpoint, as one of an earlier version does."""
    note = json.loads((checkpoint / "state.json").read_text())
    for fact in facts:
        del note["facts"][fact]
    for setting in settings:
        del note["facts"]["config"][setting]
    checkpoints.write_json(checkpoint / "state.json", note)
    names = json.loads((checkpoint / "manifest.json").read_text())
    manifest = {name: checkpoints.describe_file(checkpoint / name) for name in names}
    checkpoints.write_json(checkpoint / "manifest.json", manifest)


def test_a_checkpoint_that_notes_less_is_held_to_what_it_notes(bench, tmp_path, interrupted, whole):
    interrupted(tmp_path / "run", 5)
    forget(tmp_path / "run" / "checkpoints" / "step-000004", "scene", "words", "precision")
    with refused("another --mixed_precision"):
        resume(bench, tmp_path / "run", mixed_precision="bf16")
    assert file_hashes(resume(bench, tmp_path / "run")) == whole


def test_a_setting_that_a_checkpoint_does_not_know_is_its_default(bench, tmp_path, interrupted, whole):
    interrupted(tmp_path / "run", 5)
    unknown = ("close_ups", "attention_loss", "class_prompt")
    forget(tmp_path / "run" / "checkpoints" / "step-000004", settings=unknown)
    with refused("made with another --close_ups: resume"):
        resume(bench, tmp_path / "run", close_ups=True)
    assert file_hashes(resume(bench, tmp_path / "run")) == whole
