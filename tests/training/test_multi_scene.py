"""Many scenes from one base: each as if it were alone, shared among processes, whatever fails or was done before."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file

import bas
from bas.cli.entry import main
from bas.errors import RunError
from bas.models.text import add_handles
from bas.pretrained.folder import load
from bas.runtime.distributed import Ranks
from bas.runtime.signals import Interrupted
from bas.training import base_model, dry_run
from bas.training import loop as training
from bas.training import multi_scene as many
from bas.training.base_model import Base
from bas.training.multi_scene import find_scenes, train_each
from tests.helpers.faults import before_step, heard
from tests.helpers.kills import child
from tests.helpers.tiny import file_hashes, refused, write_scene

ADVICE = "resume with the same, or start again"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A folder of three scenes, of 1 to 3 concepts."""
    folder = tmp_path_factory.mktemp("many") / "scenes"
    for i, name in enumerate(("ant", "bee", "cat"), start=1):
        write_scene(folder / name, concepts=i)
    return folder


@pytest.fixture(scope="module")
def alone(bench, scenes, tmp_path_factory) -> dict[str, dict[str, str]]:
    """The hashes of each scene's run, trained by itself."""
    folder = tmp_path_factory.mktemp("alone")
    configs = {p.name: bench.config(folder / p.name, instance_data_dir=str(p)) for p in sorted(scenes.iterdir())}
    return {name: file_hashes(bas.train(config)) for name, config in configs.items()}


# --- The base stays as it was -------------------------------------------------------------------------------------


def test_each_scene_equals_the_same_trained_alone(bench, scenes, alone, tmp_path, monkeypatch):
    """To the bit, in any order, from one reading of the weights and of the class images."""
    loads, encodings = [], []
    for module, name, calls in ((base_model, "load", loads), (base_model, "class_images", encodings)):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, f=original, c=calls, **kwargs: (c.append(1), f(*args, **kwargs))[1]
        )
    outcomes = list(train_each(bench.config(tmp_path / "out"), find_scenes([str(scenes)])[::-1]))
    assert [(Path(o.folder).name, o.error, o.earlier) for o in outcomes] == [
        (name, None, False) for name in ("cat", "bee", "ant")
    ]
    assert {name: file_hashes(tmp_path / "out" / name) for name in alone} == alone
    assert (len(loads), len(encodings)) == (1, 1)


@pytest.mark.parametrize("left", [torch.float32, torch.bfloat16])
def test_fresh_models_are_what_was_read(bench, left):
    """After every weight moved, handles were added, gradients and another precision left behind."""
    untouched = load(bench.model)
    base = Base.open(bench.model, torch.device("cpu"), keep=True)
    models = base.fresh()
    places = {name: p.data_ptr() for name, p in models.unet.named_parameters()}
    add_handles(models.text_encoders, models.tokenizer, ("<a>", "<b>"), (None, None), seed=0)
    for network in (models.unet, models.text_encoder):
        for parameter in network.parameters():
            parameter.data.add_(1)
            parameter.data = parameter.data.to(left)
            parameter.grad = torch.ones_like(parameter)
    again = base.fresh()
    for name in ("unet", "vae", "text_encoder"):
        expected, found = getattr(untouched, name).state_dict(), getattr(again, name).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)
    assert all(p.grad is None for p in [*again.unet.parameters(), *again.text_encoder.parameters()])
    if left == torch.float32:
        assert {name: p.data_ptr() for name, p in again.unet.named_parameters()} == places
    before = base.kept["unet"]["conv_in.weight"].clone()
    again.unet.conv_in.weight.data.add_(1)
    assert torch.equal(base.kept["unet"]["conv_in.weight"], before)
    assert len(again.tokenizer) == len(untouched.tokenizer)
    assert again.handles == ()


# --- One command --------------------------------------------------------------------------------------------------


