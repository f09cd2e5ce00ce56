"""Original single files: written and read without losing a bit, and understood without a configuration."""

import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bas.errors import InputError
from bas.models.text import add_handles
from bas.pretrained.folder import load, save_model
from bas.pretrained.ldm_keys import CLIP, UNET
from bas.pretrained.single_file import CLIP_VOCABULARY, clip_tokenizer, save_single_file
from tests.helpers.families import FAMILIES, TEXT_FILE, UNET_FILE, VAE_FILE, change_tensors, refusal, tiny

BIAS = f"{UNET}output_blocks.5.1.transformer_blocks.0.norm1.bias"  # of the tiny models' last output block


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A family with its folder and its single file."""
    place = tmp_path_factory.mktemp(request.param)
    models = tiny(request.param, whole_vocabulary=True)
    save_model(models, place / "folder")
    save_single_file(models, place / "model.safetensors")
    return request.param, place / "folder", place / "model.safetensors"


@pytest.fixture(scope="module")
def sd2_file(tmp_path_factory):
    """An SD 2 single file as it was published: without metadata."""
    path = tmp_path_factory.mktemp("sd2") / "model.safetensors"
    save_single_file(tiny("sd2", whole_vocabulary=True), path)
    save_file(load_file(path), path.with_name("published.safetensors"))
    return path.with_name("published.safetensors")


def test_folder_to_file_to_folder_loses_no_bit(pair, tmp_path):
    family, folder, file = pair
    models = load(file)
    save_model(models, tmp_path)
    for name in (UNET_FILE, VAE_FILE, TEXT_FILE, "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    again = load(folder)
    assert models.unet.config.heads == again.unet.config.heads
    assert models.schedule.to_json() == again.schedule.to_json()
    assert models.resolution == (768 if family == "sd2-v" else 512)
    prompts = ["a photo of a cat, nice!! 日本"]
    assert models.tokenizer(prompts).input_ids == again.tokenizer(prompts).input_ids


def test_metadata_says_what_the_model_is(pair):
    family, _, file = pair
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    architectures = {"sd1": "v1", "sd2": "v2-512", "sd2-v": "v2-768-v"}
    assert metadata["modelspec.architecture"] == f"stable-diffusion-{architectures[family]}"
    assert metadata["modelspec.prediction_type"] == ("v" if family == "sd2-v" else "epsilon")


@pytest.mark.parametrize(
    ("spread", "asked_for", "expected", "reason"),
    [
        (0.05, None, "epsilon", "guessed from a bias that spreads by 0.050"),
        (0.12, None, "v_prediction", "guessed from a bias that spreads by 0.120"),
        (0.12, "epsilon", "epsilon", "as asked for"),
    ],
)
def test_prediction_type_without_metadata(spread, asked_for, expected, reason, sd2_file, tmp_path, caplog):
    tensors = load_file(sd2_file)
    tensors[BIAS] = torch.tensor([spread, -spread]).repeat(len(tensors[BIAS]) // 2)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with caplog.at_level(logging.INFO, "bas"):
        models = load(path, prediction_type=asked_for)
    assert models.schedule.prediction_type == expected
    assert models.resolution == (768 if expected == "v_prediction" else 512)
    (line,) = [record.message for record in caplog.records if "prediction type" in record.message]
    assert line.startswith(f"{path}: prediction type {expected}, {reason}")


def test_metadata_outweighs_the_guess(sd2_file, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(load_file(sd2_file), path, {"modelspec.prediction_type": "v"})
    assert load(path).schedule.prediction_type == "v_prediction"


def test_published_extras_and_the_older_text_names_are_read(tmp_path):
    models = tiny("sd1", whole_vocabulary=True)
    path = tmp_path / "model.ckpt"  # the content decides, not the name
    save_single_file(models, path, torch.float16)
    tensors = load_file(path)
    for key in [key for key in tensors if key.startswith(CLIP)]:
        tensors[key.replace("text_model.", "")] = tensors.pop(key)
    extras = ("model_ema.decay", "model_ema.diffusion_modelout2bias", "betas", "log_one_minus_alphas_cumprod")
    tensors |= dict.fromkeys(extras, torch.zeros(3))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    tensors[f"{CLIP}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, path)
    again = load(path)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(models, part).state_dict()
        given = getattr(again, part).state_dict()
        assert all(torch.equal(given[key], value.half().float()) for key, value in expected.items())


def test_unknown_and_missing_keys_are_listed(sd2_file, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(sd2_file.read_bytes())

    def spoil(tensors):
        tensors[f"{UNET}label_emb.0.0.weight"] = torch.zeros(1)
        del tensors[f"{UNET}out.2.bias"]

    change_tensors(path, spoil)
    assert refusal(path) == (
        f"{path} (unet) does not hold the weights that its configuration describes (2): conv_out.bias is missing; "
        f"{UNET}label_emb.0.0.weight is unexpected"
    )


@pytest.mark.parametrize(("channels", "kind"), [(9, "an inpainting model"), (5, "a depth model")])
def test_models_with_further_inputs_are_refused(channels, kind, sd2_file, tmp_path):
    path, name = tmp_path / "model.safetensors", f"{UNET}input_blocks.0.0.weight"
    save_file(load_file(sd2_file) | {name: torch.zeros(32, channels, 3, 3)}, path)
    assert refusal(path) == f"{path} is {kind} ({channels} input channels): use the base model it was made from"


@pytest.mark.parametrize(
    "name", [f"{UNET}out.2.weight", f"{UNET}middle_block.1.proj_in.weight", "first_stage_model.post_quant_conv.weight"]
)
def test_a_file_that_lacks_what_tells_its_shape(name, sd2_file, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({key: tensor for key, tensor in load_file(sd2_file).items() if key != name}, path)
    assert refusal(path) == f"{path} lacks {name}: it is damaged, download it again"


def test_what_the_layout_cannot_say_is_not_written(tmp_path):
    path = tmp_path / "model.safetensors"
    models = tiny("sd1", whole_vocabulary=True)
    add_handles(models.text_encoder, models.tokenizer, ("<toy>",), ("toy",), seed=0)
    with pytest.raises(InputError, match=r"no handles and no vocabulary but CLIP's: use a folder$"):
        save_single_file(models, path)
    models = tiny("sd2", whole_vocabulary=True)
    object.__setattr__(models.unet.config, "attention_head_dim", (2, 2, 2))
    with pytest.raises(
        InputError, match=r"cannot express this model's unet attention_head_dim \(\(2, 2, 2\)\): save a"
    ):
        save_single_file(models, path)
    assert not path.exists()


def test_the_shipped_vocabulary_is_clips():
    tokenizer = clip_tokenizer(pad_with_exclamation_mark=False)
    assert len(tokenizer) == 49408
    assert len((CLIP_VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()) == 48895
    prompt = ["a photo of a cat!"]
    ids = tokenizer(prompt, padding="max_length", max_length=9).input_ids
    assert ids == [[49406, 320, 1125, 539, 320, 2368, 256, 49407, 49407]]
    ids = clip_tokenizer(pad_with_exclamation_mark=True)(prompt, padding="max_length", max_length=9).input_ids
    assert ids == [[49406, 320, 1125, 539, 320, 2368, 0, 49407, 0]]  # as the published SD 2 tokenizer has it
