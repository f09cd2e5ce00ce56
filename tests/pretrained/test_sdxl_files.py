"""SDXL on disk: folders and single files, read and written without losing a bit, opened by diffusers unchanged."""

import json
import shutil
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bas.losses import average_maps
from bas.models.bundle import Models
from bas.models.config import UNetConfig
from bas.models.text import add_handles, encode_ids, tokenize
from bas.models.unet import UNet
from bas.pretrained import hub
from bas.pretrained.folder import build_networks, build_on_meta, load, save_model
from bas.pretrained.hub import find_spec, train_config
from bas.pretrained.ldm_keys import from_original, to_original
from bas.pretrained.single_file import infer_configs, save_single_file
from tests.helpers.families import UNET_FILE, change_json, refusal, tiny
from tests.helpers.tiny import refused

WHOLE = "give a whole Stable Diffusion 1.x, 2.x or XL model"
SECOND = "text_encoder_2/model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny SDXL folder that tests must not change."""
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    save_model(tiny("sdxl"), folder)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A tiny SDXL with CLIP's vocabulary, and its single file."""
    models, path = tiny("sdxl", whole_vocabulary=True), tmp_path_factory.mktemp("single") / "model.safetensors"
    save_single_file(models, path)
    return models, path


def assert_same(a: Models, b: Models) -> None:
    """The same weights, configurations and schedule."""
    for name, network in a.networks.items():
        state = b.networks[name].state_dict()
        assert network.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items()), name
    assert (a.schedule, a.zeros_for_empty) == (b.schedule, b.zeros_for_empty)
    assert a.vae.config == b.vae.config
    for spec in (a.spec, b.spec):
        assert (spec.text_encoder["eos_token_id"], spec.text_encoder_2["eos_token_id"]) == (
            spec.tokenizer.eos_token_id,
        ) * 2
    ours, theirs = (replace(m.unet.config, attention_head_dim=m.unet.config.heads) for m in (a, b))
    assert ours == theirs


def test_a_folder_returns_what_was_saved(saved):
    assert_same(tiny("sdxl"), load(saved))


def test_a_single_file_returns_what_was_saved(single):
    models, path = single
    assert_same(models, load(path))
    assert (load(path).resolution, load(path).schedule.timestep_spacing) == (64, "leading")


