"""Scenes of the studio: photographs come in, masks are saved as they were sent, names are kept."""

import io
import json
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bas.cli.entry import main
from bas.config import TrainConfig
from bas.data.scene_folder import JOURNAL, load_scene
from bas.data.scene_writer import version
from bas.errors import InputError
from bas.web.studio.tiles import HEAD, MAGIC, ROW, SIDE, lay, pack, unpack

W, H = 300, 270  # two squares wide and high


def picture(kind="PNG", size=(W, H), **options):
    """An image file."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def scene(studio):
    """A new photograph with one concept, as the page makes it."""
    made = studio.post("api/scenes?name=my rabbit", raw=picture())
    rows = {"concepts": [{"from": None, "handle": "rabbit", "word": "rabbit"}]}
    return studio.ask("PATCH", f"api/scenes/{made['name']}", rows, if_match=made["version"]).json()


def soft(seed):
    """A mask with all levels, which covers a part of the image."""
    mask = np.zeros((H, W), np.uint8)
    mask[10:260, 20 + seed : 280] = np.random.default_rng(seed).integers(0, 255, (250, 260 - seed), dtype=np.uint8)
    return mask


def send(studio, scene, number, mask, version=None):
    """Send a mask as the page does after a stroke."""
    path = f"api/scenes/{scene['name']}/masks/{number}"
    return studio.ask("PATCH", path, raw=pack(mask), if_match=version or scene["version"])


def test_squares_are_what_they_were():
    mask = soft(1)
    again = np.zeros_like(mask)
    lay(again, unpack(pack(mask), (W, H)))
    assert np.array_equal(again, mask)
    whole = HEAD.pack(MAGIC, W, H, 2) + ROW.pack(0, 0, 1) + b"x" + ROW.pack(1, 1, 0)
    lay(again, unpack(whole, (W, H)))
    assert (again[:SIDE, :SIDE] == 255).all()
    assert (again[SIDE:, SIDE:] == 0).all()


def raw_deflate(data):
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


BOMB = raw_deflate(bytes(SIDE * SIDE * 1000))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"BT1\0",
        HEAD.pack(b"BT2\0", W, H, 0),
        HEAD.pack(MAGIC, W + 1, H, 0),
        HEAD.pack(MAGIC, W, H, 5),
        HEAD.pack(MAGIC, W, H, 2**32 - 1),
        HEAD.pack(MAGIC, W, H, 1),
        HEAD.pack(MAGIC, W, H, 1) + ROW.pack(2, 0, 0),
        HEAD.pack(MAGIC, W, H, 1) + ROW.pack(0, 2, 0),
        HEAD.pack(MAGIC, W, H, 1) + ROW.pack(0, 0, 10),
        HEAD.pack(MAGIC, W, H, 1) + ROW.pack(0, 0, 3) + b"abc",
        HEAD.pack(MAGIC, W, H, 1) + ROW.pack(0, 0, len(BOMB)) + BOMB,
        HEAD.pack(MAGIC, W, H, 0) + b"more",
    ],
)
def test_what_is_no_mask_is_refused_and_nothing_is_written(studio, scene, data):
    folder = studio.home.folder / "scenes" / scene["name"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError):
        list(unpack(data, (W, H)))
    answer = studio.ask("PATCH", f"api/scenes/{scene['name']}/masks/0", raw=data, if_match=scene["version"])
    assert answer.status_code == 422
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_masks_are_saved_as_the_page_sent_them_and_bas_reads_the_scene(studio, scene):
    folder = studio.home.folder / "scenes" / "my rabbit"
    assert json.loads((folder / "draft.json").read_text())["concepts"][0]["painted"] is False
    first = send(studio, scene, 0, soft(1)).json()
    assert not (folder / "draft.json").exists()
    assert np.array_equal(np.asarray(Image.open(folder / "mask0.png")), soft(1))
    assert first["concepts"][0]["share"] == pytest.approx(soft(1).mean() / 255)

    rows = [{"from": 0, "handle": "<rabbit>", "word": "rabbit"}, {"from": None, "handle": "bowl", "word": None}]
    two = studio.ask("PATCH", f"api/scenes/{first['name']}", {"concepts": rows}, if_match=first["version"]).json()
    untouched = (folder / "mask0.png").stat().st_mtime_ns
    both = send(studio, two, 1, soft(2)).json()
    assert (folder / "mask0.png").stat().st_mtime_ns == untouched
    loaded = load_scene(TrainConfig(instance_data_dir=str(folder)))
    assert loaded.handles == ("<rabbit>", "<bowl>")
    assert loaded.words == ("rabbit", None)
    assert np.array_equal(loaded.masks[1], soft(2))

    got = studio.ask("GET", f"api/scenes/{both['name']}/masks/1").content
    again = np.zeros((H, W), np.uint8)
    lay(again, unpack(got, (W, H)))
    assert np.array_equal(again, soft(2))

    rows = [{"from": 1, "handle": "bowl", "word": "bowl"}]
    one = studio.ask("PATCH", f"api/scenes/{both['name']}", {"concepts": rows}, if_match=both["version"]).json()
    assert [concept["handle"] for concept in one["concepts"]] == ["<bowl>"]
    assert np.array_equal(np.asarray(Image.open(folder / "mask0.png")), soft(2))
    assert not (folder / "mask1.png").exists()
    assert studio.get("api/state")["scenes"][0]["painted"] == 1


def test_a_mask_that_is_erased_is_not_painted_any_more(studio, scene):
    first = send(studio, scene, 0, soft(1)).json()
    erased = HEAD.pack(MAGIC, W, H, 4) + b"".join(ROW.pack(x, y, 0) for x in (0, 1) for y in (0, 1))
    path = f"api/scenes/{scene['name']}/masks/0"
    answer = studio.ask("PATCH", path, raw=erased, if_match=first["version"]).json()
    assert answer["concepts"] == [first["concepts"][0] | {"share": 0.0}]
    assert not list((studio.home.folder / "scenes" / scene["name"]).glob("mask*.png"))
    again = studio.get(f"api/scenes/{scene['name']}")
    assert again["concepts"] == answer["concepts"]  # as the folder alone says


def test_masks_of_extra_images_follow_their_concepts(studio, scene):
    """Also after a stroke. What would lose them is refused, and nothing is written."""
    path, folder = f"api/scenes/{scene['name']}", studio.home.folder / "scenes" / scene["name"]
    rows = [{"from": place, "handle": f"<a{i}>", "word": None} for i, place in enumerate((0, None, None))]
    now = studio.ask("PATCH", path, {"concepts": rows}, if_match=scene["version"]).json()
    for i in range(3):
        now = send(studio, now, i, soft(i)).json()
    extra = folder / "1"
    extra.mkdir()
    (extra / "img.png").write_bytes(picture())
    for i in (1, 2):
        Image.fromarray(soft(10 + i)).save(extra / f"mask{i}.png")

    def shown():
        found = load_scene(TrainConfig(instance_data_dir=str(folder)))
        return {found.handles[i]: mask for i, mask in found.extra_images[0].masks.items()}

    def ask(*places):
        rows = [{"from": i, "handle": now["concepts"][i]["handle"], "word": None} for i in places]
        return studio.ask("PATCH", path, {"concepts": rows}, if_match=now["version"])

    def files():
        return {path: path.read_bytes() for path in folder.rglob("*.*")}

    now, before = studio.get(path), files()
    assert (
        ask(0).json()["message"] == f"{extra} shows removed concepts alone: move this folder away, or keep one of them"
    )
    erased = HEAD.pack(MAGIC, W, H, 4) + b"".join(ROW.pack(x, y, 0) for x in (0, 1) for y in (0, 1))
    answer = studio.ask("PATCH", f"{path}/masks/2", raw=erased, if_match=now["version"])
    lost = f"<a2> has a mask in {extra} too: leave a part of this one, or remove the concept"
    assert (answer.status_code, answer.json()["message"]) == (422, lost)
    assert files() == before
    now = send(studio, now, 2, soft(7)).json()
    now = ask(2, 1, 0).json()
    assert {handle: mask.tobytes() for handle, mask in shown().items()} == {
        f"<a{i}>": soft(10 + i).tobytes() for i in (1, 2)
    }
    now = ask(0, 2).json()  # of what is now <a2>, <a1>, <a0>
    assert np.array_equal(shown()["<a2>"], soft(12))
    assert sorted(path.name for path in extra.iterdir()) == ["img.png", "mask0.png"]


def test_a_link_to_nothing_hides_no_other_scene(studio, scene):
    """Nor does a scene whose folder cannot be read: its problem is told, and the rest is listed."""
    scenes = studio.home.folder / "scenes"
    for name in ("linked", "broken"):
        (scenes / name).mkdir()
    (scenes / "linked" / "img.png").write_bytes(picture())
    (scenes / "linked" / "notes.txt").symlink_to("nothing")
    (scenes / "broken" / "img.png").symlink_to("nothing")
    found = {row["name"]: row for row in studio.get("api/state")["scenes"]}
    assert found.keys() == {"my rabbit", "linked", "broken"}
    assert found["linked"]["concepts"] == 0
    assert found["broken"]["problem"].startswith(f"{scenes / 'broken'} needs exactly one image")
    assert found["my rabbit"]["handles"] == ["<rabbit>"]

    def unreadable(folder):
        if folder.name == "linked":
            raise PermissionError(13, "Permission denied", str(folder))
        return version(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bas.web.studio.scenes.version", unreadable)
        found = {row["name"]: row for row in studio.get("api/state")["scenes"]}
    assert found["linked"] == {"name": "linked", "problem": f"[Errno 13] Permission denied: '{scenes / 'linked'}'"}
    assert found["my rabbit"]["handles"] == ["<rabbit>"]


def test_a_save_that_a_killed_program_left_is_finished_by_the_list_of_scenes(studio, scene):
    """Concepts were moved and one was erased: cut off before the first rename, the new scene is there all the same."""
    path, folder = f"api/scenes/{scene['name']}", studio.home.folder / "scenes" / scene["name"]
    rows = [{"from": place, "handle": f"<a{i}>", "word": None} for i, place in enumerate((0, None))]
    now = studio.ask("PATCH", path, {"concepts": rows}, if_match=scene["version"]).json()
    for i in range(2):
        now = send(studio, now, i, soft(i)).json()
    names = {"concepts": [{"handle": "<a1>", "word": None}]}
    (folder / ".mask0.png.7.tmp").write_bytes((folder / "mask1.png").read_bytes())
    (folder / ".scene.json.7.tmp").write_text(json.dumps(names))
    note = {"renamed": {f".{name}.7.tmp": name for name in ("mask0.png", "scene.json")}, "removed": ["mask1.png"]}
    (folder / JOURNAL).write_text(json.dumps(note))
    (row,) = studio.get("api/state")["scenes"]
    assert (row["handles"], row["painted"]) == (["<a1>"], 1)
    assert sorted(path.name for path in folder.iterdir()) == ["img.png", "mask0.png", "scene.json"]
    assert np.array_equal(np.asarray(Image.open(folder / "mask0.png")), soft(1))


def test_two_pages_do_not_overwrite_each_other(studio, scene):
    assert send(studio, scene, 0, soft(1)).status_code == 200
    late = send(studio, scene, 0, soft(2))
    assert (late.status_code, late.json()["code"]) == (412, "changed")
    assert studio.ask("PATCH", f"api/scenes/{scene['name']}", {"concepts": []}).status_code == 412


def test_what_a_terminal_changes_is_seen(studio, scene):
    saved = send(studio, scene, 0, soft(1)).json()
    folder = studio.home.folder / "scenes" / scene["name"]
    Image.fromarray(soft(3)).save(folder / "mask0.png")
    changed = studio.get(f"api/scenes/{scene['name']}")
    assert changed["version"] != saved["version"]
    assert changed["concepts"][0]["share"] == pytest.approx(soft(3).mean() / 255)


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        ([{"handle": "a"}, {"handle": "<a>"}], "1"),
        ([{"handle": "a b"}], "0"),
        ([{"handle": ""}], "0"),
        ([{"handle": "<script>alert(1)</script>"}], "0"),
        ([{"handle": "ok"}, {"handle": "x" * 300}], "1"),
    ],
)
def test_a_wrong_name_is_said_at_its_concept(studio, scene, rows, field):
    rows = [{"from": None, "word": None, **row} for row in rows]
    answer = studio.ask("PATCH", f"api/scenes/{scene['name']}", {"concepts": rows}, if_match=scene["version"])
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert studio.get(f"api/scenes/{scene['name']}") == scene


@pytest.mark.parametrize(
    "rows", [None, 3, [3], [{}] * 65, [{"from": 9, "handle": "a", "word": None}], [{"from": True, "handle": "a"}]]
)
def test_what_are_no_concepts_is_refused(studio, scene, rows):
    answer = studio.ask("PATCH", f"api/scenes/{scene['name']}", {"concepts": rows}, if_match=scene["version"])
    assert answer.status_code in (400, 404)
    assert studio.get(f"api/scenes/{scene['name']}") == scene


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp"), ("TIFF", ".tif")])
def test_photographs_of_all_kinds_become_scenes(studio, kind, suffix):
    made = studio.post("api/scenes?name=photo", raw=picture(kind))
    assert (made["width"], made["height"], made["image"]) == (W, H, f"img{suffix}")
    again = studio.post("api/scenes?name=photo", raw=picture(kind))
    assert again["name"] == "photo-2"
    view = studio.ask("GET", f"api/scenes/photo/view?side=64&v={made['version']}")
    assert max(Image.open(io.BytesIO(view.content)).size) == 64
    part = studio.ask("GET", "api/scenes/photo/view?box=10,20,60,50")
    assert Image.open(io.BytesIO(part.content)).size == (50, 30)
    assert studio.ask("GET", "api/scenes/photo/view?box=10,20,6000,50").status_code == 400


def huge_png():
    """The header of a PNG of 2.5 gigapixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("data", [b"", b"not an image", picture()[:500], huge_png(), b"<svg/>"])
