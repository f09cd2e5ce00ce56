"""The command line: the official lines work, wrong input is one line and exit code 2, help tells every flag."""

import io
import json
import logging
import re
import subprocess
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import ExifTags, Image

import bas
from bas.cli.entry import COMMANDS, Once, OneLine, build_parser, full_parser, main
from bas.config import SampleConfig, TrainConfig
from bas.errors import RunError
from bas.pretrained.folder import load, read_spec
from bas.pretrained.single_file import save_single_file
from tests.helpers.families import tiny
from tests.helpers.tiny import write_class_images

ROOT = Path(bas.__file__).parents[1]


@pytest.fixture
def failure(capsys):
    """`failure(*words)` runs a command that must fail: its exit code and its one line of error."""

    def run(*words) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        output, line = capsys.readouterr()
        assert output == ""
        assert line.startswith("bas")
        assert line.count("\n") == 1
        return code, line

    return run


# --- The main path ------------------------------------------------------------------------------------------------


def test_lines_of_the_official_readme(bench, tmp_path, capsys):
    """Training and inference as that README writes them, beside the model's name and fewer steps."""
    run = tmp_path / "outputs" / "creature"
    prior = write_class_images(tmp_path / "prior_images", count=100, size=(8, 8))
    train = f"""train --instance_data_dir {bench.scene} --num_of_assets 3 --initializer_tokens creature bowl stone
        --class_data_dir {prior} --phase1_train_steps 2 --phase2_train_steps 2 --output_dir {run}
        --pretrained_model_name_or_path {bench.model}"""
    assert main(train.split()) == 0
    assert f'bas sample {run} --prompt "a photo of <asset0> at the beach"' in capsys.readouterr().out
    settings = json.loads((run / "settings.json").read_text())["config"]
    assert settings["initializer_tokens"] == ["creature", "bowl", "stone"]
    assert (settings["phase1_train_steps"], settings["num_of_assets"]) == (2, 3)

    image = tmp_path / "result.jpg"
    prompt = "a photo of <asset0> at the beach"
    assert main(["sample", "--model_path", str(run), "--prompt", prompt, "--output_path", str(image)]) == 0
    assert capsys.readouterr().out.split() == [str(image)]
    with Image.open(image) as opened:
        assert (opened.format, opened.size) == ("JPEG", (32, 32))
        note = json.loads(opened.getexif()[ExifTags.Base.UserComment])
    assert (note["prompt"], note["seed"], note["num_inference_steps"]) == (prompt, 0, 50)


def test_python_calls(bench, tmp_path):
    """The same from Python."""
    run = bas.train(bas.TrainConfig(**vars(bench.config(tmp_path / "run", phase1_train_steps=1, phase2_train_steps=1))))
    models = bas.load(run)
    images = bas.sample(models, ["a photo of <asset0>", "a bowl"], num_images=2, num_inference_steps=2, seed=1)
    assert [image.size for image in images] == [(32, 32)] * 4
    assert all(callable(getattr(bas, name)) for name in bas.__all__)


def test_several_images_and_a_grid(bench, tmp_path, capsys):
    """A file per image, prompt by prompt, that says how it was made; or one sheet."""
    line = ["sample", str(bench.model), "--num_inference_steps", "2", "--num_images", "2", "--seed", "5"]
    prompts = ["--prompt", "a bowl", "a stone"]
    assert main([*line, *prompts, "--output_path", str(tmp_path / "a" / "out.png")]) == 0
    paths = [Path(name) for name in capsys.readouterr().out.split()]
    assert [path.name for path in paths] == [f"out-{i}.png" for i in range(4)]
    notes = [json.loads(Image.open(path).text["bas"]) for path in paths]
    assert [(n["prompt"], n["seed"]) for n in notes] == [("a bowl", 5), ("a bowl", 6), ("a stone", 5), ("a stone", 6)]
    names = {f.name for f in fields(SampleConfig)}
    settings = {name: value for name, value in notes[3].items() if name in names} | {"num_images": 1}
    (again,) = bas.sample(bas.load(bench.model), "a stone", SampleConfig(**settings))
    with Image.open(paths[3]) as image:
        assert np.abs(np.asarray(image).astype(int) - np.asarray(again)).max() <= 1
    assert main([*line, *prompts, "--grid", "--output_path", str(tmp_path / "grid.webp")]) == 0
    assert [path.name for path in tmp_path.glob("grid*")] == ["grid.webp"]


# --- Wrong input --------------------------------------------------------------------------------------------------


