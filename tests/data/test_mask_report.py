"""`bas masks`: what the losses will see of a scene's masks, in numbers, in words and in an image."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from bas.cli.entry import main
from bas.config import TrainConfig
from bas.data.mask_report import CELL, sheet, table, view_scene, warnings
from bas.data.scene_folder import load_scene
from bas.pretrained.folder import build_on_meta, read_spec
from tests.helpers import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def write(folder, masks, concepts=None):
    """A 32x32 scene of masks given as {file name: array of 0..255}."""
    folder.mkdir()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(folder / "img.png")
    for i, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8)).save(folder / f"mask{i}.png")
    if concepts:
        (folder / "scene.json").write_text(json.dumps({"concepts": concepts}))
    return folder


def box(rows, columns, value=255):
    mask = np.zeros((32, 32))
    mask[slice(*rows), slice(*columns)] = value
    return mask


def view(model, folder, **settings):
    config = TrainConfig(instance_data_dir=str(folder), **settings)
    return view_scene(load_scene(config), read_spec(model), config)


def test_an_outline_has_shapes_but_reads_no_weights(model):
    models, tensors = build_on_meta(model)
    assert models.resolution == 32
    assert {parameter.device.type for parameter in models.unet.parameters()} == {"meta"}
    assert set(tensors) == {"unet", "vae", "text_encoder"}


def test_numbers_of_a_scene_worked_out_by_hand(model, tmp_path):
    words = [{"word": "bowl"}, {"handle": "<toy>", "word": "stone bowl"}]
    seen = view(model, write(tmp_path / "s", [box((0, 16), (0, 16)), box((8, 24), (0, 16), 128)], words))
    first, second = seen.concepts
    assert (first.handle, first.word, first.pieces) == ("<asset0>", "bowl", ("bowl",))
    assert (second.handle, second.pieces) == ("<toy>", ("stone", "bowl"))
    assert first.coverage == 0.25
    assert first.latent.shape == (16, 16)
    assert first.attention.shape == (4, 4)
    assert first.latent.sum() == 64
    assert first.attention.sum() == 4
    assert second.attention.tolist() == [[0] * 4] + [[np.float32(128 / 255)] * 2 + [0] * 2] * 2 + [[0] * 4]
    assert first.overlaps == {1: pytest.approx(0.5 * 128 / 255)}
    assert second.overlaps == {0: pytest.approx(0.5)}


def test_the_table_is_aligned(model, tmp_path):
    words = [{"word": "bowl"}, {"handle": "<toy>"}]
    lines = table(view(model, write(tmp_path / "s", [box((0, 16), (0, 16)), box((8, 24), (0, 32))], words))).split("\n")
    assert lines == [
        "   handle    word  pieces  coverage  loss grid   attention grid  overlaps",
        "0  <asset0>  bowl  bowl    25.0%     64 of 256   4 of 16         50% in 1",
        "1  <toy>     -     -       50.0%     128 of 256  8 of 16         25% in 0",
    ]


def test_a_mask_between_the_attention_cells_is_announced(model, tmp_path):
    seen = view(model, write(tmp_path / "s", [box((2, 6), (2, 6)), box((0, 16), (8, 32))]))
    assert seen.concepts[0].vanishes == ("attention grid",)
    assert seen.concepts[0].latent.sum() == 4
    assert warnings(seen)[0] == (
        "the mask of <asset0> vanishes on the attention grid of 4x4 cells: make it larger, or raise --resolution"
    )
    assert not seen.concepts[1].vanishes


def test_cells_are_counted_as_pixels_are_width_first(model, tmp_path):
    folder = tiny.write_scene(tmp_path / "s", concepts=2, size=(64, 32))
    speck = np.zeros((32, 64), np.uint8)
    speck[2:6, 2:6] = 255  # between the cells of the attention grid
    Image.fromarray(speck).save(folder / "mask0.png")
    seen = view(model, folder, center_crop=False)
    assert seen.image.size == (64, 32)
    assert seen.concepts[0].attention.shape == (4, 8)
    assert "vanishes on the attention grid of 8x4 cells" in warnings(seen)[0]


def test_a_mask_that_vanishes_only_in_the_mirror_is_announced(model, tmp_path):
    seen = view(model, write(tmp_path / "s", [box((0, 8), (8, 9)), box((8, 32), (0, 32))]))
    assert seen.concepts[0].latent.sum() == 4
    assert seen.concepts[0].vanishes == ("loss grid", "attention grid")


def test_large_overlaps_and_words_are_worth_a_line(model, tmp_path):
    masks = [box((0, 16), (0, 16)), box((0, 32), (0, 16))]
    lines = warnings(view(model, write(tmp_path / "s", masks, [{"word": "stone bowl"}, {}])))
    assert lines == [
        "100 % of the mask of <asset0> lies in the mask of <asset1>: their handles will share what is there",
        "'stone bowl' is 2 pieces: <asset0> starts from their mean",
        "50 % of the mask of <asset1> lies in the mask of <asset0>: their handles will share what is there",
        "<asset1> has no initial word: it starts from a random row; name one in scene.json",
    ]


def test_the_sheet_shows_the_cells_that_the_losses_read(model, tmp_path):
    seen = view(model, write(tmp_path / "s", [box((2, 18), (2, 18)), box((16, 32), (16, 32))]))
    pixels = np.asarray(sheet(seen)).astype(int)
    row = (len(pixels) - 8) // 3

    def blue(rows, column, y, x):  # how blue a pixel (of 32x32) of one cell of the sheet is
        top, left = 8 + rows * row, 8 + column * (CELL + 8)
        return pixels[top + 8 * y + 4, left + 8 * x + 4, 2]

    # Concept 0's colour has no blue, so its tint shows as less of it.
    tinted = [[blue(rows, 1, y, x) < 40 for y, x in ((1, 1), (3, 3), (17, 17), (20, 20))] for rows in range(3)]
    assert tinted == [[False, True, True, False], [False, True, True, False], [False, False, True, True]]


def test_a_wide_image_has_wide_grids(model, tmp_path):
    folder = tiny.write_scene(tmp_path / "s", concepts=2, size=(64, 32))
    seen = view(model, folder)
    assert seen.concepts[0].latent.shape == (16, 32)
    assert seen.concepts[0].attention.shape == (4, 8)


def test_extra_images_have_their_own_table_rows_and_warnings(model, tmp_path):
    """A second image, wider, that shows only the second concept: cut to 32x32, counted and drawn by itself."""
    folder = write(
        tmp_path / "s", [box((0, 16), (0, 16)), box((8, 24), (0, 32))], [{"word": "bowl"}, {"word": "stone"}]
    )
    (folder / "1").mkdir()
    wide = np.zeros((32, 64), np.uint8)
    wide[2:6, 18:22] = 255  # after the cut, columns 2 to 6: between the cells of the attention grid
    Image.new("RGB", (64, 32), (0, 0, 255)).save(folder / "1" / "img.png")
    Image.fromarray(wide).save(folder / "1" / "mask1.png")
    seen = view(model, folder)
    (other,) = seen.extra
    assert (other.name, other.image.size, [c.handle for c in other.concepts]) == ("1", (32, 32), ["<asset1>"])
    assert table(seen).split("\n")[4:] == [
        "extra image 1",
        "   handle    word   pieces  coverage  loss grid  attention grid  overlaps",
        "1  <asset1>  stone  stone   1.6%      4 of 256   0 of 16         -",
    ]
    vanishes = "vanishes on the attention grid of 4x4 cells: make it larger, or raise --resolution"
    assert warnings(seen)[-1] == f"the mask of <asset1> in extra image 1 {vanishes}"
    drawn, alone = sheet(seen), sheet(replace(seen, extra=()))
    assert drawn.height > 1.8 * alone.height
    below = np.asarray(drawn)[alone.height + 8 + 200, 8 + 200]  # in the second image: it is blue
    assert below.tolist() == [0, 0, 255]


def test_the_command_prints_and_draws(model, tmp_path, capsys, caplog):
    folder = tiny.write_scene(tmp_path / "s", concepts=5)
    image = tmp_path / "out" / "masks.png"
    assert main(["masks", str(folder), "--weights", str(model), "--output_path", str(image)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{folder}: 5 concepts; the image is 32x32 pixels, 32x32 for ")
    assert [line.split()[1] for line in printed[3:8]] == [f"<asset{i}>" for i in range(5)]
    assert printed[-1] == str(image)
    assert Image.open(image).width == 8 + 6 * (CELL + 8)
    assert "5 concepts: the method works best with up to 4" in caplog.text


def test_the_command_sees_what_the_models_own_settings_show(model, tmp_path, capsys):
    """Close-ups by the model's row as by the flag, each with a table of its own."""
    own = shutil.copytree(model, tmp_path / "model")
    (own / "bas.json").write_text('{"train": {"close_ups": true}}')
    folder = write(tmp_path / "s", [box((2, 12), (2, 12)), box((16, 28), (16, 28))])
    printed = []
    for flags in (["--weights", str(own)], ["--weights", str(model), "--close_ups"], ["--weights", str(model)]):
        assert main(["masks", str(folder), *flags]) == 0
        printed.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("extra image ")])
    assert printed == [["extra image close-up-0", "extra image close-up-1"]] * 2 + [[]]


