"""--config: a TOML file gives settings, flags win, and what is no setting is named with the nearest that is one."""

import argparse
from dataclasses import asdict

import pytest

from bas.cli.commands import sample as sample_command
from bas.cli.commands import train as train_command
from bas.cli.entry import main
from bas.cli.flags import Parser
from bas.config import SampleConfig, TrainConfig, setting_rows
from bas.errors import InputError
from bas.io.settings_file import read_config, to_toml
from bas.training.setup import check_input, setup_run
from tests.helpers import tiny

ODD = 'quote " backslash \\ line\nend \x7f \x01 é 🦊'


def write(folder, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def parse(command, words: list[str]) -> argparse.Namespace:
    parser = Parser()
    command.configure(parser)
    return parser.parse_args(words)


def test_every_setting_comes_back_as_it_was(tmp_path):
    config = TrainConfig(
        instance_data_dir=ODD,
        handles=("<a>", ODD),
        initializer_tokens=("toy", "bowl"),
        learning_rate=1e-22,
        adam_epsilon=5,
        resolution=64,
        train_text_encoder=False,
        seed=-(2**40),
        resume_from_checkpoint="latest",
    )
    again = read_config(write(tmp_path, to_toml(asdict(config))), setting_rows(TrainConfig))
    assert "resume_from_checkpoint" not in again
    assert "device" not in again  # it was None
    assert TrainConfig(**again, resume_from_checkpoint="latest") == config
    assert isinstance(again["adam_epsilon"], float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat = 1", "unknown setting learning_rat; did you mean learning_rate?"),
        ("zzzz = 1", "unknown setting zzzz"),
        ("[training]\nseed = 1", "unknown setting training"),
        ("seed = 1.5", "seed is 1.5: expected a whole number"),
        ("seed = true", "seed is True: expected a whole number"),
        ("log_steps = 0", "log_steps is 0: expected a whole number from 1 to 1000000"),
        ("resolution = '64'", "resolution is '64': expected a whole number from 1 to 16384"),
        ("center_crop = 1", "center_crop is 1: expected true or false"),
        ("learning_rate = 'fast'", "learning_rate is 'fast': expected a finite number, 0 or more"),
        (f"learning_rate = 1{'0' * 400}", f"learning_rate is 1{'0' * 59}: expected a finite number"),
        ("handles = '<toy>'", "handles is '<toy>': expected a list"),
        ("handles = ['<toy>', 1]", "handles is 1: expected a string"),
        ("optimizer = ['adam']", "optimizer is ['adam']: expected a string"),
        ("optimizer = 'sgd'", "optimizer is 'sgd': expected one of adamw, adam, adamw8bit"),
        ("placeholder_token = ''", "placeholder_token is empty"),
        (
            "no_prior_preservation = true",
            "no_prior_preservation is a flag of the command: in a file write with_prior_preservation = false",
        ),
        (
            "no-prior-preservation = true",
            "no-prior-preservation is a flag of the command: in a file write with_prior_preservation = false",
        ),
        (
            "'--no_close_ups' = true",
            "--no_close_ups is a flag of the command: in a file write close_ups = false",
        ),
        (
            "do_not_apply_masked_loss = true",
            "do_not_apply_masked_loss is a flag of the command: in a file write apply_masked_loss = false",
        ),
        ("class_prompt = []", "class_prompt is empty: leave it out, or name one or several"),
        ("no_close_ups = true", "no_close_ups is a flag of the command: in a file write close_ups = false"),
    ],
)
def test_what_is_no_setting_is_named(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_config(path, setting_rows(TrainConfig))
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_bad_file_is_one_line(tmp_path):
    for text in ("seed = = 1", "seed = 1\nseed = 2", "\x00", "seed = " + "[" * 10_000, f"seed = {'9' * 5000}"):
        path = write(tmp_path, text)
        with pytest.raises(InputError, match=r"run\.toml is not valid TOML: .+") as error:
            read_config(path, {})
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"none\.toml does not exist"):
        read_config(str(tmp_path / "none.toml"), {})


def test_no_file_is_no_settings():
    assert read_config(None, {}) == {}


def resolved(monkeypatch, words: list[str]) -> TrainConfig:
    """The settings that `bas train` would train with."""
    seen = []

    def stop(config):
        seen.append(config)
        raise InputError("far enough")

    monkeypatch.setattr(train_command, "train", stop)
    with pytest.raises(InputError, match="far enough"):
        train_command.run(parse(train_command, words))
    return seen[0]


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path, monkeypatch):
    path = write(tmp_path, 'instance_data_dir = "a"\npreset = "paper"\nadam_beta2 = 0.5\nseed = 3\nlr_power = 2')
    model = ["--weights", str(tmp_path)]
    config = resolved(monkeypatch, ["--config", path, "--seed", "7", *model])
    assert (config.instance_data_dir, config.preset, config.optimizer) == ("a", "paper", "adam")
    assert (config.adam_beta2, config.seed, config.lr_power) == (0.5, 7, 2.0)
    assert resolved(monkeypatch, ["b", "--config", path, *model]).instance_data_dir == "b"
    assert resolved(monkeypatch, ["--instance_data_dir", "c", "--config", path, *model]).instance_data_dir == "c"