def test_half_precision_and_shards_are_read(saved, tmp_path):
    """Files of the variant fp16, and a UNet in two shards; the VAE stays in float32 unless its file says otherwise."""
    folder = shutil.copytree(saved, tmp_path / "model")
    for file in [*folder.glob("*/*.safetensors")]:
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_suffix(".fp16.safetensors"))
        file.unlink()
    file = folder / UNET_FILE
    names, tensors = [], load_file(file.with_suffix(".fp16.safetensors"))
    for i, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        save_file({name: tensors[name] for name in part}, file.with_name(f"shard-{i}.safetensors"))
        names += [(name, f"shard-{i}.safetensors") for name in part]
    file.with_suffix(".fp16.safetensors").unlink()
    file.with_suffix(".safetensors.index.fp16.json").write_text(json.dumps({"weight_map": dict(names)}))
    read, expected = load(folder, dtype=torch.float16), tiny("sdxl").networks
    assert {name: next(network.parameters()).dtype for name, network in read.networks.items()} == {
        "unet": torch.float16,
        "vae": torch.float32,
        "text_encoder": torch.float16,
        "text_encoder_2": torch.float16,
    }
    for name, network in read.networks.items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor.float(), expected[name].state_dict()[key].half().float())
    change_json(folder / "vae/config.json", force_upcast=False)
    assert load(folder, dtype=torch.float16).vae.post_quant_conv.weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: shutil.rmtree(f / "text_encoder_2"), "text_encoder_2/config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2 cannot be used"),
        (
            lambda f: change_json(f / "tokenizer_2/added_tokens.json", **{"<extra>": 302}),
            "tokenizer and tokenizer_2 have other tokens: bas gives one text to both",
        ),
        (
            lambda f: change_json(f / "unet/config.json", projection_class_embeddings_input_dim=97 + 48),
            "the UNet reads a pooled text of width 97, the text encoders give 96: they belong to different models",
        ),
        (
            lambda f: change_json(f / "unet/config.json", time_cond_proj_dim=256),
            "unsupported settings: time_cond_proj_dim=256",
        ),
        (
            lambda f: change_json(f / "unet/config.json", transformer_layers_per_block=[1, [1], [2, 2]]),
            "unet transformer_layers_per_block has [2, 2] for 1 transformers",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(change, message, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    change(folder)
    assert message in refusal(folder)


def test_what_other_programs_leave_in_a_single_file_changes_nothing(single, tmp_path, caplog):
    """Tables of positions in both text encoders, a wrapper's prefix, an average of the weights, a marker that is not
    used, which is named; and the settings that suit SDXL are taken."""
    models, path = single
    inside = "transformer.text_model.embeddings.position_ids"
    left = {f"conditioner.embedders.0.{inside}": 0, f"conditioner.embedders.1.model.{inside}": 0, "ztsnr": 0}
    left |= {"model_ema.decay": 0, "denoiser.sigmas": 0, "conditioner.embedders.1.model.logit_scale": 0}
    tensors = load_file(path) | {name: torch.arange(value) for name, value in left.items()}
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
    read = load(tmp_path / "m.safetensors")
    for name, network in models.networks.items():
        state = read.networks[name].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items()), name
    assert "its marker ztsnr has no effect: zero terminal SNR needs --prediction_type v_prediction" in caplog.text
    assert train_config("scene", weights=str(tmp_path / "m.safetensors")).num_class_images == 30


@pytest.mark.parametrize(
    ("name", "value"),
    [("hidden_act", "quick_gelu"), ("num_attention_heads", 4), ("layer_norm_eps", 1e-3), ("pad_token_id", 49407)],
)
def test_a_second_text_encoder_that_shapes_do_not_tell_is_not_written(single, name, value, tmp_path):
    models = replace(single[0], text_encoder_2=deepcopy(single[0].text_encoder_2))
    setattr(models.text_encoder_2.config, name, value)
    with refused("the single-file layout cannot express", f"second text encoder {name} ({value})", "save a folder"):
        save_single_file(models, tmp_path / "m.safetensors")
    assert not [*tmp_path.iterdir()]


def deeper(changes: dict) -> Models:
    """A tiny SDXL with CLIP's vocabulary and another UNet of two layers in a level."""
    models = tiny("sdxl", whole_vocabulary=True)
    return replace(models, unet=UNet(replace(models.unet.config, layers_per_block=2, **changes)).eval())


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((1, (2, 2), (3, 3)), ((3, 3, 4), (2, 1, 1), 1)),  # as SSD-1B
        ((1, (1, 1), (2, 2)), ((2, 2, 2), (1, 1, 1), 1)),  # as Segmind Vega
    ],
)
def test_smaller_relatives_fit_a_single_file(down, up, tmp_path):
    """Their configurations write out depths that are alike, the file's shapes give one number for them."""
    depths = {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up}
    models, path = deeper(depths | {"mid_block_type": "UNetMidBlock2D"}), tmp_path / "m.safetensors"
    save_single_file(models, path)
    state = load(path).unet.state_dict()
    assert state.keys() == models.unet.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in models.unet.state_dict().items())


def test_a_unet_without_a_middle_block_has_no_single_file(single, tmp_path):
    """Of SDXL and of SD 1, as small-sd: neither written nor read, and said so."""
    small = tiny("sd1", whole_vocabulary=True)
    small = replace(small, unet=UNet(replace(small.unet.config, mid_block_type=None)))
    for models in (deeper({"mid_block_type": None}), small):
        with refused("cannot express this model's unet mid_block_type (None): save a folder instead"):
            save_single_file(models, tmp_path / "m.safetensors")
    tensors = {name: tensor for name, tensor in load_file(single[1]).items() if ".middle_block." not in name}
    save_file(tensors, tmp_path / "m.safetensors")
    assert "a UNet without a middle block: give the diffusers folder" in refusal(tmp_path / "m.safetensors")


