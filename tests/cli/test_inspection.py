"""`bas info`: every kind of file and folder by its name, whether it would load, and the numbers it is made of."""

import json
import os
import re
import struct

import pytest
import torch
from PIL import ExifTags, Image, PngImagePlugin
from safetensors.torch import save_file

from bas import __version__
from bas.cli.entry import main
from bas.cli.inspection import as_text, describe, describe_machine
from bas.data.scene import subset_prompt
from bas.errors import CONTROL
from bas.io.files import human_size
from bas.io.images import save_image
from bas.io.json_files import write_json
from bas.io.run_files import save_concepts
from bas.models.bundle import COMPONENTS
from bas.models.text import add_handles
from bas.pretrained.folder import load, save_model
from bas.pretrained.hashes import weights_hash
from tests.helpers import tiny
from tests.helpers.faults import opened, unprivileged

HANDLES = ("<toy>", "<bowl>")
CONFIG = {
    "phase1_train_steps": 3,
    "phase2_train_steps": 4,
    "instance_data_dir": "scenes/toy",
    "pretrained_model_name_or_path": None,
}
NOTE = {"config": CONFIG, "handles": list(HANDLES), "base": "ab" * 32, "version": "0.0.9"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("info") / "base", "v_prediction")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The same model with handles, in half precision, without anything that bas notes about a run."""
    models = load(base)
    add_handles(models.text_encoders, models.tokenizer, HANDLES, (None, None), seed=0)
    folder = tmp_path_factory.mktemp("info") / "tuned"
    save_model(models, folder, torch.float16)
    return folder


def test_a_base_model_in_numbers(base):
    facts, models = describe(base), load(base)
    counts = {c: sum(v.numel() for v in getattr(models, c).state_dict().values()) for c in COMPONENTS}
    assert (facts["what"], facts["loads"]) == ("a base model", True)
    assert facts["parameters"] == counts | {"total": sum(counts.values())}
    assert facts["bytes"] == 4 * sum(counts.values())
    assert (facts["family"], facts["resolution"]) == ("Stable Diffusion 1", 32)
    assert (facts["prediction type"], facts["precision"]) == ("v_prediction", "fp32")
    assert (facts["hash"], facts["known as"], facts["handles"]) == (weights_hash(base), None, [])


def test_without_hash_no_weight_is_read(base, monkeypatch):
    monkeypatch.setattr("bas.cli.inspection.weights_hash", lambda path: pytest.fail("the weights were hashed"))
    monkeypatch.setattr("bas.pretrained.loading.is_finite", lambda tensor: pytest.fail("a weight was read"))
    assert "hash" not in describe(base, hashes=False)


def test_handles_without_a_run_are_the_official_codes(tuned):
    facts = describe(tuned)
    assert facts["what"] == "a model with handles, as the official code writes it"
    assert (facts["handles"], facts["precision"]) == (list(HANDLES), "fp16")


def test_a_finished_run_tells_where_it_comes_from(tuned, tmp_path):
    run = tmp_path / "run"
    run.symlink_to(tuned, target_is_directory=True)
    save_concepts(run, [torch.zeros(2, tiny.WIDTH)], torch.ones(2, 32, 48), HANDLES, NOTE)
    facts = describe(run)
    concepts = describe(run / "concepts.safetensors")
    (tuned / "concepts.safetensors").unlink()
    assert (facts["what"], facts["loads"], facts["handles"]) == ("a finished run of bas", True, list(HANDLES))
    assert (facts["trained at"], facts["steps"]) == ("48x32 pixels", "3 + 4")
    assert (facts["base"], facts["base hash"]) == ("mini", "ab" * 32)
    assert facts["written by"] == "bas 0.0.9"
    assert (concepts["what"], concepts["handles"]) == ("the concepts of a run of bas", list(HANDLES))
    assert concepts["problem"] == f"it is part of a run: give the folder {run}"


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    write_json(tmp_path / "settings.json", NOTE)
    (tmp_path / "metrics.jsonl").write_text("{}\n{}\n{}\n")
    assert describe(tmp_path)["problem"] == "its training has not ended: it has no checkpoint: start it again"
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "manifest.json", {})
    facts = describe(tmp_path)
    assert facts["problem"] == "its training has not ended: add --resume_from_checkpoint latest to continue"
    assert (facts["what"], facts["steps done"]) == ("an unfinished run of bas", 3)
    assert facts["checkpoints"] == ["step-000002"]


@pytest.mark.parametrize("note", [{}, NOTE | {"config": 3}, NOTE | {"handles": [1]}, NOTE | {"base": None}])
def test_a_run_whose_notes_are_spoilt_is_told(tmp_path, note):
    write_json(tmp_path / "settings.json", note)
    facts = describe(tmp_path)
    assert facts["loads"] is False
    assert facts["problem"].startswith(f"{tmp_path / 'settings.json'} is not as bas wrote it (")


def bitmap(side: int) -> bytes:
    """The header of a square .bmp file, without its pixels."""
    return b"BM" + struct.pack("<IIIIiiHH", 54, 0, 54, 40, side, side, 1, 24) + bytes(24)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"nothing", "is not a readable PNG, JPEG, WEBP, BMP, TIFF, GIF, AVIF image: "),
        (bitmap(12_000), "is 12000x12000: more than 100 megapixels, make it smaller"),
        (bitmap(65_000), "exceeds limit"),  # Pillow's own
    ],
    ids=["broken", "large", "a bomb"],
)
def test_a_scene_with_a_broken_image_is_told(tmp_path, content, problem):
    scene = tiny.write_scene(tmp_path / "scene", concepts=2)
    (scene / "img.png").write_bytes(content)
    facts = describe(scene)
    assert (facts["what"], facts["loads"]) == ("a folder", False)
    assert facts["problem"].startswith(f"{scene / 'img.png'} is ")
    assert problem in facts["problem"]


def test_a_folder_that_may_not_be_read_is_told(tmp_path):
    scene = tiny.write_scene(tmp_path / "scene")
    scene.chmod(0)
    with opened(tmp_path), unprivileged():
        facts = describe(scene)
    assert (facts["what"], facts["loads"]) == ("a folder", False)
    assert facts["problem"].endswith("cannot be read: Permission denied")


def test_a_scene_is_named_and_counted(tmp_path):
    scene = tiny.write_scene(tmp_path / "scene", concepts=2, size=(48, 32))
    facts = describe(scene)
    assert (facts["what"], facts["loads"]) == ("a scene to train on", False)
    assert (facts["image"], facts["masks"]) == ("img.png, 48x32 pixels", ["mask0.png", "mask1.png"])


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("unet.down_blocks.0.lora_A.weight", "a LoRA"),
        ("emb_params", "a textual inversion embedding"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("something.else", "a .safetensors file"),
    ],
)
def test_files_of_other_kinds_have_a_name_and_a_reason(key, what, tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({key: torch.zeros(4, 6, dtype=torch.bfloat16)}, path, {"author": "somebody"})
    facts = describe(path)
    assert (facts["what"], facts["loads"]) == (what, False)
    assert (facts["tensors"], facts["parameters"]) == (1, {"total": 24})
    assert (facts["precision"], facts["metadata"]["author"]) == ("bf16", "somebody")
    assert facts["problem"].startswith(str(path))


def test_a_model_that_lacks_a_weight_would_not_load(tuned, tmp_path):
    models = load(tuned)
    save_model(models, tmp_path)
    weights = models.unet.state_dict()
    del weights["conv_in.bias"]
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    facts = describe(tmp_path)
    assert facts["what"] == "a diffusers folder"
    assert facts["problem"].endswith("(1): conv_in.bias is missing")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("model.ckpt", b"\x80\x02}q\x00.......", "is a pickled checkpoint"),
        ("page.safetensors", b"<!DOCTYPE html><html></html>", "is a web page"),
        ("empty.safetensors", b"", "holds 0 bytes, so it is not a model"),
        ("notes.txt", b"just a few words of text", "is a text file: name the folder of a model"),
    ],
)
def test_what_is_no_model_says_why(name, content, problem, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    facts = describe(path)
    assert (facts["what"], facts["loads"]) == ("a file", False)
    assert problem in facts["problem"]


def test_an_empty_name_is_refused(capsys):
    """A shell variable that is not set, rather than the machine."""
    assert main(["info", ""]) == 2
    assert "the model's name is empty" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pipe", "pipe.png", "pipe.safetensors"])
def test_a_pipe_is_not_opened(name, tmp_path):
    """That would wait for ever."""
    os.mkfifo(tmp_path / name)
    facts = describe(tmp_path / name)
    assert (facts["what"], facts["loads"]) == ("a file", False)
    assert facts["problem"] == f"{tmp_path / name} is not an ordinary file"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_an_image_tells_its_settings(tmp_path, suffix):
    """In the note of a PNG or the EXIF comment of others; that of another program is not taken for them."""
    mine, others = (tmp_path / f"{name}{suffix}" for name in "ab")
    save_image(Image.new("RGB", (6, 4)), mine, {"prompt": subset_prompt(HANDLES), "seed": 7})
    exif = Image.Exif()
    exif[ExifTags.Base.UserComment] = '{"workflow": "of another program"}'
    Image.new("RGB", (6, 4)).save(others, exif=exif)
    ours, other = describe(mine), describe(others)
    assert (ours["what"], ours["size"]) == ("an image made by bas", "6x4 pixels")
    assert json.loads(ours["made with"]) == {"prompt": "a photo of <toy> and <bowl>", "seed": 7}
    assert (other["what"], "made with" in other) == ("an image", False)


def test_foreign_text_cannot_forge_a_line_or_reach_the_terminal(tmp_path):
    """From a file's name, its metadata, a tensor's name, and the settings of an image."""
    path = tmp_path / "x\nloads  yes.safetensors"
    save_file({"a\x1b[31m": torch.zeros(1)}, path, {"title\r": "fine\nloads  yes\x1b]0;t\x07", "note": "\u202egnp"})
    image = Image.new("RGB", (4, 4))
    save_image(image, tmp_path / "a.png", {"prompt": "x"})
    with Image.open(tmp_path / "a.png") as opened:
        extra = PngImagePlugin.PngInfo()
        extra.add_itxt("bas", "one\ntwo\x9b2J")
        opened.save(tmp_path / "b.png", pnginfo=extra)
    for file in (path, tmp_path / "b.png"):
        details = describe(file)
        lines = as_text({"path": str(file), **details}).splitlines()
        assert sum(line.startswith("loads") for line in lines) == 1
        assert not CONTROL.search("".join(lines))
    assert "made with  one\\ntwo\\x9b2J" in lines
    assert "note: \\u202egnp" in as_text(describe(path))


@pytest.mark.parametrize("length", [4000, 4001, 3_000_000])
def test_a_long_note_is_cut_where_it_is_printed(length, tmp_path):
    """An image carries notes of any length; --json has them whole."""
    note = PngImagePlugin.PngInfo()
    note.add_itxt("bas", "x" * length, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=note)
    details = describe(tmp_path / "a.png")
    if "made with" not in details:  # Pillow reads no note of megabytes
        assert length == 3_000_000
        return
    assert details["made with"] == "x" * length
    end = f"... ({length - 4000} more characters: --json prints all)" if length > 4000 else ""
    assert as_text(details).splitlines()[-1].split()[2:] == ("x" * 4000 + end).split()


def test_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("BAS_CACHE", str(tmp_path))
    (tmp_path / "file").write_bytes(bytes(2500))
    facts = describe_machine()
    assert (facts["bas"], facts["torch"]) == (__version__, torch.__version__)
    assert facts["caches"][str(tmp_path)].startswith("2.5 kB, ")
    assert facts["devices"][-1].startswith("cpu ")
    assert facts["models"]["sd15"] == "not here: bas download sd15"


def test_sizes_and_lines():
    assert [human_size(n) for n in (0, 999, 1000, 4_265_146_304, 2e12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "4.3 GB", "2.0 TB",
    ]  # fmt: skip
    facts = {"what": "x", "loads": True, "handles": ["<a>", "<b>"], "hash": None, "parameters": {"unet": 1234}}
    facts |= {"caches": {"/c": "empty", "/d": "1 kB"}}
    assert as_text(facts).splitlines() == [
        "what        x",
        "loads       yes",
        "handles     <a> <b>",
        "parameters  unet 1,234",
        "caches      /c: empty",
        "            /d: 1 kB",
    ]


def test_the_command_prints_lines_or_json(base, capsys):
    assert main(["info", str(base)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^loads +yes$", text, re.MULTILINE)
    assert re.search(r"^prediction type +v_prediction$", text, re.MULTILINE)
    assert main(["info", str(base), "--json", "--no_hash"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["path"], facts["what"], "hash" in facts) == (str(base), "a base model", False)
    assert main(["info", "no/such-place/here"]) == 2
    assert capsys.readouterr().err.startswith("bas: no/such-place/here does not exist")