def test_what_is_no_photograph_leaves_nothing(studio, data):
    answer = studio.ask("POST", "api/scenes?name=<b>x</b>", raw=data)
    assert (answer.status_code, answer.json()["code"]) == (422, "input")
    assert str(studio.home.folder) not in answer.json()["message"]
    assert list((studio.home.folder / "scenes").iterdir()) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", ".hidden", "con", "<img src=x>", "", "x" * 300, "日本 語"])
def test_a_name_becomes_that_of_a_folder_in_scenes(studio, name):
    made = studio.client.post(
        f"/{studio.guard.token}/api/scenes",
        params={"name": name},
        content=picture(),
        headers={"Origin": "http://127.0.0.1:8765", "Content-Type": "application/octet-stream"},
    ).json()
    assert [path.name for path in (studio.home.folder / "scenes").iterdir()] == [made["name"]]
    assert not set("/\\<>.") & set(made["name"])
    assert studio.get(f"api/scenes/{made['name']}")["width"] == W


def as_folder(files):
    """The files of a folder as the page sends them."""
    rows = [[name, len(data)] for name, data in files]
    return b"bas scene\n" + json.dumps(rows).encode() + b"\n" + b"".join(data for _, data in files)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMG, HALF = ("img.png", picture()), np.uint8(255) * (np.arange(H * W).reshape(H, W) % W < 100)
