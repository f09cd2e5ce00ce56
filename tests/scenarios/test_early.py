"""Wrong input is found before any weight is read: in one line, with exit code 2, in under two seconds."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bas.cli.entry import main
from bas.errors import InputError
from bas.pretrained.folder import save_model
from tests.helpers.faults import opened, unprivileged
from tests.helpers.tiny import Bench, taught, write_scene

HANDLES = "known handles: <asset0>, <asset1>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base model, a taught one, a scene, and all kinds of broken input: read only."""
    folder = tmp_path_factory.mktemp("early")
    bench = Bench(folder)
    save_model(taught(bench.model), folder / "taught")
    mask = np.asarray(Image.open(bench.scene / "mask0.png"))

    def spoil(name: str, file: str, content: bytes | Image.Image) -> None:
        target = shutil.copytree(bench.scene, folder / name) / file
        content.save(target) if isinstance(content, Image.Image) else target.write_bytes(content)

    spoil("text", "img.png", b"this is no image")
    spoil("truncated", "mask1.png", (bench.scene / "mask1.png").read_bytes()[:60])
    spoil("black", "mask1.png", Image.fromarray(mask * 0))
    spoil("wide", "mask1.png", Image.new("L", (64, 32), 255))
    spoil("same", "mask1.png", Image.fromarray(mask))
    spoil("both", "mask1.png", Image.fromarray(np.dstack([mask, mask.T])))
    spoil("gap", "mask7.png", Image.fromarray(mask.T))
    spoil("notes", "scene.json", b"[]")
    spoil("two", "img.jpg", b"")
    write_scene(folder / "crowd", concepts=37, size=(37 * 8, 32))
    Image.new("L", (32, 32), 0).save(folder / "black.png")
    speck = Image.new("L", (32, 32), 0)
    speck.putpixel((5, 5), 255)
    speck.save(folder / "speck.png")
    spoil("tiny", "mask1.png", speck)
    for path in shutil.copytree(bench.scene, folder / "strip").glob("*.png"):
        Image.open(path).resize((600, 1)).save(path)
    (folder / "run").mkdir()
    (folder / "stopped").mkdir()
    (folder / "stopped" / "metrics.jsonl").touch()
    (folder / "file").touch()
    (folder / "settings").mkdir()
    (folder / "settings" / "settings.json").write_text("{")
    (folder / "list.json").write_text(json.dumps([{"mask": "black.png", "prompt": "a bowl"}]))
    return folder


@pytest.fixture
def no_weights(monkeypatch):
    """Reading the values of weights fails loudly: filling a network, hashing its files."""

    def read(*args, **kwargs):
        pytest.fail("weights were read")

    monkeypatch.setattr("bas.pretrained.folder.load_weights", read)
    monkeypatch.setattr("bas.pretrained.hashes._file_hash", read)
    monkeypatch.setattr("bas.data.mask_proposals.load_segmenter", read)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", read)


