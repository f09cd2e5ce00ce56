"""Scenes: which images and masks are read, as which numbers, and which are refused, in which words."""

import json
import logging
import struct
import zlib
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from bas.config import TrainConfig
from bas.data.scene import resize_and_crop_box, sample_subset, subset_prompt
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.io.images import read_image, read_mask, to_floats
from tests.helpers.faults import opened, unprivileged
from tests.helpers.tiny import refused, write_scene

# Eight columns of six rows: soft values, no two rows or columns alike, black and white both present.
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
GREY[0, 0], GREY[5, 7] = 0, 255
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def save(path, array, mode=None, **options):
    """Write an array as an image file, and return its path."""
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def load(folder, **changes):
    """The scene in a folder, with default settings."""
    return load_scene(TrainConfig(instance_data_dir=str(folder), **changes))


@pytest.fixture
def scene(tmp_path):
    """A sound scene of three concepts, to be spoilt."""
    return write_scene(tmp_path / "scene", size=(40, 32))


# --- Modes --------------------------------------------------------------------------------------------------------


def test_image_keeps_its_values_in_every_mode(tmp_path):
    """Greys become three equal channels, 16 bits are rounded to 8, a palette is looked up."""
    path = tmp_path / "img.png"
    grey = np.stack([GREY] * 3, axis=-1)
    cases = {
        "L": (GREY, None, grey),
        "RGB": (RGB, None, RGB),
        "LA": (np.dstack([GREY, np.full_like(GREY, 255)]), None, grey),
        "RGBA": (np.dstack([RGB, np.full_like(GREY, 255)]), None, RGB),
        "P": (GREY, "P", grey),
        "1": (GREY > 100, None, grey * 0 + (grey > 100) * 255),
        "I;16": (GREY.astype(np.uint16) * 257, None, grey),
    }
    for mode, (array, convert, expected) in cases.items():
        save(path, array, convert)
        assert Image.open(path).mode == mode
        assert np.array_equal(np.asarray(read_image(path)), expected), mode
    save(tmp_path / "img.tif", GREY.astype(np.float32) / 255)
    assert Image.open(tmp_path / "img.tif").mode == "F"
    assert np.array_equal(np.asarray(read_image(tmp_path / "img.tif")), grey)


def test_cmyk_image_becomes_rgb(tmp_path):
    cmyk = np.zeros((6, 8, 4), np.uint8)
    cmyk[..., 0] = GREY  # cyan ink takes red away
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "img.tif")
    expected = np.stack([255 - GREY, np.full_like(GREY, 255), np.full_like(GREY, 255)], axis=-1)
    assert np.array_equal(np.asarray(read_image(tmp_path / "img.tif")), expected)


def test_transparent_pixels_become_white(tmp_path, caplog):
    alpha = np.full_like(GREY, 255)
    alpha[:, :4] = 0
    image = read_image(save(tmp_path / "img.png", np.dstack([RGB, alpha])))
    expected = RGB.copy()
    expected[:, :4] = 255
    assert np.array_equal(np.asarray(image), expected)
    assert "transparent" in caplog.text


