"""Scene folders as people have them: which files count, which way up they are, and what takes no memory."""

import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from bas.config import TrainConfig
from bas.data.scene_folder import load_scene
from bas.data.scene_writer import open_draft, write_draft
from tests.helpers.tiny import refused, write_scene


def load(folder, **settings):
    return load_scene(TrainConfig(instance_data_dir=str(folder), **settings))


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# --- Files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["img.txt", "img.xmp", "img.json", "img.caption", "img.npz", "img", "._img.png", "img.png.txt"]
)
def test_captions_and_sidecars_are_no_second_image(tmp_path, name):
    folder = write_scene(tmp_path / "s")
    (folder / name).write_bytes(b"a photo of a toy")
    assert len(load(folder)) == 3


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_none(tmp_path, value):
    """The image is used as it is stored."""
    folder = write_scene(tmp_path / "s", size=(40, 32))
    with Image.open(folder / "img.png") as image:
        image.save(folder / "img.png", exif=orientation(value))
    assert load(folder).image.size == (40, 32)


@pytest.mark.parametrize("name", ["IMG.PNG", "Img.png", "img.JPG", "IMG.JPEG", "img.JFIF"])
def test_the_image_may_be_named_in_capital_letters(tmp_path, name):
    folder = write_scene(tmp_path / "s")
    (folder / "img.png").rename(folder / name)
    assert load(folder).image.size == (32, 32)


def test_two_images_that_differ_in_capitals_are_named(tmp_path):
    folder = write_scene(tmp_path / "s")
    (folder / "IMG.JPG").write_bytes((folder / "img.png").read_bytes())
    with refused(f"{folder} needs exactly one image named img.jpg, img.png, ...; found IMG.JPG, img.png"):
        load(folder)


@pytest.mark.parametrize("name", ["img.psd", "img.dng", "photo.jxl"])
def test_images_that_nobody_reads_are_named(tmp_path, name):
    folder = write_scene(tmp_path / "s")
    (folder / "img.png").rename(folder / name)
    with refused(f"found none, but {name}: convert it to img.jpg or img.png"):
        load(folder)


def test_a_missing_scene_is_called_missing(tmp_path):
    with refused(f"{tmp_path / 'nowhere'} does not exist: name a scene, a folder with img.jpg and mask0.png"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["GIF", "AVIF"])
def test_gif_and_avif_are_read(tmp_path, kind):
    folder = write_scene(tmp_path / "s")
    colours = Image.new("RGB", (32, 32), (200, 40, 40))
    colours.save(folder / f"img.{kind.lower()}", kind, **({"quality": 100} if kind == "AVIF" else {}))
    (folder / "img.png").unlink()
    assert np.abs(np.asarray(load(folder).image).astype(int) - (200, 40, 40)).max() <= 3


def test_of_an_animation_in_gif_the_first_frame_is_read(tmp_path, caplog):
    folder = write_scene(tmp_path / "s")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(folder / "img.gif", save_all=True, append_images=frames[1:])
    (folder / "img.png").unlink()
    assert load(folder).image.getpixel((3, 3)) == (255, 0, 0)
    assert f"{folder}/img.gif holds several frames: the first is read" in caplog.messages


def test_heic_is_read_with_its_plugin(tmp_path):
    plugin = pytest.importorskip("pillow_heif", reason="pillow-heif, which reads HEIC, is not installed")
    folder = write_scene(tmp_path / "s", size=(64, 64))
    plugin.from_pillow(Image.new("RGB", (64, 64), (200, 40, 40))).save(folder / "img.heic", quality=95)
    (folder / "img.png").unlink()
    assert np.abs(np.asarray(load(folder).image).astype(int) - (200, 40, 40)).max() <= 6


