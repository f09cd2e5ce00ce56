"""What is no Stable Diffusion 1.x, 2.x or XL model is refused by name, in one line, and nothing in it is ever run."""

import ast
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import bas
from bas.models.bundle import COMPONENTS
from bas.pretrained.folder import load
from bas.pretrained.single_file import CLIP_VOCABULARY
from bas.pretrained.unsupported import check_merges
from tests.helpers.families import UNET_FILE, change_json, refusal
from tests.helpers.tiny import refused

INCOMPLETE = "is missing: the model is incomplete, download it again"
WHOLE = "give a whole Stable Diffusion 1.x, 2.x or XL model"
NO_PICKLE = "a pickle can run any program when it is opened, so bas opens none: use the model's .safetensors version"


# --- Folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "is a Stable Diffusion XL refiner (StableDiffusionXLImg"),
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "is an inpainting model (StableDiffusionXLInpaint"),
        (
            {"_class_name": "StableDiffusionXLControlNetPipeline"},
            "is a ControlNet pipeline of Stable Diffusion XL (StableDiffusionXLControlNetPipeline): ",
        ),
        ({"_class_name": "StableDiffusionXLPipeline"}, "has None as its text_encoder_2, bas needs CLIPTextModelWith"),
        ({"_class_name": "StableDiffusion3Pipeline"}, "is a Stable Diffusion 3 model (StableDiffusion3Pipeline): "),
        ({"_class_name": "FluxPipeline"}, "is a Flux model (FluxPipeline): "),
        (
            {"_class_name": "StableDiffusionInpaintPipeline"},
            "is an inpainting model (StableDiffusionInp",
        ),
        ({"unet": ["diffusers", "SD3Transformer2DModel"]}, "has 'SD3Transformer2DModel' as its unet, bas needs UNet2D"),
        ({"text_encoder": ["my_code", "Evil"]}, "has 'Evil' as its text_encoder, bas needs CLIPTextModel: "),
        ({"vae": "AutoencoderKL; import os"}, "has 'AutoencoderKL; import os' as its vae, bas needs AutoencoderKL: "),
    ],
)
def test_other_pipelines_are_refused_by_name(changes, reason, folder):
    change_json(folder / "model_index.json", **changes)
    message = refusal(folder)
    assert message.startswith(f"{folder} {reason}")
    assert message.endswith(WHOLE)


@pytest.mark.parametrize(
    ("channels", "kind"),
    [(9, "an inpainting model"), (5, "a depth model"), (8, "an InstructPix2Pix model"), (7, "an upscaler")],
)
def test_models_with_further_inputs_are_refused_by_name(channels, kind, folder):
    change_json(folder / "unet/config.json", in_channels=channels)
    assert refusal(folder) == f"{folder} is {kind} ({channels} input channels): use the base model it was made from"


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        (
            "unet/config.json",
            {"block_out_channels": [10**9, 64, 64]},
            "unet block_out_channels is 1000000000",
        ),
        (
            "unet/config.json",
            {"block_out_channels": [32] * 99},
            "unet block_out_channels' levels is 99",
        ),
        (
            "unet/config.json",
            {"addition_embed_type": "image"},
            "unet addition_embed_type is 'image': expected text_time, or none",
        ),
        ("text_encoder/config.json", {"vocab_size": 10**12}, "text encoder vocab_size is 1000000000000: expected"),
        (
            "text_encoder/config.json",
            {"hidden_size": 128},
            "the UNet reads text of width 64, the text encoder gives",
        ),
        ("text_encoder/config.json", {"model_type": "t5"}, "the text encoder is a 't5': bas needs a CLIP text model"),
        (
            "vae/config.json",
            {"latent_channels": 16},
            "the UNet has 4 latent channels, the VAE 16",
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "scheduler prediction_type is 'sample'"),
    ],
)
def test_configurations_are_checked_before_anything_is_allocated(file, changes, reason, folder):
    change_json(folder / file, **changes)
    assert reason in refusal(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("unet/config.json", {"block_out_channels": None}),
        ("unet/config.json", {"down_block_types": [["CrossAttnDownBlock2D"]] * 3}),
        ("vae/config.json", {"block_out_channels": 5}),
        ("vae/config.json", {"scaling_factor": "x"}),
        ("text_encoder/config.json", {"layer_norm_eps": "x"}),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 1.5}),
    ],
)
def test_values_of_the_wrong_type_are_blamed_on_their_file(file, changes, folder):
    change_json(folder / file, **changes)
    assert refusal(folder).startswith(f"{folder / file} cannot be used: ")


