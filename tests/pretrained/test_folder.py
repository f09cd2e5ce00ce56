"""Model folders: what is read is what was written, diffusers agrees, and every wrong weight is named."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bas.io import tensors as tensor_files
from bas.models.bundle import COMPONENTS, Models
from bas.models.config import UNetConfig, VAEConfig
from bas.models.text import add_handles, build_text_encoder
from bas.pretrained import hashes, loading
from bas.pretrained.component_files import component_files
from bas.pretrained.folder import load, save_model
from bas.pretrained.hashes import weights_hash
from bas.sampling.prompt_strength import encode_prompts
from bas.schedulers import NoiseSchedule
from tests.helpers.families import FAMILIES, TEXT_FILE, UNET_FILE, VAE_FILE, change_json, change_tensors, refusal, tiny

PROMPTS = ["a photo of a toy at the beach", "a bowl!"]


def states(models: Models) -> dict[str, torch.Tensor]:
    """All weights by name."""
    return {f"{c}.{k}": v for c in COMPONENTS for k, v in getattr(models, c).state_dict().items()}


def assert_same_weights(a: Models, b: Models) -> None:
    left, right = states(a), states(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# --- Round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_returns_what_was_saved(family, tmp_path):
    models = tiny(family)
    save_model(models, tmp_path)
    again = load(tmp_path)
    assert_same_weights(models, again)
    assert again.unet.config.heads == models.unet.config.heads
    assert again.vae.config == models.vae.config
    assert again.schedule.to_json() == models.schedule.to_json()
    assert again.tokenizer(PROMPTS).input_ids == models.tokenizer(PROMPTS).input_ids
    assert (again.resolution, again.size_multiple) == (768 if family == "sd2-v" else 512, 8 * 4)
    assert (again.handles, again.source, again.unet.training) == ((), tmp_path, False)
    assert all(p.requires_grad for p in again.unet.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_the_folder_unchanged(family, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the reader under test")
    models = tiny(family)
    add_handles(models.text_encoders, models.tokenizer, ("<toy-1>", "<Bowl>"), ("toy", None), seed=0)
    save_model(models, tmp_path)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)

    prompt = ["a photo of <toy-1> and <Bowl>, at the beach!"]
    ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    # In double precision, so that the order of sums does not matter and only the weights do.
    pipeline.to(torch.float64)
    models.to(dtype=torch.float64)
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 700])
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        text = encode_prompts(models.text_encoders, models.tokenizer, prompt)
        context = text.states.expand(2, -1, -1)
        torch.testing.assert_close(pipeline.text_encoder(ids)[0], text.states, atol=1e-6, rtol=0)
        ours = models.unet(x, t, context).sample
        torch.testing.assert_close(pipeline.unet(x, t, context).sample, ours, atol=1e-6, rtol=0)
        ours = models.vae.encode(image).mean
        torch.testing.assert_close(pipeline.vae.encode(image).latent_dist.mean, ours, atol=1e-6, rtol=0)
        torch.testing.assert_close(pipeline.vae.decode(x).sample, models.vae.decode(x), atol=1e-6, rtol=0)
    expected = "v_prediction" if family == "sd2-v" else "epsilon"
    assert pipeline.scheduler.config.prediction_type == expected
    assert pipeline.vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16"}, {"max_shard_size": "1MB"}], ids=["whole", "fp16", "shards"]
)
def test_a_folder_written_by_diffusers_opens(options, saved, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: it is the writer under test")
    dtype = torch.float16 if "variant" in options else torch.float32
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(saved, local_files_only=True, torch_dtype=dtype)
    pipeline.save_pretrained(tmp_path, **options)
    assert len(component_files(tmp_path / "unet", "diffusion_pytorch_model")) > (
        1 if "max_shard_size" in options else 0
    )
    models = load(tmp_path)
    expected = load(saved).to(dtype=dtype).to(dtype=torch.float32)
    assert_same_weights(models, expected)
    assert models.tokenizer(PROMPTS).input_ids == expected.tokenizer(PROMPTS).input_ids


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_converted_on_the_way_in_and_out(dtype, saved, tmp_path):
    models = load(saved, dtype=dtype)
    assert {v.dtype for v in states(models).values()} == {dtype}
    save_model(models, tmp_path, dtype)
    assert {t.dtype for t in load_file(tmp_path / UNET_FILE).values()} == {dtype}
    assert_same_weights(load(tmp_path, dtype=dtype), models)


def mapped_bytes(folder: Path) -> int:
    """Bytes of files in a folder that this process has in its address space."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]
    ends = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return sum(end - begin for begin, end in ends)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what a process has mapped")
