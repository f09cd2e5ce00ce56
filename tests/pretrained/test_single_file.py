"""Original single files: written and read without losing a bit, and understood without a configuration."""

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bas.errors import InputError
from bas.models.text import add_handles
from bas.pretrained import single_file
from bas.pretrained.folder import load, read_spec, save_model
from bas.pretrained.ldm_keys import CLIP, OPEN_CLIP, UNET
from bas.pretrained.single_file import CLIP_VOCABULARY, clip_tokenizer, save_single_file, without_handles
from tests.helpers.families import FAMILIES, TEXT_FILE, UNET_FILE, VAE_FILE, change_tensors, refusal, tiny
from tests.helpers.tiny import refused

BIAS = f"{UNET}output_blocks.5.1.transformer_blocks.0.norm1.bias"  # of the tiny models' last output block


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A family with its folder and its single file."""
    place = tmp_path_factory.mktemp(request.param)
    models = tiny(request.param, whole_vocabulary=True)
    save_model(models, place / "folder")
    save_single_file(models, place / "model.safetensors")
    return request.param, place / "folder", place / "model.safetensors"


def publish(family: str, folder: Path) -> Path:
    """A single file as it was published: without metadata."""
    path = folder / "model.safetensors"
    save_single_file(tiny(family, whole_vocabulary=True), path)
    save_file(load_file(path), path.with_name("published.safetensors"))
    return path.with_name("published.safetensors")


@pytest.fixture(scope="module")
def sd1_file(tmp_path_factory):
    return publish("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="module")
def sd2_file(tmp_path_factory):
    return publish("sd2", tmp_path_factory.mktemp("sd2"))


CLIP_TOKENIZER = cache(clip_tokenizer)


@pytest.fixture
def words_read_once(monkeypatch):
    """CLIP's 49,408 tokens take longer than all else of these tests, which add none to them."""
    monkeypatch.setattr(single_file, "clip_tokenizer", CLIP_TOKENIZER)


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
        "add_embedding.linear_1.weight is unexpected"
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
    add_handles(models.text_encoders, models.tokenizer, ("<toy>",), ("toy",), seed=0)
    with pytest.raises(InputError, match=r"no handles and no vocabulary but CLIP's: use a folder$"):
        save_single_file(models, path)
    models = tiny("sd2", whole_vocabulary=True)
    object.__setattr__(models.unet.config, "attention_head_dim", (2, 2, 2))
    with pytest.raises(
        InputError, match=r"cannot express this model's unet attention_head_dim \(\(2, 2, 2\)\): save a"
    ):
        save_single_file(models, path)
    assert not path.exists()


@pytest.mark.parametrize(("family", "padding", "named"), [("sd1", "!", 0), ("sd2", "<|endoftext|>", 49407)])
def test_a_model_that_pads_otherwise_is_not_written(family, padding, named, tmp_path):
    """A single file carries no tokenizer: its readers pad as the family does. Handles make no difference."""
    models = tiny(family, whole_vocabulary=True)
    models.tokenizer.add_special_tokens({"pad_token": padding})
    for given in (models, without_handles(models)):
        with refused(f"cannot express this model's tokenizer pad_token_id ({named}): save a folder instead"):
            save_single_file(given, tmp_path / "model.safetensors")
    models.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    with refused("cannot express this model's tokenizer pad_token (<pad>)"):
        without_handles(models)


def test_settings_that_a_single_file_cannot_hold_are_named(tmp_path, caplog):
    """Guidance scale, spacing of timesteps, settings of training, in one line; nothing of a model without any."""
    models, path = tiny("sd1", whole_vocabulary=True), tmp_path / "model.safetensors"
    save_single_file(models, path)
    assert caplog.messages == []
    schedule = replace(models.schedule, timestep_spacing="trailing")
    save_single_file(replace(models, guidance_scale=3.0, schedule=schedule, training={"attention_grid": 8}), path)
    assert caplog.messages == [
        f"{path} cannot hold the model's own guidance scale (--guidance_scale 3 gives it back) and timestep_spacing "
        "trailing (no flag gives it back: keep the folder) and settings of training (in its bas.json: keep the folder "
        "to train on it)"
    ]


