"""The run folder: whether a run may write to it, the lock on it, and what is removed from it."""

import errno
import json
import os
import resource
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bas.cli.entry import main
from bas.config import TrainConfig
from bas.errors import RunError
from bas.io.tensors import write_tensors
from bas.training.checkpoints import remove_all
from bas.training.disk_space import writing
from bas.training.run_folder import check_output_folder, clear_finished, has_leftovers, locked, prepare_folder
from tests.helpers.kills import child
from tests.helpers.tiny import refused, write_scene, write_settings

METADATA = {"config": asdict(TrainConfig("scene")), "handles": ["<asset0>"], "base": "x", "version": "1"}


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- Folders that bas did not write -----------------------------------------------------------------------------------


def foreign_folder(folder: Path, name: str, content: str) -> Path:
    """A folder of another program, with files of names that a run has too."""
    for place in ("checkpoints/step-1000/model.safetensors", "unet/.x.tmp", ".draft.12.tmp", ".lock"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(f"precious {place}")
    (folder / name).write_text(content)
    return folder


FOREIGN = {
    "an editor's settings": ("settings.json", '{"editor.fontSize": 14}'),
    "a trainer's metrics": ("metrics.jsonl", "".join(f'{{"epoch": {i}}}\n' for i in range(100))),
    "settings that are a list": ("settings.json", "[]"),
    "settings with a config": ("settings.json", json.dumps(METADATA | {"config": {"lr": 0.1}})),
    "settings without handles": ("settings.json", json.dumps(METADATA | {"handles": []})),
    "damaged settings": ("settings.json", json.dumps(METADATA)[:100]),
    "settings of bas beside other files": ("settings.json", json.dumps(METADATA)),
}


@pytest.mark.parametrize("resuming", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_that_bas_did_not_write_is_refused_and_left_alone(tmp_path, kind, resuming):
    folder = foreign_folder(tmp_path / "foreign", *FOREIGN[kind])
    before = files_in(folder)
    with refused("foreign"):
        prepare_folder(folder, resuming)
    assert files_in(folder) == before


@pytest.mark.parametrize("name", ["checkpoints", "previews", "unet", "scene"])
def test_a_file_in_the_place_of_a_folder_is_found_before_training(tmp_path, name):
    folder = write_settings(tmp_path / "run")
    (folder / "metrics.jsonl").touch()
    (folder / name).write_text("precious")
    with refused(f"{folder / name} is not a folder, as it is in a run of bas: move it away"):
        prepare_folder(folder, resuming=True)
    assert (folder / name).read_text() == "precious"


@pytest.mark.parametrize("kind", ["an editor's settings", "a trainer's metrics"])
@pytest.mark.parametrize("resume", [[], ["--resume_from_checkpoint", "latest"]])
def test_the_command_refuses_it_with_2(bench, tmp_path, kind, resume, capsys):
    folder = foreign_folder(tmp_path / "foreign", *FOREIGN[kind])
    before = files_in(folder)
    assert main([*bench.command(folder), *resume]) == 2
    assert files_in(folder) == before
    assert capsys.readouterr().err.count("\n") == 1


def test_of_many_scenes_the_one_whose_folder_is_foreign_is_refused(bench, tmp_path, caplog):
    scenes = [write_scene(tmp_path / name, 2) for name in ("ant", "bee")]
    folder = foreign_folder(tmp_path / "out" / "ant", *FOREIGN["a trainer's metrics"])
    before = files_in(folder)
    words = bench.command(tmp_path / "out", *map(str, scenes))
    assert main([*words, "--phase1_train_steps", "1", "--phase2_train_steps", "0"]) == 1
    assert files_in(folder) == before
    assert (tmp_path / "out" / "bee" / "concepts.safetensors").exists()
    assert "ant is not empty: name a new folder" in caplog.text


def test_in_a_run_only_what_bas_wrote_is_removed(tmp_path):
    """Half-written files of bas go; folders called like a checkpoint, and files beside a checkpoint's, stay."""
    run = write_settings(tmp_path / "run")
    theirs = [
        "checkpoints/step-000004/weights.bin",
        "checkpoints/step-000002/notes.txt",
        "unet/.x.tmp",
        ".draft.tmp",
        ".draft.71.tmp",
    ]
    ours = ["checkpoints/step-000003/state.json", "checkpoints/.step-000005.tmp/.state.safetensors.7.tmp"]
    ours += ["unet/.config.json.71.tmp", ".settings.json.71.tmp", "unet/.tmpa1B2c3", ".tmpa1B2c3"]
    ours += ["checkpoints/.step-000005.tmp/.tmpa1B2c3"]
    whole = ["checkpoints/step-000002/manifest.json", "checkpoints/step-000002/state.json"]
    for name in [*theirs, *ours, *whole, "metrics.jsonl"]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    prepare_folder(run, resuming=True)
    left = files_in(run).keys() - {"settings.json", "metrics.jsonl"}
    assert left == {*theirs, *whole}
    remove_all(run)
    assert files_in(run).keys() - {"settings.json", "metrics.jsonl"} == set(theirs)


def save_until_killed(path: Path) -> None:
    """Write weights, and die by the kernel's signal after 1000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    write_tensors(path, {"weight": torch.zeros(100_000)})


@pytest.mark.parametrize(
    "name",
    [
        "concepts.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "checkpoints/.step-000002.tmp/exp_avg.safetensors",
    ],
)
def test_nothing_is_left_of_weights_whose_writing_was_killed(tmp_path, name):
    """The library writes into a file of its own, beside the temporary one of bas and as large as the weights."""
    run = write_settings(tmp_path / "run")
    (run / "metrics.jsonl").touch()
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    assert child(save_until_killed, run / name) == -signal.SIGXFSZ
    assert len([path for path in (run / name).parent.glob(".*") if path.is_file()]) == 2
    prepare_folder(run, resuming=True)
    remove_all(run)
    assert set(files_in(run)) == {"metrics.jsonl", "settings.json"}
    assert not (run / "checkpoints").exists()


def test_a_checkpoint_behind_a_link_is_not_removed(tmp_path):
    run, elsewhere = write_settings(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "state.json").write_text("kept")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-000001").symlink_to(elsewhere)
    (run / "metrics.jsonl").touch()
    prepare_folder(run, resuming=True)
    remove_all(run)
    assert (elsewhere / "state.json").read_text() == "kept"


@pytest.mark.parametrize("leftover", [".bas.lock", ".lock", ".git/config"])
def test_hidden_files_do_not_make_a_folder_used(tmp_path, leftover):
    (tmp_path / leftover).parent.mkdir(exist_ok=True)
    (tmp_path / leftover).touch()
    check_output_folder(tmp_path, resuming=False)


def test_hidden_files_of_others_stay(tmp_path):
    """In a folder of hidden files alone, that which a killed run was writing goes, and no other temporary file."""
    for name in (".settings.json.71.tmp", ".notes.2024.tmp", ".model.safetensors.71.tmp", ".tmpa1B2c3"):
        (tmp_path / name).touch()
    prepare_folder(tmp_path, resuming=False)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".model.safetensors.71.tmp", ".notes.2024.tmp", ".tmpa1B2c3"]


def test_a_run_that_was_killed_before_its_first_step_is_begun_again(tmp_path):
    """It holds the settings and the scene, and no metrics."""
    run = write_settings(tmp_path / "run")
    write_scene(run / "scene")
    (run / "config.toml").touch()
    prepare_folder(run, resuming=False)


# --- The lock ---------------------------------------------------------------------------------------------------------


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


def test_folders_that_were_made_for_nothing_are_removed(tmp_path):
    (tmp_path / "there").mkdir()
    with locked(tmp_path / "there" / "deep" / "run"):
        assert (tmp_path / "there" / "deep" / "run").is_dir()
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    assert list((tmp_path / "there").iterdir()) == []
    with locked(tmp_path / "there"):
        pass
    assert (tmp_path / "there").is_dir()


@pytest.mark.parametrize("words", [["--resolution", "33"], ["--resume_from_checkpoint", "nowhere"]])
def test_a_refused_command_leaves_no_folder(bench, tmp_path, words):
    assert main([*bench.command(tmp_path / "new" / "run"), *words]) == 2
    assert list(tmp_path.iterdir()) == []


# --- Errors of the disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room, then"),
        (errno.EDQUOT, "make room, then"),
        (errno.EROFS, "make the folder writable, then"),
        (errno.EACCES, "make the folder writable, then"),
    ],
)
def test_a_write_that_fails_says_why_and_what_to_do(tmp_path, number, advice):
    with pytest.raises(RunError) as caught, writing(tmp_path):
        raise OSError(number, os.strerror(number))
    told = f"writing to {tmp_path} failed: {os.strerror(number)}; no checkpoint was saved yet: {advice} the same"
    assert str(caught.value).startswith(f"{told} command goes on")


LEFTOVERS = (".bas.lock", ".report.html.999999.tmp", "checkpoints/step-000008/state.json", "checkpoints")


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_what_a_kill_left_in_a_finished_run_is_cleared(tmp_path, leftover):
    run = write_settings(tmp_path / "run")
    assert not has_leftovers(run)
    if leftover == "checkpoints":
        (run / leftover).mkdir()
    else:
        (run / leftover).parent.mkdir(parents=True, exist_ok=True)
        (run / leftover).touch()
    (run / ".mine.71.tmp").touch()
    assert has_leftovers(run)
    clear_finished(run)
    assert not has_leftovers(run)
    assert sorted(path.name for path in run.iterdir()) == [".mine.71.tmp", "settings.json"]