def test_what_is_converted_leaves_the_address_space(saved, monkeypatch):
    """Else a model's files would stay in memory beside it until the last weight: two thirds of the peak in bf16."""
    total, count, seen = len(states(load(saved))), itertools.count(), []

    def look(_tensor):
        """At every tenth weight and at the last ten: looking through all that is mapped takes a while."""
        if (number := next(count)) % 10 == 0 or number >= total - 10:
            seen.append(mapped_bytes(saved))
        return True

    monkeypatch.setattr(tensor_files, "MAPPED_ALONE", 1)  # these are small: as if they were large
    monkeypatch.setattr(loading, "WORTH_THREADS", 1)
    monkeypatch.setattr(loading, "is_finite", look)
    models = load(saved, dtype=torch.bfloat16)
    sizes = [file.stat().st_size for file in saved.rglob("*.safetensors")]
    assert next(count) == total == len(states(models))
    assert max(seen) > 0.99 * sum(sizes)
    assert min(seen) < 0.02 * sum(sizes)  # the last ones, in whatever order the threads come to them
    assert mapped_bytes(saved) == 0
    models = load(saved)
    assert mapped_bytes(saved) == 0  # nothing was converted, and yet a later change of the files changes no weight


def test_handles_become_rows_and_tokens(tmp_path):
    models = tiny("sd2")
    rows = len(models.tokenizer)
    (embedding,) = add_handles(models.text_encoders, models.tokenizer, ("<toy>", "<Bowl-2>"), ("toy", None), seed=1)
    save_model(models, tmp_path)

    matrix = load_file(tmp_path / TEXT_FILE)["text_model.embeddings.token_embedding.weight"]
    assert torch.equal(matrix, torch.cat([embedding.weight, embedding.handles]))
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["vocab_size"] == rows + 2
    assert json.loads((tmp_path / "tokenizer/added_tokens.json").read_text()) == {"<toy>": rows, "<Bowl-2>": rows + 1}

    again = load(tmp_path)
    assert again.handles == ("<toy>", "<Bowl-2>")
    prompts = ["a photo of <toy> and <Bowl-2>, at the beach"]
    ours = encode_prompts(models.text_encoders, models.tokenizer, prompts)
    assert torch.equal(encode_prompts(again.text_encoders, again.tokenizer, prompts).states, ours.states)
    save_model(again, tmp_path / "twice")
    assert (tmp_path / "twice" / TEXT_FILE).read_bytes() == (tmp_path / TEXT_FILE).read_bytes()


def test_a_run_of_the_official_code_opens(folder):
    """It has old tokenizer files with added_tokens.json, old VAE names, a position counter, no steps_offset."""
    rows = json.loads((folder / "text_encoder/config.json").read_text())["vocab_size"]
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps({"<asset0>": rows, "<asset1>": rows + 1}))
    old = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {f"{kind}_token": old | {"content": "<|endoftext|>"} for kind in ("eos", "unk")}
    special |= {"bos_token": old | {"content": "<|startoftext|>"}, "pad_token": "!"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "errors": "replace", **special}
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    change_json(folder / "text_encoder/config.json", vocab_size=rows + 2)
    (folder / "scheduler/scheduler_config.json").write_text(
        json.dumps({"_class_name": "DDPMScheduler", "clip_sample": False, "beta_schedule": "scaled_linear"}).replace(
            "}", ', "beta_start": 0.00085, "beta_end": 0.012}'
        )
    )

    def old_text(tensors):
        name = "text_model.embeddings.token_embedding.weight"
        tensors[name] = torch.cat([tensors[name], torch.ones(2, 64)])
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    def old_vae(tensors):
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, old in names.items():
            for key in [key for key in tensors if f".{new}." in key]:
                tensors[key.replace(f".{new}.", f".{old}.")] = tensors.pop(key)

    before = load_file(folder / VAE_FILE)
    change_tensors(folder / TEXT_FILE, old_text)
    change_tensors(folder / VAE_FILE, old_vae)
    models = load(folder)
    assert models.handles == ("<asset0>", "<asset1>")
    assert models.tokenizer("a <asset1>", add_special_tokens=False).input_ids[-1] == rows + 1
    assert torch.equal(models.text_encoder.get_input_embeddings().weight[-2:], torch.ones(2, 64))
    assert models.schedule.steps_offset == 1  # as in diffusers' pipeline
    assert all(torch.equal(value, before[key]) for key, value in models.vae.state_dict().items())


