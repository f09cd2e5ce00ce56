"""Settings: their limits, the layers they come from, the presets."""

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from bas.cli.entry import build_parser
from bas.cli.flags import Parser, add_fields
from bas.config import (
    GROUPS,
    CocoConfig,
    EditConfig,
    ProposalConfig,
    SampleConfig,
    StudyConfig,
    TrainConfig,
    VaryConfig,
    flag_of,
    setting_rows,
    value_type,
)
from bas.io.settings_file import read_config
from bas.presets import PLAIN, PRESETS
from tests.helpers.tiny import refused

OFFICIAL = {  # defaults of the official train.py, by its own names
    "num_class_images": 100,
    "phase1_train_steps": 400,
    "phase2_train_steps": 400,
    "initial_learning_rate": 5e-4,
    "learning_rate": 2e-6,
    "train_batch_size": 1,
    "sample_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "prior_loss_weight": 1.0,
    "lambda_attention": 1e-2,
    "placeholder_token": "<asset>",
    "class_prompt": ("a photo at the beach",),
    "lr_scheduler": "constant",
    "lr_num_cycles": 1,
    "lr_power": 1.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_weight_decay": 1e-2,
    "adam_epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "img_log_steps": 200,
    "checkpointing_steps": 200,
    "gradient_checkpointing": False,
    "scale_lr": False,
    "train_text_encoder": True,
    "apply_masked_loss": True,
}


def test_defaults_are_the_official_ones():
    config = TrainConfig()
    assert {name: getattr(config, name) for name in OFFICIAL} == OFFICIAL
    assert TrainConfig.resolve({}) == config


EVERY_DATACLASS = (TrainConfig, SampleConfig, VaryConfig, EditConfig, ProposalConfig, CocoConfig, StudyConfig)
BESIDE = {  # what some values need
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "min_things": {"max_things": 1_000_000},
    "max_things": {"min_things": 1},
}
STEPS, COUNT = (0, 1_000_000), (1, 1_000_000)
WHOLE = {  # the range of every whole number
    TrainConfig: {
        **dict.fromkeys(("phase1_train_steps", "phase2_train_steps", "lr_warmup_steps"), STEPS),
        **dict.fromkeys(("img_log_steps", "checkpointing_steps"), STEPS),
        **dict.fromkeys(("gradient_accumulation_steps", "num_class_images"), COUNT),
        "train_batch_size": (1, 1024),  # a dry run draws one batch
        **dict.fromkeys(("sample_batch_size", "log_steps", "preview_inference_steps"), COUNT),
        **dict.fromkeys(("checkpoints_total_limit", "lr_num_cycles", "num_of_assets"), COUNT),
        "collection_size": (1, 500),
        **dict.fromkeys(("resolution", "attention_grid"), (1, 16_384)),
        **dict.fromkeys(("rank", "conv_rank"), (1, 1024)),
        "seed": (-(2**62), 2**62),
    },
    SampleConfig: {
        **dict.fromkeys(("num_inference_steps", "num_images", "batch_size"), COUNT),
        **dict.fromkeys(("height", "width"), (1, 16_384)),
        "steps_offset": STEPS,
        "seed": (-(2**62), 2**62),
    },
    ProposalConfig: {"grow": (-1000, 1000), "max_concepts": COUNT},
    CocoConfig: {"scenes": COUNT, "min_things": COUNT, "max_things": COUNT, "seed": (0, 2**62)},
    StudyConfig: {"pages": (1, 1000), "questions": (2, 500), "seed": (0, 2**62)},
}
EVERYTHING_OR_MORE = (0.0, 1e300, -1e-9, float("inf"))
PROBABILITY, DECAY = (0.0, 1.0, -1e-9, 1.001), (0.0, 0.999, -1e-9, 1.0)
INSIDE = (0.001, 0.999, 0.0, 1.0)
NUMBERS = {  # of every other number: two at its ends that pass, two beyond them that do not
    TrainConfig: {
        **dict.fromkeys(("initial_learning_rate", "learning_rate", "lambda_attention"), EVERYTHING_OR_MORE),
        **dict.fromkeys(("prior_loss_weight", "max_grad_norm", "adam_weight_decay"), EVERYTHING_OR_MORE),
        "lr_power": EVERYTHING_OR_MORE,
        "adam_epsilon": (1e-30, 1e300, 0.0, float("inf")),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), DECAY),
        "alpha": (0.001, 1000.0, 0.0, 1000.1),
        "flip_probability": PROBABILITY,
        "seg_mix_probability": PROBABILITY,
        "seg_mix_move": PROBABILITY,
    },
    SampleConfig: {"guidance_scale": EVERYTHING_OR_MORE, "guidance_rescale": PROBABILITY, "eta": PROBABILITY},
    EditConfig: {"blending_start_percentage": DECAY},
    ProposalConfig: {"threshold": INSIDE, "min_coverage": INSIDE, "smooth": (0.0, 1000.0, -1e-9, 1000.1)},
    CocoConfig: {"min_share": INSIDE},
}


