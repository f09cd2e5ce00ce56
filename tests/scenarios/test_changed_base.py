"""A base model whose files change: while it is read, while a run computes with it, between two sessions of a run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import bas
from bas.pretrained.folder import load
from bas.pretrained.hashes import weights_hash
from bas.training.base_model import Base
from bas.training.multi_scene import train_each
from tests.helpers.cases import some_fast
from tests.helpers.faults import before_step, resume
from tests.helpers.tiny import file_hashes, refused

UNET = "unet/diffusion_pytorch_model.safetensors"


def overwrite(path: Path) -> None:
    """Other numbers, in place, as `cp`, `rsync --inplace` and `dd` write them."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def replace_file(path: Path) -> None:
    """Another file takes the name, as `mv` and downloads do it."""
    other = path.with_name("other")
    shutil.copyfile(path, other)
    overwrite(other)
    os.replace(other, path)


def keep_times(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """The change, with the size and the time of change that programs see as before."""

    def changing(path: Path) -> None:
        before = path.stat()
        change(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    return changing


@pytest.fixture
def model(bench, tmp_path) -> Path:
    """A copy of the bench's model that a test may change."""
    return Path(shutil.copytree(bench.model, tmp_path / "model"))


@pytest.mark.parametrize("change", some_fast((overwrite, truncate, replace_file), overwrite))
def test_a_run_computes_with_the_weights_that_it_read(change, bench, model, tmp_path, monkeypatch, whole):
    """Every file of the base changes before the second step; the run ends with the bits of an undisturbed one."""
    monkeypatch.setattr("bas.io.tensors.MAPPED_ALONE", 1)  # these are small: as if they were large

    def disturb(*args):
        for path in model.rglob("*.safetensors"):
            change(path)

    before_step(monkeypatch, 2, disturb)
    run = bas.train(bench.config(tmp_path / "run", pretrained_model_name_or_path=str(model)))
    assert file_hashes(run) == whole


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_base_that_changes_while_it_is_read_is_refused(component, model, monkeypatch):
    (file,) = (model / component).glob("*.safetensors")

    def reading(*args, **kwargs):
        models = load(*args, **kwargs)
        keep_times(overwrite)(file)
        return models

    monkeypatch.setattr("bas.training.base_model.load", reading)
    with refused(f"{model} was changed while it was read: start again"):
        Base.open(model, "cpu")


@pytest.mark.parametrize(
    "change", [keep_times(overwrite), keep_times(replace_file)], ids=["in place", "by another file"]
)
def test_a_run_is_not_resumed_on_another_base_of_the_same_size_and_time(change, bench, model, tmp_path, monkeypatch):
    monkeypatch.setattr("bas.pretrained.hashes.SETTLED", 0)
    changes = {"pretrained_model_name_or_path": str(model), "checkpointing_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        stopped(bench, tmp_path, monkeypatch, changes)
    change(model / UNET)
    with refused("was made with another base"):
        resume(bench, tmp_path / "run", **changes)


def test_a_resumed_run_reads_the_base_even_where_its_hash_is_known(bench, model, tmp_path, monkeypatch):
    """A cache that was copied along, or changed, answers for the old weights."""
    monkeypatch.setenv("BAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("bas.pretrained.hashes.SETTLED", 0)
    changes = {"pretrained_model_name_or_path": str(model), "checkpointing_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        stopped(bench, tmp_path, monkeypatch, changes)
    memory, before = tmp_path / "cache" / "hashes.json", weights_hash(model)
    overwrite(model / UNET)
    stat, known = (model / UNET).stat(), json.loads(memory.read_text())
    state = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    known[str((model / UNET).resolve())]["state"] = state
    memory.write_text(json.dumps(known))
    assert weights_hash(model) == before  # what the cache says
    with refused("was made with another base"):
        resume(bench, tmp_path / "run", **changes)


def test_a_finished_run_of_another_base_does_not_count_as_this_one(bench, model, tmp_path):
    """Neither alone nor as one of several scenes."""
    changes = {"pretrained_model_name_or_path": str(model), "phase2_train_steps": 0}
    run = bas.train(bench.config(tmp_path / "runs" / bench.scene.name, **changes))
    (outcome,) = train_each(bench.config(tmp_path / "runs", **changes), [bench.scene])
    assert (outcome.earlier, outcome.error) == (True, None)
    keep_times(replace_file)(model / UNET)
    (outcome,) = train_each(bench.config(tmp_path / "runs", **changes), [bench.scene])
    assert outcome.earlier is False
    assert f"{run} was made with another base" in outcome.error
    with refused(f"{run} already holds a finished run"):
        bas.train(bench.config(run, **changes))


def stopped(bench, tmp_path, monkeypatch, changes: dict) -> None:
    """A run that ends before its fourth step."""

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        before_step(patch, 4, stop)
        bas.train(bench.config(tmp_path / "run", **changes))