TRAIN = [
    (
        "train {scene} --weights {model} --phase1_train_steps -1",
        "--phase1_train_steps is -1: expected a whole number from 0",
    ),
    ("train {scene} --weights {model} --phase1_train_steps 0 --phase2_train_steps 0", "both phases have 0 steps"),
    ("train {scene} --weights {model} --device abacus", "--device abacus cannot be used here"),
    ("train {scene} --weights {unset}", "the model's name is empty"),
    ("train {scene} --weights {model} --class_data_dir {unset}", "--class_data_dir is empty: leave it out"),
    ("train {scene} --weights {file}", "file holds 0 bytes, so it is not a model"),
    ("train {scene} --weights {scene}", "scene is not a model"),
    ("train {scene} --weights {model} --handles <a> <b>", "--handles gives 2 names, but"),
    ("train {scene} --weights {model} --handles <a> <b> c.", "handle '<c.>': expected <name>"),
    ("train {scene} --weights {model} --num_of_assets 2", "--num_of_assets is 2, but"),
    ("train {scene} --weights {model} --output_dir {file}", "cannot write to --output_dir"),
    ("train {scene} --weights {model} --output_dir {model}", "model is not empty: name a new folder"),
    ("train {scene} --weights {model} --output_dir {scene}", "scene is not empty: name a new folder"),
    ("train {scene} --weights {model} --class_data_dir {file}", "--class_data_dir"),
    ("train {scene} --weights {model} --class_data_dir {file}/new", "file is not a folder"),
    (
        "train {scene} --weights {model} --class_data_dir {text}",
        "text is a scene, it has mask0.png: name a folder of class images",
    ),
    ("train {scene} --weights {model} --device meta", "--device meta cannot be used here: it computes nothing"),
    ("train {scene} --weights {model} --output_dir {run} --resume_from_checkpoint {none}", "none"),
    ("train {scene} --weights {model} --resolution 33", "--resolution 33: this model takes multiples of 2 pixels"),
    ("train {scene} --weights {model} --attention_grid 5", "no cross-attention on 5 cells"),
    ("train {scene} --weights {model} --initializer_tokens a a \\x20", "the initial word ' ' holds no token"),
    ("train {scene} --weights {taught}", "handle <asset0> is already a token of this model: choose another name"),
    ("train {scene} --weights {model} --class_prompt <dog>", "unknown handle <dog> in '<dog>'"),
    ("train {scene} --weights {model} --preview_inference_steps 1001", "1001 denoising steps: this model was trained"),
    ("train {scene} --weights {model} --output_dir r\udce9n", "--output_dir 'r\\udce9n' is not UTF-8"),
    ("train {scene} --weights {model} --class_prompt a \udce9", "--class_prompt '\\udce9' is not UTF-8"),
    (
        "train {scene} --weights ~nobody-of-this-name/m",
        "~nobody-of-this-name/m does not exist, and is not a known model",
    ),
    ("train {tiny} --weights {model}", "the mask of <asset1> vanishes on the loss grid of"),
    ("train {strip} --weights {model}", "an image of 600x1 would become 19200x32 for the model: crop it"),
    ("train {crowd} --weights {model}", "37 concepts: a prompt of this model has room for 36 handles: use fewer masks"),
    ("train {crowd} --weights {model} --close_ups", "--close_ups: 37 concepts have 137438953470 subsets to show"),
    ("train {long} --weights {model}", "xxx cannot be read: File name too long"),
    ("train {scene} {long} --weights {model}", "xxx cannot be read: File name too long"),
    ("train {scene} --config {long}", "xxx does not exist"),
    (
        "train {scene}/img.png --weights {model}",
        "img.png is not a folder: a scene is a folder with img.jpg and mask0.png",
    ),
    ("train {none} --weights {model}", "none does not exist: name a scene, a folder with img.jpg and mask0.png"),
    ("train {text} --weights {model}", "text/img.png is not a readable PNG, JPEG, WEBP, BMP, TIFF, GIF, AVIF image"),
    ("train {truncated} --weights {model}", "truncated/mask1.png is not a readable PNG, JPEG, WEBP, BMP, TIFF"),
    ("train {black} --weights {model}", "black/mask1.png is black all over: paint the concept white"),
    ("train {wide} --weights {model}", "wide/mask1.png is 64x32, img.png is 32x32: they must have the same shape"),
    ("train {same} --weights {model}", "same/mask1.png is the same mask as mask0.png"),
    ("train {both} --weights {model}", "both/mask1.png: colour and alpha both vary, so which is the mask?"),
    ("train {gap} --weights {model}", "gap has masks up to mask7.png but lacks mask3.png"),
    ("train {notes} --weights {model}", "notes/scene.json is not {{"),
    ("train {two} --weights {model}", "two needs exactly one image named img.jpg, img.png, ...; found img.jpg, img"),
]
SAMPLE = [
    ("sample {taught}", "no prompt: add --prompt"),
    ("sample {unset} --prompt bowl", "the model's name is empty"),
    ("sample {stopped} --prompt a", "stopped is an unfinished run: train on with --resume_from_checkpoint latest"),
    ("sample {taught} --prompt <asset2>", f"unknown handle <asset2> in '<asset2>'; {HANDLES}"),
    ("sample {taught} --prompt bowl asset0>", f"unknown handle asset0> in 'asset0>'; {HANDLES}"),
    ("sample {taught} --prompt bowl --negative_prompt <toy>", f"unknown handle <toy> in '<toy>'; {HANDLES}"),
    ("sample {taught} --prompt (<asset0>:9)", "(<asset0>:9): a strength is a number from 0 to 5"),
    ("sample {model} --prompt <asset0>", "known handles: none: this is a base model"),
    ("sample {taught} --prompt bowl --height 31", "--height 31: this model takes multiples of 2 pixels"),
    ("sample {taught} --prompt bowl --num_inference_steps 1001", "1001 denoising steps: this model was trained with"),
    ("sample {taught} --prompt bowl --num_inference_steps 1000 --sampler dpmpp_2m", "1000 denoising steps: this model"),
    ("vary {taught} --output_dir {new} --num_inference_steps 1001", "1001 denoising steps: this model was trained"),
    ("explore {taught} --output_dir {new} --num_inference_steps 1001", "1001 denoising steps: this model was trained"),
    ("attend {taught} --output_dir {new} --prompt <asset0> --num_inference_steps 1001", "1001 denoising steps"),
    ("sample {taught} --prompt bowl --num_images 0", "--num_images is 0: expected a whole number from 1"),
    ("sample {taught} --prompt bowl --output_path a.gif", "--output_path a.gif: name a .png, .jpg or .webp file"),
    ("sample {taught} --prompt bowl --output_path {file}/a.png", "file is in the way"),
    ("sample {taught} --prompt bowl --device abacus", "--device abacus cannot be used here"),
    ("sample {none} --prompt bowl", "none does not exist, and is not a known model"),
    ("vary {model} --output_dir {new}", "has no handles: give the folder of a finished `bas train`"),
    ("vary {taught} --output_dir {scene}", "scene is not empty: name a new folder"),
    ("vary {taught} --output_dir {new} --width 13", "--width 13: this model takes multiples of 2 pixels"),
    ("vary {taught} --output_dir {new} --negative_prompt <toy>", "unknown handle <toy> in '<toy>'"),
    ("explore {model} --output_dir {new}", "has no handles: give the folder of a finished `bas train`"),
    (
        "explore {taught} --output_dir {new} --contexts snow <toy>",
        "unknown handle <toy> in 'a photo of <asset0> <toy>'",
    ),
    ("explore {taught} --output_dir {new} --eta 2", "--eta is 2.0: expected a finite number, 0 or more"),
    ("attend {taught} --output_dir {new} --prompt bowl", "'bowl' holds no handle: name one, or ask for all --words"),
    ("attend {taught} --output_dir {new} --prompt <toy>", f"unknown handle <toy> in '<toy>'; {HANDLES}"),
    ("attend {taught} --output_dir {new} --prompt <asset0> --attention_grid 5", "no cross-attention on 5 cells"),
    ("attend {taught} --output_dir {new} --prompt <asset0> --height 9", "--height 9: this model takes multiples of 2"),
    ("attend {taught} --output_dir {new} --prompt <asset0> --negative_prompt <toy>", "unknown handle <toy> in '<toy>'"),
]
EDIT = [
    ("--init_image {scene}/img.png --prompt bowl", "name a region and a prompt: --mask with --prompt, or --regions"),
    ("--init_image {text}/img.png --mask {scene}/mask0.png --prompt bowl", "text/img.png is not a readable PNG"),
    ("--init_image {scene}/img.png --mask {wide}/mask1.png --prompt bowl", "wide/mask1.png is 64x32, img.png is 32x32"),
    ("--init_image {scene}/img.png --mask {black}/mask1.png --prompt bowl", "mask1.png is black all over: paint white"),
    ("--init_image {scene}/img.png --mask {folder}/speck.png --prompt bowl", "covers no cell of the 16x16 grid"),
    (
        "--init_image {scene}/img.png --mask {scene}/mask0.png --prompt <toy>",
        f"unknown handle <toy> in '<toy>'; {HANDLES}",
    ),
    ("--init_image {scene}/img.png --mask {scene}/mask0.png --prompt bowl --height 9", "--height 9: this model takes"),
    ("--init_image {scene}/img.png --mask {scene}/mask0.png --prompt a --num_inference_steps 1001", "1001 denoising"),
    (
        "--init_image {scene}/img.png --mask {scene}/mask0.png --prompt bowl --output_path x",
        "name a .png, .jpg or .webp",
    ),
    ("--init_image {scene}/img.png --regions {folder}/list.json", "black.png is black all over"),
    ("--init_image {scene}/img.png --regions {none}", "none does not exist"),
    (
        "--init_image {scene}/img.png --mask {scene}/mask0.png --prompt bowl --output_path {scene}/img.png",
        "img.png is an input of this command: name another file",
    ),
    (
        "--init_image {scene}/img.png --mask {scene}/mask0.png --prompt bowl --output_path {scene}/mask0.png",
        "mask0.png is an input of this command: name another file",
    ),
    ("--init_image {scene}/img.png --regions {long}", "xxx does not exist"),
]
OTHERS = [
    ("masks {black} --weights {model}", "black/mask1.png is black all over"),
    ("masks {scene} --weights {model} --resolution 33", "--resolution 33: this model takes multiples of 2 pixels"),
    ("masks {long} --weights {model}", "xxx cannot be read: File name too long"),
    ("masks {long} --auto sam", "xxx cannot be read: File name too long"),
    ("masks {scene} --weights {model} --output_path {scene}/mask0.png", "mask0.png is an input of this command"),
    ("masks {scene} --weights {model} --points 1,2", "--points needs --auto"),
    ("masks {scene}/img.png --auto clipseg --output_dir {new}", "--auto clipseg needs --words, one per concept"),
    ("masks {scene}/img.png --auto clipseg --points 1,2 --output_dir {new}", "--points is for --auto sam, not clipseg"),
    (
        "masks {scene}/img.png --auto sam --threshold 2 --output_dir {new}",
        "--threshold is 2.0: expected a finite number, more than 0",
    ),
    (
        "masks {scene}/img.png --auto sam --points 99,2 --output_dir {new}",
        "'99,2': expected x,y in pixels, inside 32x32",
    ),
    ("masks {scene} --auto sam", "scene has masks already: name another --output_dir"),
    ("report {none}", "none is not a run of bas: it has no settings.json"),
    ("report {settings}", "settings/settings.json is not valid JSON"),
    ("export {taught} {new}.safetensors", "taught has a vocabulary of its own: a single file carries no tokenizer"),
    ("export {model} {new}.ckpt", "new.ckpt: name a .safetensors file in an existing folder"),
    ("export {model} {new}/a.safetensors", "new/a.safetensors: name a .safetensors file in an existing folder"),
    ("export {text} {new}.safetensors", "text is not a model"),
    ("info {none}", "none does not exist, and is not a known model"),
]
CASES = [*TRAIN, *SAMPLE, *((f"edit {{taught}} {rest}", message) for rest, message in EDIT), *OTHERS]
NAMES = ("scene", "model", "taught", "file", "run", "none", "settings", "stopped")
NAMES += ("text", "truncated", "black", "wide", "same", "both", "gap", "notes", "two", "tiny", "crowd", "strip")