NAMED = json.dumps({"concepts": [{"handle": "<ball>", "word": "ball"}]}).encode()


@pytest.mark.parametrize(
    "masks",
    [
        [("mask0.png", png(HALF)), ("scene.json", NAMED)],
        [("labels.png", png(HALF // 255)), ("scene.json", NAMED), ("1/img.png", IMG[1]), ("1/mask0.png", png(HALF))],
        [("cutout0.png", png(np.dstack([HALF] * 4))), ("scene.json", NAMED)],
        [("masks.npy", None), ("scene.json", NAMED)],
        [("regions.json", None)],
        [],
    ],
)
def test_a_folder_of_any_mask_source_becomes_a_scene(studio, masks):
    """With its names and extra images, and without files that no scene has."""
    array = io.BytesIO()
    np.save(array, HALF[None])
    region = {"concepts": [{"handle": "<ball>", "word": "ball", "box": [0, 0, 100, H]}]}
    made = {"masks.npy": array.getvalue(), "regions.json": json.dumps(region).encode()}
    others = [("../out.png", b"x"), ("/out.png", b"x"), (".hidden.png", b"x"), ("a/b.png", b"x"), ("run.sh", b"x")]
    files = [IMG, *((name, data or made[name]) for name, data in masks), *others]
    scene = studio.post("api/scenes?name=toys", raw=as_folder(files))
    folder = studio.home.folder / "scenes" / "toys"
    assert [path.name for path in folder.parent.iterdir()] == ["toys"]
    assert not list(studio.home.folder.rglob("out.png"))
    extra = {"1", "1/img.png", "1/mask0.png"} if len(masks) == 4 else set()
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert found == {"img.png"} | ({"mask0.png", "scene.json"} if masks else set()) | extra
    assert [(row["handle"], row["word"]) for row in scene["concepts"]] == ([("<ball>", "ball")] if masks else [])
    if masks:
        assert np.array_equal(np.asarray(Image.open(folder / "mask0.png")), HALF)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (as_folder([("photo.png", IMG[1])]), 422, "toys has no image named img.jpg"),
        (as_folder([IMG, ("mask1.png", png(HALF))]), 422, "toys has masks up to mask1.png but lacks mask0.png"),
        (as_folder([IMG, ("mask00.png", png(HALF))]), 422, "name it mask0.png"),
        (as_folder([("img.png", b"no image")]), 422, "toys/img.png"),
        (as_folder([IMG, ("img.jpg", IMG[1])]), 422, "exactly one image"),
        (as_folder([IMG] + [(f"{i}.png", b"") for i in range(256)]), 422, "more than 256 files"),
        (as_folder([IMG, ("mask0.png", b"no image")]), 422, "toys/mask0.png"),
        (as_folder([IMG, IMG]), 400, "not as announced"),
        (as_folder([IMG])[:-1], 400, "not as announced"),
        (as_folder([IMG]) + b"x", 400, "not as announced"),
        (b'bas scene\n[["img.png", -1], ["b.png", 1]]\n', 400, "not as announced"),
        (b'bas scene\n[["img.png", true]]\nx', 400, "not as announced"),
        (b'bas scene\n[[["img.png"], 1]]\nx', 400, "not as announced"),
        (b"bas scene\n[3]\n", 400, "not as announced"),
        (b"bas scene\n" + b"[" * 100_000, 400, "not as announced"),
        (b"bas scene\n", 400, "not as announced"),
    ],
)
def test_a_folder_that_is_no_scene_leaves_nothing(studio, body, status, said):
    answer = studio.ask("POST", "api/scenes?name=toys", raw=body)
    assert answer.status_code == status
    assert said in answer.json()["message"]
    assert str(studio.home.folder) not in answer.json()["message"]
    assert list((studio.home.folder / "scenes").iterdir()) == []


def test_folders_that_the_page_cannot_name_are_said(studio):
    assert studio.get("api/state")["unnamed"] is None
    for name in ("toys", "100% toys", "a#b", 'it\'s "q"', ".upload-3"):
        (studio.home.folder / "scenes" / name).mkdir()
    (studio.home.folder / "runs" / "a&b=c").mkdir()
    said = studio.get("api/state")["unnamed"]
    assert said.startswith('Rename runs/a&b=c, scenes/100% toys, scenes/a#b, scenes/it\'s "q": a name begins with')
    for i in range(20):
        (studio.home.folder / "scenes" / f"#{i:02d}").mkdir()
    assert "scenes/#08 and more: a name" in studio.get("api/state")["unnamed"]


def test_what_is_deleted_is_in_the_trash_and_comes_back(studio, scene):
    """With the same bytes; not over a scene that has its name by now, and not twice."""
    photo = (studio.home.folder / "scenes" / "my rabbit" / "img.png").read_bytes()
    name = studio.ask("DELETE", f"api/scenes/{scene['name']}").json()["trash"]
    (there,) = (studio.home.folder / "trash").iterdir()
    assert there.name == name
    assert name.endswith("-my rabbit")
    assert (there / "my rabbit" / "img.png").read_bytes() == photo
    assert studio.ask("GET", f"api/scenes/{scene['name']}").status_code == 404
    assert studio.get("api/trash") == [{"name": name, "was": "scenes/my rabbit"}]

    other = studio.post("api/scenes?name=my rabbit", raw=picture(size=(64, 64)))
    refused = studio.ask("POST", f"api/trash/{name}")
    assert (refused.status_code, refused.json()["code"]) == (409, "taken")
    assert studio.get("api/scenes/my rabbit") == other
    studio.ask("DELETE", "api/scenes/my rabbit")
    assert len(studio.get("api/trash")) == 2

    assert studio.post(f"api/trash/{name}") == {"was": "scenes/my rabbit"}
    assert studio.get(f"api/scenes/{scene['name']}") == scene
    assert (studio.home.folder / "scenes" / "my rabbit" / "img.png").read_bytes() == photo
    assert [row["name"] == name for row in studio.get("api/trash")] == [False]
    assert studio.ask("POST", f"api/trash/{name}").status_code == 404


@pytest.mark.parametrize(
    "was", ["../out", "scenes/../../out", "jobs/x", "scenes", "/scenes/x", "scenes//x", "scenes/..", 3, None]
)
def test_a_note_of_the_trash_leads_nowhere_else(studio, was):
    """A wrong note restores nothing, and is not listed."""
    place = studio.home.folder / "trash" / "20260101-000000-x"
    for name in ("x", "out"):
        (place / name).mkdir(parents=True)
    (place / "was.json").write_text(json.dumps({"was": was}))
    assert studio.get("api/trash") == []
    assert studio.ask("POST", f"api/trash/{place.name}").status_code == 404
    assert (place / "out").is_dir()


def box(rows, columns):
    """A mask of one white rectangle, in shares of the sides."""
    mask = np.zeros((H, W), np.uint8)
    mask[slice(*(round(H * share) for share in rows)), slice(*(round(W * share) for share in columns))] = 255
    return mask


SMALL = "of 16x16 cells: make it larger, or raise Resolution in Train"
WRITE_IT = 'write it under "It is a"'
INVERTED = "covers 96 % of the image: is it inverted?"
SHARED = "their handles will share what is there"


@pytest.mark.parametrize(
    ("masks", "words", "notes"),
    [
        (
            [box((0, 0.96), (0, 1)), box((0.1, 0.2), (0.1, 0.2))],
            ["ball", None],
            [
                ("<a>", f"the mask of <a> {INVERTED}", False),
                ("<b>", "100 % of the mask of <b> lies in the mask of <a>: " + SHARED, False),
                ("<b>", "<b> has no initial word: it starts from a random row; " + WRITE_IT, False),
            ],
        ),
        (
            [box((0.1, 0.5), (0.1, 0.5)), box((0.6, 0.61), (0.6, 0.61))],
            ["ball", "ball"],
            [
                ("<b>", f"the mask of <b> vanishes on the attention grid {SMALL}", False),
                ("<b>", f"the mask of <b> vanishes on the loss grid {SMALL}", True),
            ],
        ),
        (
            [box((0.1, 0.5), (0.1, 0.5)), box((0, 1), (0, 1))],
            ["ball", "ball"],
            [("<b>", "the mask of <b> is white all over: leave out what is not the concept", True)],
        ),
        (
            [box((0.1, 0.5), (0.1, 0.5)), box((0.6, 0.9), (0.6, 0.9)) // 4],
            ["ball", "ball"],
            [
                (
                    "<b>",
                    "the mask of <b> is 63 of 255 at most, so its concept weighs 6 %: paint it white, or name it "
                    "labels.png if it is a label map",
                    False,
                )
            ],
        ),
        # The first concept is not painted, so the file of the second is the first.
        ([None, box((0, 0.96), (0, 1))], [None, "ball"], [("<b>", f"the mask of <b> {INVERTED}", False)]),
        ([box((0.1, 0.5), (0.1, 0.5)), box((0.6, 0.9), (0.6, 0.9))], ["ball", "ball"], []),
    ],
)
def test_the_page_has_each_line_of_bas_masks_with_its_concept(studio, scene, caplog, capsys, masks, words, notes):
    """The same lines as those of the command, with what one does on the page, and which mask each of them is about."""
    rows = [{"from": None, "handle": handle, "word": word} for handle, word in zip(("<a>", "<b>"), words, strict=True)]
    scene = studio.ask("PATCH", f"api/scenes/{scene['name']}", {"concepts": rows}, if_match=scene["version"]).json()
    for number, mask in enumerate(masks):
        if mask is not None:
            scene = send(studio, scene, number, mask).json()
    found = studio.post("api/check", {"scene": scene["name"], "base": "mini"})["notes"]
    assert [(note["handle"], note["text"], note["bad"]) for note in found] == notes
    folder = studio.home.folder / "scenes" / scene["name"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bas"):
        code = main(["masks", str(folder)])
    painted = [handle for handle, mask in zip(("<a>", "<b>"), masks, strict=True) if mask is not None]

    def as_the_page_says(text):
        for number, handle in enumerate(painted):
            text = text.replace(f"{folder}/mask{number}.png", f"the mask of {handle}")
        return text.replace("name one in scene.json", WRITE_IT).replace("--resolution", "Resolution in Train")

    said = [as_the_page_says(record.getMessage()) for record in caplog.records]
    assert [line for line in said if "mask" in line or "word" in line] == [text for _, text, bad in notes if not bad]
    refusals = [text for _, text, bad in notes if bad]
    assert code == (2 if refusals else 0)
    assert all(text in as_the_page_says(capsys.readouterr().err) for text in refusals)