def test_a_mask_that_training_refuses_is_refused_after_it_is_drawn(model, tmp_path, capsys):
    folder, image = write(tmp_path / "s", [box((5, 6), (5, 6)), box((8, 32), (0, 32))]), tmp_path / "masks.png"
    words = [str(folder), "--weights", str(model)]
    assert main(["masks", *words, "--output_path", str(image)]) == 2
    output, errors = capsys.readouterr()
    assert "0 of 256" in output
    assert Image.open(image).width == 8 + 3 * (CELL + 8)
    refusal = (
        "bas: the mask of <asset0> vanishes on the loss grid of 16x16 cells: make it larger, or raise --resolution"
    )
    assert errors.splitlines()[-1] == refusal
    assert errors.count(refusal) == 1
    assert main(["train", *words, "--output_dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.splitlines() == [refusal]


def test_a_mask_too_small_for_the_attention_grid_is_told_once(model, tmp_path, caplog):
    folder = write(tmp_path / "s", [box((2, 6), (2, 6)), box((0, 16), (8, 32))])
    assert main(["masks", str(folder), "--weights", str(model)]) == 0
    assert len([line for line in caplog.messages if "attention" in line]) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_path", "m.pdf"], "name a .png, .jpg or .webp file"),
        (["--resolution", "33"], "--resolution 33: this model takes multiples of"),
        (["--attention_grid", "5"], "no cross-attention on 5 cells"),
        (["--initializer_tokens", " ", "a", "a"], "the initial word ' ' holds no token"),
        (["--handles", "<a>", "<b>"], "--handles gives 2 names, but"),
    ],
)
def test_bad_input_is_one_line(model, tmp_path, capsys, flags, message):
    folder = tiny.write_scene(tmp_path / "s")
    assert main(["masks", str(folder), "--weights", str(model), *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bas: ")]
    assert message in line


def test_resizing_is_that_of_the_losses(model, tmp_path):
    soft = np.add.outer(np.arange(32), np.arange(32)) * 4.0
    seen = view(model, write(tmp_path / "s", [soft, 255 - soft]))
    exact = torch.from_numpy(soft).float()[::8, ::8] / 255  # the first pixel of every cell
    assert torch.equal(torch.from_numpy(seen.concepts[0].attention), exact)