def test_every_setting_has_a_help_and_every_training_setting_a_heading():
    for settings in EVERY_DATACLASS:
        assert all(row.metadata["help"] for row in fields(settings))
    assert all(row.metadata["group"] in GROUPS for row in fields(TrainConfig))
    assert sum(row.metadata["common"] for row in fields(TrainConfig)) == 10


def test_every_number_of_every_dataclass_has_a_range_in_this_file():
    for settings in (TrainConfig, SampleConfig, ProposalConfig, CocoConfig, StudyConfig):
        kinds = {name: value_type(row)[0] for name, row in setting_rows(settings).items()}
        assert {name for name, kind in kinds.items() if kind is int} == WHOLE[settings].keys()
        assert {name for name, kind in kinds.items() if kind is float} == NUMBERS.get(settings, {}).keys()


def test_whole_numbers_keep_within_their_range():
    for settings, ranges in WHOLE.items():
        for name, (least, most) in ranges.items():
            for value in (least, most):
                others = BESIDE.get(name, {})
                assert getattr(settings(**{name: value} | others), name) == value
            for value in (least - 1, most + 1):
                with refused(f"--{name} is {value}: expected a whole number from {least} to {most}"):
                    settings(**{name: value})
            for value in (1.5, True, "1"):
                with refused(f"--{name} is {value!r}: expected a whole number"):
                    settings(**{name: value})


def test_numbers_keep_within_their_range():
    for settings, ranges in NUMBERS.items():
        for name, (least, most, below, beyond) in ranges.items():
            for value in (least, most):
                assert getattr(settings(**{name: value}), name) == value
            for value in (below, beyond, float("nan"), float("inf"), -float("inf"), False, "1", 10**400):
                with refused(f"--{name} is {value!r:.60}: expected a finite number"):
                    settings(**{name: value})


def test_the_range_is_said_as_it_is():
    for settings, flags, expected in (
        (TrainConfig, {"learning_rate": -1}, "a finite number, 0 or more"),
        (TrainConfig, {"flip_probability": 1.1}, "a finite number, 0 or more and 1 or less"),
        (TrainConfig, {"adam_beta1": 1.0}, "a finite number, 0 or more and less than 1"),
        (ProposalConfig, {"threshold": 1.0}, "a finite number, more than 0 and less than 1"),
        (CocoConfig, {"min_things": 3, "max_things": 2}, "a whole number from 3 to 1000000"),
    ):
        (name, value) = [*flags.items()][-1]
        with refused(f"--{name} is {value!r}: expected {expected}"):
            settings(**flags)


def test_a_text_with_choices_is_one_of_them():
    for settings in EVERY_DATACLASS:
        for row in fields(settings):
            for value in row.metadata["choices"]:
                others = PLAIN if row.name == "method" else {}
                assert getattr(settings(**{row.name: value} | others), row.name) == value
            if row.metadata["choices"]:
                with refused(f"--{row.name} is 'x': expected one of {', '.join(row.metadata['choices'])}"):
                    settings(**{row.name: "x"})


def test_float32_has_the_words_of_training_and_of_sampling(tmp_path):
    """One word stays in records."""
    train = build_parser("train").parse_args(["train", "scene", "--mixed_precision", "fp32"])
    sample = build_parser("sample").parse_args(["sample", "--precision", "no"])
    assert (train.mixed_precision, sample.precision) == ("no", "fp32")
    (tmp_path / "a.toml").write_text('mixed_precision = "fp32"')
    file = read_config(str(tmp_path / "a.toml"), setting_rows(TrainConfig))
    assert TrainConfig.resolve({}, file=file).mixed_precision == "no"
    assert TrainConfig(mixed_precision="fp32").mixed_precision == "no"
    for wrong in ({"save_precision": "no"}, {"compile": "fp32"}, {"mixed_precision": "float32"}):
        with refused(f"is '{next(iter(wrong.values()))}': expected one of "):
            TrainConfig(**wrong)