def test_a_text_encoder_of_another_depth_than_programs_build_is_told(tmp_path, caplog, monkeypatch):
    """Programs know the depth by the family: 12 layers of OpenAI's, the first 23 and all 32 of open_clip's."""
    assert single_file.TEXT_DEPTHS == {768: 12, 1024: 23, 1280: 32}
    path = tmp_path / "model.safetensors"
    for depth, told in ((2, 0), (3, 1)):
        monkeypatch.setattr(single_file, "TEXT_DEPTHS", {64: depth})
        save_single_file(tiny("sd1", whole_vocabulary=True), path)
        assert len(caplog.messages) == told
    assert f"{path} has a text_encoder of 2 layers, and other programs build one of 3" in caplog.text


def test_the_shipped_vocabulary_is_clips():
    tokenizer = clip_tokenizer(pad_with_exclamation_mark=False)
    assert len(tokenizer) == 49408
    assert len((CLIP_VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()) == 48895
    prompt = ["a photo of a cat!"]
    ids = tokenizer(prompt, padding="max_length", max_length=9).input_ids
    assert ids == [[49406, 320, 1125, 539, 320, 2368, 256, 49407, 49407]]
    ids = clip_tokenizer(pad_with_exclamation_mark=True)(prompt, padding="max_length", max_length=9).input_ids
    assert ids == [[49406, 320, 1125, 539, 320, 2368, 0, 49407, 0]]  # as the published SD 2 tokenizer has it


# --- Families by shapes, layouts of others, leftovers -----------------------------------------------------------------


def assert_same(ours, theirs) -> None:
    """Weights and configurations of two models are the same."""
    assert (ours.spec.unet.heads, ours.spec.vae) == (theirs.spec.unet.heads, theirs.spec.vae)
    assert ours.spec.text_encoder == theirs.spec.text_encoder
    for part in ("unet", "vae", "text_encoder"):
        given, expected = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[key], expected[key]) for key in expected)