def test_mask_is_the_channel_that_varies(tmp_path):
    """The official masks are RGBA with alpha 255 everywhere; drawing programs often do it the other way round."""
    path, flat = tmp_path / "mask0.png", np.full_like(GREY, 255)
    grey = np.stack([GREY] * 3, axis=-1)
    expected = GREY.astype(np.float32) / 255
    masks = {
        "L": GREY,
        "RGB": grey,
        "RGBA, colour": np.dstack([grey, flat]),
        "RGBA, colour, alpha half": np.dstack([grey, flat // 2]),
        "RGBA, alpha on white": np.dstack([flat, flat, flat, GREY]),
        "RGBA, alpha on black": np.dstack([flat * 0, flat * 0, flat * 0, GREY]),
        "LA, alpha": np.dstack([flat, GREY]),
        "LA, colour": np.dstack([GREY, flat]),
        "I;16": GREY.astype(np.uint16) * 257,
    }
    for name, array in masks.items():
        mask = read_mask(save(path, array))
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, GREY), name
    assert np.array_equal(read_mask(save(path, GREY, "P")), GREY)
    assert np.array_equal(read_mask(save(path, GREY > 100)), (GREY > 100) * 255)
    assert np.array_equal(read_mask(save(path, expected, format="TIFF")), GREY)


def test_mask_with_colour_and_alpha_is_ambiguous(tmp_path):
    path = save(tmp_path / "mask0.png", np.dstack([GREY, GREY, GREY, GREY[::-1]]))
    with refused(str(path), "colour and alpha both vary"):
        read_mask(path)


@pytest.mark.parametrize("bad", [-0.5, 1.5, np.nan, np.inf])
def test_float_mask_outside_black_to_white_is_refused(tmp_path, bad):
    values = GREY.astype(np.float32) / 255
    values[2, 3] = bad
    path = save(tmp_path / "mask0.tif", values)
    with refused(str(path), "values outside black to white"):
        read_mask(path)


def test_mask_of_zeros_and_ones_is_read_as_black_and_white(tmp_path, caplog):
    mask = read_mask(save(tmp_path / "mask0.png", (GREY > 100).astype(np.uint8)))
    assert np.array_equal(mask, (GREY > 100) * 255)
    assert "1 is read as inside" in caplog.text


# --- Orientation --------------------------------------------------------------------------------------------------

STORED = {  # how a camera stores the upright image, by its EXIF note (CIPA DC-008, Orientation)
    1: lambda upright: upright,
    2: np.fliplr,
    3: lambda upright: np.rot90(upright, 2),
    4: np.flipud,
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: np.rot90(upright, 2).swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_image_is_turned_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](RGB))
    path = save(tmp_path / "img.png", stored, exif=exif)
    assert np.array_equal(np.asarray(read_image(path)), RGB)


def test_mask_in_the_stored_orientation_gets_a_hint(scene):
    """40x32 as shown, 32x40 as stored: the mask that fits the stored image is refused with the reason."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(scene / "img.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(scene / "img.png", exif=exif)
    assert load(scene).image.size == (40, 32)
    mask = Image.open(scene / "mask1.png")
    mask.transpose(Image.Transpose.ROTATE_90).save(scene / "mask1.png")
    with refused("mask1.png is 32x40", "img.png is 40x32", "EXIF", "upright"):
        load(scene)


# --- Size ---------------------------------------------------------------------------------------------------------


def test_mask_of_another_size_but_the_same_shape_is_resized(scene, caplog):
    big = Image.open(scene / "mask0.png").resize((80, 64), Image.Resampling.NEAREST)
    before = load(scene).masks[0]
    big.save(scene / "mask0.png")
    after = load(scene).masks[0]
    assert "mask0.png is 80x64, img.png is 40x32: the mask is resized" in caplog.text
    assert after.shape == before.shape
    assert np.abs(to_floats(after) - to_floats(before)).mean() < 0.04  # only edges differ


def test_mask_of_another_shape_is_refused(scene):
    Image.open(scene / "mask2.png").resize((32, 32)).save(scene / "mask2.png")
    with refused("mask2.png is 32x32", "img.png is 40x32", "same shape"):
        load(scene)


@pytest.mark.parametrize(
    ("size", "square", "resized", "box"),
    [
        ((512, 512), False, (512, 512), (0, 0, 512, 512)),
        ((800, 600), False, (683, 512), (21, 0, 661, 512)),  # 683 // 64 x 64 = 640 columns from the middle
        ((600, 800), False, (512, 683), (0, 21, 512, 661)),
        ((800, 600), True, (683, 512), (85, 0, 597, 512)),
        ((513, 511), False, (514, 512), (1, 0, 513, 512)),
        ((63, 64), False, (512, 520), (0, 4, 512, 516)),
        ((1, 1), False, (512, 512), (0, 0, 512, 512)),
        ((4000, 300), False, (6827, 512), (21, 0, 6805, 512)),
    ],
)
def test_frame(size, square, resized, box):
    assert resize_and_crop_box(size, 512, 64, square) == (resized, box)


@pytest.mark.parametrize(("resolution", "sides"), [(512, (640, 512)), (520, (688, 520)), (500, (664, 500))])
def test_sides_are_multiples_of_what_divides_the_resolution(resolution, sides):
    _, (left, top, right, bottom) = resize_and_crop_box((800, 600), resolution, 64, False)
    assert (right - left, bottom - top) == sides


@pytest.mark.parametrize("square", [False, True])
def test_crop_takes_the_same_pixels_of_image_and_masks(tmp_path, square):
    """At its own size nothing is resampled: tensors are exactly the cropped arrays, soft values included."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (16, 43), dtype=np.uint8)
    save(tmp_path / "img.png", np.stack([values] * 3, axis=-1))
    save(tmp_path / "mask0.png", values)
    image, masks = load(tmp_path).tensors(16, 8, square)
    width, left = (16, 13) if square else (40, 1)
    expected = torch.from_numpy(values[:, left : left + width].astype(np.float32))
    assert image.shape == (3, 16, width)
    assert torch.equal(masks[0], expected / 255)
    assert torch.equal(image, (expected / 127.5 - 1).expand(3, -1, -1))