def test_switches_take_true_and_false_alone():
    for settings in EVERY_DATACLASS:
        for name in (row.name for row in fields(settings) if row.type is bool):
            for value in (0, 1, "true", None):
                with refused(f"--{name} is {value!r}: expected true or false"):
                    settings(**{name: value})


def test_only_what_may_be_left_open_takes_none():
    for settings in EVERY_DATACLASS:
        for row in fields(settings):
            if value_type(row)[2]:
                assert getattr(settings(**{row.name: None}), row.name) is None
            else:
                with refused(f"{row.name if row.type is not bool else ''} is None: expected"):
                    settings(**{row.name: None})


def test_later_layers_win():
    """Defaults, then the model's own row, then the preset, then the flags."""
    row = {"learning_rate": 1e-4, "adam_beta2": 0.5, "class_prompt": ["a", "b"]}
    config = TrainConfig.resolve({"preset": "paper", "adam_weight_decay": 0.5}, row)
    assert config.learning_rate == 1e-4
    assert config.adam_beta2 == PRESETS["paper"]["adam_beta2"] == 0.99
    assert config.adam_weight_decay == 0.5
    assert config.optimizer == "adam"
    assert not config.with_prior_preservation
    assert config.class_prompt == ("a", "b")


def test_the_decay_of_adam_is_the_papers_unless_given():
    """In Adam it is part of the gradient, in AdamW it is not."""
    for flags, decay in (
        ({}, 1e-2),
        ({"optimizer": "adam"}, 1e-8),
        ({"preset": "paper"}, 1e-8),
        ({"preset": "paper", "optimizer": "adamw"}, 1e-2),
        ({"optimizer": "adam", "adam_weight_decay": 0.1}, 0.1),
    ):
        assert TrainConfig.resolve(flags).adam_weight_decay == decay


def test_a_choice_by_flag_brings_its_settings_over_a_file():
    """What a flag's choice brings replaces the file's values, and what the file's own choice brought goes with it."""

    def run(file: dict, flags: dict, row: dict | None = None) -> TrainConfig:
        written = asdict(TrainConfig.resolve(file | place, row))  # as in a run's config.toml
        assert TrainConfig.resolve({}, row, file=written) == TrainConfig.resolve(file | place, row)
        return TrainConfig.resolve(flags, row, file=written)

    place = {"output_dir": "run"}
    adapters = {"train": "lora", "rank": 4, "conv_rank": 2, "seed": 3}
    for file, flags, same, row in (  # same: the settings that file and flags lead to
        ({"seed": 3}, {"card": "8gb"}, {"seed": 3, "card": "8gb"}, None),
        ({"card": "8gb"}, {"card": "24gb"}, {"card": "24gb"}, None),
        ({"card": "8gb"}, {"card": "any"}, {}, None),
        ({"card": "8gb", "train": "kv"}, {"card": "24gb"}, {"card": "24gb", "train": "kv"}, None),
        ({}, {"card": "8gb", "train": "full"}, {"card": "8gb", "train": "full"}, None),
        ({}, {"card": "8gb", "learning_rate": 3e-5}, {"card": "8gb", "learning_rate": 3e-5}, None),
        (adapters, {"train": "full"}, {"seed": 3}, None),
        (adapters, {"train": "full"}, {"seed": 3}, {"learning_rate": 1e-3}),
        (adapters, {"train": "token"}, {"train": "token", "rank": 4, "seed": 3}, None),
        (adapters, {"method": "cd-m"}, {"method": "cd-m", "seed": 3}, None),
        (adapters | {"learning_rate": 3e-4}, {"train": "lora"}, adapters | {"learning_rate": 3e-4}, None),
        ({"train": "kv"}, {"train": "lora"}, {"train": "lora"}, None),
        ({"method": "ti"}, {"method": "bas"}, {}, {"lambda_attention": 0.3}),
        ({}, {"method": "db-m"}, {"method": "db-m"}, None),
        ({}, {"preset": "paper"}, {"preset": "paper"}, None),
        ({"preset": "paper"}, {"preset": "official"}, {}, None),
        ({"optimizer": "adam"}, {"optimizer": "adamw"}, {}, None),
        ({"preset": "paper"}, {"card": "16gb"}, {"preset": "paper", "card": "16gb"}, None),
        ({"card": "8gb"}, {"seed": 5}, {"card": "8gb", "seed": 5}, None),
    ):
        assert run(file, flags, row) == TrainConfig.resolve(same | place, row), (file, flags)
    with refused("--method cd-m decides what is trained", "--train lora"):
        run({"method": "cd-m"}, {"train": "lora"})