def test_a_failed_scene_is_reported_and_the_others_are_trained(bench, scenes, alone, tmp_path, capsys, caplog):
    """Exit code 1; the same command again trains what failed, once it is mended, and nothing else."""
    spoilt = write_scene(tmp_path / "all" / "bad", concepts=2)
    (spoilt / "mask1.png").write_bytes((spoilt / "mask0.png").read_bytes())
    line = bench.command(tmp_path / "out", str(scenes / "ant"), str(tmp_path / "all"), str(scenes / "cat"))
    assert main(line) == 1
    output, errors = capsys.readouterr()
    assert [text.split()[-3] for text in output.splitlines()] == [str(tmp_path / "out" / n) for n in ("ant", "cat")]
    assert "bas: 1 of 3 scenes failed" in errors.splitlines()[-1]
    assert sum("mask1.png is the same mask" in record.message for record in caplog.records) == 2
    assert {name: file_hashes(tmp_path / "out" / name) for name in ("ant", "cat")} == {
        n: alone[n] for n in ("ant", "cat")
    }
    assert (tmp_path / "out" / "ant" / "report.html").exists()

    write_scene(spoilt, concepts=2)
    made = (tmp_path / "out" / "cat" / "concepts.safetensors").stat().st_mtime_ns
    assert main(line) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("ant was finished before")
    assert (tmp_path / "out" / "bad" / "concepts.safetensors").exists()
    assert (tmp_path / "out" / "cat" / "concepts.safetensors").stat().st_mtime_ns == made


def test_an_unfinished_scene_goes_on(bench, scenes, alone, tmp_path, monkeypatch):
    """From its checkpoint, to the same bits."""
    original, steps = training.optimizer_step, iter(range(1, 100))

    def dying(*args):
        if next(steps) == 6 + 4:  # the second scene's fourth step
            raise KeyboardInterrupt
        return original(*args)

    config, chosen = bench.config(tmp_path / "out", checkpointing_steps=1), find_scenes([str(scenes)])
    with monkeypatch.context() as patch:
        patch.setattr(training, "optimizer_step", dying)
        with pytest.raises(KeyboardInterrupt):
            list(train_each(config, chosen))
    assert [o.earlier for o in train_each(config, chosen)] == [True, False, False]
    assert {name: file_hashes(tmp_path / "out" / name) for name in alone} == alone


def test_finished_with_other_settings_is_no_success(bench, scenes, tmp_path):
    chosen = find_scenes([str(scenes / "ant")])
    list(train_each(bench.config(tmp_path / "out"), chosen))
    (outcome,) = train_each(bench.config(tmp_path / "out", learning_rate=1e-5), chosen)
    assert "another --learning_rate" in outcome.error


def test_finished_with_another_scene_is_no_success(bench, scenes, tmp_path):
    """Its mask was painted anew since."""
    scene = Path(shutil.copytree(scenes / "ant", tmp_path / "ant"))
    list(train_each(bench.config(tmp_path / "out"), [scene]))
    assert [outcome.earlier for outcome in train_each(bench.config(tmp_path / "out"), [scene])] == [True]
    with Image.open(scene / "mask0.png") as mask:
        mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(scene / "mask0.png")
    (outcome,) = train_each(bench.config(tmp_path / "out"), [scene])
    assert outcome.error == f"{tmp_path / 'out' / 'ant'} was made with another scene: {ADVICE}"


def test_a_page_that_cannot_be_written_ends_nothing(bench, scenes, tmp_path, monkeypatch, capsys, caplog):
    def full(run):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.html")

    monkeypatch.setattr("bas.cli.commands.train.write_report", full)
    chosen = [str(scenes / name) for name in ("ant", "bee")]
    assert main(bench.command(tmp_path / "out", *chosen)) == 0
    assert [line.split("/out/")[1] for line in capsys.readouterr().out.splitlines()] == ["ant is ready", "bee is ready"]
    assert main(bench.command(tmp_path / "alone", chosen[0])) == 0
    assert "alone is ready" in capsys.readouterr().out
    told = [f"{tmp_path / name} has no report: " for name in ("out/ant", "out/bee", "alone")]
    assert [line for line in caplog.messages if "page" in line] == [
        f"{start}[Errno 28] No space left on device: 'report.html'; write it with bas report" for start in told
    ]


