"""Weights between file and network: finite in the precision they get, under whatever names wrappers gave them."""

import json
from dataclasses import replace

import diffusers
import pytest
import torch

from bas.errors import InputError, RunError
from bas.models.bundle import Models
from bas.models.unet import UNet
from bas.models.vae import VAE
from bas.pretrained.folder import load, read_spec, save_model
from bas.pretrained.single_file import save_single_file
from bas.sampling.sampler import sample
from tests.helpers.families import TEXT_FILE, UNET_FILE, VAE_FILE, change_json, change_tensors, refusal, tiny
from tests.helpers.tiny import refused

BIAS, EMBEDDING = "conv_out.bias", "text_model.embeddings.token_embedding.weight"


def assert_same(ours: Models, theirs: Models) -> None:
    """Every weight of two models is the same, bit by bit."""
    for part in ("unet", "vae", "text_encoder"):
        given, expected = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert given.keys() == expected.keys()
        assert all(torch.equal(given[key], expected[key]) for key in expected)


# --- Finite after each conversion -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "value", "stored", "dtype", "fits"),
    [
        (UNET_FILE, BIAS, 70_000.0, torch.float32, torch.float16, False),
        (UNET_FILE, BIAS, 65_504.0, torch.float32, torch.float16, True),  # the largest number of fp16
        (VAE_FILE, "decoder.conv_out.bias", -70_000.0, torch.bfloat16, torch.float16, False),
        (TEXT_FILE, EMBEDDING, 1e39, torch.float64, torch.float32, False),
        (UNET_FILE, BIAS, 3.4e38, torch.float64, torch.float32, True),
        (UNET_FILE, BIAS, 3.4e38, torch.float32, torch.bfloat16, False),  # rounded up, beyond the largest of bf16
    ],
)
def test_weights_that_are_beyond_the_range_of_the_precision_are_refused(file, name, value, stored, dtype, fits, folder):
    def change(tensors):
        tensors[name] = tensors[name].to(stored)
        tensors[name].view(-1)[1] = value

    change_tensors(folder / file, change)
    if fits:
        part = getattr(load(folder, dtype=dtype), file.split("/")[0])
        assert all(weight.isfinite().all() for weight in part.parameters())
        return
    short = {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    with pytest.raises(
        InputError, match=rf"{name.removeprefix('text_model.')} holds values beyond the range of {short}$"
    ):
        load(folder, dtype=dtype)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("value", [70_000.0, float("nan"), float("-inf")])
def test_a_model_that_would_not_load_again_is_not_saved(part, value, tmp_path):
    """And nothing is written: a run keeps the checkpoints that it has."""
    models = tiny("sd1", whole_vocabulary=True)
    with torch.no_grad():
        next(getattr(models, part).parameters()).view(-1)[0] = value
    for save, target in ((save_model, tmp_path / "folder"), (save_single_file, tmp_path / "model.safetensors")):
        with pytest.raises(RunError, match=rf"cannot be saved in fp16, 1 weights .* \({part} .*--save_precision fp32"):
            save(models, target, torch.float16)
        assert not target.exists()


def test_models_that_are_converted_in_memory_are_checked():
    models = tiny("sd1")
    with torch.no_grad():
        models.vae.post_quant_conv.bias[0] = 70_000
    with refused("vae post_quant_conv.bias holds values beyond the range of torch.float16"):
        models.to(dtype=torch.float16)
    assert models.to(dtype=torch.bfloat16).vae.post_quant_conv.bias[0] == 70_144  # the nearest of bf16


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "_fsdp_wrapped_module.", "state_dict."]
)
def test_prefixes_of_wrappers_are_removed(prefix, folder):
    """torch.compile and parallel training put them before every name."""
    expected = load(folder)

    def wrap(tensors):
        for name in list(tensors):
            tensors[f"{prefix}{name}"] = tensors.pop(name)

    for file in (UNET_FILE, VAE_FILE, TEXT_FILE):
        change_tensors(folder / file, wrap)
    assert_same(load(folder), expected)


def test_compiled_blocks_are_read_and_a_weight_of_two_names_is_not(folder):
    """A regionally compiled model has the wrapper in the middle of its names."""
    expected = load(folder)
    change_tensors(
        folder / UNET_FILE,
        lambda t: t.update(
            {"down_blocks.0._orig_mod.resnets.0.conv1.bias": t.pop("down_blocks.0.resnets.0.conv1.bias")}
        ),
    )
    assert_same(load(folder), expected)
    change_tensors(folder / UNET_FILE, lambda t: t.update({"module.conv_in.bias": t["conv_in.bias"] + 1}))
    assert refusal(folder) == (
        f"{folder} (unet) holds weights twice, with and without a wrapper's prefix: save it again"
    )


