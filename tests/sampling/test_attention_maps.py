"""Attention at sampling time: which columns are read, what is averaged, and what is written."""

import json

import numpy as np
import pytest
import torch
from einops import reduce
from PIL import Image
from tokenizers import AddedToken

from bas.cli.entry import main
from bas.config import SampleConfig
from bas.io.figures import concept_colour
from bas.models.text import find_places, tokenize
from bas.pretrained.folder import save_model
from bas.pretrained.hub import load, trained_grid
from bas.sampling.attention_maps import Attention, attend, write_attention
from bas.sampling.sampler import sample
from tests.helpers.tiny import refused, taught, write_model

PROMPT = "a photo of <asset1> and <asset0> at the beach"
FAST = SampleConfig(num_inference_steps=3, seed=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return taught(write_model(tmp_path_factory.mktemp("attend") / "model"))


def places(models, prompt, words=False):
    (ids,) = tokenize(models.tokenizer, [prompt]).tolist()
    return find_places(models.tokenizer, ids, words)


def test_handles_are_found_in_a_prompt(models):
    assert places(models, PROMPT) == {"<asset1>": [4], "<asset0>": [6]}
    assert places(models, "a photo of the beach") == {}


def test_words_of_several_pieces_and_words_that_come_twice_have_several_places(models):
    found = places(models, "a <asset0>, a photo of bat", words=True)
    assert found == {"a": [1, 4], "<asset0>": [2], ",": [3], "photo": [5], "of": [6], "bat": [7, 8]}


@pytest.fixture(scope="module")
def padded(models, tmp_path_factory):
    """A tokenizer as SD 2 has it: `!` is its padding, and so an added token; `<bag>` is a handle of two vectors."""
    save_model(models, tmp_path_factory.mktemp("padded") / "model")
    tokenizer = load(tmp_path_factory.getbasetemp() / "padded0" / "model").tokenizer
    tokenizer.add_special_tokens({"pad_token": "!"})
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in ("<bag>", "<bag>_1")])
    return tokenizer


@pytest.mark.parametrize(
    ("prompt", "words", "found"),
    [
        ("bat! <asset0>", False, {"<asset0>": [4]}),
        ("bat! <asset0>", True, {"bat": [1, 2], "!": [3], "<asset0>": [4]}),
        ("a!<asset0>!a", True, {"a": [1, 5], "!": [2, 4], "<asset0>": [3]}),
        ("a <bag><bag>_1 at", True, {"a": [1], "<bag>": [2, 3], "at": [4]}),
        ("a <bag><bag>_1 at", False, {"<bag>": [2, 3]}),
    ],
)
def test_an_added_token_is_a_word_of_its_own(padded, prompt, words, found):
    ids = padded(prompt).input_ids
    assert find_places(padded, ids, words) == found


def test_words_are_named_by_their_text():
    """Outside ASCII too: the miniature's vocabulary spells it in bytes."""
    tokenizer = load(None).tokenizer
    for prompt in ("café müll", "写真", "naïve ❤"):
        ids = tokenizer(prompt).input_ids
        found = find_places(tokenizer, ids, words=True)
        assert list(found) == prompt.split()
        assert sorted(place for places in found.values() for place in places) == list(range(1, len(ids) - 1))


def test_the_image_is_the_one_that_sample_draws(models):
    assert attend(models, PROMPT, FAST).image == sample(models, PROMPT, FAST)[0]


def test_maps_are_the_mean_over_steps_heads_and_layers_of_the_prompts_own_half(models, monkeypatch):
    seen, forward = [], models.unet.forward

    def spy(latents, timesteps, context, return_maps, *_):
        output = forward(latents, timesteps, context, True)
        seen.append([m.probs for m in output.maps if m.place != "mid" and m.probs.shape[2] == 4])
        return output._replace(maps=[m for m in output.maps if tuple(m.probs.shape[2:4]) == tuple(return_maps)])

    monkeypatch.setattr(models.unet, "forward", spy)
    attention = attend(models, PROMPT, FAST)
    assert attention.names == ("<asset1>", "<asset0>")
    assert attention.maps.shape == (2, 4, 4)
    assert len(seen) == 3
    for values, position in zip(attention.maps, (4, 6), strict=True):
        columns = [reduce(p[1, ..., position], "heads h w -> h w", "mean") for step in seen for p in step]
        np.testing.assert_allclose(values, torch.stack(columns).mean(dim=0).numpy(), atol=1e-7)