def test_what_a_flag_brings_wins_over_the_file_of_a_run(tmp_path, monkeypatch, bench):
    """The card of a smaller GPU trains adapters, whatever the file of the earlier run says of it."""
    path = write(tmp_path, to_toml(asdict(bench.config(tmp_path / "run"))))
    config = resolved(monkeypatch, ["--config", path, "--card", "8gb", "--log_steps", "3"])
    assert (config.train, config.mixed_precision, config.gradient_checkpointing) == ("lora", "bf16", True)
    assert (config.learning_rate, config.save_precision, config.log_steps) == (1e-4, "fp16", 3)
    assert config.phase2_train_steps == bench.config().phase2_train_steps


def test_the_command_names_the_nearest(tmp_path, capsys):
    path = write(tmp_path, "sedd = 1")
    assert main(["train", "scene", "--config", path]) == 2
    assert capsys.readouterr().err == f"bas: {path}: unknown setting sedd; did you mean seed?\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("learning_rate = nan", "learning_rate is nan: expected a finite number"),
        ("learning_rate = 1e999", "learning_rate is inf: expected a finite number"),
        ("learning_rate = -1", "learning_rate is -1: expected a finite number"),
        ("adam_beta1 = nan", "adam_beta1 is nan"),
        ("resolution = 1_000_000_000", "resolution is 1000000000: expected a whole number from 1 to 16384"),
        ("phase1_train_steps = -1", "phase1_train_steps is -1: expected a whole number from 0 to 1000000"),
        ("seed = 100_000_000_000_000_000_000", "seed is 100000000000000000000: expected"),
    ],
)
def test_numbers_out_of_range_are_one_line(line, words, bench, tmp_path, capsys):
    path = write(tmp_path, line)
    assert main(["train", str(bench.scene), "--weights", str(bench.model), "--config", path]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bas: {path}: {words}")
    assert error.count("\n") == 1


def test_a_run_keeps_settings_that_can_be_given_again(tmp_path, monkeypatch):
    model, scene = tiny.write_model(tmp_path / "model"), tiny.write_scene(tmp_path / "toy", concepts=1)
    config = TrainConfig(
        instance_data_dir=str(scene),
        pretrained_model_name_or_path=str(model),
        output_dir=str(tmp_path / "run"),
        with_prior_preservation=False,
        lr_power=1.5,
        device="cpu",
    )
    (tmp_path / "run").mkdir()
    setup_run(config, *check_input(config))
    assert resolved(monkeypatch, ["--config", str(tmp_path / "run" / "config.toml")]) == config


def test_sampling_takes_prompts_and_model_from_the_file(tmp_path, monkeypatch):
    path = write(tmp_path, 'model_path = "a"\nprompt = ["x", "y"]\nseed = 5\nguidance_scale = 3')
    calls = []

    def record(models, prompts, config, *others):
        calls.append((models, prompts, config))
        raise InputError("far enough")

    monkeypatch.setattr(sample_command, "sample_each", record)
    monkeypatch.setattr(sample_command, "open_model", lambda args, check, texts: args.model_path or args.run)
    monkeypatch.setattr(sample_command, "find_model", lambda args: tmp_path)
    for words in ([], ["b", "--seed", "6"], ["--model_path", "c", "--prompt", "z"]):
        with pytest.raises(InputError, match="far enough"):
            sample_command.run(parse(sample_command, [*words, "--config", path]))
    assert calls == [
        ("a", ["x", "y"], SampleConfig(seed=5, guidance_scale=3.0)),
        ("b", ["x", "y"], SampleConfig(seed=6, guidance_scale=3.0)),
        ("c", ["z"], SampleConfig(seed=5, guidance_scale=3.0)),
    ]
    with pytest.raises(InputError, match="no prompt"):
        sample_command.run(parse(sample_command, ["b"]))


def test_settings_that_are_gone_may_stay_off(tmp_path):
    """As the config.toml of an earlier version has them; on, they are unknown."""
    path = tmp_path / "config.toml"
    path.write_text('cuda_graphs = false\nfused_kernels = false\nunet_layers = "all"\nseed = 7\n')
    assert read_config(str(path), setting_rows(TrainConfig)) == {"seed": 7}
    path.write_text("cuda_graphs = true\n")
    with tiny.refused("unknown setting cuda_graphs"):
        read_config(str(path), setting_rows(TrainConfig))


def test_a_file_takes_the_name_of_the_flag(tmp_path):
    known = setting_rows(TrainConfig)
    assert read_config(write(tmp_path, 'weights = "mini"'), known) == {"pretrained_model_name_or_path": "mini"}
    both = 'weights = "mini"\npretrained_model_name_or_path = "mini"'
    with pytest.raises(InputError, match="weights and pretrained_model_name_or_path are one setting"):
        read_config(write(tmp_path, both), known)