@pytest.mark.parametrize("size", [(100, 70), (70, 100), (33, 41)])
def test_resizing_keeps_image_and_masks_aligned(tmp_path, size):
    """A bright corner with its mask, resized by odd factors: both have their middle in the same place."""
    width, height = size
    half = np.zeros((height, width), np.uint8)
    half[height // 3 :, width // 2 :] = 255
    save(tmp_path / "img.png", np.stack([half] * 3, axis=-1))
    save(tmp_path / "mask0.png", half)
    image, masks = load(tmp_path).tensors(64, 8)
    assert image.shape[1:] == masks.shape[1:]
    assert all(side % 8 == 0 for side in masks.shape[1:])
    assert masks.min() >= 0
    assert masks.max() <= 1
    for axis, side in enumerate(masks.shape[1:]):
        profiles = [layer.mean(dim=1 - axis) for layer in (image[0] / 2 + 0.5, masks[0])]
        middles = [(profile * torch.arange(side)).sum() / profile.sum() for profile in profiles]
        assert abs(middles[0] - middles[1]) < 0.05
        assert middles[0] > side / 2


# --- Files that cannot be read ------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG of any size in a few bytes: its pixels are missing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\1\0IDAT"


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    whole = save(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    spoilt = {
        "empty": (b"", "it is empty"),
        "text": (b"this is no image\n", "not a readable PNG, JPEG, WEBP, BMP, TIFF, GIF, AVIF image"),
        "truncated": (whole.read_bytes()[:2000], "truncated"),
        "only a header": (png_header(64, 64), "truncated"),
        "120 megapixels": (png_header(12_000, 10_000), "12000x10000: more than 100 megapixels"),
        "4 gigapixels": (png_header(65_000, 65_000), "exceeds limit"),
        "gif": (b"GIF89a\x01\x00\x01\x00\x80\x00\x00", "not a readable"),
    }
    for name, (content, reason) in spoilt.items():
        path = tmp_path / f"{name}.png"
        path.write_bytes(content)
        for read in (read_image, read_mask):
            with refused(str(path), reason):
                read(path)


def test_mutated_files_are_read_or_refused(tmp_path):
    """Random damage in every format: an image or one line, never another error."""
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    read, refusals = 0, []
    path = tmp_path / "img"
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF"):
        Image.fromarray(RGB).save(path, kind, **({} if kind == "BMP" else {"exif": exif}))
        whole = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            for place in rng.integers(0, min(len(whole), 250), rng.integers(1, 6)):
                damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged[: rng.integers(1, 2 * len(damaged))])
            try:
                read_image(path)
                read += 1
            except InputError as error:
                refusals.append(str(error))
    assert min(read, len(refusals)) > 20
    assert not any("\n" in message for message in refusals)


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "PNG"])
def test_animations_are_refused(tmp_path, kind):
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    frames[0].save(tmp_path / "img", kind, save_all=True, append_images=frames[1:])
    with refused("holds several frames: save the one you mean as a still image"):
        read_image(tmp_path / "img")


@pytest.mark.parametrize("place", ["", "1"])
@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_folder_that_may_not_be_read_is_named(scene, place, mode):
    write_scene(scene / "1")
    (scene / place).chmod(mode)
    with opened(scene.parent), unprivileged(), refused(str(scene / place), "cannot be read: Permission denied"):
        load(scene)