@pytest.mark.parametrize("inner", ["text_model.", ""])
def test_sd2_with_the_text_names_of_transformers_is_sd2(inner, sd2_file, tmp_path, words_read_once):
    """Its UNet's linear projections tell: heads of 64 features, GELU, padding with `!`; 24 layers are 23."""
    expected = load(sd2_file)
    tensors = {key: tensor for key, tensor in load_file(sd2_file).items() if not key.startswith("cond_stage_model.")}
    text = {key.removeprefix("text_model."): weight for key, weight in expected.text_encoder.state_dict().items()}
    tensors |= {f"{CLIP}{inner}{key}": weight.clone() for key, weight in text.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    models = load(tmp_path / "model.safetensors")
    assert_same(models, expected)
    assert models.text_encoder.config.hidden_act == "gelu"
    assert models.unet.config.heads == (1, 1, 2)
    assert models.tokenizer.pad_token_id == 0
    last = "encoder.layers.1."
    for number in range(2, 24):
        layer = {key.replace(last, f"encoder.layers.{number}."): w for key, w in text.items() if key.startswith(last)}
        tensors |= {f"{CLIP}{inner}{key}": weight.clone() for key, weight in layer.items()}
    save_file(tensors, tmp_path / "deep.safetensors")
    assert load(tmp_path / "deep.safetensors").text_encoder.config.num_hidden_layers == 23


def test_a_text_encoder_of_the_other_family_is_refused(sd1_file, sd2_file, tmp_path, words_read_once):
    """The UNet projects by convolutions, as SD 1, and the text encoder is open_clip's, as SD 2's."""
    path = tmp_path / "model.safetensors"
    tensors = {key: tensor for key, tensor in load_file(sd1_file).items() if not key.startswith(CLIP)}
    tensors |= {key: tensor for key, tensor in load_file(sd2_file).items() if key.startswith(OPEN_CLIP)}
    save_file(tensors, path)
    assert refusal(path) == (
        f"{path} has the UNet of Stable Diffusion 1 and the text encoder of 2 (open_clip): "
        "they belong to different models"
    )


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_two_text_encoders_are_not_mixed(family, sd1_file, sd2_file, tmp_path):
    """One under each tool's names: which of them the UNet reads is not said."""
    path, both = tmp_path / "model.safetensors", (sd1_file, sd2_file)
    texts = {k: v for file in both for k, v in load_file(file).items() if k.startswith((CLIP, OPEN_CLIP))}
    save_file(load_file(sd1_file if family == "sd1" else sd2_file) | texts, path)
    assert refusal(path) == (
        f"{path} holds two text encoders, under {OPEN_CLIP} and {CLIP}: save it again with the one it uses"
    )


@pytest.mark.parametrize(("family", "width"), [("sd1", 1024), ("sd2", 768)])
def test_a_width_of_the_other_family_is_refused(family, width, sd1_file, sd2_file, tmp_path):
    path = tmp_path / "model.safetensors"
    name = f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    tensors = load_file(sd1_file if family == "sd1" else sd2_file)
    save_file(tensors | {name: torch.zeros(len(tensors[name]), width)}, path)
    ours, other = ("1", "2") if family == "sd1" else ("2", "1")
    assert refusal(path) == (
        f"{path} has the UNet of Stable Diffusion {ours}, which reads text of width {width}, as {other} has it: "
        "it is damaged"
    )


def test_sd2_in_the_later_layout_is_read_and_sdxls_refiner_is_not(sd2_file, tmp_path, words_read_once):
    """Stability AI's later code keeps the text encoder under conditioner.embedders.0."""
    path = tmp_path / "model.safetensors"
    tensors = load_file(sd2_file)
    renamed = {key.replace("cond_stage_model.", "conditioner.embedders.0."): value for key, value in tensors.items()}
    save_file(renamed | {"denoiser.sigmas": torch.zeros(1000)}, path)
    assert_same(load(path), load(sd2_file))
    save_file(renamed | {f"{UNET}label_emb.0.0.weight": torch.zeros(1)}, path)
    assert (
        refusal(path) == f"{path} is a Stable Diffusion XL refiner: give a whole Stable Diffusion 1.x, 2.x or XL model"
    )


LEFTOVERS = (
    *("global_step", "epoch", "iteration", "logit_scale", "v_pred", "embedding_manager.initial_embeddings.weight"),
    *("embedding_manager.string_to_param_dict.*", "optimizer_states.0.x", "model_ema.num_updates"),
    *("step", "pytorch-lightning_version", "callbacks.ModelCheckpoint.x", "__index_timestep_zero__", "model.betas"),
    *("cond_stage_model.logit_scale", "cond_stage_model.text_projection", "first_stage_model.discriminator.0.bias"),
    *("cond_stage_model.transformer.vision_model.x", "cond_stage_model.model.visual.proj", "ema.decay"),
)


def test_leftovers_of_training_are_left_out(sd2_file, tmp_path, words_read_once, caplog):
    path = tmp_path / "model.safetensors"
    save_file(load_file(sd2_file) | {name: torch.ones(2, 3) for name in LEFTOVERS}, path)
    assert_same(load(path, prediction_type="epsilon"), load(sd2_file, prediction_type="epsilon"))
    assert caplog.messages == []


def test_what_no_program_is_known_to_leave_is_counted(sd2_file, tmp_path, words_read_once, caplog):
    path, strange = tmp_path / "model.safetensors", ("cond_stage_model.extra.weight", "foo.bar")
    save_file(load_file(sd2_file) | {name: torch.ones(3) for name in strange}, path)
    assert_same(load(path, prediction_type="epsilon"), load(sd2_file, prediction_type="epsilon"))
    assert caplog.messages == [f"{path} also holds 2 tensors of no known network, which are not read ({strange[0]})"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "state_dict.", "_forward_module."])
