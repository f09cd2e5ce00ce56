"""Odd and bad images, masks and scenes, case by case: the exact values where they are read, the words where not.

What each module promises by itself stands in tests/data.
"""

import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import bas
from bas.config import TrainConfig
from bas.data.mask_formats import read_cutout
from bas.data.mask_report import view_scene, warnings
from bas.data.scene_folder import load_scene
from bas.errors import InputError
from bas.io.images import FORMATS, read_image, read_mask
from bas.pretrained.folder import read_spec
from tests.helpers.tiny import refused, write_model, write_scene

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
UNREADABLE = "is not a readable PNG, JPEG, WEBP, BMP, TIFF, GIF, AVIF image: "


def save(path, array, **options):
    """Write an array as an image file, and return its path."""
    Image.fromarray(array).save(path, **options)
    return path


def pixels(path):
    """The image's values, as nested lists."""
    return np.asarray(read_image(path)).tolist()


def load(folder, **changes):
    return load_scene(TrainConfig(instance_data_dir=str(folder), **changes))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(path, depth, colour_type, row, more=b""):
    """A PNG of one row that Pillow itself would not write. row: its bytes; more: chunks before it."""
    width = 8 * len(row) // (depth * {0: 1, 2: 3, 4: 2, 6: 4}[colour_type])
    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    data = chunk(b"IHDR", header) + more + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


@pytest.fixture
def scene(tmp_path):
    """A sound scene of three concepts, to be spoilt."""
    return write_scene(tmp_path / "scene", size=(40, 32))


# --- Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_the_content_counts_not_the_extension(tmp_path, kind):
    path = tmp_path / ("img.png" if kind != "PNG" else "img.jpg")
    save(path, np.full((6, 8, 3), 77, np.uint8), format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert pixels(path) == [[[77] * 3] * 8] * 6


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "DDS", "SGI"])
def test_other_formats_are_refused_under_any_name(tmp_path, kind):
    path = save(tmp_path / "img.png", RGB, format=kind)
    with refused(f"{path} {UNREADABLE}it is none of these, or damaged; convert it"):
        read_image(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.7, 0.95])
def test_a_truncated_file_is_refused_not_filled_up(tmp_path, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / "img.png", noise, format=kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with refused(
        f"{path} {UNREADABLE}",
        {"WEBP": "could not create decoder object", "AVIF": ""}.get(kind, "is truncated"),
    ):
        read_image(path)


def make_loop(path):
    path.symlink_to(path)


def make_circle(path):
    path.symlink_to("other.png")
    (path.parent / "other.png").symlink_to(path)


@pytest.mark.parametrize("make", [make_loop, make_circle, os.mkfifo, Path.mkdir], ids=lambda make: make.__name__)
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / "mask0.png")
    with refused(f"{tmp_path / 'mask0.png'} is not a file"):
        read_mask(tmp_path / "mask0.png")


def test_a_name_that_no_file_can_have_is_refused(tmp_path):
    for name, shown in (("x" * 300, "x" * 300), ("a\0b", "a\\x00b")):
        with refused(f"{tmp_path / shown} does not exist"):
            read_image(tmp_path / name)


def test_of_a_phones_two_images_in_a_jpeg_the_first_is_read(tmp_path):
    second = Image.new("RGB", (4, 3))
    options = {"format": "MPO", "save_all": True, "append_images": [second], "quality": 95}
    path = save(tmp_path / "img.jpg", RGB, **options)
    with Image.open(path) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    assert pixels(path) == pixels(save(tmp_path / "plain.jpg", RGB, quality=95))
    assert read_mask(path).shape == GREY.shape


def test_a_link_to_an_image_is_read(tmp_path):
    (tmp_path / "img.png").symlink_to(save(tmp_path / "real.png", RGB))
    assert pixels(tmp_path / "img.png") == RGB.tolist()


TAGS = ((256, 12000), (257, 12000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 12000), (279, 144_000_000))
BOMBS = {  # headers of 12000x12000 pixels, and next to nothing behind them
    "PNG": b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0))
    + b"\0\0\1\0IDAT",
    "JPEG": b"\xff\xd8\xff\xc0"
    + struct.pack(">HBHH", 17, 8, 12000, 12000)
    + b"\3\1\x11\0\2\x11\0\3\x11\0"
    + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0\x3f\0",
    "BMP": b"BM" + struct.pack("<IIIIiiHH", 54, 0, 54, 40, 12000, 12000, 1, 24) + bytes(24),
    "TIFF": b"II*\0\x08\0\0\0\x09\0"
    + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in TAGS)
    + bytes(4),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_bomb_is_refused_before_it_is_decoded(tmp_path, kind, monkeypatch, recwarn):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was decoded"))
    (tmp_path / "img.png").write_bytes(BOMBS[kind])
    with refused(f"{tmp_path / 'img.png'} is 12000x12000: more than 100 megapixels, make it smaller"):
        read_image(tmp_path / "img.png")
    assert not recwarn.list  # Pillow's own remark would be a second line