def arguments(line: str, place: Path, new: Path) -> list[str]:
    """A line of a case as the shell would give it. new: a path where nothing is yet."""
    paths = {name: place / name for name in NAMES} | {"folder": place, "new": new, "long": "x" * 300, "unset": ""}
    return [word.format(**paths).replace("\\x20", " ") for word in line.split()]


@pytest.mark.parametrize(("line", "message"), CASES, ids=[line for line, _ in CASES])
def test_wrong_input_is_found_before_weights_are_read(line, message, place, tmp_path, no_weights, capsys):
    began = time.process_time()
    assert main(arguments(line, place, tmp_path / "new")) == 2
    taken = time.process_time() - began
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("bas: ")
    assert message.replace("{{", "{") in errors
    assert taken < 2


@pytest.mark.parametrize("place_of_scene", [".", "one"])
@pytest.mark.parametrize("command", ["train {scenes} --weights {model}", "masks {scenes}/one --weights {model}"])
def test_a_folder_that_may_not_be_read_is_bad_input(command, place_of_scene, place, tmp_path, no_weights, capsys):
    locked = write_scene(tmp_path / "scenes" / "one").parent / place_of_scene
    locked.chmod(0)
    with opened(place), opened(tmp_path), unprivileged():
        assert main(command.format(scenes=tmp_path / "scenes", model=place / "model").split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"bas: {locked}")
    assert errors.endswith(" cannot be read: Permission denied\n")


@pytest.mark.parametrize("line", ["sample {taught} --prompt bowl", "export {model} {new}.safetensors"])
def test_sound_input_does_read_them(line, place, tmp_path, no_weights):
    """Else the test above would hold for any command."""
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        main(arguments(line, place, tmp_path / "new"))


def test_steps_of_previews_that_nobody_asked_for_are_not_looked_at(place, tmp_path, no_weights):
    line = "train {scene} --weights {model} --output_dir {new} --img_log_steps 0 --preview_inference_steps 1001"
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        main(arguments(line, place, tmp_path / "new"))


def test_a_scene_whose_name_is_not_utf8_is_refused(place, tmp_path, no_weights, capsys):
    scene = os.fsdecode(os.fsencode(tmp_path) + b"/sc\xe9ne")
    shutil.copytree(place / "scene", scene)
    assert main(["train", scene, "--weights", str(place / "model"), "--output_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"bas: --instance_data_dir {scene!r} is not UTF-8: rename it\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line", ["sample {none} --prompt bowl", "report {none}", "masks {black}"])
def test_debug_shows_the_trace(line, place, tmp_path):
    with pytest.raises(InputError):
        main(arguments(f"{line} --debug", place, tmp_path / "new"))