@pytest.mark.parametrize(
    ("file", "content"),
    [("vocab.json", "{"), ("vocab.json", "[1]"), ("merges.txt", "#version\nzz qq\n"), ("added_tokens.json", "{")],
)
def test_damaged_tokenizers_are_refused(file, content, folder):
    (folder / "tokenizer" / file).write_text(content)
    assert refusal(folder).startswith(f"{folder / 'tokenizer'}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_a_tokenizer_in_another_encoding_is_named(file, encoding, folder):
    path = folder / "tokenizer" / file
    path.write_bytes(path.read_text().encode(encoding))
    message = refusal(folder)
    assert message.startswith(f"{path} is not ") or message.startswith(f"{path} is no ")
    assert "UTF-" in message
    assert "save it as UTF-8" in message


def test_a_tokenizer_reads_only_its_own_folder(folder, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    elsewhere = str(tmp_path / "other.json")
    before = load(folder).tokenizer("a photo").input_ids
    change_json(
        folder / "tokenizer/tokenizer_config.json",
        vocab_file=elsewhere,
        tokenizer_file=elsewhere,
        model_max_length=10**30,
    )
    tokenizer = load(folder).tokenizer
    assert tokenizer("a photo").input_ids == before
    assert tokenizer.model_max_length == 77


def words_and_merges(folder: Path, layout: str, merges: int) -> Path:
    """A vocabulary of 2000 words, of which 514 need no merge, and so many merges: in two files, or in one."""
    folder.mkdir()
    words = {f"w{i}": i for i in range(2000)}
    if layout == "tokenizer.json":
        model = {"vocab": words, "merges": [["a", "b"]] * merges}
        (folder / layout).write_text(json.dumps({"model": model}))
    else:
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "a b\n" * merges)
    return folder


@pytest.mark.parametrize("layout", ["merges.txt", "tokenizer.json"])
def test_merges_that_were_cut_off_are_refused(layout, tmp_path):
    """2000 - 514 words need a merge each, and 2 % of 2000 may lack theirs."""
    check_merges(words_and_merges(tmp_path / "whole", layout, 1446))
    check_merges(CLIP_VOCABULARY)
    folder = words_and_merges(tmp_path / "cut", layout, 1445)
    with refused(f"{folder / layout} holds 1445 merges, too few for the 2000 words of the vocabulary: it is cut off"):
        check_merges(folder)


def test_vocabulary_and_rows_must_agree(folder):
    rows = json.loads((folder / "text_encoder/config.json").read_text())["vocab_size"]
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps({"<asset0>": rows}))
    (folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    assert refusal(folder) == (
        f"{folder}: the tokenizer has {rows + 1} tokens, the text encoder {rows} rows: they belong to different models"
    )


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", 7, None])
def test_shards_stay_in_the_folder(name, folder):
    (folder / UNET_FILE).unlink()
    index = folder / f"{UNET_FILE}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": name}}))
    assert refusal(folder) == f"{index} names a shard {name!r}: expected a .safetensors file beside it"


def test_a_missing_shard_is_named(folder):
    (folder / UNET_FILE).unlink()
    index = folder / f"{UNET_FILE}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.bias": "part-1.safetensors"}}))
    assert refusal(folder) == f"{folder / 'unet/part-1.safetensors'} {INCOMPLETE}"


def test_pickled_weights_in_a_folder_are_refused(folder):
    (folder / UNET_FILE).rename(folder / "unet/diffusion_pytorch_model.bin")
    assert refusal(folder) == (f"{folder / 'unet'} holds only pickled weights (.bin): {NO_PICKLE}")


