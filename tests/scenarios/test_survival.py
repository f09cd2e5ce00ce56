"""What a training does when another one comes, when the disk is full or read-only, and when memory runs out."""

import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import bas
from bas.cli.entry import main
from bas.data.scene_writer import open_draft
from bas.errors import InputError, RunError
from bas.io import files
from bas.io import tensors as tensor_files
from bas.io.files import new_folder
from bas.io.images import image_path
from bas.pretrained.folder import read_spec
from bas.training import checkpoints, metrics
from bas.training.checkpoints import list_checkpoints
from bas.training.class_images import check_class_folder
from bas.training.disk_space import free_disk_space
from bas.training.run_folder import locked, prepare_folder
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step, full_disk, opened, resume, training, unprivileged
from tests.helpers.kills import child
from tests.helpers.small_runs import LORA, write_base, write_small_run
from tests.helpers.tiny import file_hashes, refused, write_class_images, write_settings

# --- Two runs in one folder -------------------------------------------------------------------------------------------


def test_the_second_of_two_runs_is_refused_and_the_first_goes_on(bench, tmp_path, monkeypatch, whole):
    answers = []

    def race(*args):
        answers.append(child(expect_refusal, bench, tmp_path / "run"))

    before_step(monkeypatch, 2, race)
    bas.train(bench.config(tmp_path / "run"))
    assert answers == [0]
    assert file_hashes(tmp_path / "run") == whole
    assert not (tmp_path / "run" / ".bas.lock").exists()


def expect_refusal(bench, run):
    bas.training.base_model.load = lambda *args, **kwargs: pytest.fail("weights were read")
    for wanted in (None, "latest"):
        with refused(f"another run is writing to {run}"):
            bas.train(bench.config(run, resume_from_checkpoint=wanted))


def hold(folder: Path) -> None:
    """End this process with 3 if it alone held the folder, with 4 if another did."""
    held = folder / "held"
    try:
        with locked(folder / "run"):
            os.close(os.open(held, os.O_CREAT | os.O_EXCL))  # fails where another one holds the folder
            held.unlink()
            os._exit(3)
    except InputError:
        os._exit(4)