def test_velocity_and_zero_snr_survive_in_both_layouts(single, tmp_path):
    """Other programs know them by two empty tensors; bas writes and reads these."""
    models = single[0]
    schedule = replace(
        models.schedule, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    models = replace(models, schedule=schedule)
    save_single_file(models, tmp_path / "v.safetensors")
    assert load_file(tmp_path / "v.safetensors")["ztsnr"].shape == (0,)
    save_file(load_file(tmp_path / "v.safetensors"), tmp_path / "bare.safetensors")  # markers without metadata
    for file in ("v.safetensors", "bare.safetensors"):
        _, path = build_on_meta(tmp_path / file), tmp_path / file
        assert build_on_meta(path)[0].schedule == schedule
    save_model(models, tmp_path / "folder")
    assert load(tmp_path / "folder").schedule == schedule


def test_the_pooled_text_is_that_of_the_end_in_diffusers_too(tmp_path):
    """A handle's id is above the end's; with the 2 that the hub's files say, transformers would pool at the handle."""
    transformers = pytest.importorskip("transformers")
    models = tiny("sdxl")
    add_handles(models.text_encoders, models.tokenizer, ("<toy>",), (None,), seed=0)
    save_model(models, tmp_path)
    ids = tokenize(models.tokenizer, ["a photo of <toy> at the beach"])
    padded = ids.masked_fill(torch.arange(77) > ids[0].tolist().index(models.tokenizer.eos_token_id), 0)
    pooled = encode_ids(models.text_encoders, ids).pooled
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder_2")
    with torch.no_grad():
        assert torch.equal(theirs(padded).text_embeds, pooled)
        change_json(tmp_path / "text_encoder_2/config.json", eos_token_id=2)
        wrong = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder_2")
        assert (wrong(padded).text_embeds - pooled).abs().max() > 0.01


def test_diffusers_reads_the_single_file_into_the_same_weights(single, tmp_path):
    """Its own converters, with the configurations of the folder beside it."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reader under test")
    models, path = single
    save_model(models, tmp_path)
    pipeline = diffusers.StableDiffusionXLPipeline.from_single_file(path, config=str(tmp_path), local_files_only=True)
    for name, network in load(tmp_path).networks.items():
        theirs = getattr(pipeline, name).state_dict()
        ours = {key.removeprefix("text_model."): tensor for key, tensor in network.state_dict().items()}
        theirs = {key.removeprefix("text_model."): tensor for key, tensor in theirs.items()}
        assert ours.keys() == theirs.keys() - {"embeddings.position_ids"}
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items()), name


# --- At full size, on the meta device -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full():
    """SDXL base as it was published, with shapes but no weights, from the configurations in the package."""
    return build_networks(find_spec("sdxl"))


def shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def test_full_size_names_and_shapes_are_those_of_diffusers(full):
    """All four networks, and how many numbers each has."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reference")
    transformers = pytest.importorskip("transformers")
    configs = json.loads(hub.KNOWN_CONFIGS.read_text())["sdxl"]
    text = {name: transformers.CLIPTextConfig(**configs[name]) for name in ("text_encoder", "text_encoder_2")}
    with torch.device("meta"):
        theirs = {
            "unet": diffusers.UNet2DConditionModel.from_config(configs["unet"]),
            "vae": diffusers.AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": transformers.CLIPTextModel(text["text_encoder"]),
            "text_encoder_2": transformers.CLIPTextModelWithProjection(text["text_encoder_2"]),
        }
    for name, network in full.networks.items():
        assert shapes(network) == shapes(theirs[name]), name
    assert {name: sum(p.numel() for p in network.parameters()) for name, network in full.networks.items()} == {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    }
    assert (full.resolution, full.size_multiple, full.schedule.set_alpha_to_one) == (1024, 32, True)