def test_missing_and_unexpected_keys_are_shown_together(folder):
    """Forty missing ones would leave no room for those that explain them."""

    def rename(tensors):
        for name in sorted(tensors)[:40]:
            tensors[f"ema.{name}"] = tensors.pop(name)

    change_tensors(folder / UNET_FILE, rename)
    message = refusal(folder)
    assert (message.count(" is missing"), message.count(" is unexpected")) == (10, 10)
    assert "configuration describes (80): " in message
    assert message.endswith("; and 60 more")


# --- The text encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
def test_a_text_encoder_may_have_fewer_layers_than_its_file(layers, folder):
    """Clip skip: the configuration is cut, the weights behind are left out, as transformers leaves them."""
    change_json(folder / "text_encoder/config.json", num_hidden_layers=layers)
    models = load(folder)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    ids = torch.arange(77)[None]
    expected = theirs.text_encoder(input_ids=ids).last_hidden_state
    assert theirs.text_encoder.config.num_hidden_layers == layers
    torch.testing.assert_close(models.text_encoder(input_ids=ids).last_hidden_state, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("extra", "fits"), [(0, True), (8, True), (112, True), (1, False), (128, False), (-8, False)])
def test_an_embedding_may_be_padded_to_a_multiple_of_eight(extra, fits, folder):
    expected = load(folder)
    tokens = len(expected.tokenizer)
    rows = tokens + extra + (-tokens % 8 if fits and extra else 0)

    def pad(tensors):
        more = torch.full((max(rows - tokens, 0), 64), 7.0)
        tensors[EMBEDDING] = torch.cat([tensors[EMBEDDING], more])[:rows]

    change_tensors(folder / TEXT_FILE, pad)
    change_json(folder / "text_encoder/config.json", vocab_size=rows)
    if fits:
        assert_same(load(folder), expected)
        assert read_spec(folder).text_encoder["vocab_size"] == tokens
    else:
        assert refusal(folder).endswith(
            f"the tokenizer has {tokens} tokens, the text encoder {rows} rows: they belong to different models"
        )


@pytest.mark.parametrize("name", ["logit_scale", "text_projection.weight", "text_model.embeddings.position_ids"])
def test_weights_that_stable_diffusion_does_not_use_are_left_out(name, folder):
    expected = load(folder)
    change_tensors(folder / TEXT_FILE, lambda tensors: tensors.update({name: torch.ones(3)}))
    assert_same(load(folder), expected)


# --- Latent channels --------------------------------------------------------------------------------------------------


def with_channels(folder, unet: int, vae: int) -> None:
    """Write a model whose networks have these latent channels."""
    models, channels = tiny("sd1"), {"in_channels": unet, "out_channels": unet}
    models.unet = UNet(replace(models.unet.config, **channels))
    models.vae = VAE(replace(models.vae.config, latent_channels=vae))
    save_model(models, folder)


@pytest.mark.parametrize("channels", [1, 3, 5, 7, 8, 9, 12, 16])
def test_any_number_of_latent_channels_opens_and_draws(channels, tmp_path):
    with_channels(tmp_path, channels, channels)
    models = load(tmp_path)
    assert models.spec.unet.in_channels == models.spec.vae.latent_channels == channels
    (image,) = sample(models, "a photo", num_inference_steps=1, height=64, width=64)
    assert image.size == (64, 64)


@pytest.mark.parametrize(
    ("unet", "vae", "kind"),
    [
        (8, 4, "an InstructPix2Pix model"),
        (24, 12, "an InstructPix2Pix model"),
        (9, 4, "an inpainting model"),
        (25, 12, "an inpainting model"),
        (5, 4, "a depth model"),
        (13, 12, "a depth model"),
        (7, 4, "an upscaler"),
    ],
)
def test_channels_beyond_the_latents_tell_the_kind_of_model(unet, vae, kind, folder):
    change_json(folder / "unet/config.json", in_channels=unet)
    change_json(folder / "vae/config.json", latent_channels=vae)
    assert refusal(folder) == f"{folder} is {kind} ({unet} input channels): use the base model it was made from"