def test_folders_and_dangling_links_are_no_masks(scene):
    mask = scene / "mask1.png"
    mask.unlink()
    mask.symlink_to(scene / "nothing")
    with refused("mask1.png is not a file"):
        load(scene)
    mask.unlink()
    mask.mkdir()
    with refused("mask1.png is not a file"):
        load(scene)


# --- Sets of masks ------------------------------------------------------------------------------------------------


def test_mask_must_show_something_and_leave_something_out(scene):
    cases = {0: "black all over", 255: "white all over"}
    for value, reason in cases.items():
        save(scene / "mask1.png", np.full((32, 40), value, np.uint8))
        with refused("mask1.png", reason):
            load(scene)


def test_map_of_labels_is_refused(scene):
    labels = np.zeros((32, 40), np.uint8)
    labels[:10], labels[10:20] = 1, 3
    save(scene / "mask1.png", labels)
    with refused("mask1.png", "3 of 255", "labels"):
        load(scene)


def test_nearly_full_mask_is_worth_a_warning(scene, caplog):
    mask = np.full((32, 40), 255, np.uint8)
    mask[0] = 0
    save(scene / "mask1.png", mask)
    load(scene)
    assert "covers 97 % of the image: is it inverted?" in caplog.text


def test_two_concepts_need_two_masks(scene):
    (scene / "mask2.png").write_bytes((scene / "mask0.png").read_bytes())
    with refused("mask2.png is the same mask as mask0.png"):
        load(scene)


def test_missing_numbers_are_named(scene):
    (scene / "mask2.png").rename(scene / "mask4.png")
    (scene / "mask0.png").rename(scene / "mask6.png")
    with refused("lacks mask0.png, mask2.png, mask3.png, mask5.png; numbers begin with 0"):
        load(scene)


def test_scene_needs_a_folder_one_image_and_a_mask(scene, tmp_path):
    with refused("nowhere does not exist: name a scene"):
        load(tmp_path / "nowhere")
    (scene / "img.jpg").write_bytes(b"")
    with refused("exactly one image", "found img.jpg, img.png"):
        load(scene)
    for name in ("img.jpg", "img.png"):
        (scene / name).unlink()
    with refused("exactly one image named img.jpg, img.png, ...; found none"):
        load(scene)
    Image.fromarray(RGB).save(scene / "IMG.JPG")
    (scene / "IMG.JPG").rename(scene / "IMG_0042.JPG")
    with refused("found none, but IMG_0042.JPG: rename the one you mean"):
        load(scene)
    (scene / "IMG_0042.JPG").unlink()
    with refused("my photo.png is not a folder", "`bas paint '", "my photo.png'` makes one of an image"):
        load(save(tmp_path / "my photo.png", RGB))
    save(scene / "img.png", RGB)
    for path in scene.glob("mask*"):
        path.unlink()
    with refused("no mask0.png"):
        load(scene)


def test_more_than_four_concepts_are_worth_a_warning(tmp_path, caplog):
    assert len(load(write_scene(tmp_path, concepts=5))) == 5
    assert "5 concepts: the method works best with up to 4" in caplog.text


def test_overlapping_masks_are_allowed(scene, caplog):
    """A part and its whole, as in the paper's decomposition of entangled concepts."""
    whole = np.asarray(Image.open(scene / "mask0.png")) // 2 + np.asarray(Image.open(scene / "mask1.png"))
    save(scene / "mask1.png", whole)
    with caplog.at_level(logging.WARNING):
        assert len(load(scene)) == 3
    assert not caplog.text


# --- Names --------------------------------------------------------------------------------------------------------


def note(scene, *concepts):
    """Write the scene's scene.json."""
    (scene / "scene.json").write_text(json.dumps({"concepts": list(concepts)}))


def test_handles_and_words_without_a_note(scene):
    read = load(scene)
    assert read.handles == ("<asset0>", "<asset1>", "<asset2>")
    assert read.words == (None, None, None)
    assert load(scene, placeholder_token="<thing>").handles == ("<thing0>", "<thing1>", "<thing2>")


