"""The bench: its arithmetic, its tables, the turns that sides take, and that docs/speed.md shows docs/speed.json."""

import json
import sys
import threading
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from bas.cli import entry
from bas.io.run_files import read_concepts
from bas.pretrained.additions import Additions
from bas.pretrained.folder import load
from tests.helpers.tiny import Bench
from tools.bench import __main__ as bench
from tools.bench import bas_side as bench_bas
from tools.bench.bas_side import BasSide, Mode, mode_named
from tools.bench.clock import interleave, optimizer_seconds, run_command
from tools.bench.material import OFFICIAL, Material, make_scene
from tools.bench.table import Line, Stat, markdown, share, speedup, text_table

DOCS = Path(__file__).parents[2] / "docs"

# --- Arithmetic and tables ----------------------------------------------------------------------------------------


def test_quartiles_lie_between_the_measurements():
    assert Stat.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Stat(3.0, 2.0, 4.0, 5)
    assert Stat.of([1.0, 2.0]) == Stat(1.5, 1.25, 1.75, 2)
    assert Stat.of([7.0]) == Stat(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="nothing"):
        Stat.of([])


def test_a_speedup_is_theirs_over_ours_and_a_share_ours_over_theirs():
    theirs, ours = Stat.of([6.0]), Stat.of([1.5])
    assert speedup(theirs, ours) == 4.0
    assert share(theirs, ours) == 0.25
    assert speedup(None, ours) is None


RESULT = {
    "date": "2026-01-02",
    "machine": {
        "name": "A CPU",
        "cores": 2,
        "threads": 1,
        "memory_gb": 23.6,
        "load_before": 0.04,
        "load_after": 1.0,
    },
    "versions": {"torch": "2.13.0"},
    "ceilings": [["copy", 12.345, "GB/s"]],
    "quick": "",
    "lines": [
        Line(
            "phase-1 step",
            "small, CPU",
            "fp32",
            official=Stat(6.0, 5.5, 6.25, 3),
            bas=Stat(1.5, 1.4, 1.6, 3),
            ratio=4.0,
            goal="3x (3.5x)",
            fidelity={"loss": 1e-7, "handles": 2.5e-6, "handles cosine": 0.9999999},
        ).to_json(),
        Line("peak memory", "small, CPU", goal="0.30x (0.21x)", note="no such counter").to_json(),
        Line("peak memory", "full, GPU", goal="0.30x (0.21x)", note="no CUDA device").to_json(),
    ],
}


def test_markdown_of_a_small_result():
    """Medians with quartiles, goal and fidelity. A row not measured says why; a setting without any is left out."""
    assert markdown(RESULT) == (
        "- 2026-01-02, A CPU, 1 threads of 2 cores, 24 GB; torch 2.13.0\n"
        "- ceilings measured in the same call: copy 12.3 GB/s\n"
        "- load of the machine at the start and the end: 0.0, 1.0 (busy processes; on an idle machine 0 at the start)\n"
        "\n### small, CPU\n\n"
        "| row | bas in | official | compiled | bas | ratio | goal (stretch) | fidelity |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| phase-1 step | fp32 | 6 s [5.5, 6.25] | - | 1.5 s [1.4, 1.6] | 4.00x | 3x (3.5x) "
        "| loss 1.0e-07, handles 2.5e-06 (cos 1.00000) |\n"
        "| peak memory | - | - | - | not measured: no such counter | - | 0.30x (0.21x) | - |\n"
    )


def test_the_terminal_shows_the_same_cells_aligned():
    shown = text_table(RESULT).splitlines()
    titles, row = shown[5], shown[6]
    assert titles.split() == [
        "row",
        "bas",
        "in",
        "official",
        "compiled",
        "bas",
        "ratio",
        "goal",
        "(stretch)",
        "fidelity",
    ]
    for text, title in (("fp32", "bas in"), ("6 s [5.5, 6.25]", "official"), ("4.00x", "ratio"), ("loss", "fidelity")):
        assert row.index(text) == titles.index(title)