def test_full_size_single_file_names_and_what_is_read_from_its_shapes(full):
    """Under the original names and back: no name is lost, and the shapes tell the published configuration."""
    states = {name: shapes(network).keys() for name, network in full.networks.items()}
    tensors = {
        name: dict(zip(states[name], network.state_dict().values(), strict=True))
        for name, network in full.networks.items()
    }
    original = to_original(tensors, full.unet.config, full.vae.config, open_clip=False)
    assert original["conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert original["model.diffusion_model.label_emb.0.2.weight"].shape == (1280, 1280)
    back = from_original(original, full.unet.config, full.vae.config, layers_2=32)
    assert {name: part.keys() for name, part in back.items()} == states
    unet, vae, first, second = infer_configs(original, {}, "epsilon", Path("sdxl.safetensors"))
    assert replace(unet, upcast_attention=False) == replace(full.unet.config, attention_head_dim=(5, 10, 20))
    assert vae == full.vae.config
    for found, spec in ((first, full.spec.text_encoder), (second, full.spec.text_encoder_2)):
        assert {key: spec[key] for key in found} == found


def test_full_size_single_file_names_are_those_that_diffusers_converts(full):
    """Its own converters make of them the names and shapes of its UNet, VAE and text encoders."""
    files = pytest.importorskip("diffusers.loaders.single_file_utils", reason="diffusers is the reader under test")
    configs = json.loads(hub.KNOWN_CONFIGS.read_text())["sdxl"]
    states = {name: dict(network.state_dict()) for name, network in full.networks.items()}
    tensors = {
        part: {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
        for part, state in states.items()
    }
    original = to_original(tensors, full.unet.config, full.vae.config, open_clip=False)
    prefix = "conditioner.embedders.1.model."
    found = {
        "unet": files.convert_ldm_unet_checkpoint(dict(original), configs["unet"]),
        "vae": files.convert_ldm_vae_checkpoint(dict(original), configs["vae"]),
        "text_encoder": files.convert_ldm_clip_checkpoint(
            dict(original), remove_prefix="conditioner.embedders.0.transformer."
        ),
        "text_encoder_2": files.convert_open_clip_checkpoint(full.text_encoder_2, dict(original), prefix=prefix),
    }
    for part, converted in found.items():
        theirs = {name.removeprefix("text_model."): tuple(tensor.shape) for name, tensor in converted.items()}
        assert theirs == shapes(full.networks[part]), part


def test_full_size_maps_on_a_quarter_of_the_latents_are_of_fifty_layers(full):
    """At 1024 pixels, 20 heads each: 20 layers on the way down, 30 up, and 10 in the middle, which are not averaged."""
    latents, states, pooled = (
        torch.empty(shape, device="meta") for shape in ((1, 4, 128, 128), (1, 77, 2048), (1, 1280))
    )
    with torch.no_grad():
        maps = full.unet(latents, 500, states, return_maps=(32, 32), pooled=pooled).maps
    assert Counter(m.place for m in maps) == {"down": 20, "up": 30, "mid": 10}
    assert {m.probs.shape for m in maps} == {(1, 20, 32, 32, 77)}
    assert average_maps(maps).shape == (1, 32, 32, 77)


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        (  # segmind/SSD-1B
            {
                "transformer_layers_per_block": [1, [2, 2], [4, 4]],
                "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            },
            1_331_334_404,
        ),
        (  # segmind/Segmind-Vega
            {
                "transformer_layers_per_block": [1, [1, 1], [2, 2]],
                "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 1],
            },
            745_225_604,
        ),
    ],
)
def test_smaller_relatives_are_rows_of_data(changes, count):
    """The number of the UNet's weights, as their publishers' configurations give it."""
    config = json.loads(hub.KNOWN_CONFIGS.read_text())["sdxl"]["unet"]
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_json(config | changes | {"mid_block_type": "UNetMidBlock2D"}))
    assert sum(p.numel() for p in unet.parameters()) == count


def test_what_suits_sdxl_comes_before_its_own_settings(saved, tmp_path):
    """Text encoders off and fewer class images, unless a flag or the model's bas.json says otherwise."""
    config = train_config("scene", weights=str(saved))
    assert (config.train_text_encoder, config.num_class_images) == (False, 30)
    assert train_config("scene", weights="sdxl").num_class_images == 30
    assert train_config("scene", weights="sd21-base").num_class_images == 100
    assert train_config("scene", weights=str(saved), num_class_images=7).num_class_images == 7
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "bas.json").write_text('{"train": {"train_text_encoder": true}}')
    config = train_config("scene", weights=str(folder))
    assert (config.train_text_encoder, config.num_class_images) == (True, 30)