def test_wrong_lines_are_refused_in_one_line(bench, tmp_path, failure):
    scene, model = bench.scene, ["--weights", bench.model]
    cases = [
        (["--debug"], "COMMAND"),
        (["trian"], "unknown command trian; did you mean train?"),
        (["train", scene, "--phase1_steps", "3"], "did you mean --phase1_train_steps?"),
        (["train", scene, "--learning_rat", "3"], "did you mean --learning_rate?"),
        (["train", scene, "--learning-rate=3"], "did you mean --learning_rate?"),
        (["train", scene, "--lr", "3"], "bas calls it --initial_learning_rate and --learning_rate"),
        (["train", scene, "--max_train_steps", "3"], "bas calls it --phase1_train_steps and --phase2_train_steps"),
        (["train", scene, "--xformers"], "leave it out: PyTorch's fused attention is always used"),
        (["sample", "run", "--steps", "3"], "bas calls it --num_inference_steps"),
        (["sample", "run", "--size=64"], "bas calls it --width and --height"),
        (["vary", "run", "--CFG", "3"], "bas calls it --guidance_scale"),
        (["generate", "run"], "unknown command generate; bas calls it sample"),
        (["train", scene, "--phase1_train_steps", "many"], "many"),
        (["train", scene, "--phase1_train_steps", "-1", *model], "--phase1_train_steps is -1"),
        (["train", scene, "--optimizer", "sgd"], "sgd"),
        (["train", *model], "name a scene folder"),
        (["train", scene, "--instance_data_dir", "other", *model], "two scenes"),
        (["train", tmp_path / "none", *model, "--output_dir", tmp_path / "run"], "does not exist"),
        (["train", scene, "--weights", "no-model"], "no-model"),
        (["train", scene, *model, "--num_of_assets", "2"], "3 masks"),
        (["train", scene, *model, "--device", "abacus"], "--device abacus"),
        (["train", scene, *model, "--resolution", "33", "--output_dir", tmp_path / "r"], "multiples of 2"),
        (["train", scene, *model, "--adam_beta1", "1"], "--adam_beta1 is 1.0"),
        (["sample", bench.model], "--prompt"),
        (["sample", bench.model, "--prompt", "x", "--output_path", "x.txt"], ".png, .jpg or .webp"),
        (["sample", bench.model, "--model_path", "other", "--prompt", "x"], "two models"),
        (["sample", bench.model, "--prompt", "<asset0>"], "this is a base model"),
        (["sample", bench.model, "--prompt", "x", "--height", "31"], "--height 31"),
        (["sample", bench.model, "--prompt", "x", "--num_inference_steps", "0"], "--num_inference_steps is 0"),
        (["sample", tmp_path, "--prompt", "x"], "is not a model"),
    ]
    for words, expected in cases:
        code, line = failure(*words)
        assert code == 2, words
        assert expected in line, (words, line)


def test_debug_shows_the_trace(bench, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["train", str(tmp_path / "none"), "--weights", str(bench.model), "--debug"])


def test_failed_training_has_its_own_exit_code(bench, failure, monkeypatch):
    def fail(config):
        raise RunError("phase1 step 3: loss is nan")

    monkeypatch.setattr(import_module("bas.cli.commands.train"), "train", fail)
    assert failure("train", bench.scene, "--weights", bench.model) == (1, "bas: phase1 step 3: loss is nan\n")


# --- First steps and streams ---------------------------------------------------------------------------------------