def test_the_documented_table_is_that_of_the_documented_run():
    """docs/speed.md holds, between its marks, what `tools.bench --markdown docs/speed.json` prints."""
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    table = page.split("<!-- bench -->\n")[1].split("<!-- end of bench -->")[0]
    assert table == markdown(json.loads((DOCS / "speed.json").read_text(encoding="utf-8")))


def test_the_command_renders_a_file(tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    bench.main(["--markdown", str(tmp_path / "result.json")])
    assert capsys.readouterr().out == markdown(RESULT)


@pytest.mark.parametrize(
    "flags",
    [["--threads", "0"], ["--rows", "nothing"], ["--markdown", "no such file"], ["--output", "no such folder/x.json"]],
)
def test_wrong_flags_end_with_code_2(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(flags)
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


# --- Measuring ----------------------------------------------------------------------------------------------------


def test_sides_take_turns_after_a_warm_up():
    order = []
    found = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", least=3, budget=0)
    assert order == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 3, "b": 3}


def test_a_budget_allows_thirty_rounds_and_no_more():
    found = interleave({"a": lambda: None}, "cpu", least=1, budget=60)
    assert len(found["a"]) == 30


def test_a_mode_that_this_version_lacks_says_what_is_missing():
    assert mode_named("fp32").available() == ""
    assert "no --no_such_flag" in Mode("x", {"no_such_flag": True}).available()
    assert "no --mixed_precision fp8" in Mode("x", {"mixed_precision": "fp8"}).available()


def test_rectangles_stand_in_for_any_number_of_concepts(tmp_path):
    """Eight masks that tile the image: each pixel belongs to exactly one."""
    scene = make_scene(tmp_path / "scene", 64, concepts=8)
    masks = np.stack([np.asarray(Image.open(path)) for path in sorted(scene.glob("mask*.png"))])
    assert masks.shape == (8, 64, 64)
    assert (masks.sum(axis=0, dtype=int) == 255).all()


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> Material:
    """The tests' tiny model and scene in the bench's terms."""
    tiny = Bench(tmp_path_factory.mktemp("tiny"))
    files = str(tiny.model), str(tiny.scene), str(tiny.class_images)
    return Material(*files, ("creature", "bowl", "stone"), 32, "cpu")


def test_bas_takes_one_step_at_a_time_in_its_own_loop(material, tmp_path):
    """After each call exactly one more line of metrics; nothing goes on in between, nor after the end."""
    side = BasSide(material, mode_named("fp32"), 1, tmp_path / "run")
    for steps in (1, 2, 3):
        side.step()
        side.run.metrics.flush()
        rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, steps + 1))
    side.close()
    assert not side.thread.is_alive()


def test_a_run_starts_in_the_thread_that_trains(material, tmp_path, monkeypatch):
    """PyTorch keeps the compiler's settings by thread: set in another one they would not hold for the steps."""
    threads = set()
    for module, name in ((bench_bas, "setup_run"), (bench_bas.training, "sample_batch")):
        watched = partial(lambda f, *args: threads.add(threading.current_thread()) or f(*args), getattr(module, name))
        monkeypatch.setattr(module, name, watched)
    side = BasSide(material, mode_named("fp32"), 1, tmp_path / "run")
    side.step()
    side.close()
    assert threads == {side.thread}


def test_a_lora_step_is_compared_with_a_full_one_without_its_optimizer(material, tmp_path, monkeypatch):
    """A full step of 5 s, 2 s of it in the optimizer of all weights, and one with a LoRA of 1.5 s: half of 3 s."""
    from tools.bench import rows

    names = map(str, count())
    given = SimpleNamespace(material=lambda _: material, rounds=2, budget=0, fresh=lambda _: tmp_path / next(names))
    monkeypatch.setattr(rows, "interleave", lambda sides, *_: dict(zip(sides, ([5.0, 5.0], [1.5, 1.5]), strict=True)))
    monkeypatch.setattr(rows, "optimizer_seconds", lambda device: nullcontext({10: [0.1, 0.1], 1000: [2.0, 2.0]}))
    (found,) = rows.adapters(given, SimpleNamespace(name="a model", device="cpu"), ())
    assert (found.bas.median, found.bas.n, found.note, found.ratio) == (1.5, 2, "against 3 s", 0.5)


