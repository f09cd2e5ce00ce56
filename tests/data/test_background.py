"""The background as a concept: what its mask is, and that everything counts it in."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import bas
from bas.cli.entry import main
from bas.config import SampleConfig, TrainConfig
from bas.data.batches import sample_batch
from bas.data.scene_folder import load_scene
from bas.io.run_files import read_concepts
from tests.helpers.tiny import refused, write_scene


def load(folder, **changes):
    return load_scene(TrainConfig(instance_data_dir=str(folder), background_handle="bg", **changes))


@pytest.fixture
def scene(tmp_path):
    return write_scene(tmp_path / "scene", concepts=2)


def test_the_background_is_what_no_mask_covers(scene):
    loaded = load(scene)
    assert loaded.handles == ("<asset0>", "<asset1>", "<bg>")
    assert loaded.words == (None, None, "background")
    left, right, background = loaded.masks
    assert background.dtype == np.uint8
    assert np.array_equal(background, 255 - np.maximum(left, right))
    # The soft edge stays soft: 127 of 255 in the mask leave 128 of 255.
    assert background[10, 31] == 128
    assert background[0, 0] == 255


def test_names_and_counts_of_the_given_concepts_stay_as_they_are(scene):
    note = {"concepts": [{"handle": "<toy>", "word": "toy"}, {"handle": "<bowl>", "word": "bowl"}]}
    (scene / "scene.json").write_text(json.dumps(note))
    loaded = load(scene, num_of_assets=2)
    assert loaded.handles == ("<toy>", "<bowl>", "<bg>")
    assert loaded.words == ("toy", "bowl", "background")


def test_the_handle_is_taken_with_or_without_brackets(scene):
    assert load_scene(TrainConfig(instance_data_dir=str(scene), background_handle="<room>")).handles[-1] == "<room>"


def test_a_background_that_cannot_be_is_refused(scene):
    with refused("--background_handle my bg: expected 1 to 32 letters a-z or A-Z, digits, _ or -"):
        load_scene(TrainConfig(instance_data_dir=str(scene), background_handle="my bg"))
    with refused("--background_handle <asset1>", "of that name"):
        load_scene(TrainConfig(instance_data_dir=str(scene), background_handle="asset1"))
    for i, half in enumerate((slice(0, 16), slice(16, 32))):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, half] = 255
        Image.fromarray(mask).save(scene / f"mask{i}.png")
    with refused("--background_handle <bg>", "no background is left"):
        load(scene)


def test_the_background_counts_as_a_concept(tmp_path, caplog):
    folder = write_scene(tmp_path, concepts=4)
    with caplog.at_level(logging.WARNING):
        assert len(load(folder)) == 5
    assert "5 concepts" in caplog.text


def test_training_prompts_name_the_background_as_any_other(bench):
    config = bench.config(background_handle="bg", with_prior_preservation=False)
    models, data = bench.prepared(config)
    generator, prompts = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        batch = sample_batch(data, models, config.phases[0], config, generator)
        prompts.add(models.tokenizer.decode(batch.input_ids[0], skip_special_tokens=True))
        if batch.present.sum() == 4:  # all three and the background: together they cover nearly everything
            assert batch.union.mean() > 0.9
    assert any(prompt.replace(" ", "") == "aphotoof<bg>" for prompt in prompts)
    assert any("<bg>" in prompt and "<asset0>" in prompt for prompt in prompts)


def test_a_run_learns_it_and_draws_a_concept_at_it(bench, tmp_path):
    config = bench.config(
        tmp_path / "run",
        background_handle="bg",
        phase1_train_steps=2,
        phase2_train_steps=1,
        img_log_steps=3,
        preview_inference_steps=1,
        with_prior_preservation=False,
    )
    run = bas.train(config)
    tensors, note = read_concepts(run)
    assert note["handles"] == ["<asset0>", "<asset1>", "<asset2>", "<bg>"]
    assert note["config"]["background_handle"] == "bg"
    assert torch.equal(tensors["masks"][3], 255 - tensors["masks"][:3].amax(dim=0))
    assert len(load_file(run / "concepts.safetensors")["handles"]) == 4
    assert len(list(run.glob("previews/*.png"))) == 1
    models = bas.load(run)
    here, nowhere = bas.sample(models, ["<asset0> at <bg>", "<asset0>"], SampleConfig(num_inference_steps=2))
    assert here != nowhere


def test_masks_shows_it(bench, capsys):
    assert main(["masks", str(bench.scene), "--background_handle", "bg", "--weights", str(bench.model)]) == 0
    out = capsys.readouterr().out
    assert "4 concepts" in out
    assert "<bg>" in out