@pytest.mark.parametrize(
    "error",
    [pytest.param(MemoryError(), marks=pytest.mark.slow), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_scene_that_is_too_large_stops_no_other(bench, scenes, tmp_path, monkeypatch, error):
    def too_large(settings, base):
        if settings.instance_data_dir.endswith("ant"):
            raise error
        return original(settings, base)

    original = many.train
    monkeypatch.setattr(many, "train", too_large)
    monkeypatch.setattr("bas.training.dry_run.SAVINGS", ())  # each is a plan of its own
    outcomes = list(train_each(bench.config(tmp_path / "out"), find_scenes([str(scenes)])))
    assert outcomes[0].error.startswith("cpu is out of memory: the run takes at least ")
    assert [outcome.error for outcome in outcomes[1:]] == [None, None]


def test_a_damaged_base_ends_all_scenes_at_once(bench, scenes, tmp_path, monkeypatch):
    """It is read once, and told once: nothing is wrong with the scenes."""
    model = Path(shutil.copytree(bench.model, tmp_path / "model"))
    (weights,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors | {"conv_in.bias": tensors["conv_in.bias"][:-1]}, weights)
    config = bench.config(tmp_path / "out", pretrained_model_name_or_path=str(model))
    opened, original = [], Base.open
    monkeypatch.setattr(Base, "open", lambda *args: opened.append(args) or original(*args))
    with refused("conv_in.bias"):
        list(train_each(config, find_scenes([str(scenes)])))
    assert len(opened) == 1
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_fit_into_memory_ends_all_scenes(bench, scenes, tmp_path, monkeypatch):
    """With what each flag of a training saves, as where a step takes too much."""

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Base, "open", too_large)
    monkeypatch.setattr("bas.training.dry_run.SAVINGS", ())
    with pytest.raises(RunError, match="cpu is out of memory: the run takes at least "):
        list(train_each(bench.config(tmp_path / "out"), find_scenes([str(scenes)])))


def test_folders_that_hold_no_scene_are_refused(bench, scenes, tmp_path):
    (tmp_path / "empty").mkdir()
    with refused("empty", "not a scene"):
        find_scenes([str(tmp_path / "empty")])
    write_scene(tmp_path / "run" / "scene")
    (tmp_path / "run" / "settings.json").touch()
    with refused("run holds a run, not scenes"):
        find_scenes([str(tmp_path / "run")])
    with refused("nowhere does not exist"):
        find_scenes([str(scenes), "nowhere"])
    with refused("two scenes are called ant"):
        find_scenes([str(scenes), str(write_scene(tmp_path / "ant"))])
    (tmp_path / "links").mkdir()
    for name in ("cat", "dog"):  # each a link to a folder "it"
        (tmp_path / "links" / name).symlink_to(write_scene(tmp_path / name / "it"))
    linked = find_scenes([str(tmp_path / "links")])
    runs = [many.settings_of(scene, bench.config(tmp_path / "out")).output_dir for scene in linked]
    assert runs == [str(tmp_path / "out" / name) for name in ("cat", "dog")]
    with refused("--device nonsense"):
        list(train_each(bench.config(tmp_path / "out", device="nonsense"), find_scenes([str(scenes)])))


@pytest.mark.parametrize("left", ["mask0.png", "labels.png", "scene.json"])
def test_a_scene_whose_image_is_misnamed_is_no_folder_of_scenes(bench, tmp_path, capsys, left):
    """Its extra images are not trained in its place."""
    scene = write_scene(tmp_path / "photo", 1)
    write_scene(scene / "1", 1)
    (scene / "img.png").rename(scene / "photo.png")
    (scene / "mask0.png").rename(scene / left)
    assert main(["train", str(scene), "--weights", str(bench.model), "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"{scene} needs exactly one image named img.jpg, img.png, ...; found none, but " in error
    assert "photo.png" in error
    assert find_scenes([str(scene)]) == [scene]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_training_without_a_base_says_what_it_is(bench, scenes, tmp_path, monkeypatch, caplog, rank):
    """One line of all processes; none where a flag or the file of settings names a base."""
    for name in ("one_scene", "many_scenes"):
        monkeypatch.setattr(f"bas.cli.commands.train.{name}", lambda *args: None)
    (tmp_path / "named.toml").write_text(f"pretrained_model_name_or_path = '{bench.model}'\n")
    caplog.set_level("INFO")
    for named in (["--weights", str(bench.model)], ["--config", str(tmp_path / "named.toml")], []):
        assert caplog.messages == []
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["train", str(scenes), *named]) == 0
    told = ["the base model is the miniature, which knows no photographs; bas.json holds its settings"]
    assert caplog.messages == (told if rank == "0" else [])


@pytest.fixture
def no_operations(monkeypatch):
    """Dry runs that count memory alone, in a third of the time."""
    monkeypatch.setattr(dry_run, "plan_run", partial(dry_run.plan_run, count_operations=False))


def test_dry_run_counts_the_scenes(bench, scenes, tmp_path, capsys, no_operations):
    """What all of them leave on the disk, too; the rest is said to be of the first."""

    def needed(*more: str) -> int:
        assert main([*bench.command(tmp_path / "out", *more), "--dry_run"]) == 0
        output = capsys.readouterr().out
        assert "phase2" in output
        assert ("3, of which 0 are finished; below is" in output) == (str(scenes) in more)
        size, unit = re.search(r"disk +enough: ([0-9.]+) (kB|MB) of", output).groups()
        return float(size) * {"kB": 1e3, "MB": 1e6}[unit]

    assert needed(str(scenes)) == pytest.approx(3 * needed(str(scenes / "bee")), rel=0.1)
    assert not (tmp_path / "out").exists()


def test_dry_run_looks_at_every_scene(bench, scenes, tmp_path, capsys, no_operations):
    """What would be refused in its turn, perhaps hours later, is listed."""
    folder = shutil.copytree(scenes, tmp_path / "scenes")
    Image.new("L", (32, 32)).save(folder / "bee" / "mask0.png")
    bas.train(bench.config(tmp_path / "out" / "cat", instance_data_dir=str(folder / "cat")))
    capsys.readouterr()
    assert main([*bench.command(tmp_path / "out", str(folder)), "--dry_run"]) == 2
    output, errors = capsys.readouterr()
    assert "3, of which 1 are finished\n" in output
    assert re.search(r"rejected +\S*bee: \S*mask0.png is black all over", output)
    assert "phase2" in output
    assert errors == "bas: 1 of 3 scenes cannot be trained, as listed under rejected\n"


def test_dry_run_needs_no_download_and_no_extra(scenes, tmp_path, capsys, monkeypatch, no_operations):
    """As that of one scene: the model is known by its shapes, and what is missing is named."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    flags = f"--weights sd15 --train v --optimizer adamw8bit --device cpu --output_dir {tmp_path / 'out'} --dry_run"
    assert main(["train", str(scenes), *flags.split()]) == 0
    output = capsys.readouterr().out
    assert "3, of which 0 are finished; below is" in output
    assert "sd15, epsilon; not here yet: bas download sd15" in output
    assert "--optimizer adamw8bit is an extra: pip install bitsandbytes" in output
    assert "rejected" not in output


def test_no_scene_at_all_is_refused(monkeypatch, tmp_path, capsys):
    """As an empty variable gives it: it does not mean all scenes that lie around."""
    monkeypatch.chdir(write_scene(tmp_path / "scenes" / "one").parents[1])
    for names in ([], [""], ["scenes", ""]):
        assert main(["train", *names]) == 2
        assert "name a scene folder: bas train SCENE" in capsys.readouterr().err


# --- Several processes --------------------------------------------------------------------------------------------


def test_parts_share_everything_once():
    items = list(range(7))
    parts = [Ranks(rank, 3).part(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("name", "given"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_processes_of_a_machine_share_its_gpus(monkeypatch, name, given):
    """The sixth of them gets the second of two, unless another one is named."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Ranks(5, 6, local=5).device(name) == given
    assert chosen == ([given] if given == "cuda:1" else [])


def test_lists_are_gathered_in_order_and_as_often_as_asked(monkeypatch):
    """Two processes' places, here of two threads, in one store: a second call sees nothing of the first."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")  # nobody connects there
    store = dist.HashStore()
    monkeypatch.setattr("bas.runtime.distributed.rendezvous", lambda *args, **kwargs: iter([(store, 0, 2)]))

    def process(rank: int) -> list[list]:
        with Ranks(rank, 2).connected() as gather:
            return [gather([[f"scene {rank}", call]] * (rank + 1)) for call in range(2)]

    with ThreadPoolExecutor() as pool:
        seen = list(pool.map(process, range(2)))
    assert seen[0] == seen[1] == [[["scene 0", call], ["scene 1", call], ["scene 1", call]] for call in range(2)]


def test_nonsense_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with refused("WORLD_SIZE='many'"):
        Ranks.from_environment()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with refused("RANK=2 of WORLD_SIZE=2"):
        Ranks.from_environment()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with refused("WORLD_SIZE=2 without MASTER_ADDR: start the processes with torchrun"):
        Ranks.from_environment().connected().__enter__()


def test_several_scenes_do_not_train_into_a_run(bench, scenes, tmp_path, capsys):
    """The config.toml of a run names its own folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.json").write_text("{}")
    (tmp_path / "config.toml").write_text(f"output_dir = '{tmp_path / 'run'}'\n")
    assert main(["train", str(scenes), "--weights", str(bench.model), "--config", str(tmp_path / "config.toml")]) == 2
    assert f"--output_dir {tmp_path / 'run'} holds a run: name a folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["settings.json"]


def test_several_scenes_go_on_by_the_same_command(bench, scenes, tmp_path, monkeypatch):
    """A signal stops the first one, and the message names no flag: several scenes refuse that of one."""
    before_step(monkeypatch, 1, lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    with heard(), pytest.raises(Interrupted, match=r"after step 1 of 6, saved in .*/ant; the same command continues$"):
        list(train_each(bench.config(tmp_path / "out"), find_scenes([str(scenes)])))


def by_torchrun(line: list[str], folder: Path) -> tuple[int, str, str]:
    """Run a command of bas in two processes that torchrun starts. -> exit code, output, errors"""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "bas"]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(bas.__file__).parents[1]),
    }
    done = subprocess.run([*launcher, *line], env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def by_forks(line: list[str], folder: Path) -> tuple[int, str, str]:
    """The same in two forks of a process that has imported PyTorch, with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor() as pool:
        codes = {*pool.map(lambda rank: child(as_rank, rank, port, line, folder), range(2))}
    output, errors = ("".join((folder / f"{kind}{rank}").read_text() for rank in range(2)) for kind in ("out", "err"))
    return max(codes), output, errors


def as_rank(rank: int, port: int, line: list[str], folder: Path) -> None:
    """End this process as one of two that run a command of bas."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **place}
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{kind}{rank}", os.O_WRONLY | os.O_CREAT), number)
    sys.exit(main(line))


@pytest.mark.parametrize("started", [by_forks, pytest.param(by_torchrun, marks=pytest.mark.slow)])
def test_two_processes_train_every_scene_once(bench, scenes, alone, tmp_path, started):
    """A failed scene of one process ends both with code 1 after all are trained."""
    broken = write_scene(tmp_path / "broken")
    (broken / "mask0.png").write_text("nothing")
    code, output, errors = started(bench.command(tmp_path / "out", str(scenes), str(broken)), tmp_path)
    assert code == 1, errors
    ready = sorted(line.split("/out/")[1] for line in output.splitlines() if "/out/" in line)
    assert ready == [f"{name} is ready" for name in ("ant", "bee", "cat")]
    assert "bas: 1 of 4 scenes failed" in errors
    assert {name: file_hashes(tmp_path / "out" / name) for name in alone} == alone