def test_a_warm_up_needs_a_course_that_has_one():
    with refused("--lr_warmup_steps 5", "constant_with_warmup"):
        TrainConfig(lr_warmup_steps=5)
    assert TrainConfig(lr_warmup_steps=5, lr_scheduler="constant_with_warmup").lr_warmup_steps == 5


def test_unknown_settings_and_presets_are_refused():
    with refused("unknown training setting nonsense"):
        TrainConfig.resolve({}, {"nonsense": 1})
    with refused("--preset is 'x'", "official, paper"):
        TrainConfig.resolve({"preset": "x"})


def test_a_card_lies_between_the_preset_and_the_flags():
    config = TrainConfig.resolve({"card": "16gb", "preset": "paper", "gradient_checkpointing": False})
    assert (config.optimizer, config.adam_beta2, config.mixed_precision) == ("adamw8bit", 0.99, "bf16")
    assert not config.gradient_checkpointing
    assert TrainConfig.resolve({"card": "12gb"}).phases[1].trains == (
        "handles",
        "embedding",
        "cross_attention",
        "text_encoder",
    )
    with refused("--card is '7gb'", "any, 80gb, 40gb, 24gb, 16gb, 12gb, 8gb, 6gb"):
        TrainConfig.resolve({"card": "7gb"})


def test_settings_from_python_are_taken_as_those_of_flags():
    """Paths as their text, lists as tuples; one text where several are expected is refused."""
    config = TrainConfig(output_dir=Path("runs") / "a", class_data_dir=Path("b"), handles=["toy"], learning_rate=1)
    assert (config.output_dir, config.class_data_dir, config.handles) == (str(Path("runs") / "a"), "b", ("toy",))
    assert isinstance(config.learning_rate, float)
    for wrong, message in (
        ({"handles": "ab"}, "--handles is 'ab': expected a list"),
        ({"handles": ("a", 1)}, "--handles is 1: expected a string"),
        ({"output_dir": 5}, "--output_dir is 5: expected a string"),
        ({"placeholder_token": ""}, "--placeholder_token is empty"),
        ({"pretrained_model_name_or_path": ""}, "--weights is empty"),
        ({"output_dir": "a\udc80"}, "is not UTF-8"),
        ({"output_dir": "a\0b"}, "holds the character 0, which no name"),
        ({"initializer_tokens": ("a\0b",)}, "holds the character 0, which no name"),
    ):
        with refused(message):
            TrainConfig(**wrong)


def test_a_flag_is_refused_in_the_words_of_a_file_and_of_python(capsys):
    parser = Parser(prog="bas")
    add_fields(parser, TrainConfig)
    for words, message in (
        (["--log_steps", "1e3"], "--log_steps is '1e3': expected a whole number"),
        (["--flip_probability", "half"], "--flip_probability is 'half': expected a number"),
        (["--preset", "fast"], "--preset is 'fast': expected one of official, paper"),
    ):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(words)
        assert end.value.code == 2
        assert capsys.readouterr().err == f"bas: {message} (bas --help lists the flags)\n"


def test_a_switch_can_be_set_either_way_and_says_which_way_helps():
    """What is on by default has its turn-off flag in the help, described from the setting's own words."""
    parser = Parser(prog="bas")
    add_fields(parser, TrainConfig)
    shown = " ".join(parser.format_help().split())
    for row in fields(TrainConfig):
        if row.type is bool:
            off = flag_of(row) if row.default else f"--no_{row.name}"
            assert vars(parser.parse_args([f"--{row.name}"])) == {row.name: True}
            assert vars(parser.parse_args([off])) == {row.name: False}
            told = f"{off} turn off: {row.metadata['help']}" if row.default else f"--{row.name} {row.metadata['help']}"
            assert told in shown


def test_what_a_base_switches_on_a_flag_switches_off():
    parser = Parser()
    add_fields(parser, TrainConfig, only=("close_ups", "with_prior_preservation"))
    assert vars(parser.parse_args(["--no_close_ups", "--no_prior_preservation"])) == {
        "close_ups": False,
        "with_prior_preservation": False,
    }
    resolved = TrainConfig.resolve({"close_ups": False}, {"close_ups": True, "normalize_masked_loss": True})
    assert (resolved.close_ups, resolved.normalize_masked_loss) == (False, True)