def test_of_racing_processes_one_holds_the_folder(tmp_path):
    """Six processes at once, three times: never two hold it, and the lock of a dead one is free."""
    answers = []
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            ended = list(pool.map(child, [hold] * 6, [tmp_path] * 6))
            assert set(ended) <= {3, 4}
            assert 3 in ended
            answers += ended
    assert 4 in answers


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run that keeps its trained weights alone, beside its base."""
    place = tmp_path_factory.mktemp("small")
    return write_small_run(place / "run", write_base(place / "base", "sd1"), **LORA)


# --- A full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", some_fast((0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.9999), 0, 0.5, 0.9999))
def test_a_full_disk_keeps_the_old_checkpoint(bench, tmp_path, monkeypatch, whole, share):
    run, original = tmp_path / "run", checkpoints.write_tensors
    size = {}

    def write(path, tensors, *rest):
        if path.parts[-2:] == (".step-000005.tmp", "state.safetensors"):
            before = list_checkpoints(run)[-1] / "state.safetensors"
            size["room"] = int(share * before.stat().st_size)
            with full_disk(size["room"]):
                return original(path, tensors, *rest)
        return original(path, tensors, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", write)
        with pytest.raises(RunError, match=r"writing to .* failed: .*(large|space).*make room") as caught:
            bas.train(bench.config(run, checkpointing_steps=1))
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]
    assert file_hashes(resume(bench, run)) == whole


def test_a_disk_that_fills_at_the_metrics_or_at_the_end_loses_nothing(bench, tmp_path, monkeypatch, whole):
    run, no_space = tmp_path / "run", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*args, **kwargs):
        raise no_space

    for module, name in ((metrics.MetricsLog, "flush"), (training, "save_model"), (training, "save_concepts")):
        with monkeypatch.context() as patch:
            if name == "flush":
                original, calls = metrics.MetricsLog.flush, iter(range(100))
                patch.setattr(module, name, lambda log, f=original, c=calls: refuse() if next(c) == 4 else f(log))
            else:
                patch.setattr(module, name, refuse)
            with pytest.raises(RunError, match=r"No space left on device.*make room"):
                resume(bench, run, checkpointing_steps=1)
        assert list_checkpoints(run)
    assert file_hashes(resume(bench, run, checkpointing_steps=1)) == whole


def test_a_write_that_claims_success_is_looked_at_on_the_disk(bench, tmp_path, monkeypatch, whole):
    """A file that is shorter than its header says never takes the place of a whole one."""
    run, original, sizes = tmp_path / "run", tensor_files.save_file, []

    def cut_short(tensors, path, metadata):
        original(tensors, path, metadata)
        if ".step-000003.tmp" in path.parts:
            sizes.append(path.stat().st_size)
            os.truncate(path, sizes[0] - 1)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", cut_short)
        with pytest.raises(RunError, match=r"safetensors cannot be written: .*make room"):
            bas.train(bench.config(run, checkpointing_steps=1))
    assert sizes
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000002"]
    assert file_hashes(resume(bench, run)) == whole


def test_only_leftovers_of_a_run_are_cleared(tmp_path):
    """A killed run's half-written files go; files of like names that are not its own stay."""
    theirs = [tmp_path / "notes" / ".draft.tmp", tmp_path / ".cache.tmp" / "kept"]
    ours = [tmp_path / ".settings.json.71.tmp", tmp_path / "checkpoints" / ".step-000003.tmp" / "state.json"]
    ours += [tmp_path / "scene" / "close-up-0" / ".mask0.png.71.tmp", tmp_path / "unet" / ".a.safetensors.9.tmp"]
    for path in (*theirs, *ours, write_settings(tmp_path) / "metrics.jsonl"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    prepare_folder(tmp_path, resuming=True)
    assert [path.exists() for path in (*theirs, *ours)] == [True] * len(theirs) + [False] * len(ours)
    assert not ours[1].parent.exists()


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    """Synced, renamed, and the folder synced: else a power cut could leave an empty file of the right name."""
    order, sync, replace = [], files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (order.append(f"sync {path.suffix}"), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("rename"), replace(a, b)))
    files.write_text(tmp_path / "a.txt", "a")
    assert order == ["sync .tmp", "rename", "sync "]


@pytest.mark.parametrize("words", [["merge", "--into_base"], ["export"]])
def test_a_command_whose_disk_was_full_can_run_again(words, small_run, tmp_path, capsys):
    """It says what to do, leaves no half of a model, and the same command then gives the whole."""
    target = tmp_path / ("new.safetensors" if words == ["export"] else "new")
    line = [words[0], str(small_run), *words[1:], *([] if words == ["export"] else ["--output_dir"]), str(target)]
    with full_disk(4000):
        assert main(line) == 1
    assert re.fullmatch(rf"bas: {target}\S*: File too large: make room\n", capsys.readouterr().err)
    assert not any(tmp_path.iterdir())
    assert main(line) == 0
    assert target.exists()


# --- A folder that cannot be written ----------------------------------------------------------------------------------


@pytest.fixture
def closed(tmp_path_factory):
    """A folder that anybody may read and nobody but its owner may write to; its owner is root or may not either."""
    folder = tmp_path_factory.mktemp("closed")
    with opened(folder):
        folder.chmod(0o555)
        yield folder


def test_a_read_only_folder_is_refused(closed):
    with unprivileged():
        with refused(f"cannot write to --output_dir {closed / 'run'}: Permission denied"), locked(closed / "run"):
            pass
        with refused(f"cannot write to --output_dir {closed}: Permission denied"), locked(closed):
            pass
        with refused(f"cannot write to --output_dir {closed / 'a' / 'b'}: {closed} is read-only for you"):
            free_disk_space(closed / "a" / "b")
        with refused(f"cannot write to --output_dir {closed / 'new'}: Permission denied"):
            new_folder(str(closed / "new"))
    assert list(closed.iterdir()) == []