def test_a_header_bomb_takes_no_memory(tmp_path):
    """In a process of its own, all of them: decoding a single one would take 144 MB or more."""
    code = """
import sys
from pathlib import Path
from bas.config import InputError
from bas.io.images import read_image
from bas.runtime.memory import peak_bytes
before = peak_bytes()
for path in Path(sys.argv[1]).iterdir():
    try:
        read_image(path)
    except InputError:
        print(peak_bytes() - before)
"""
    for kind, content in BOMBS.items():
        (tmp_path / kind).write_bytes(content)
    words = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(bas.__file__).parents[1]
    grown = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    assert len(grown) == len(BOMBS)
    assert max(map(int, grown)) < 16e6  # what the plugins of Pillow take themselves


@pytest.mark.parametrize("name", ["a b", "Füße 図", "-dash", ".hidden", "new\nline", "quo'\"te", "%s{x}", "*?[a]"])
def test_odd_folder_names_are_read(tmp_path, name):
    plain = load(write_scene(tmp_path / "plain"))
    odd = load(write_scene(tmp_path / name))
    assert odd.image == plain.image
    assert np.array_equal(odd.masks, plain.masks)


def test_an_odd_name_stays_in_one_line(tmp_path):
    path = tmp_path / "new\nline.png"
    path.touch()
    with refused(f"{tmp_path}/new\\nline.png {UNREADABLE}it is empty"):
        read_image(path)


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("mask1.jpg", "mask1.png"),
        ("mask01.png", "mask1.png"),
        ("Mask1.PNG", "mask1.png"),
        ("mask_1.png", "mask1.png"),
        ("mask 1.tiff", "mask1.png"),
        ("cutout-00.webp", "cutout0.png"),
    ],
)
def test_a_mask_of_another_spelling_is_not_passed_over(scene, name, right):
    (scene / name).write_bytes(b"")
    with refused(f"{scene / name} would not be read: name it {right}"):
        load(scene)


def test_nor_is_it_in_an_extra_image(scene):
    shot = write_scene(scene / "1")
    (shot / "mask2.png").rename(shot / "mask02.png")
    with refused(f"{shot / 'mask02.png'} would not be read: name it mask2.png"):
        load(scene)


# --- Modes --------------------------------------------------------------------------------------------------------


def words(*values):
    """16-bit values as a PNG stores them."""
    return struct.pack(f">{len(values)}H", *values)


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "expected"),
    [
        (16, 2, words(0x1280, 0x8000, 0xFFFF, 0x00FF, 0x0100, 0x7FFF), [[18, 128, 255], [0, 1, 127]]),
        (16, 4, words(0x1280, 0xFFFF, 0xFF00, 0xFFFF), [[18] * 3, [255] * 3]),
        (16, 6, words(0x1280, 256, 512, 0xFFFF, 1, 2, 3, 0), [[18, 1, 2], [255] * 3]),
        (1, 0, b"\x40", [[0] * 3, [255] * 3] + [[0] * 3] * 6),
        (2, 0, b"\x1b", [[0] * 3, [85] * 3, [170] * 3, [255] * 3]),
        (4, 0, b"\x0f", [[0] * 3, [255] * 3]),
    ],
    ids=["16-bit RGB", "16-bit LA", "16-bit RGBA", "1-bit", "2-bit", "4-bit"],
)
def test_images_of_every_depth(tmp_path, depth, colour_type, row, expected):
    assert pixels(png(tmp_path / "img.png", depth, colour_type, row)) == [expected]


@pytest.mark.parametrize(
    ("name", "array", "options", "expected"),
    [
        ("half transparent LA", [[[100, 128], [0, 255]]], {}, [[177] * 3, [0] * 3]),  # 100 x 128/255 + 255 x 127/255
        ("a transparent colour", [[[1, 2, 3], [4, 5, 6]]], {"transparency": (1, 2, 3)}, [[255] * 3, [4, 5, 6]]),
        ("a transparent grey", [[7, 9]], {"transparency": 9}, [[7] * 3, [255] * 3]),
    ],
)
def test_transparent_pixels_are_laid_over_white(tmp_path, name, array, options, expected, caplog):
    path = save(tmp_path / "img.png", np.array(array, np.uint8), **options)
    assert pixels(path) == [expected], name
    assert caplog.messages == [f"{path} has transparent pixels: they become white"]