def test_flags_win_over_the_note(scene):
    note(scene, {"handle": "<toy>", "word": "creature"}, {"word": "bowl"}, {})
    read = load(scene)
    assert read.handles == ("<toy>", "<asset1>", "<asset2>")
    assert read.words == ("creature", "bowl", None)
    read = load(scene, handles=("<a>", "<b>", "<c>"), initializer_tokens=("x", "y", "z"))
    assert read.handles == ("<a>", "<b>", "<c>")
    assert read.words == ("x", "y", "z")


def test_words_may_be_escaped(scene):
    (scene / "scene.json").write_text('{"concepts": [{"word": "\\ud83e\\udd8a"}, {}, {}]}')
    assert load(scene).words == ("🦊", None, None)


def test_a_pattern_of_handles_that_all_have_names_is_told(scene, caplog):
    """Whether flags name them or scene.json does; where one has no name, the pattern counts."""
    unused = "--placeholder_token <toy> has no effect: all handles have names"
    assert load(scene, handles=("a", "b", "c"), placeholder_token="<toy>").handles == ("<a>", "<b>", "<c>")
    assert caplog.messages == [unused]
    caplog.clear()
    note(scene, {"handle": "<a>"}, {"handle": "<b>"}, {"handle": "<c>"})
    load(scene, placeholder_token="<toy>")
    assert caplog.messages == [unused]
    caplog.clear()
    note(scene, {"handle": "<a>"}, {}, {"handle": "<c>"})
    assert load(scene, placeholder_token="<toy>").handles == ("<a>", "<toy1>", "<c>")
    assert not caplog.messages


def test_counts_must_agree(scene):
    with refused("--num_of_assets is 2", "3 masks"):
        load(scene, num_of_assets=2)
    with refused("--initializer_tokens gives 1 names", "3 masks"):
        load(scene, initializer_tokens=("bowl",))
    with refused("--handles gives 4 names", "3 masks"):
        load(scene, handles=("<a>", "<b>", "<c>", "<d>"))
    note(scene, {})
    with refused("names 1 concepts", "3 masks"):
        load(scene)


def test_handles_must_be_well_formed_and_different(scene):
    with refused("not all different"):
        load(scene, handles=("<a>", "<b>", "<a>"))
    for bad in ("to y", "<to y>", "<../x>", "<>", "<" + "a" * 33 + ">"):
        with refused("handle", "expected <name>"):
            load(scene, handles=("<a>", "<b>", bad))


def test_handles_may_be_given_without_the_brackets_that_a_shell_needs_quoted(scene):
    assert load(scene, handles=("toy", "<bowl>", "c")).handles == ("<toy>", "<bowl>", "<c>")
    with refused("the handles <toy> <b> <toy> are not all different"):
        load(scene, handles=("toy", "b", "<toy>"))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"concepts": 3}',
        '{"concepts": ["toy", "toy", "toy"]}',
        '{"concepts": [{"word": 1}, {}, {}]}',
        '{"concepts": [{"handle": ["<a>"]}, {}, {}]}',
        "[" * 100_000,
        '{"concepts": [{"word": "\\ud800"}, {}, {}]}',
        '{"concepts": [{"name": "toy"}, {"name": "bowl"}, {"name": "stone"}]}',
    ],
)
def test_bad_notes_are_refused(scene, content):
    (scene / "scene.json").write_text(content)
    with refused("scene.json is not"):
        load(scene)


# --- Union sampling -----------------------------------------------------------------------------------------------


def test_union_sampling_draws_the_size_first_then_the_subset_then_an_order():
    """6000 draws of N = 3: each ordered subset of size k has probability 1/3 / (number of them). Chi-square of 15."""
    generator = torch.Generator().manual_seed(0)
    draws = 6000
    counts = {}
    for _ in range(draws):
        drawn = tuple(sample_subset(3, "union", generator))
        counts[drawn] = counts.get(drawn, 0) + 1
    expected = {}
    for size, ways in ((1, 3), (2, 6), (3, 6)):
        expected |= {drawn: draws / 3 / ways for drawn in counts if len(drawn) == size}
    assert len(counts) == len(expected) == 15
    chi_square = sum((counts[drawn] - mean) ** 2 / mean for drawn, mean in expected.items())
    assert chi_square < 36.1  # 14 degrees of freedom, one seed in a thousand