def test_hooks_tell_the_seconds_of_an_optimizer_by_its_weights():
    """Two optimizers, of 3 and of 8 weights; after the block, also after an error in it, no step is timed."""
    small, large = (torch.optim.SGD([torch.nn.Parameter(torch.ones(n))]) for n in (3, 8))
    spent = {}

    def fail() -> None:
        nonlocal spent
        with optimizer_seconds("cpu") as spent:
            for optimizer in (small, large, large):
                optimizer.step()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    large.step()
    assert {weights: len(seconds) for weights, seconds in spent.items()} == {3: 1, 8: 2}
    assert all(0 < second < 1 for seconds in spent.values() for second in seconds)


def test_loading_a_base_and_a_lora_is_measured_against_loading_the_base(tmp_path, monkeypatch):
    """Loading is asked for three times a round, once with a LoRA of the model, which fits it; the last line is the
    share of memory with it."""
    from tools.bench import children, programs

    asked = []

    def child(task, _threads):
        asked.append(task)
        return {"seconds": 1.0, "peak": 3e9 if "lora" in task else 2e9}

    monkeypatch.setattr(programs, "child", child)
    names, model = map(str, count()), OFFICIAL / "model"
    given = SimpleNamespace(model=lambda _: model, rounds=1, threads=1, fresh=lambda _: tmp_path / next(names))
    *_, last = programs.loading(given, SimpleNamespace(name="a model", model="a model", device="cpu"), ())
    assert (last.row, last.bas.median, last.ratio) == ("load a base and a LoRA, memory", 3.0, 1.5)
    assert [("lora" in task, task["side"]) for task in asked[3:]] == [
        *((False, "diffusers"), (False, "bas"), (True, "bas"))
    ]
    weight = "mid_block.attentions.0.proj_in.weight"
    added = load(model, additions=Additions.read([asked[-1]["lora"]], ())).unet.state_dict()[weight]
    assert not torch.equal(added, load(model).unet.state_dict()[weight])
    for task in asked[-2:]:  # what the processes do with the two tasks of bas
        told = children.loading(task | {"threads": torch.get_num_threads()})
        assert told["seconds"] > 0
        assert told["peak"] > 0