@pytest.mark.parametrize("name", ["img.heic", "img.jpg"])
def test_heic_without_its_plugin_is_named(tmp_path, name, monkeypatch):
    monkeypatch.setattr("bas.io.images.importlib.util.find_spec", lambda name: None)
    folder = write_scene(tmp_path / "s")
    (folder / "img.png").unlink()
    (folder / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with refused(
        f"{folder / name} is not a readable", "it is HEIC: `pip install pillow-heif` to read it, or convert it"
    ):
        load(folder)


# --- Names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["toy\x1b[2J", "a\x01b", "a\nb", "a\x9bb", "a\u202eb"])
def test_words_with_control_characters_are_refused(tmp_path, word):
    folder = write_scene(tmp_path / "s")
    with refused(f"the initial word of <asset0>, {word!a}, holds control characters"):
        load(folder, initializer_tokens=(word, "bowl", "stone"))


def test_words_of_every_script_are_taken(tmp_path):
    words = ("Füße", "写真", "👨\u200d👩\u200d👧")
    assert load(write_scene(tmp_path / "s"), initializer_tokens=words).words == words


# --- Which way up -------------------------------------------------------------------------------------------------

TURNED = {2: "mirrored", 3: "turned by 180 degrees", 6: "turned by 90 degrees", 8: "turned by 270 degrees"}


def turn(folder, value, size, name="img.png"):
    """Store the image of a folder anew, with this orientation; its masks stay as they are."""
    Image.new("RGB", size, "grey").save(folder / name, exif=orientation(value))


@pytest.mark.parametrize("value", TURNED)
def test_a_square_image_that_is_turned_is_said_once(tmp_path, caplog, value):
    folder = write_scene(tmp_path / "s")
    turn(folder, value, (32, 32))
    load(folder)
    assert caplog.messages == [
        f"{folder}/img.png is {TURNED[value]} by its EXIF tag, and is used upright; if mask0.png to mask2.png was "
        "drawn on the stored image, it does not fit: save the image without the tag, or turn the masks"
    ]


@pytest.mark.parametrize(("value", "stored", "told"), [(3, (48, 32), True), (2, (48, 32), True), (6, (32, 48), False)])
def test_a_size_that_fits_one_way_alone_needs_no_word(tmp_path, caplog, value, stored, told):
    """Upright, the image is 48x32 like its masks: by 90 degrees, masks of the stored image would be 32x48."""
    folder = write_scene(tmp_path / "s", size=(48, 32))
    turn(folder, value, stored)
    load(folder)
    assert len(caplog.messages) == told


def test_masks_that_state_which_way_up_they_are_need_no_word(tmp_path, caplog):
    folder = write_scene(tmp_path / "s")
    for path in folder.glob("mask*"):
        Image.open(path).save(path, exif=orientation(1))
    turn(folder, 3, (32, 32))
    load(folder)
    assert caplog.messages == []


def test_an_upright_image_needs_no_word(tmp_path, caplog):
    folder = write_scene(tmp_path / "s")
    turn(folder, 1, (32, 32))
    load(folder)
    assert caplog.messages == []


def test_shapes_without_a_size_are_unknown_even_where_the_sides_differ(tmp_path, caplog):
    folder = write_scene(tmp_path / "s", concepts=0, size=(48, 32))
    turn(folder, 6, (32, 48))
    (folder / "regions.json").write_text(json.dumps({"concepts": [{"box": [4, 4, 30, 20]}]}))
    load(folder)
    assert "if regions.json concept 0 was drawn on the stored image" in caplog.text


def test_an_extra_image_that_is_turned_is_said(tmp_path, caplog):
    folder = write_scene(tmp_path / "s")
    write_scene(folder / "1")
    turn(folder / "1", 3, (32, 32))
    load(folder)
    assert [message.split(" is ")[0] for message in caplog.messages] == [f"{folder}/1/img.png"]


def test_masks_that_bas_writes_for_a_turned_image_say_that_they_are_upright(tmp_path, caplog):
    turn(tmp_path, 3, (32, 32), "photo.jpg")
    draft = open_draft(tmp_path / "photo.jpg", None)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 9, 9))
    write_draft(draft, [mask], [{"handle": "<a>", "word": None}])
    assert load(tmp_path / "photo").masks[0].sum() == 81 * 255
    assert caplog.messages == []


# --- Masks in a palette -------------------------------------------------------------------------------------------


def save_palette(path, values, colours):
    image = Image.fromarray(values.astype(np.uint8), "P")
    image.putpalette([part for colour in colours for part in colour])
    image.save(path)


INSIDE = np.zeros((32, 32))
INSIDE[4:20, 4:20] = 1


@pytest.mark.parametrize(
    ("entry", "colours"),
    [
        (1, [(0, 0, 0), (128, 0, 0)]),  # PASCAL VOC
        (1, [(0, 0, 0), (0, 0, 90)]),
        (15, [(0, 0, 0)] * 15 + [(192, 128, 128)]),
        (2, [(10, 10, 10), (9, 9, 9), (80, 10, 10)]),
    ],
)
def test_a_mask_of_two_palette_entries_is_read_by_entry(tmp_path, caplog, entry, colours):
    folder = write_scene(tmp_path / "s", concepts=1)
    save_palette(folder / "mask0.png", INSIDE * entry, colours)
    (mask,) = load(folder).masks
    assert np.array_equal(mask, 255 * INSIDE)
    assert caplog.messages == [f"{folder}/mask0.png has a palette: entry {entry} is read as inside, entry 0 as outside"]


