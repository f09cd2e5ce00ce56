"""The settings that a model brings in its bas.json, for its training and for its images."""

import json
import shutil
from dataclasses import replace

import pytest

import bas
from bas.cli.entry import main
from bas.config import SampleConfig, TrainConfig
from bas.presets import GUIDANCE, OF_A_MODEL, SAMPLING_OF_A_MODEL
from bas.pretrained import hub
from bas.pretrained.folder import load, read_spec, save_model
from bas.pretrained.own_settings import OWN_SETTINGS, read_own_settings
from bas.sampling.sampler import as_record, sample
from tests.helpers.tiny import refused


def test_a_model_may_bring_its_training_row(tmp_path):
    """None without the file; an empty row in a file without it; lists become tuples, as in a config file."""
    assert read_own_settings(tmp_path, "train") is None
    (tmp_path / "bas.json").write_text('{"train": {"attention_grid": 16, "class_prompt": ["a", "b"]}}')
    assert read_own_settings(tmp_path, "train") == {"attention_grid": 16, "class_prompt": ("a", "b")}
    (tmp_path / "bas.json").write_text("{}")
    assert read_own_settings(tmp_path, "train") == {}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"phase1_train_steps": "400"}, "phase1_train_steps is '400': expected a whole number"),
        ({"class_prompt": "a photo"}, "class_prompt is 'a photo': expected a list"),
        ({"learning_rat": 1}, "unknown setting learning_rat; did you mean learning_rate?"),
        ([1], "train is [1], expected settings by name"),
        (1.5, "train is 1.5, expected settings by name"),
        (None, "train is None, expected settings by name"),
    ],
)
def test_a_training_row_is_checked_as_a_config_file_is(train, message, tmp_path):
    (tmp_path / "bas.json").write_text(json.dumps({"train": train}))
    with refused(f"{tmp_path / 'bas.json'}: {message}"):
        read_own_settings(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_dir", "/home/victim"),
        ("class_data_dir", "../classes"),
        ("resume_from_checkpoint", "latest"),
        ("instance_data_dir", "other"),
        ("pretrained_model_name_or_path", "other"),
        ("device", "cpu"),
        ("report_to", "tensorboard"),
        ("checkpoints_total_limit", 1),
    ],
)
def test_a_model_sets_only_how_it_is_trained(tmp_path, name, value):
    """A file from elsewhere does not decide what is read or written."""
    row = {"train": {name: value, "learning_rate": 1e-5}}
    (tmp_path / "bas.json").write_text(json.dumps(row))
    with refused(f"{tmp_path / 'bas.json'} sets {name}", "only how it is trained"):
        hub.train_config("scene", weights=str(tmp_path))


@pytest.mark.parametrize("name", ["trian", "learning_rate"])
def test_anything_beside_the_two_uses_is_refused(tmp_path, name):
    """A slip would else be passed over, with the settings in it."""
    (tmp_path / OWN_SETTINGS).write_text(json.dumps({"train": {}, name: {"learning_rate": 0.1}}))
    for use in ("train", "sample"):
        with refused(f"{tmp_path / 'bas.json'} holds '{name}': expected train and sample alone; remove it there"):
            read_own_settings(tmp_path, use)


def test_the_settings_of_the_miniature_are_allowed():
    """Both rows of the shipped file hold settings that a model may set, and those are settings of the two uses."""
    row = json.loads((hub.find(None) / OWN_SETTINGS).read_text())
    assert row["train"].keys() <= {*OF_A_MODEL} <= {*TrainConfig.__dataclass_fields__}
    assert row["sample"].keys() <= {*SAMPLING_OF_A_MODEL} <= {*SampleConfig.__dataclass_fields__}


def test_a_run_as_a_base_keeps_the_training_row_of_its_base(bench, tmp_path):
    """A small run, one on top of it, and whole models: a run's and one that a merge writes."""
    row = {"learning_rate": 0.003, "attention_grid": 4, "class_prompt": ["a", "b"]}
    base = shutil.copytree(bench.model, tmp_path / "base")
    (base / OWN_SETTINGS).write_text(json.dumps({"train": row}))
    short = {"phase1_train_steps": 0, "phase2_train_steps": 1, "class_prompt": ("a",), "img_log_steps": 0}
    small, whole, further = (tmp_path / name for name in ("small", "whole", "further"))
    lora = {"train": "lora", "rank": 1}
    bas.train(replace(bench.config(small, **short, **lora), pretrained_model_name_or_path=str(base)))
    on_small = replace(bench.config(whole, **short, handles=("x", "y", "z")), pretrained_model_name_or_path=str(small))
    bas.train(on_small)
    bas.train(replace(on_small, output_dir=str(further), **lora))
    assert main(["merge", str(small), "--into_base", "--output_dir", str(tmp_path / "merged")]) == 0
    for run in (small, whole, further, tmp_path / "merged"):
        assert hub.training_row(str(run)) == row | {"class_prompt": ("a", "b")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"seed": 3}, "sets seed: a model may set only how its images are sampled"),
        ({"layout": "/etc/passwd"}, "sets layout: a model may set only how its images are sampled"),
        ({"guidance_scale": "3"}, "guidance_scale is '3': expected a finite number"),
        ({"guidance": 3}, "unknown setting guidance"),
    ],
)
def test_a_model_sets_only_how_its_images_are_sampled(folder, row, message):
    """No other setting of sampling is taken from a model, above all none that names a file."""
    (folder / OWN_SETTINGS).write_text(json.dumps({"sample": row}))
    with refused(str(folder / OWN_SETTINGS), message):
        read_spec(folder)


def test_images_take_the_guidance_scale_of_their_model(bench, tmp_path):
    """The scale of bas.json draws the same image as the flag, is recorded, and goes with a saved model."""
    folder, again = shutil.copytree(bench.model, tmp_path / "model"), tmp_path / "again"
    plain = load(folder)
    assert plain.guidance_scale == GUIDANCE == 7.5
    save_model(plain, again)
    assert not (again / OWN_SETTINGS).exists()
    asked, other = (
        sample(plain, "a cat", num_inference_steps=2, guidance_scale=scale)[0].tobytes() for scale in (2.5, 7.5)
    )
    (folder / OWN_SETTINGS).write_text('{"sample": {"guidance_scale": 2.5}}')
    save_model(load(folder), again)
    for model in (folder, again):
        models = load(model)
        assert sample(models, "a cat", num_inference_steps=2)[0].tobytes() == asked != other
        assert as_record(models, SampleConfig())["guidance_scale"] == 2.5
        assert as_record(models, SampleConfig(guidance_scale=4.0))["guidance_scale"] == 4.0