def test_prefixes_of_wrappers_are_removed(prefix, sd2_file, tmp_path, words_read_once):
    path = tmp_path / "model.safetensors"
    save_file({f"{prefix}{key}": value for key, value in load_file(sd2_file).items()}, path)
    assert_same(load(path), load(sd2_file))


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_fsdp_wrapped_module."])
def test_a_compiled_unet_in_a_whole_model_is_read(wrapper, sd2_file, tmp_path, words_read_once):
    """Its wrapper's prefix stands in the middle of the names."""
    path = tmp_path / "model.safetensors"
    save_file({key.replace(UNET, f"{UNET}{wrapper}"): value for key, value in load_file(sd2_file).items()}, path)
    assert_same(load(path), load(sd2_file))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_text_encoder_cut_to_fewer_layers_is_read(layers, tmp_path):
    path = tmp_path / "model.safetensors"
    save_single_file(tiny("sd1", whole_vocabulary=True), path)
    change_tensors(path, lambda t: [t.pop(key) for key in list(t) if f"encoder.layers.{layers}." in key])
    models = load(path)
    assert models.text_encoder.config.num_hidden_layers == layers
    assert models.spec.text_encoder["num_hidden_layers"] == layers


# --- Prediction types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize(
    ("markers", "yaml", "metadata", "asked_for", "expected", "zero_snr"),
    [
        (("v_pred",), None, None, None, "v_prediction", False),
        (("v_pred", "ztsnr"), None, None, None, "v_prediction", True),
        (("ztsnr",), None, None, "epsilon", "epsilon", False),
        (("v_pred",), None, None, "epsilon", "epsilon", False),
        (("v_pred",), None, "epsilon", None, "epsilon", False),
        ((), 'parameterization: "v"', None, None, "v_prediction", False),
        ((), "parameterization: eps # as published", None, None, "epsilon", False),
        ((), "parameterization: 'v'", "epsilon", None, "epsilon", False),
        ((), '{linear_start: 0.1, "parameterization": v}', None, None, "v_prediction", False),
        ((), None, "V-Prediction", None, "v_prediction", False),
        ((), "# parameterization: v", None, "v_prediction", "v_prediction", False),
    ],
)
def test_what_tells_the_prediction_type(
    family, markers, yaml, metadata, asked_for, expected, zero_snr, sd1_file, sd2_file, tmp_path, words_read_once
):
    """First the user, then the file's metadata, then its markers, then the .yaml beside it."""
    path, published = tmp_path / "model.safetensors", sd1_file if family == "sd1" else sd2_file
    given = {"modelspec.prediction_type": metadata} if metadata else None
    save_file(load_file(published) | {name: torch.zeros(0) for name in markers}, path, given)
    if yaml:
        text = f"model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    {yaml}\n    timesteps: 1\n"
        path.with_suffix(".yaml").write_text(text)
    schedule = read_spec(path, asked_for).schedule
    assert (schedule.prediction_type, schedule.rescale_betas_zero_snr) == (expected, zero_snr)
    assert (schedule.alpha(999) == 0) is zero_snr


def test_sd1_with_nothing_beside_it_predicts_noise(tmp_path, caplog):
    path = tmp_path / "model.safetensors"
    save_single_file(tiny("sd1", whole_vocabulary=True), path)
    save_file(load_file(path), path)
    path.with_suffix(".yaml").write_bytes(b"\xff\xfe\x00")
    with caplog.at_level(logging.INFO, "bas"):
        assert load(path).schedule.prediction_type == "epsilon"
    assert "--prediction_type v_prediction for the others" in caplog.text
    path.with_suffix(".yaml").write_text("  parameterization: v\n", encoding="utf-16")  # as some editors save it
    assert load(path).schedule.prediction_type == "v_prediction"