def test_incomplete_folders_are_refused(folder):
    (folder / UNET_FILE).unlink()
    assert refusal(folder).startswith(f"{folder / 'unet'} holds no diffusion_pytorch_model.safetensors: ")
    (folder / "vae/config.json").unlink()
    assert refusal(folder) == f"{folder / 'vae/config.json'} {INCOMPLETE}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[1]", "holds list, not a JSON object"),
        (" " * (2**24 + 1), "is larger than any configuration"),
        (b"\xff\xfe{}", "is not valid JSON"),
    ],
    ids=["cut", "deep", "list", "huge", "utf16"],
)
def test_bad_json_is_named(content, reason, folder):
    path = folder / "unet/config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(folder).startswith(f"{path} {reason}")


def test_folders_that_are_no_models(folder, tmp_path):
    assert refusal(folder / "unet") == (
        f"{folder / 'unet'} holds UNet2DConditionModel, one part of a model: give the folder of the whole model"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal(empty) == f"{empty} is not a model: it has neither model_index.json nor unet, vae and text_encoder"
    (empty / "model.safetensors").touch()
    assert refusal(empty) == f"{empty} is not a diffusers folder: give a file in it, as {empty / 'model.safetensors'}"
    (empty / "pytorch_lora_weights.safetensors").touch()
    assert (
        refusal(empty)
        == f"{empty} is a LoRA: it holds changes to a model: name the model, and add the file with --lora"
    )


def test_code_in_a_folder_is_never_run(folder, tmp_path):
    canary = tmp_path / "canary"
    program = f"open({str(canary)!r}, 'w')\n"
    for place in (folder, *(folder / part for part in (*COMPONENTS, "tokenizer", "scheduler"))):
        for name in ("modeling.py", "pipeline.py", "__init__.py"):
            (place / name).write_text(program)
    for config in ("text_encoder/config.json", "tokenizer/tokenizer_config.json"):
        change_json(folder / config, auto_map={"AutoModel": "modeling.Model", "AutoTokenizer": ["modeling.T", None]})
    load(folder)
    assert not canary.exists()


# --- The sources of bas -------------------------------------------------------------------------------------------

SOURCES = sorted(Path(bas.__file__).parent.rglob("*.py"))
NEVER_IMPORTED = {"pickle", "shelve", "marshal", "dill", "cloudpickle", "joblib", "subprocess", "pty", "runpy"}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "os.system", "os.popen"}
MAY_BE_TRUE = {"trust_remote_code", "allow_pickle", "shell"}  # and must not
STARTS_PROCESSES = "jobs.py"  # of the studio: bas itself, for a job
OWN_PROCESS = ["words = [sys.executable, '-m', 'bas', 'studio', '--job', job]", "subprocess.Popen(words, "]


def test_the_sources_hold_nothing_that_unpickles_or_runs_data():
    """Nor a shell, nor a module by a name that is not written out, but for five tables of modules in the sources.

    One place starts a process: bas itself.
    """
    by_name = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.name}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [name.name for name in node.names] + [getattr(node, "module", None) or ""]
                allowed = {"subprocess"} if path.name == STARTS_PROCESSES else set()
                assert not {name.split(".")[0] for name in names} & NEVER_IMPORTED - allowed, where
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in NEVER_CALLED, where
                assert not [k.arg for k in node.keywords if k.arg in MAY_BE_TRUE and ast.unparse(k.value) != "False"]
                if called == "importlib.import_module" and not isinstance(node.args[0], ast.Constant):
                    by_name.append(path.name)
    assert len(SOURCES) > 40
    assert by_name == ["__init__.py", "entry.py", "libraries.py", "app.py", "worker.py"]


def test_the_studio_starts_no_other_program_than_bas():
    (path,) = (path for path in SOURCES if path.name == STARTS_PROCESSES)
    source = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
    assert [source.count(text) for text in OWN_PROCESS] == [1, 1]
    used = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    started = {name.removeprefix("subprocess.") for name in used if name.startswith("subprocess.")}
    assert started - {"PIPE", "DEVNULL", "DETACHED_PROCESS", "CREATE_NEW_PROCESS_GROUP"} == {"Popen"}
    assert source.count("subprocess.Popen(") == 1


@pytest.mark.parametrize(("package", "least"), [("torch", (2, 10)), ("transformers", (5, 3)), ("pillow", (12, 2))])
def test_versions_with_known_holes_are_not_installed(package, least):
    """torch CVE-2025-32434 and CVE-2026-24747, transformers CVE-2026-4372, Pillow CVE-2026-40192."""
    setup = (Path(bas.__file__).parents[1] / "setup.py").read_text(encoding="utf-8")
    (floor,) = re.findall(rf'"{package}>=([0-9.]+)"', setup)
    assert tuple(map(int, floor.split("."))) >= least