def test_position_ids_survive_the_meta_device(saved):
    models = load(saved)
    buffers = {name: b for name, b in models.text_encoder.named_buffers() if name.endswith("position_ids")}
    assert [b.flatten().tolist() for b in buffers.values()] == [list(range(77))]
    assert not any(b.is_meta for network in (models.unet, models.vae, models.text_encoder) for b in network.buffers())


def test_text_keys_without_prefix_open_too(saved, folder):
    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("text_model.")] = tensors.pop(key)

    change_tensors(folder / TEXT_FILE, strip)
    assert_same_weights(load(folder), load(saved))


def test_prediction_type_can_be_overridden(saved):
    assert load(saved).schedule.prediction_type == "epsilon"
    assert load(saved, prediction_type="v_prediction").schedule.prediction_type == "v_prediction"


def test_the_published_configurations_are_understood():
    """The config.json files of Stable Diffusion 1.5 and 2.1 as they stand on the hub."""
    common = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.10.0.dev0",
        "act_fn": "silu",
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    sd15 = {"attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}
    sd21 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96}
    sd21 |= {"dual_cross_attention": False, "only_cross_attention": False, "num_class_embeds": None}
    sd21 |= {"use_linear_projection": True, "upcast_attention": True}
    assert UNetConfig.from_json(common | sd15) == UNetConfig()
    config = UNetConfig.from_json(common | sd21)
    assert (config.heads, config.sample_size, config.use_linear_projection) == ((5, 10, 20, 20), 96, True)
    vae = {"act_fn": "silu", "latent_channels": 4, "sample_size": 768, "block_out_channels": [128, 256, 512, 512]}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    for advice in ({}, {"force_upcast": True}, {"force_upcast": False}):
        assert VAEConfig.from_json(vae | advice) == VAEConfig(sample_size=768, **advice)
    schedule = {"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    schedule |= {"beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True}
    schedule |= {"steps_offset": 1, "trained_betas": None, "clip_sample": False, "prediction_type": "v_prediction"}
    assert NoiseSchedule.from_json(schedule).prediction_type == "v_prediction"
    text = {"attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu"}
    text |= {"hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 77, "pad_token_id": 1}
    text |= {"num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768, "vocab_size": 49408}
    with torch.device("meta"):
        assert sum(p.numel() for p in build_text_encoder(text).parameters()) == 123_060_480


# --- Writing --------------------------------------------------------------------------------------------------------


def test_a_model_can_be_saved_over_its_own_mapped_files(saved, folder):
    models = load(folder)
    models.unet.conv_in.bias.data.fill_(3.0)
    save_model(models, folder)
    assert load_file(folder / UNET_FILE)["conv_in.bias"].unique().tolist() == [3.0]
    assert torch.equal(load(folder).unet.conv_out.weight, load(saved).unet.conv_out.weight)


def test_a_failed_save_leaves_the_old_file_and_no_other(folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def disk_full(tensors, path, metadata):
        Path(path).write_bytes(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_files, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tiny("sd1"), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_index_is_written_last(tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    save_model(tiny("sd1"), tmp_path)
    assert order[-1] == "model_index.json"
    assert len(order) == 13


# --- Strict reading -------------------------------------------------------------------------------------------------


def test_all_wrong_keys_are_listed_in_one_error(folder):
    def spoil(tensors):
        del tensors["conv_in.bias"]
        tensors["extra.weight"] = torch.zeros(1)
        tensors["conv_out.bias"] = torch.zeros(5)

    change_tensors(folder / UNET_FILE, spoil)
    assert refusal(folder) == (
        f"{folder} (unet) does not hold the weights that its configuration describes (3): conv_in.bias is missing; "
        "extra.weight is unexpected; conv_out.bias is [5] instead of [4]"
    )


def test_a_long_list_of_wrong_keys_is_counted(folder):
    change_tensors(folder / UNET_FILE, lambda tensors: [tensors.pop(key) for key in sorted(tensors)[:33]])
    message = refusal(folder)
    assert message.count("is missing") == 20
    assert message.endswith("; and 13 more")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(4, dtype=torch.int64), "conv_out.bias is int64, not fp16, bf16 or fp32"),
        (torch.zeros(4, dtype=torch.uint8), "conv_out.bias is uint8, not fp16, bf16 or fp32"),
        (torch.zeros(4).to(torch.float8_e4m3fn), "conv_out.bias is float8_e4m3fn, not fp16, bf16 or fp32"),
        (torch.full((4,), torch.nan), "conv_out.bias holds values that are not finite numbers"),
        (torch.tensor([0, 1, torch.inf, 0]), "conv_out.bias holds values that are not finite numbers"),
    ],
    ids=["int64", "uint8", "fp8", "nan", "inf"],
)
def test_unusable_weights_are_refused(value, reason, folder):
    change_tensors(folder / UNET_FILE, lambda tensors: tensors.update({"conv_out.bias": value}))
    assert refusal(folder) == f"{folder} (unet) holds broken weights (1): {reason}"


@pytest.mark.parametrize("marked", ["every file", "tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json"])
def test_byte_order_marks_change_nothing(marked, saved, tmp_path):
    """As an editor of Windows writes them, in any description of a model."""
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    texts = [path for path in copy.rglob("*") if path.suffix in (".json", ".txt")]
    assert len(texts) > 6
    for path in texts if marked == "every file" else [copy / marked]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    models, plain = load(copy), load(saved)
    assert_same_weights(models, plain)
    text = "a photo of a bowl"
    assert models.tokenizer(text).input_ids == plain.tokenizer(text).input_ids
    assert models.tokenizer.get_vocab() == plain.tokenizer.get_vocab()


# --- Hashes ---------------------------------------------------------------------------------------------------------


def test_weights_hash_follows_the_content_and_is_remembered(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED", 0)
    first, copy = weights_hash(folder), shutil.copytree(folder, tmp_path / "copy")
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert weights_hash(copy) == first
    file = Path(copy) / UNET_FILE
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", lambda *args: pytest.fail("a file was read"))
        assert weights_hash(copy) == first
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = weights_hash(copy)  # the same size and time of change, another ctime
    assert changed != first
    other = file.with_name("other")
    content[-1] ^= 2
    other.write_bytes(content)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, file)  # and another inode
    assert weights_hash(copy) not in (first, changed)


def test_the_hash_of_a_file_that_was_just_written_is_not_remembered(tmp_path, monkeypatch):
    """The clock of a file system may stand still between two writes."""
    monkeypatch.setenv("BAS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "abc").write_bytes(b"abc")
    weights_hash(tmp_path / "abc")
    assert not (tmp_path / "cache" / "hashes.json").exists()


@pytest.mark.parametrize("entry", ["x", {"state": None}, {"sha256": 5}, {"sha256": "a" * 63}, {"sha256": ["a"]}])
def test_a_damaged_memory_of_hashes_is_made_anew(tmp_path, monkeypatch, entry, caplog):
    monkeypatch.setenv("BAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED", 0)
    (tmp_path / "abc").write_bytes(b"abc")
    first, memory = weights_hash(tmp_path / "abc"), tmp_path / "cache" / "hashes.json"
    sound = json.loads(memory.read_text())
    ((key, value),) = sound.items()
    memory.write_text(json.dumps({key: {**value, **entry} if isinstance(entry, dict) else entry}))
    assert weights_hash(tmp_path / "abc") == first
    assert json.loads(memory.read_text()) == sound
    for text in (b"", b"[]", b'{"a": ', b"\xff\xfe{", b"[" * 100_000):
        memory.write_bytes(text)
        assert weights_hash(tmp_path / "abc") == first
        assert json.loads(memory.read_text()) == sound
    assert caplog.text.count("it is made again") == 5


def test_weights_hash_of_a_file_is_its_sha256(tmp_path, monkeypatch):
    monkeypatch.setenv("BAS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "abc").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert weights_hash(tmp_path / "abc") == abc
    assert weights_hash(tmp_path / "abc", remembered=False) == abc