def test_single_sampling_draws_one_concept_uniformly():
    generator = torch.Generator().manual_seed(0)
    drawn = [sample_subset(4, "single", generator) for _ in range(2000)]
    assert all(len(chosen) == 1 for chosen in drawn)
    counts = np.bincount([chosen[0] for chosen in drawn], minlength=4)
    assert ((counts - 500) ** 2 / 500).sum() < 16.3  # 3 degrees of freedom


def test_uniform_sampling_draws_every_subset_alike():
    """7000 draws of N = 3 over 7 subsets, and both orders of the first pair. Chi-square of 7."""
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(sample_subset(3, "uniform", generator)) for _ in range(7000)]
    counts = Counter(map(frozenset, drawn))
    assert len(counts) == 7
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 22.5  # 6 degrees of freedom
    assert {(0, 1), (1, 0)} <= set(drawn)


def test_all_concepts_in_random_order():
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(sample_subset(3, "all", generator)) for _ in range(200)}
    assert drawn == set(permutations(range(3)))


def test_one_concept_is_always_drawn():
    generator = torch.Generator().manual_seed(0)
    kinds = ("union", "uniform", "single", "all")
    assert all(sample_subset(1, kind, generator) == [0] for kind in kinds for _ in range(20))


def test_prompts():
    assert subset_prompt(["<asset1>"]) == "a photo of <asset1>"
    assert subset_prompt(("<asset2>", "<asset0>", "<x>")) == "a photo of <asset2> and <asset0> and <x>"


def test_close_ups_show_each_narrow_subset_large(tmp_path):
    """Boxes by hand: 28 of 200 columns at 0.7 of the side make a close-up of 40 x 20, moved inside the image."""
    pixels = np.random.default_rng(0).integers(256, size=(100, 200, 3), dtype=np.uint8)
    masks = np.zeros((3, 100, 200), dtype=np.uint8)
    masks[0, 4:12, 4:32] = 255  # at the upper left: its close-up is moved to begin at 0, 0
    masks[1, 40:52, 100:128] = 255  # its height decides: 12 of 100 rows make 0.171 of the side, its width 0.2
    masks[2, 90:98, 170:190] = 255
    save(tmp_path / "img.png", pixels)
    for i, mask in enumerate(masks):
        save(tmp_path / f"mask{i}.png", mask)
    assert load(tmp_path).extra_images == ()
    shots = {shot.name: shot for shot in load(tmp_path, close_ups=True).extra_images}
    assert sorted(shots) == [
        "close-up-0",
        "close-up-0-1",
        "close-up-1",
        "close-up-1-2",
        "close-up-2",
    ]  # the first and the last stand too far apart: their close-up would be the image
    corner, middle = shots["close-up-0"], shots["close-up-1"]
    assert np.array_equal(np.asarray(corner.image), pixels[:20, :40])
    assert np.array_equal(np.asarray(middle.image), pixels[36:56, 94:134])
    assert list(middle.masks) == [1]
    assert np.array_equal(middle.masks[1], masks[1, 36:56, 94:134])
    pair = shots["close-up-0-1"]
    assert sorted(pair.masks) == [0, 1]
    assert pair.image.size == (177, 89)  # 124 of 200 columns


def three_in_a_row(folder, faint=255):
    """An image of 200x100 with boxes of 10x20 pixels, the middle one as faint as given."""
    masks = np.zeros((3, 100, 200), dtype=np.uint8)
    masks[0, 40:60, 60:70], masks[1, 40:60, 95:105], masks[2, 40:60, 130:140] = 255, faint, 255
    save(folder / "img.png", np.full((100, 200, 3), 90, np.uint8))
    for i, mask in enumerate(masks):
        save(folder / f"mask{i}.png", mask)
    return folder


def test_a_faint_concept_is_in_its_close_ups(tmp_path):
    """A mask of 120 of 255 counts for the box as a white one does: 20 rows, or 45 or 80 columns, at 0.7 of the side."""
    sizes = {"0": (57, 29), "1": (57, 29), "2": (57, 29), "0-1": (64, 32), "0-2": (114, 57), "1-2": (64, 32)}
    for faint in (255, 120):
        shots = load(three_in_a_row(tmp_path, faint), close_ups=True).extra_images
        assert {shot.name: shot.image.size for shot in shots} == {
            f"close-up-{name}": size for name, size in sizes.items()
        }
        assert all((mask > 0).sum() == 200 for shot in shots for mask in shot.masks.values())