def test_a_transparent_palette_entry_becomes_white(tmp_path, caplog):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "img.png", transparency=0)
    assert pixels(tmp_path / "img.png") == [[[255] * 3, [40, 50, 60]]]
    assert "transparent" in caplog.text


@pytest.mark.parametrize("profile", [ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"nonsense"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_colour_profile_is_not_applied(tmp_path, kind, profile):
    exact = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    plain = pixels(save(tmp_path / "plain", RGB, format=kind, **exact))
    assert pixels(save(tmp_path / "with", RGB, format=kind, icc_profile=profile, **exact)) == plain
    assert Image.open(tmp_path / "with").info["icc_profile"] == profile
    assert kind == "JPEG" or plain == RGB.tolist()


def test_a_key_colour_of_16_bits_is_not_cut_to_8(tmp_path):
    """Pillow would clip 16 bits at 255 on the way to RGBA: both pixels white."""
    key = chunk(b"tRNS", words(0x1280))
    path = png(tmp_path / "mask0.png", 16, 0, words(0x1280, 0x8000), key)
    assert read_mask(path).tolist() == [[18, 128]]
    assert pixels(path) == [[[18] * 3, [128] * 3]]
    with refused(f"{path} has no alpha channel"):
        read_cutout(path)


@pytest.mark.parametrize("read", [read_image, read_mask])
@pytest.mark.parametrize("bad", [np.float32(255), np.float32(-0.01), np.float32("nan"), np.int32(65536), np.int32(-1)])
def test_values_outside_black_to_white_are_refused(tmp_path, read, bad):
    values = np.zeros((6, 8), bad.dtype)
    values[2, 3] = bad
    path = save(tmp_path / "img.tif", values)
    with refused(f"{path} holds values outside black to white: save it as an 8-bit grey image"):
        read(path)


def test_whole_numbers_of_32_bits_are_read_as_16(tmp_path):
    path = save(tmp_path / "mask0.tif", GREY.astype(np.int32) * 257)
    assert Image.open(path).mode == "I"
    assert np.array_equal(read_mask(path), GREY)


def test_a_cmyk_mask_is_turned_to_grey(tmp_path):
    ink = np.dstack([np.zeros((6, 8, 3), np.uint8), 255 - GREY])
    Image.fromarray(ink, "CMYK").save(tmp_path / "mask0.tif")
    assert np.array_equal(read_mask(tmp_path / "mask0.tif"), GREY)


def test_a_cielab_mask_is_turned_to_grey(tmp_path):
    """Pillow turns that mode to RGB alone."""
    lab = np.dstack([GREY, np.full_like(GREY, 128), np.full_like(GREY, 128)])
    Image.fromarray(lab, "LAB").save(tmp_path / "mask0.tif")
    assert Image.open(tmp_path / "mask0.tif").mode == "LAB"
    grey = read_image(tmp_path / "mask0.tif").convert("L")
    assert np.array_equal(read_mask(tmp_path / "mask0.tif"), np.asarray(grey))


# --- Content of masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixel", "message"),
    [
        ((255, 255, 255, 255), "mask0.png is white all over"),
        ((0, 0, 0, 255), "mask0.png is black all over"),
        ((255, 255, 255, 0), "mask0.png is white all over"),
        ((0, 0, 0, 0), "mask0.png is black all over"),
    ],
)
def test_an_rgba_mask_that_varies_in_nothing_is_its_colour(scene, pixel, message):
    Image.new("RGBA", (40, 32), pixel).save(scene / "mask0.png")
    with refused(message):
        load(scene)


def test_colour_is_the_mask_under_an_alpha_of_zero(tmp_path):
    path = save(tmp_path / "mask0.png", np.dstack([GREY, GREY, GREY, GREY * 0]))
    assert np.array_equal(read_mask(path), GREY)


def test_one_level_of_alpha_beside_colour_already_asks(tmp_path):
    alpha = np.full_like(GREY, 255)
    alpha[3, 3] = 254
    path = save(tmp_path / "mask0.png", np.dstack([GREY, GREY, GREY, alpha]))
    with refused(f"{path}: colour and alpha both vary, so which is the mask? Save it as a grey image"):
        read_mask(path)


@pytest.mark.parametrize(
    ("dtype", "level", "most"),
    [
        (np.uint16, 200, 1),  # 8 bits stored as 16
        (np.uint8, 25, 25),
        (np.uint8, 2, 2),
    ],
)
def test_nearly_black_masks_are_refused(scene, dtype, level, most):
    mask = np.zeros((32, 40), dtype)
    mask[8:24, 8:16], mask[8:24, 16:20] = level, level // 2
    save(scene / "mask1.png", mask)
    with refused(
        f"mask1.png is nearly black, {most} of 255 at most: if it is a label map, name it labels.png; else save it in "
        "black and white"
    ):
        load(scene)


def test_a_mask_just_light_enough_keeps_its_values(scene, caplog):
    mask = np.zeros((32, 40), np.uint8)
    mask[8:24, 8:20] = 26
    save(scene / "mask1.png", mask)
    assert np.array_equal(load(scene).masks[1], mask)
    assert "mask1.png is 26 of 255 at most, so its concept weighs 1 %: paint it white" in caplog.text


@pytest.mark.parametrize(
    ("colour", "told"),
    [
        (
            "red",
            "76 of 255 at most, so its concept weighs 9 %: paint it white, or name it labels.png if it is a label map",
        ),
        ("#800000", "38 of 255 at most, so its concept weighs 2 %: paint it white, or name it labels.png if it is a "),
        ("#e6e6e6", None),
        ("white", None),
    ],
)
def test_a_mask_in_a_colour_is_told_how_little_it_weighs(scene, caplog, colour, told):
    """The weight by eq. 1, in which a mask stands squared."""
    mask = Image.new("RGB", (40, 32))
    mask.paste(colour, (8, 8, 20, 24))
    mask.save(scene / "mask1.png")
    load(scene)
    assert (f"mask1.png is {told}" in caplog.text) if told else not caplog.messages


def test_a_soft_mask_below_one_of_255_is_not_taken_for_zeros_and_ones(tmp_path, caplog):
    mask = GREY.astype(np.float32) / 255 / 255
    assert np.array_equal(read_mask(save(tmp_path / "mask0.tif", mask)), mask > 0)
    assert not caplog.messages


@pytest.mark.parametrize(("most", "told"), [(1, "holds only the values 0 and 1 of 255"), (255, "it is read as white")])
@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_a_mask_of_8_bits_stored_in_16_is_read_as_it_was(tmp_path, caplog, kind, most, told):
    mask = np.zeros((32, 40), kind)
    mask[4:20, 8:16] = most
    path = save(tmp_path / "mask0.tif", mask)
    assert np.array_equal(read_mask(path), np.where(mask, 255, 0))
    assert [text for text in caplog.messages if told in text] == caplog.messages != []


def test_a_photograph_as_a_mask_is_told(tmp_path, caplog):
    """A cut-out on black, in the usual two forms; the same in grey is a soft mask."""
    rows, columns = np.mgrid[:64, :64] * 4
    inside = np.zeros((64, 64, 1), bool)
    inside[8:40, 8:40] = True
    picture = np.where(inside, np.dstack([rows, columns, 252 - rows]), 0).astype(np.uint8)
    told = "has many colours, and its brightness is read as the mask: is it a photograph?"
    for name in ("mask0.png", "mask1.jpg"):
        read_mask(save(tmp_path / name, picture))
        assert caplog.messages == [f"{tmp_path / name} {told}"]
        caplog.clear()
    grey = np.repeat(picture[..., :1], 3, axis=-1)
    read_mask(save(tmp_path / "grey.png", grey))
    assert not caplog.messages


def test_ones_alone_are_white(scene, caplog):
    save(scene / "mask1.png", np.ones((32, 40), np.uint8))
    with refused("mask1.png is white all over"):
        load(scene)
    assert caplog.messages == [f"{scene / 'mask1.png'} holds only the values 0 and 1 of 255: 1 is read as inside"]


@pytest.mark.parametrize(("rows", "warned"), [(15, None), (16, 80), (18, 90), (19, 95)])
def test_80_of_100_or_more_are_worth_a_question(tmp_path, rows, warned, caplog):
    mask = np.zeros((20, 20), np.uint8)
    mask[:rows] = 255
    write_scene(tmp_path, concepts=1, size=(20, 20))
    path = save(tmp_path / "mask0.png", mask)
    load(tmp_path)
    assert caplog.messages == ([f"{path} covers {warned} % of the image: is it inverted?"] if warned else [])


def test_a_single_white_pixel_is_read_and_announced_on_both_grids(tmp_path):
    folder, model = write_scene(tmp_path / "scene", concepts=2), write_model(tmp_path / "model")
    mask = np.zeros((32, 32), np.uint8)
    mask[5, 5] = 255
    save(folder / "mask1.png", mask)
    config = TrainConfig(instance_data_dir=str(folder), initializer_tokens=("bowl", "stone"))
    read = load_scene(config)
    assert read.masks[1].sum() == read.masks[1][5, 5] == 255
    assert warnings(view_scene(read, read_spec(model), config)) == [
        "the mask of <asset1> vanishes on the loss grid of 16x16 cells: make it larger, or raise --resolution",
        "the mask of <asset1> vanishes on the attention grid of 4x4 cells: make it larger, or raise --resolution",
        "100 % of the mask of <asset1> lies in the mask of <asset0>: their handles will share what is there",
    ]


# --- Orientation and size -----------------------------------------------------------------------------------------


def note(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path, orientation):
    assert pixels(save(tmp_path / "img.png", RGB, exif=note(orientation))) == RGB.tolist()


def test_a_mask_is_turned_by_its_own_note(tmp_path):
    path = save(tmp_path / "mask0.png", np.ascontiguousarray(np.rot90(GREY)), exif=note(6))
    assert np.array_equal(read_mask(path), GREY)


def test_a_smaller_mask_of_the_turned_image_gets_the_hint_too(scene):
    save(scene / "mask1.png", np.eye(20, 16, dtype=np.uint8) * 255)
    with refused("mask1.png is 16x20, img.png is 40x32: they must have the same shape: is one turned by an EXIF tag?"):
        load(scene)


@pytest.mark.parametrize(("size", "image"), [((64, 64), (63, 64)), ((400, 30), (40, 32))])
def test_another_shape_names_both_sizes_and_nothing_else(tmp_path, size, image):
    write_scene(tmp_path, concepts=1, size=image)
    save(tmp_path / "mask0.png", np.tri(size[1], size[0], dtype=np.uint8) * 255)
    sizes = f"{tmp_path}/mask0.png is {size[0]}x{size[1]}, img.png is {image[0]}x{image[1]}"
    with pytest.raises(InputError, match=f"^{re.escape(sizes)}: they must have the same shape$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("size", "square", "shape"),
    [
        ((63, 64), False, (64, 64)),
        ((513, 511), False, (64, 64)),
        ((4000, 300), False, (64, 848)),
        ((4000, 300), True, (64, 64)),
        ((300, 4000), False, (848, 64)),
    ],
)
def test_any_size_comes_to_the_model(tmp_path, size, square, shape):
    image, masks = load(write_scene(tmp_path, concepts=2, size=size)).tensors(64, 16, square)
    assert image.shape == (3, *shape)
    assert masks.shape == (2, *shape)
    assert masks[0].max() == 1
    assert masks[1].max() == 1
    assert masks.min() == 0


def test_a_single_pixel_is_an_image(tmp_path):
    save(tmp_path / "img.png", np.array([[[255, 0, 51]]], np.uint8))
    save(tmp_path / "mask0.png", np.array([[51]], np.uint8))
    image, masks = load(tmp_path).tensors(64, 8)
    assert torch.allclose(image, torch.tensor([1, -1, -0.6])[:, None, None].expand(3, 64, 64))
    assert torch.allclose(masks, torch.full((1, 64, 64), 0.2))


def test_a_mask_of_nearly_the_same_shape_is_resized_with_a_warning(tmp_path, caplog):
    write_scene(tmp_path, concepts=1, size=(513, 511))
    half = np.zeros((512, 512), np.uint8)
    half[:, :256] = 255
    path = save(tmp_path / "mask0.png", half)
    (mask,) = load(tmp_path).masks
    assert mask.shape == (511, 513)
    assert np.array_equal(mask[:, :256], np.full((511, 256), 255))
    assert np.array_equal(mask[:, 257:], np.zeros((511, 256)))
    assert ((mask[:, 256] > 0) & (mask[:, 256] < 255)).all()
    assert caplog.messages == [f"{path} is 512x512, img.png is 513x511: the mask is resized"]


# --- Sets ---------------------------------------------------------------------------------------------------------


def test_the_same_mask_in_another_mode_is_the_same_mask(scene):
    grey = np.asarray(Image.open(scene / "mask0.png"))
    save(scene / "mask1.png", np.dstack([grey * 0, grey * 0, grey * 0, grey]))
    with refused("mask1.png is the same mask as mask0.png: two concepts need two masks"):
        load(scene)


def test_four_concepts_are_no_matter(tmp_path, caplog):
    assert len(load(write_scene(tmp_path, concepts=4))) == 4
    assert not caplog.messages