def test_a_grey_palette_is_read_by_brightness(tmp_path, caplog):
    folder = write_scene(tmp_path / "s", concepts=1)
    save_palette(folder / "mask0.png", 1 - INSIDE, [(255, 255, 255), (0, 0, 0)])
    (mask,) = load(folder).masks
    assert np.array_equal(mask, 255 * INSIDE)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("values", "colours", "count"),
    [
        (INSIDE + np.eye(32), [(0, 0, 0), (128, 0, 0), (0, 128, 0)], 3),
        (INSIDE + 1, [(0, 0, 0), (128, 0, 0), (0, 128, 0)], 2),  # without entry 0
        (INSIDE, [(255, 255, 255), (128, 0, 0)], 2),  # entry 0 is lighter: which is inside?
    ],
)
def test_a_mask_of_other_palettes_gets_a_hint(tmp_path, values, colours, count):
    folder = write_scene(tmp_path / "s", concepts=1)
    save_palette(folder / "mask0.png", values, colours)
    with refused(f"mask0.png has {count} palette entries in colours: if it is a label map, name it labels.png"):
        load(folder)


BORDER = np.where(np.roll(INSIDE, 2, axis=1) != INSIDE, 255, INSIDE)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (BORDER.astype(np.uint8), "small numbers and 255"),  # 1 inside, 255 undecided
        (np.where(BORDER == 255, 255, 15 * BORDER).astype(np.uint8), "small numbers and 255"),
        (INSIDE[..., None] * [255, 0, 0] + np.roll(INSIDE, 16, 1)[..., None] * [0, 255, 0], "2 colours"),
        (INSIDE[..., None] * [255, 0, 0] + (1 - INSIDE[..., None]) * [0, 0, 128], "2 colours"),
    ],
)
def test_a_map_of_labels_as_a_mask_gets_a_hint(tmp_path, mask, found):
    folder = write_scene(tmp_path / "s", concepts=1)
    Image.fromarray(np.asarray(mask, np.uint8)).save(folder / "mask0.png")
    with refused(f"mask0.png holds {found}: if it is a label map, name it labels.png; else save it in black and white"):
        load(folder)


@pytest.mark.parametrize("low", [2, 8])
def test_a_dark_corner_beside_white_is_a_mask(tmp_path, caplog, low):
    folder = write_scene(tmp_path / "s", concepts=1)
    mask = (255 * INSIDE).astype(np.uint8)
    mask[30:, 28:] = low
    Image.fromarray(mask).save(folder / "mask0.png")
    assert np.array_equal(load(folder).masks[0], mask)
    assert caplog.messages == []


VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0)] + [(0, 0, 0)] * 252 + [(224, 224, 192)]


@pytest.mark.parametrize("kind", ["palette", "palette of other colours", "grey", "16 bits", "colours"])
def test_the_undecided_border_of_a_label_map_is_no_concept(tmp_path, caplog, kind):
    folder = write_scene(tmp_path / "s", concepts=0)
    labels = INSIDE + 2 * (np.arange(32) > 24)
    labels[:, 22:24] = 255
    name = "value 255"
    if kind.startswith("palette"):
        save_palette(folder / "labels.png", labels, VOC if kind == "palette" else VOC[::-1])
    elif kind == "colours":
        Image.fromarray(np.array(VOC, np.uint8)[labels.astype(int)]).save(folder / "labels.png")
        name = "colour #e0e0c0"
    else:
        Image.fromarray(labels.astype(np.uint8 if kind == "grey" else np.uint16)).save(folder / "labels.png")
    sums = sorted(mask.sum() / 255 for mask in load(folder).masks)
    assert sums == [7 * 32, 16 * 16]
    assert f"{folder}/labels.png: {name} is read as undecided, not as a concept" in caplog.messages


@pytest.mark.parametrize("values", [(255,), (85, 170, 255), (128, 255)])
def test_white_is_a_label_of_a_drawn_map(tmp_path, values):
    folder = write_scene(tmp_path / "s", concepts=0)
    labels = np.zeros((32, 32), np.uint8)
    for i, value in enumerate(values):
        labels[8 * i : 8 * i + 6] = value
    Image.fromarray(labels).save(folder / "labels.png")
    assert [mask.sum() / 255 for mask in load(folder).masks] == [192] * len(values)


# --- Memory and time ----------------------------------------------------------------------------------------------


def coco(**annotation):
    return json.dumps({"annotations": [annotation | {"id": i} for i in range(60)]})