def test_close_ups_of_which_the_square_shows_no_concept_are_left_out(tmp_path):
    """Concepts 0 and 2 stand 60 columns apart, and the middle square of their close-up has 57."""
    shots = load(three_in_a_row(tmp_path), close_ups=True, center_crop=True).extra_images
    assert [shot.name.removeprefix("close-up-") for shot in shots] == ["0", "1", "2", "0-1", "1-2"]


@pytest.mark.parametrize(("concepts", "size"), [(1, (32, 32)), (3, (32, 32))])
def test_close_ups_that_add_nothing_are_told(tmp_path, caplog, concepts, size):
    """A single concept has no part, and these concepts are as high as the image."""
    caplog.set_level("INFO")
    assert load(write_scene(tmp_path / "s", concepts=concepts, size=size), close_ups=True).extra_images == ()
    assert caplog.messages == ["close_ups adds nothing: no part of the concepts is narrower than the image"]


@pytest.mark.parametrize(
    ("concepts", "settings", "told"),
    [
        (3, {"close_ups": True, "seg_mix_probability": 1.0}, "close_ups adds nothing: with Seg-Mix 1 every image"),
        (3, {"close_ups": True, "seg_mix_probability": 0.9}, ""),
        (3, {"seg_mix_probability": 1.0}, ""),
        (1, {"seg_mix_probability": 0.5}, "Seg-Mix adds nothing: every concept covers more than half of the scene"),
        (1, {"seg_mix_probability": 0.0}, ""),
        (1, {"attention_loss": "cross_entropy"}, "cross_entropy adds nothing: a single handle"),
        (1, {"attention_loss": "cross_entropy", "lambda_attention": 0.0}, ""),
        (2, {"attention_loss": "cross_entropy"}, ""),
    ],
)
def test_settings_that_add_nothing_to_a_scene_are_told(tmp_path, caplog, concepts, settings, told):
    """A single concept covers three quarters of its image."""
    caplog.set_level("INFO")
    load(three_in_a_row(tmp_path) if concepts == 3 else write_scene(tmp_path / "s", concepts=concepts), **settings)
    lines = [line for line in caplog.messages if "adds nothing" in line]
    assert len(lines) == bool(told)
    assert all(line.startswith(told) for line in lines)


def test_close_ups_of_many_concepts_are_refused_not_counted_for_ever(tmp_path):
    """Their number doubles with each concept."""
    with refused("--close_ups: 9 concepts have 510 subsets to show: expected 8 concepts or fewer, or close_ups = "):
        load(write_scene(tmp_path / "nine", concepts=9, size=(90, 32)), close_ups=True)
    assert len(load(write_scene(tmp_path / "eight", concepts=8, size=(80, 32)), close_ups=True)) == 8


def test_notes_name_handles_with_or_without_brackets(tmp_path):
    """Other notes are the user's own, but for a slip of the pen."""
    folder = write_scene(tmp_path / "scene", concepts=2)
    notes = {"concepts": [{"handle": "toy", "word": "bowl"}, {"handle": "<cat>"}]}
    (folder / "scene.json").write_text(json.dumps(notes))
    scene = load_scene(TrainConfig(str(folder)))
    assert (scene.handles, scene.words) == (("<toy>", "<cat>"), ("bowl", None))
    notes["concepts"][1] |= {"wrod": "cat", "mask": "mask1.png"}
    (folder / "scene.json").write_text(json.dumps(notes))
    with refused("scene.json", "unknown wrod; did you mean word?"):
        load_scene(TrainConfig(str(folder)))


@pytest.mark.parametrize("name", ["cutout0.png", "labels.png", "regions.json"])
def test_an_extra_image_has_no_other_source_of_masks(tmp_path, name):
    """It would not be read; in the first image it is a second source, and refused as well."""
    folder = write_scene(tmp_path / "scene", concepts=2)
    (write_scene(folder / "1", concepts=2) / name).touch()
    with refused(name, "would not be read"):
        load_scene(TrainConfig(str(folder)))