def test_without_guidance_the_maps_are_there_too(models):
    config = SampleConfig(num_inference_steps=2, guidance_scale=1)
    maps = attend(models, PROMPT, config).maps
    assert maps.shape == (2, 4, 4)
    assert (maps > 0).all()


def test_all_words_share_what_is_left_of_the_special_tokens(models):
    maps = attend(models, "a photo of <asset0>", FAST, words=True).maps
    assert maps.shape == (4, 4, 4)
    assert (maps > 0).all()
    assert (maps.sum(axis=0) < 1).all()


def test_another_grid_on_request(models):
    assert attend(models, PROMPT, FAST, side=8).maps.shape == (2, 8, 8)
    with refused("5 cells", "--attention_grid 8 or 4"):
        attend(models, PROMPT, FAST, side=5)


def test_a_prompt_without_a_handle_needs_words(models):
    with refused("holds no handle", "--words"):
        attend(models, "a photo of a bowl", FAST)


def test_files_are_numbered_and_keep_the_runs_colours(tmp_path):
    maps = np.zeros((2, 4, 4), np.float32)
    maps[0, 0, 0] = maps[1, 3, 3] = 0.25
    black = Image.new("RGB", (64, 64))
    sheet = write_attention(Attention(black, ("<b>", "../word"), maps), ("<a>", "<b>"), tmp_path, {})
    assert sheet == tmp_path / "sheet.png"
    names = ["map0.npy", "map0.png", "map1.npy", "map1.png", "maps.json", "picture.png", "sheet.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert json.loads((tmp_path / "maps.json").read_text()) == {"map0": "<b>", "map1": "../word"}
    assert np.array_equal(np.load(tmp_path / "map0.npy"), maps[0])
    for i, corner, colour in ((0, (0, 0), concept_colour(1)), (1, (63, 63), concept_colour(2))):
        with Image.open(tmp_path / f"map{i}.png") as overlay:
            assert overlay.getpixel(corner) == colour


def test_the_grid_is_the_one_of_training(tmp_path):
    (tmp_path / "bas.json").write_text(json.dumps({"train": {"attention_grid": 8}}))
    assert trained_grid(tmp_path) == 8
    assert trained_grid(tmp_path / "nothing") is None


def test_the_command(models, tmp_path, capsys):
    save_model(models, tmp_path / "run")
    (tmp_path / "run" / "bas.json").write_text(json.dumps({"train": {"attention_grid": 8}}))
    out = tmp_path / "maps"
    fast = ["--num_inference_steps", "2", "--device", "cpu"]
    argv = ["attend", str(tmp_path / "run"), "--prompt", "a photo of (<asset1>:1.5)", "--output_dir", str(out), *fast]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{out / 'sheet.png'}\n"
    assert np.load(out / "map0.npy").shape == (8, 8)
    with Image.open(out / "picture.png") as image:
        assert json.loads(image.text["bas"])["prompt"] == "a photo of (<asset1>:1.5)"
    assert main(argv) == 2


def test_a_setting_without_effect_is_told_once(models, tmp_path, caplog):
    """Though the request is checked before weights are read, and once more when it is drawn."""
    save_model(models, tmp_path / "run")
    argv = ["attend", str(tmp_path / "run"), "--prompt", "a photo of <asset1>", "--output_dir", str(tmp_path / "maps")]
    settings = ["--sampler", "ddpm", "--eta", "0.5", "--num_inference_steps", "2", "--device", "cpu"]
    assert main([*argv, *settings]) == 0
    assert sum("--eta has no effect" in message for message in caplog.messages) == 1