# --- Files --------------------------------------------------------------------------------------------------------


class Canary:
    """A pickle that would leave a file behind if it were ever opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "model.bin", "model.pt"])
@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_pickles_are_refused_unopened(name, kind, tmp_path):
    path, canary = tmp_path / name, tmp_path / "canary"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    else:
        path.write_bytes(pickle.dumps(Canary(canary)))
    what = "a zip archive, most likely a pickled PyTorch checkpoint" if kind == "zip" else "a pickled checkpoint"
    assert refusal(path) == (f"{path} is {what}: {NO_PICKLE}")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a Git LFS pointer, not the weights: run ",
        ),
        (b"<!DOCTYPE html><html></html>", "is a web page: the download went wrong"),
        (b"\n  <html>denied</html>", "is a web page: the download went wrong"),
        (b"GGUF\x03\0\0\0\0\0\0\0", "is a GGUF file: use the model's .safetensors version"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "is a JPEG image: use a .safetensors file"),
        (b"7z\xbc\xaf\x27\x1c\0\x04", "is an archive: unpack it"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\x03", "is an archive: unpack it"),
        (b'{"_class_name": "StableDiffusionPipeline"}', "is a text file: name the folder of a model"),
        (b"model:\r\n  target: ldm\r\n", "is a text file: name the folder of a model"),
    ],
    ids=["lfs", "html", "html2", "gguf", "jpeg", "7z", "gz", "json", "yaml"],
)
def test_files_that_hold_no_tensors(content, reason, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} {reason}")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "is a LoRA: it holds changes to a model"),
        (["unet.down_blocks.0.attentions.0.to_k.lora_A.weight"], "is a LoRA: it holds changes to a model"),
        (["unet.up_blocks.1.attn.processor.to_q.lora.up.weight"], "is a LoRA: it holds changes to a model"),
        (["<toy>"], "is a textual inversion embedding: name a model, and add the file with --embedding"),
        (["emb_params"], "is a textual inversion embedding: name a model, and add the file with --embedding"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], f"is a VAE alone: {WHOLE}"),
        (["first_stage_model.encoder.conv_in.weight"], f"is a VAE alone: {WHOLE}"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], f"is a UNet alone: {WHOLE}"),
        (["text_model.embeddings.token_embedding.weight"], f"is a text encoder alone: {WHOLE}"),
        (["control_model.input_blocks.0.0.weight"], f"is a ControlNet: {WHOLE}"),
        (["controlnet_cond_embedding.conv_in.weight"], f"is a ControlNet: {WHOLE}"),
        (["conditioner.embedders.1.x", "model.diffusion_model.x"], "holds no VAE: use the full file"),
        (["edm_mean", "edm_std", "model.x"], f"is a Playground 2.5 model, of another noise schedule (EDM): {WHOLE}"),
        (
            ["edm_vpred.sigma_max", "model.diffusion_model.x"],
            f"is a CosXL model, of another noise schedule (EDM): {WHOLE}",
        ),
        (["model.diffusion_model.joint_blocks.0.x"], f"is a Stable Diffusion 3 model: {WHOLE}"),
        (["double_blocks.0.img_attn.qkv.weight"], f"is a Flux model: {WHOLE}"),
        (["fc.weight"], f"is not a Stable Diffusion model (its first key is 'fc.weight'): {WHOLE}"),
        (["model.diffusion_model.x", "cond_stage_model.x"], "holds no VAE: use the full file, not one without it"),
        (["model.diffusion_model.x", "first_stage_model.x"], "holds no text encoder: use the full file"),
    ],
)
def test_other_kinds_of_safetensors_are_refused_by_name(names, reason, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(1, 4) for name in names}, path)
    assert refusal(path).startswith(f"{path} {reason}")


def test_paths_that_are_no_files(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'} {INCOMPLETE}"
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert refusal(tmp_path / "link").startswith(f"{tmp_path / 'link'} is a link to a file that is missing: ")
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"{tmp_path / 'pipe'} is not an ordinary file"