def test_what_goes_wrong_in_the_held_loop_is_raised(material, tmp_path, monkeypatch):
    side = BasSide(material, mode_named("fp32"), 1, tmp_path / "run")
    monkeypatch.setattr("tools.bench.bas_side.training.sample_batch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        side.step()


@pytest.mark.parametrize(("phase", "mode"), [(1, "fp32"), (1, "fp32, exact"), (2, "fp32"), (2, "bf16")])
def test_fidelity_compares_with_the_official_arithmetic(material, tmp_path, phase, mode):
    """In float32 the same gradients to 1e-4; in bf16 not; a reference twice as large is half the reference away."""
    pytest.importorskip("diffusers", reason="the reference is computed by diffusers")
    from tools.bench.fidelity import compare, fidelity, official_gradients

    reference = official_gradients(material, phase)
    found = fidelity(reference, material, mode_named(mode), phase, tmp_path / "run")
    names = ["loss", "handles", *(["UNet"] if phase == 2 else [])]
    assert [name for name in found if "cosine" not in name] == names
    if mode == "bf16":
        assert 1e-4 < found["handles"] < 0.2
        assert 0.98 < found["handles cosine"] < 1 - 1e-7
    else:
        assert max(found[name] for name in names) < 1e-4
        assert found["handles cosine"] == pytest.approx(1, abs=1e-7)
    error, cosine = compare([reference.handles], [2 * reference.handles])
    assert (error, cosine) == (pytest.approx(0.5), pytest.approx(1))


def test_each_goal_stands_on_its_row():
    from tools.bench.goals import NAMES, goal

    assert goal("phase-1 step", "cuda", "bf16") == "8x (11x)"
    assert goal("phase-1 step", "cuda", "bf16, exact") == "5x (7x)"
    assert goal("phase-2 step", "cpu", "bf16") == "2.3x (3x)"
    assert goal("command to concepts and one image, warm", "cuda", "") == "4.5x (6.5x)"
    assert goal("phase-2 step", "cuda", "fp32") == ""
    assert set(NAMES) == set(bench.GROUPS)


def test_a_row_that_fails_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    """Every other row is listed too: what was measured, what the run left out, what failed."""
    pytest.importorskip("diffusers", reason="the rows run the official side")
    from tools.bench import rows as bench_rows

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory\nof all kinds")
        yield

    def succeed(_bench, setting, _lines):
        yield Line("class images", setting.name, note="3 images")

    monkeypatch.setitem(bench_rows.MEASURES, "imports", fail)
    monkeypatch.setitem(bench_rows.MEASURES, "images", succeed)
    monkeypatch.setattr(bench, "free_bytes", lambda: 1e12)
    arguments = bench.read_arguments(["--quick", "--device", "cpu", "--rows", "imports", "images"])
    saved = []
    bench.measure(bench.Bench(arguments, tmp_path), lambda lines: saved.append(list(lines)))
    notes = {line.row: line.note for line in saved[-1] if line.setting == "small SD 2, CPU"}
    assert notes["import"] == "failed: out of memory"
    assert notes["phase-1 step"] == "left out of this run"
    assert notes["class images"] == "3 images"
    assert {line.setting for line in saved[-1]} == {setting.name for setting in bench.SETTINGS}


@pytest.fixture
def failing_mode(monkeypatch):
    """The bench's rows with stand-ins for all that computes; bas in bf16 fails in its first step."""
    bench_rows = pytest.importorskip("tools.bench.rows", reason="the rows run the official side on diffusers")
    closed = []

    class Side:
        def __init__(self, _material, mode, _phase, _run):
            self.mode = mode.name

        def step(self):
            if self.mode == "bf16":
                raise torch.OutOfMemoryError("out of memory\nof all kinds")

        def close(self):
            closed.append(self.mode)

    def interleave_once(calls: dict, *_) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [1.0] for name in calls}

    def child(task: dict, *_) -> dict:
        if task.get("mode") == "bf16":
            raise RuntimeError("out of memory: code 1")
        return {"peak": 1e9, "first": 2.0, "later": [1.0]}

    for name in ("official_gradients", "OfficialLoop", "read_scene", "with_compiled_unet"):
        monkeypatch.setattr(bench_rows, name, MagicMock())
    modes = [mode_named(name) for name in ("fp32", "bf16", "bf16, whole")]
    monkeypatch.setattr(bench_rows, "chosen_modes", lambda *_: modes)
    monkeypatch.setattr(bench_rows, "interleave", interleave_once)
    monkeypatch.setattr(bench_rows, "fidelity", lambda *_: None)
    monkeypatch.setattr(bench_rows, "BasSide", Side)
    monkeypatch.setattr(bench_rows, "child", child)
    return bench_rows, closed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_mode_that_fails_is_noted_and_the_other_modes_go_on(failing_mode, device):
    """On a CPU all modes take turns together, and then each by itself; on a GPU they are alone from the start."""
    (bench_rows, closed), given = failing_mode, MagicMock()
    setting = SimpleNamespace(name="a model", device=device)
    steps = list(bench_rows.steps(given, setting, ()))
    named = [(line.row, line.mode) for line in steps]
    modes = ("fp32", "bf16", "bf16, whole")
    assert named == [(f"phase-{phase} step", mode) for phase in (1, 2) for mode in modes]
    assert {line.note for line in steps if line.mode == "bf16"} == {"failed: out of memory"}
    assert all(line.bas == Stat.of([1.0]) for line in steps if line.mode != "bf16")
    sides = 3 if device == "cuda" else 6
    assert len(closed) == 2 * sides

    jobs = {line.mode: line for line in bench_rows.job(given, setting, steps)}
    assert jobs["bf16"].note == "failed: out of memory"
    assert jobs["fp32"].bas == Stat.of([800.0])
    assert tuple(jobs) == modes


def test_a_mode_whose_process_fails_is_noted_and_the_other_modes_go_on(failing_mode):
    bench_rows, _ = failing_mode
    lines = list(bench_rows.memory(MagicMock(), SimpleNamespace(name="a model", device="cpu"), ()))
    failed = [line for line in lines if line.mode == "bf16"]
    assert [line.row for line in failed[:2]] == ["peak memory, phase 1", "start-up, phase 1"]
    assert {line.note for line in failed} == {"failed: out of memory: code 1"}
    assert len(lines) == 2 * 2 * 3
    assert all(line.bas for line in lines if line.mode != "bf16")