# --- The schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"steps_offset": 0}),
        ("DDIMScheduler", {"clip_sample": True}),
        ("DDIMScheduler", {"set_alpha_to_one": None}),
        ("DDIMScheduler", {"beta_start": None, "beta_end": None, "beta_schedule": None}),
    ],
)
def test_a_folder_draws_as_in_diffusers_whatever_its_scheduler_file_leaves_out(name, change, folder):
    """Of the pipeline's rules: steps_offset is 1, clip_sample is off. Two steps of guided denoising."""
    path = folder / "scheduler/scheduler_config.json"
    given = {"_class_name": name, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    given |= {"set_alpha_to_one": False, "clip_sample": False} | change
    path.write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
    models = load(folder)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    theirs = pipeline("a photo", latents=noise, num_inference_steps=2, height=64, width=64, output_type="np").images[0]
    (ours,) = sample(models, "a photo", seed=3, num_inference_steps=2, height=64, width=64)
    difference = torch.tensor(theirs) * 255 - torch.frombuffer(bytearray(ours.tobytes()), dtype=torch.uint8).view(
        64, 64, 3
    )
    assert difference.abs().max() <= 0.51  # rounding to 8 bits, and no more


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"layers_per_block": [1, 1, 1], "transformer_layers_per_block": [1, 1, 1]}),
        ("unet", {"cross_attention_dim": [64, 64, 64], "only_cross_attention": [False, False, False]}),
        ("unet", {"sample_size": [64, 64], "act_fn": "swish"}),
        ("vae", {"sample_size": [512, 512], "act_fn": "swish"}),
    ],
)
def test_one_value_may_be_written_for_every_level(part, changes, folder):
    """diffusers reads the same network from both forms."""
    expected = load(folder)
    change_json(folder / part / "config.json", **changes)
    models = load(folder)
    assert_same(models, expected)
    assert models.resolution == expected.resolution
    kind = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    theirs = kind.from_pretrained(folder / part, local_files_only=True)
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        if part == "unet":
            context = torch.randn(1, 5, 64)
            ours, reference = models.unet(x, torch.tensor([7]), context).sample, theirs(x, 7, context).sample
        else:
            ours, reference = models.vae.decode(x), theirs.decode(x).sample
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [[1, 2, 1], [], [1, 1.5, 1]])
def test_levels_that_differ_are_refused(value, folder):
    change_json(folder / "unet/config.json", layers_per_block=value)
    assert f"unet layers_per_block is {tuple(value)}: expected a whole number" in refusal(folder)


# --- Classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["KandinskyPipeline", "LatentConsistencyModelPipeline", "PixArtAlphaPipeline", "MyPipeline", "stablediffusion"],
)
def test_a_pipeline_of_an_unknown_class_is_refused(name, folder):
    change_json(folder / "model_index.json", _class_name=name)
    assert refusal(folder) == (
        f"{folder} is a model of another kind ({name}): give a whole Stable Diffusion 1.x, 2.x or XL model"
    )


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline"])
def test_pipelines_with_the_same_networks_are_read(name, folder):
    expected = load(folder)
    change_json(folder / "model_index.json", _class_name=name)
    assert_same(load(folder), expected)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("unet/config.json", "UNetMotionModel"),
        ("unet/config.json", "ControlNetModel"),
        ("vae/config.json", "AsymmetricAutoencoderKL"),
        ("vae/config.json", "AutoencoderTiny"),
    ],
)
def test_a_network_of_another_class_is_refused(file, name, folder):
    change_json(folder / file, _class_name=name)
    part = file.split("/")[0]
    assert refusal(folder).startswith(f"{folder} has {name!r} as its {part}, bas needs ")


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "LCMScheduler", "EDMEulerScheduler"])
def test_a_scheduler_of_other_models_is_refused(name, folder):
    change_json(folder / "scheduler/scheduler_config.json", _class_name=name)
    assert f"scheduler _class_name is {name!r}" in refusal(folder)


def test_models_of_another_noise_schedule_are_named(folder):
    """By the scheduler of their folders; Playground's latents have a mean, which is no setting of its VAE alone."""
    change_json(folder / "scheduler/scheduler_config.json", _class_name="EDMEulerScheduler")
    assert "is a CosXL model, of another noise schedule (EDM)" in refusal(folder)
    change_json(folder / "scheduler/scheduler_config.json", _class_name="EDMDPMSolverMultistepScheduler")
    change_json(folder / "vae/config.json", latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    assert "is a Playground 2.5 model, of another noise schedule (EDM)" in refusal(folder)
