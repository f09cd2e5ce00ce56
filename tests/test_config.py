"""Settings: their limits, the layers they come from, the presets."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from bas.cli.flags import Parser, add_fields
from bas.config import PRESETS, SampleConfig, TrainConfig
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


def test_every_setting_has_a_gloss():
    for settings in (TrainConfig, SampleConfig):
        assert all(f.metadata["help"] for f in fields(settings))


AT_LEAST = {
    0: ("phase1_train_steps", "phase2_train_steps", "lr_warmup_steps", "img_log_steps", "checkpointing_steps"),
    1: (
        *("train_batch_size", "gradient_accumulation_steps", "num_class_images", "sample_batch_size", "log_steps"),
        *("preview_inference_steps", "checkpoints_total_limit", "lr_num_cycles"),
        *("num_of_assets", "resolution", "attention_grid"),
    ),
}


@pytest.mark.parametrize(("least", "name"), [(least, name) for least, names in AT_LEAST.items() for name in names])
def test_whole_numbers_have_a_least_value(least, name):
    assert getattr(replace(TrainConfig(), **{name: least}), name) == least
    with refused(f"--{name} is {least - 1}", f"expected {least} or more"):
        TrainConfig(**{name: least - 1})


@pytest.mark.parametrize(
    "name",
    [
        *("initial_learning_rate", "learning_rate", "lambda_attention", "prior_loss_weight", "max_grad_norm"),
        *("adam_weight_decay", "adam_epsilon", "lr_power"),
    ],
)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_rates_and_weights_are_finite_and_not_negative(name, value):
    TrainConfig(**{name: 0.0})
    with refused(f"--{name} is {value}", "finite number"):
        TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "flags", "words"),
    [
        (TrainConfig, {"flip_probability": 1.1}, "--flip_probability is 1.1"),
        (TrainConfig, {"phase1_train_steps": 10**18}, "is 1000000000000000000: expected 1000000 or less"),
        (TrainConfig, {"train_batch_size": 10**9}, "--train_batch_size is 1000000000: expected 1000000 or less"),
        (TrainConfig, {"resolution": 10**9}, "--resolution is 1000000000: expected 16384 or less"),
        (TrainConfig, {"seed": 2**64}, "--seed is 18446744073709551616: expected"),
        (SampleConfig, {"num_images": 10**12}, "--num_images is 1000000000000: expected 1000000 or less"),
        (SampleConfig, {"width": 10**9}, "--width is 1000000000: expected 16384 or less"),
        (SampleConfig, {"seed": -(2**64)}, "--seed is -18446744073709551616: expected"),
        (TrainConfig, {"adam_beta1": 1.0}, "--adam_beta1 is 1.0"),
        (TrainConfig, {"adam_beta2": -0.1}, "--adam_beta2 is -0.1"),
        (TrainConfig, {"preset": "fast"}, "expected one of official, paper"),
        (TrainConfig, {"optimizer": "sgd"}, "expected one of adamw, adam"),
        (TrainConfig, {"subset_sampling": "none"}, "expected one of union, uniform, single, all"),
        (TrainConfig, {"mixed_precision": "fp8"}, "expected one of auto, no, fp16, bf16"),
        (TrainConfig, {"lr_scheduler": "step"}, "expected one of constant"),
        (TrainConfig, {"save_precision": "int8"}, "expected one of fp32, fp16, bf16"),
        (SampleConfig, {"num_inference_steps": 0}, "--num_inference_steps is 0"),
        (SampleConfig, {"num_images": 0}, "--num_images is 0"),
        (SampleConfig, {"batch_size": -2}, "--batch_size is -2"),
        (SampleConfig, {"height": 0}, "--height is 0"),
        (SampleConfig, {"width": -8}, "--width is -8"),
        (SampleConfig, {"guidance_scale": float("nan")}, "--guidance_scale is nan"),
        (SampleConfig, {"eta": 1.5}, "--eta is 1.5"),
        (SampleConfig, {"sampler": "euler"}, "expected one of ddim, ddpm, dpmpp_2m"),
    ],
)
def test_what_is_out_of_range_is_refused(settings, flags, words):
    with refused(words):
        settings(**flags)


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


def test_a_warm_up_needs_a_course_that_has_one():
    with refused("--lr_warmup_steps 5", "constant_with_warmup"):
        TrainConfig(lr_warmup_steps=5)
    assert TrainConfig(lr_warmup_steps=5, lr_scheduler="constant_with_warmup").lr_warmup_steps == 5


def test_unknown_settings_and_presets_are_refused():
    with refused("unknown training settings: nonsense"):
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
    with refused("--card is '8gb'", "any, 24gb, 16gb, 12gb"):
        TrainConfig.resolve({"card": "8gb"})


def test_settings_from_python_are_taken_as_those_of_flags():
    """Paths as their text; what is no whole number, or one text where several are expected, is refused."""
    config = TrainConfig(output_dir=Path("runs") / "a", class_data_dir=Path("b"))
    assert (config.output_dir, config.class_data_dir) == (str(Path("runs") / "a"), "b")
    for wrong in ({"phase2_train_steps": 0.5}, {"phase1_train_steps": True}):
        with refused("expected a whole number"):
            TrainConfig(**wrong)
    with refused("--handles is 'ab': expected several, as a tuple"):
        TrainConfig(handles="ab")


def test_what_a_base_switches_on_a_flag_switches_off():
    parser = Parser()
    add_fields(parser, TrainConfig, only=("close_ups", "with_prior_preservation"))
    assert vars(parser.parse_args(["--no_close_ups", "--no_prior_preservation"])) == {
        "close_ups": False,
        "with_prior_preservation": False,
    }
    resolved = TrainConfig.resolve({"close_ups": False}, {"close_ups": True, "normalize_masked_loss": True})
    assert (resolved.close_ups, resolved.normalize_masked_loss) == (False, True)