def test_a_command_that_fails_says_why_in_its_first_line():
    command = [sys.executable, "-c", "import sys; sys.exit('a warning\\nout of memory')"]
    with pytest.raises(RuntimeError, match=r"^out of memory: code 1 of"):
        run_command(command, threads=1)


def test_the_bench_measures_without_tf32(monkeypatch, capsys):
    """PyTorch allows it for convolutions: the reference would be off by a thousandth."""
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(bench, "describe", lambda _: {**RESULT, "machine": dict(RESULT["machine"])})
    monkeypatch.setattr(bench, "measure", lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    bench.main(["--threads", str(torch.get_num_threads())])
    assert seen == [False]
    assert capsys.readouterr().out


# --- Many scenes --------------------------------------------------------------------------------------------------


def named(command: list[str], flag: str) -> str:
    """What a command line says after a flag."""
    return command[command.index(flag) + 1]


@pytest.fixture
def scenes_row(material, tmp_path, monkeypatch):
    """The row of many scenes on the tiny model, and its commands; `run` is given each and says how long it took."""
    pytest.importorskip("diffusers", reason="the official side runs on diffusers")
    from tools.bench import programs as bench_programs

    def measure(setting: bench.Setting, run, *flags: str):
        given, commands = bench.Bench(bench.read_arguments(["--device", "cpu", *flags]), tmp_path), []
        given.side = 32

        def run_command(command, _threads, _environment):
            if "--help" in command:
                return 100.0, ""
            commands.append(command)
            return run(command), ""

        monkeypatch.setattr(bench_programs, "run_command", run_command)
        monkeypatch.setattr(given, "model", lambda _: material.model)
        (line,) = bench_programs.scenes(given, setting, ())
        return line, commands

    return measure


@pytest.mark.parametrize(("setting", "scenes", "steps", "images"), [(0, 4, "400", 100), (1, 3, "4", 2)])
def test_scenes_per_hour_count_one_command_each_against_one_for_all(scenes_row, setting, scenes, steps, images):
    """Higher is better, so the ratio is ours over theirs; what only warms the disk does not count."""
    line, commands = scenes_row(bench.SETTINGS[setting], lambda command: 6.0 if "bas" in command else 8.0)
    assert (line.official, line.bas) == (Stat.of([3600 / 8]), Stat.of([3600 * scenes / 6]))
    assert (line.ratio, line.unit) == (pytest.approx(8 * scenes / 6), "scenes an hour")
    assert line.note == (
        f"{scenes} scenes, {steps} + {steps} steps, {images} class images made before, and start of the process"
    )
    assert len(commands) == scenes + 1
    for command in commands:
        assert (named(command, "--phase1_train_steps"), named(command, "--phase2_train_steps")) == (steps, steps)
        assert len(list(Path(named(command, "--class_data_dir")).iterdir())) == images


def test_both_sides_save_the_concepts_of_each_scene(scenes_row, monkeypatch):
    """The commands are run as they stand; neither side makes a class image."""
    from tools.bench import official_loop  # there: the fixture looked for diffusers

    def run(command: list[str]) -> float:
        if "bas" in command:
            assert entry.main(command[3:]) == 0
        else:
            monkeypatch.setattr("sys.argv", command[2:])
            official_loop.main()
        return 1.0

    _, commands = scenes_row(bench.SETTINGS[1], run, "--quick")
    first, second, ours = (Path(named(command, "--output_dir")) for command in commands)
    assert [folder.name for folder in (first, second)] == ["scene0", "scene1"]
    for official in (first, second):
        handles = ["<asset0>", "<asset1>", "<asset2>"]
        _, note = read_concepts(ours / official.name)
        assert list(load(official).handles) == note["handles"] == handles
    class_images = Path(named(commands[0], "--class_data_dir"))
    assert sorted(path.name for path in class_images.glob("[!.]*")) == ["class0.jpg", "class1.jpg"]