def test_images_and_masks_are_not_made_for_a_folder_that_is_read_only(bench, tmp_path, monkeypatch):
    """Neither is an image generated, nor does a page open on which somebody paints in vain."""
    monkeypatch.setattr("bas.io.files.os.access", lambda path, mode: Path(path) != tmp_path)
    with refused(f"cannot write to --output_path {tmp_path}: {tmp_path} is read-only for you, name another"):
        image_path(str(tmp_path / "out.png"))
    with refused(f"cannot write to the scene {tmp_path}: ", "name another --output_dir"):
        open_draft(bench.scene / "img.png", tmp_path)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_missing_class_images_need_a_folder_to_write(bench, tmp_path, monkeypatch, images):
    """In the cache as in a folder of one's own; where all are there, nobody writes."""
    monkeypatch.setenv("BAS_CACHE", str(tmp_path))
    own = write_class_images(tmp_path / "class_images" / "0123456789abcdef", images)
    monkeypatch.setattr("bas.io.files.os.access", lambda path, mode: tmp_path not in (path, *path.parents))
    for folder, flag in ((None, f"the cache {tmp_path / 'class_images'}"), (str(own), f"--class_data_dir {own}")):
        config = bench.config(class_data_dir=folder)
        with refused(f"cannot write to {flag}: ") if images < 2 else nullcontext():
            check_class_folder(config, read_spec(bench.model), (32, 32))


def test_train_sees_it_before_it_reads_weights(bench, tmp_path, monkeypatch):
    """The folder turns read-only between two sessions."""
    run = bas.train(bench.config(tmp_path / "run", phase1_train_steps=1, phase2_train_steps=0))
    (run / "concepts.safetensors").unlink()
    monkeypatch.setattr("bas.training.base_model.load", lambda *args, **kwargs: pytest.fail("weights were read"))
    monkeypatch.setattr("bas.io.files.os.access", lambda path, mode: Path(path) != run)
    with refused(f"cannot write to --output_dir {run}: {run} is read-only for you"):
        resume(bench, run, phase1_train_steps=1, phase2_train_steps=0)


# --- Out of memory ----------------------------------------------------------------------------------------------------


def full(*args):
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")


@pytest.mark.parametrize("step", some_fast((2, 5), 5))
def test_out_of_memory_keeps_the_last_checkpoint(bench, tmp_path, monkeypatch, whole, step):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        before_step(patch, step, full)
        with pytest.raises(torch.OutOfMemoryError):
            bas.train(bench.config(run, checkpointing_steps=1))
    assert [path.name for path in list_checkpoints(run)] == [f"step-{step - 1:06d}"]
    assert file_hashes(resume(bench, run)) == whole


def too_much(make):
    """The error that a library itself raises when it is asked for more memory than any machine has."""
    try:
        make(10**17)
    except (RuntimeError, MemoryError) as error:
        return error


WITHOUT_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory.\nTried"),
    MemoryError(),
    *(too_much(make) for make in (bytes, torch.empty, np.empty)),
]


@pytest.mark.parametrize("error", WITHOUT_MEMORY, ids=lambda error: type(error).__name__)
def test_a_command_without_memory_is_one_line(bench, monkeypatch, capsys, error):
    def fail(*args):
        raise error

    monkeypatch.setattr("bas.cli.commands.sample.sample_each", fail)
    words = ["sample", str(bench.model), "--prompt", "a bowl", "--device", "cpu"]
    assert main(words) == 1
    advice = "try --batch_size 1, --precision fp16, or a smaller --height and --width"
    assert capsys.readouterr().err == f"bas: out of memory: {advice}\n"
    with pytest.raises(type(error)):
        main([*words, "--debug"])


def test_another_error_is_no_lack_of_memory(bench, monkeypatch):
    def fail(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr("bas.cli.commands.sample.sample_each", fail)
    with pytest.raises(RuntimeError, match="something else"):
        main(["sample", str(bench.model), "--prompt", "a bowl", "--device", "cpu"])
