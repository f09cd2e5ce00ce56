"""Errors of one line, the names of other tools, and mistakes of bas that are not blamed on a file."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bas import other_tools
from bas.cli.entry import COMMANDS, build_parser, main
from bas.config import SampleConfig, TrainConfig
from bas.errors import InputError, RunError, did_you_mean, printable
from bas.io.images import open_image
from bas.io.json_files import check_shape
from bas.io.tensors import read_tensors
from bas.pretrained.folder import read_spec


def test_a_message_is_one_printable_line():
    for kind in (InputError, RunError):
        assert (
            str(kind("a\nb\r\x1b[2J\x7f\x9b\u2028\u202e写真\udcff"))
            == r"a\nb\r\x1b[2J\x7f\x9b\u2028\u202e写真" + "\udcff"
        )
    assert printable("a photo of <toy>, ünïcode") == "a photo of <toy>, ünïcode"
    assert str(InputError(f"a.json: kind is {'x' * 9000}: name another")) == (
        f"a.json: kind is {'x' * 1984} ... {'x' * 1986}: name another"
    )


@pytest.mark.parametrize("character", [*"\u00ad\u061c\u180e\u200b\u200e\u200f\u202a\u2060\u206f\ufeff\ufffb\U000e0041"])
def test_characters_that_nobody_sees_are_escaped(character):
    """They turn the direction of what follows, or make two names look alike."""
    assert printable(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


def test_joiners_of_words_and_emoji_stay():
    assert printable("می\u200cخواهم 👩\u200d🚀") == "می\u200cخواهم 👩\u200d🚀"


HUGE = {"decimal": "9" * 5000, "hexadecimal": f"0x{'f' * 5000}", "in a list": f"[0x{'f' * 5000}]"}


@pytest.mark.parametrize("number", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("name", ["seed", "learning_rate", "train_text_encoder", "output_dir", "noise_offset"])
def test_a_number_of_thousands_of_digits_is_refused_in_one_line(name, number, tmp_path, capsys):
    """Python writes and reads no such number; its advice about that is for programmers."""
    file = tmp_path / "run.toml"
    file.write_text(f"{name} = {number}\n")
    assert main(["train", "scene", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"bas: {file}")
    assert "set_int_max_str_digits" not in message
    assert message.count("\n") == 1
    assert len(message) < 300


def test_a_number_of_thousands_of_digits_from_python():
    with pytest.raises(InputError, match=r"^--seed is a number of thousands of digits: expected a whole number from "):
        TrainConfig(seed=10**5000)
    with pytest.raises(ValueError, match=r"^steps is a number of thousands of digits$"):
        check_shape({"steps": 10**5000}, {"steps": str})


@pytest.mark.parametrize(
    ("word", "known", "answer"),
    [
        ("--lr", ["--learning_rate", "--seed"], "; bas calls it --learning_rate"),
        ("lr", ["learning_rate", "initial_learning_rate"], "; bas calls it initial_learning_rate and learning_rate"),
        ("--Steps=4", ["--num_inference_steps"], "; bas calls it --num_inference_steps"),
        ("--cfg-scale", ["--guidance_scale"], "; bas calls it --guidance_scale"),
        ("--learning-rate", ["--learning_rate"], "; did you mean --learning_rate?"),
        ("--xformers", ["--seed"], "; leave it out: PyTorch's fused attention is always used"),
        ("--sed", ["--seed"], "; did you mean --seed?"),
        ("--zzz", ["--seed"], ""),
    ],
)
def test_an_unknown_word_is_answered(word, known, answer):
    assert did_you_mean(word, known) == answer


def test_other_tools_names_lead_to_flags_and_commands_that_exist():
    """And none of them hides a name that a command has."""
    flags = set(COMMANDS)
    for command in COMMANDS:
        sub = build_parser(command)._subparsers._group_actions[0].choices[command]
        flags |= {flag.lstrip("-") for flag in sub._option_string_actions}
    assert {name for names in other_tools.NAMES.values() for name in names} <= flags
    assert all(name == name.lower().replace("-", "_") for name in {**other_tools.NAMES, **other_tools.NOT_NEEDED})


def test_files_and_python_answer_as_the_command_line(tmp_path, capsys):
    (tmp_path / "run.toml").write_text("lr = 1e-5\n")
    assert main(["train", "scene", "--config", str(tmp_path / "run.toml")]) == 2
    assert "unknown setting lr; bas calls it initial_learning_rate and learning_rate" in capsys.readouterr().err
    with pytest.raises(InputError, match="unknown setting steps; bas calls it num_inference_steps"):
        SampleConfig().changed(steps=3)
    with pytest.raises(InputError, match=r"max_train_steps.*; bas calls it phase1_train_steps and phase2_train_steps"):
        TrainConfig.resolve({"max_train_steps": 3})


@pytest.mark.parametrize("kind", [TypeError, AttributeError, NameError, AssertionError])
def test_a_mistake_of_bas_is_not_blamed_on_the_file(bench, tmp_path, monkeypatch, kind):
    """It ends with its trace and exit code 1, also where everything that a library raises is caught."""
    image, tensors = tmp_path / "a.png", tmp_path / "a.safetensors"
    Image.new("RGB", (4, 4)).save(image)
    save_file({"weight": torch.zeros(2**17)}, tensors)
    source = "def mistaken(*args, **kwargs):\n    raise kind('a mistake')\n"
    space = {"__name__": "bas.mistaken", "kind": kind}
    exec(source, space)
    monkeypatch.setattr("bas.io.images._decode", space["mistaken"])
    monkeypatch.setattr("bas.io.tensors._mapped", space["mistaken"])
    monkeypatch.setattr("bas.pretrained.folder.UNetConfig.from_json", space["mistaken"])
    for read, path in ((open_image, image), (read_tensors, tensors), (read_spec, bench.model)):
        with pytest.raises(kind, match="a mistake"):
            read(path)


def test_what_a_library_raises_is_about_the_file(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("a broken header")

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.Image.open", broken)
    with pytest.raises(InputError, match="a broken header"):
        open_image(tmp_path / "a.png")