def test_no_command_shows_the_first_steps(capsys):
    """The commands that it shows exist, with these flags; it is no error."""
    assert main([]) == 0
    shown = capsys.readouterr().out
    lines = [line.split("   ")[0].split() for line in shown.splitlines() if line.startswith("  bas ")]
    assert [words[1] for words in lines] == ["demo", "download", "paint", "masks", "train", "sample"]
    for _, command, *words in lines:
        flags = {word for word in words if word.startswith("--")}
        assert (
            flags <= build_parser(command)._subparsers._group_actions[0].choices[command]._option_string_actions.keys()
        )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(tmp_path, closed):
    """As under cron: the work is done, and no file that is written receives what is printed."""
    script = tmp_path / "command.py"
    script.write_text(
        "import logging, os, sys, types\n"
        "from bas.cli import entry\n"
        "def run(args):\n"
        f"    with open({str(tmp_path / 'out.txt')!r}, 'w') as file:\n"
        "        print('printed'); print('told', file=sys.stderr); logging.warning('logged')\n"
        "        os.write(1, b'raw'); os.write(2, b'raw')\n"  # as a library in C prints
        "        file.write('written')\n"
        "stub = types.ModuleType('stub', 'A command.')\n"
        "stub.EXAMPLES, stub.configure, stub.run = (), lambda parser: None, run\n"
        "sys.modules['bas.cli.commands.info'] = stub\n"
        "sys.exit(entry.main(['info']))\n"
    )
    words = f"PYTHONPATH={ROOT} {sys.executable} {script} {closed}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "out.txt").read_text() == "written"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding):
    """A folder of another script, or of bytes that are no character, is printed after the work: no trace, code 0."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding, errors="strict"))
    monkeypatch.setattr("bas.cli.commands.info.run", lambda args: print("写真/\udcff is ready"))
    assert main(["info"]) == 0
    name = "写真" if encoding == "utf-8" else "\\u5199\\u771f"
    assert printed.getvalue().decode(encoding) == f"{name}/\\udcff is ready\n"


def test_no_message_holds_control_characters(capsys, tmp_path):
    """A file's name can neither forge a line nor reach the terminal, in errors or in the log."""
    assert main(["info", f"{tmp_path}/x\nbas: all is well\x1b[2J\u202e"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"bas: {tmp_path}/x\\nbas: all is well\\x1b[2J\\u202e ")
    assert line.count("\n") == 1
    record = logging.LogRecord("bas", logging.WARNING, "", 0, "%s is turned", ("a\rb\x9b",), None)
    assert OneLine().format(record) == "bas: a\\rb\\x9b is turned"


def test_a_warning_comes_once():
    """A request is checked before its weights are read, and again in each batch."""
    once, rows = Once(), [("too long: %s", "x")] * 2 + [("saved", "")] * 2 + [("too short: %s", "x")]
    levels = {"saved": logging.INFO}
    records = [
        logging.LogRecord("bas", levels.get(text, logging.WARNING), "", 0, text, (value,) if value else (), None)
        for text, value in rows
    ]
    assert [once.filter(record) for record in records] == [True, False, True, True, True]


def test_how_a_file_is_read_is_told_once(tmp_path, caplog):
    """A model is described, and then loaded: two readings of its file, one line."""
    path, once = tmp_path / "model.safetensors", Once()
    save_single_file(tiny("sd1", whole_vocabulary=True), path)
    with caplog.at_level(logging.INFO, "bas"):
        read_spec(path)
        load(path)
    records = [record for record in caplog.records if "prediction type" in record.getMessage()]
    assert [once.filter(record) for record in records] == [True, False]


def test_every_command_can_be_completed():
    """The parser for shtab has every command with its flags, and completes file names where they are meant."""
    parser = full_parser()
    commands = parser._subparsers._group_actions[0].choices
    assert list(commands) == list(COMMANDS)
    files = {name: {a.dest for a in sub._actions if hasattr(a, "complete")} for name, sub in commands.items()}
    assert {"scenes", "output_dir", "class_data_dir", "config"} <= files["train"]
    assert {"run", "output_path"} <= files["sample"]
    assert "seed" not in files["train"]


# --- Help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert f"usage: bas {command}" in output
    assert "--debug" in output


def test_help_tells_every_setting(capsys):
    """Once, by its flag; a switch that is on by default, by the flag that turns it off."""
    for command, settings in (("train", TrainConfig), ("sample", SampleConfig)):
        assert main([command, "--help"]) == 0
        output = capsys.readouterr().out
        for f in fields(settings):
            names = "|".join([f"--no_{f.name}" if f.default is True else f"--{f.name}", *f.metadata["flag"]])
            assert len(re.findall(rf"^  (?:-\w, )?(?:{names})\b", output, re.MULTILINE)) == 1, f.name


def test_package_and_help_do_without_torch():
    """Both answer at once, and on a machine where PyTorch is broken."""
    shown = "from bas.cli.entry import build_parser; build_parser(None).print_help()"
    code = f"import sys; {shown}; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout


def test_ctrl_c_ends_with_one_line_and_130(monkeypatch, capsys):
    """An interrupt is no crash: no trace, and the exit code that shells use for it."""

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("bas.cli.commands.info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err.strip() == "bas: interrupted"


def test_help_of_training_is_grouped(capsys):
    """The ten flags that people use first, then the others by what they are about; each stands once."""
    assert main(["train", "--help"]) == 0
    output = capsys.readouterr().out
    titles = re.findall(r"^(\S[^\n]*):$", output, re.MULTILINE)
    assert titles[2:] == [
        "used most",
        "scene",
        "method",
        "training",
        "memory and speed",
        "output",
        "expert",
        "examples",
    ]
    first = output.split("used most:\n")[1].split("\n\n")[0]
    flags = re.findall(r"^  (--\w+)", first, re.MULTILINE)
    assert len(flags) == 10
    assert {"--initializer_tokens", "--output_dir", "--phase1_train_steps", "--seed"} <= {*flags}
    usage = output.split("\n\n")[0]
    assert usage == "usage: bas train [SCENE ...] [FLAGS]"


def test_a_switch_is_turned_both_ways():
    """Also back on, over a preset or a file that turned it off; its help is that of the switch."""
    parser = build_parser("train")
    for name, off in (("with_prior_preservation", "--no_prior_preservation"), ("close_ups", "--no_close_ups")):
        assert getattr(parser.parse_args(["train", "scene", f"--{name}"]), name) is True
        assert getattr(parser.parse_args(["train", "scene", off]), name) is False
    help_text = " ".join(parser._subparsers._group_actions[0].choices["train"].format_help().split())
    assert "--no_prior_preservation turn off: also train on class images" in help_text


def test_public_names_are_ordinary_attributes(monkeypatch):
    """Of an ordinary module: what is set is what is read, and what is taken back is there again."""
    original = bas.train
    monkeypatch.setattr(bas, "train", 3)
    assert (bas.train, type(bas)) == (3, ModuleType)
    monkeypatch.undo()
    assert bas.train is original
    assert {*bas.__all__, "__version__"} <= {*dir(bas)}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bas.nonsense  # noqa: B018