BOMBS = {  # the file, what makes its content, what is told
    "60 run lengths of 100 megapixels": (
        "coco.json",
        lambda: coco(segmentation={"size": [10_000, 10_000], "counts": [5, 10**8 - 5]}),
        "coco.json has 60 masks of 10000x10000 pixels, more than 200 megapixels together: make them smaller",
    ),
    "60 polygons on a stated size": (
        "coco.json",
        lambda: json.dumps(
            {
                "images": [{"id": 1, "width": 10_000, "height": 10_000}],
                "annotations": [{"image_id": 1, "segmentation": [[0, 0, 9000, 0, 9000, 9000]]}] * 60,
            }
        ),
        "coco.json has 60 masks of 10000x10000 pixels, more than 200 megapixels together: make them smaller",
    ),
    "1000 boxes": (
        "regions.json",
        lambda: json.dumps({"concepts": [{"box": [1, 1, 20, 20]}] * 1000}),
        "has 1000 masks: keep those",
    ),
    "a polygon of a million points": (
        "regions.json",
        lambda: json.dumps({"concepts": [{"polygon": [[i % 32, i % 31] for i in range(1_000_000)]}]}),
        "regions.json concept 0 has 1000000 points: simplify it to 100000 or fewer",
    ),
    "run lengths of a megapixel each in a list": (
        "coco.json",
        lambda: json.dumps({"annotations": [{"segmentation": {"size": [3000, 3000], "counts": [1] * 4_000_000}}]}),
        "the run lengths add up to 4000000, not to 3000x3000 pixels",
    ),
    "a time stamp": ("mask1732851234.png", str, "has masks up to mask1732851234.png but lacks mask0.png, mask1.png"),
    "a number of 240 digits": (f"mask{'9' * 240}.png", str, "but lacks mask0.png, mask1.png"),
}  # tried in tests/scenarios/test_cost_of_refusal.py


def test_many_large_images_as_masks_are_refused_by_their_headers(tmp_path, monkeypatch):
    folder = write_scene(tmp_path / "s", concepts=0)
    mask = Image.new("1", (9_000, 9_000))
    for i in range(3):
        mask.save(folder / f"mask{i}.png")
    monkeypatch.setattr("bas.data.mask_formats.read_mask", lambda path: pytest.fail("it was decoded"))
    with refused("has 3 masks of 9000x9000 pixels, more than 200 megapixels together"):
        load(folder)


def test_a_polygon_of_many_points_is_rasterised_in_seconds():
    from bas.data.mask_shapes import rasterise_polygon

    turns = np.linspace(0, 2 * np.pi, 100_000, endpoint=False)
    points = 500 + 400 * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    start = time.process_time()
    area = rasterise_polygon(points, (1000, 1000)).sum()
    assert area == pytest.approx(np.pi * 400**2, rel=1e-3)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("name", ["Scene.json", "scene.JSON", "scenes.json", "scene.json.txt", "scene (1).json"])
def test_a_note_of_nearly_the_name_is_not_passed_over(tmp_path, name):
    """As other systems write it, or a browser; beside scene.json it is a copy."""
    folder = write_scene(tmp_path / "s", concepts=1)
    (folder / name).write_text('{"concepts": [{"handle": "<toy>"}]}')
    with refused(f"{folder / name} would not be read: name it scene.json"):
        load_scene(TrainConfig(instance_data_dir=str(folder)))
    (folder / "scene.json").write_text('{"concepts": [{"handle": "<toy>"}]}')
    assert load_scene(TrainConfig(instance_data_dir=str(folder))).handles == ("<toy>",)


def test_what_looks_like_a_part_of_a_scene_is_not_passed_over_silently(tmp_path, caplog):
    """Copies of masks, folders of images without a number, and names beside an extra image."""
    folder, other = write_scene(tmp_path / "s"), write_scene(tmp_path / "other")
    copies = ["cutout3-old.jpg", "mask0 (1).png", "mask1 - Copy.png", "mask2_v2.png"]
    for name in copies:
        (folder / name).write_bytes(b"")
    for name in ("image1", "\u00b2", "1"):
        shutil.copytree(other, folder / name)
    (folder / "notes").mkdir()
    (folder / "._mask0 (1).png").write_bytes(b"")
    (folder / "1" / "scene.json").write_text("{}")
    assert len(load_scene(TrainConfig(instance_data_dir=str(folder))).extra_images) == 1
    read = "masks are named mask0.png, mask1.png, ... and nothing else"
    assert [text for text in caplog.messages if "is not read" in text] == [
        *(f"{folder / name} is not read: {read}" for name in copies),
        *(
            f"{folder / name} holds an image but is not read: folders of extra images are named 1, 2, ..."
            for name in ("image1", "\u00b2")
        ),
        f"{folder / '1' / 'scene.json'} is not read: the scene names the concepts, and a mask has its concept's number",
    ]
