"""Scenes are written as a whole: a save that is cut off at any of its renames leaves the old scene or the new one."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from bas.config import TrainConfig
from bas.data.scene_folder import JOURNAL, load_scene
from bas.data.scene_writer import concepts_to_edit, finish_save, open_draft, save, version, write_draft
from tests.helpers.tiny import refused

SIZE = 16


class Cut(BaseException):
    """The end of the process."""


def mask(i):
    """A mask that tells its concept by its place."""
    values = np.zeros((SIZE, SIZE), np.uint8)
    values[i : i + 3, i : i + 3] = 255
    return Image.fromarray(values)


def names(*numbers):
    return [{"handle": f"<a{i}>", "word": f"word{i}"} for i in numbers]


@pytest.fixture
def scene(tmp_path):
    """A scene of the concepts 0, 1 and 2, with an extra image of 1 and 2."""
    folder = tmp_path / "scene"
    (folder / "1").mkdir(parents=True)
    for place in (folder, folder / "1"):
        Image.new("RGB", (SIZE, SIZE), "red").save(place / "img.png")
    for i in (1, 2):
        mask(i + 5).save(folder / "1" / f"mask{i}.png")
    write_draft(open_draft(folder, None), [mask(i) for i in range(3)], names(0, 1, 2))
    return folder


def shown(folder):
    """The handles in their order, each with its mask in the scene and in the extra image, as a training reads them."""
    found = load_scene(TrainConfig(instance_data_dir=str(folder)))
    extra = {found.handles[i]: values.tobytes() for i, values in found.extra_images[0].masks.items()}
    named = zip(found.handles, found.masks, strict=True)
    return [(handle, values.tobytes(), extra.get(handle)) for handle, values in named]


def cut_after(monkeypatch, count):
    """Let the process end instead of doing another change of a name: a rename or a removal."""
    left = iter(range(count))

    def cutting(change):
        def changed(*args, **options):
            if next(left, None) is None:
                raise Cut
            return change(*args, **options)

        return changed

    monkeypatch.setattr(os, "replace", cutting(os.replace))
    monkeypatch.setattr(os, "unlink", cutting(os.unlink))


@pytest.mark.parametrize("order", [(2, 1), (1, 2, 0), (0, 3, 2, 1)], ids=["removed", "moved", "added"])
def test_a_save_that_is_cut_off_leaves_the_old_scene_or_the_new_one(scene, order):
    """Names, masks and masks of the extra image fit each other after every single rename and removal."""
    before = shown(scene)
    draft, masks = open_draft(scene, None), [mask(i) for i in order]
    origins = [i if i < 3 else None for i in order]
    whole = {path: path.read_bytes() for path in scene.rglob("*.*")}
    outcomes = []
    for count in range(100):
        for path in scene.rglob("*.*"):
            path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            cut_after(patch, count)
            try:
                write_draft(draft, masks, names(*order), origins)
            except Cut:
                ended = False
            else:
                ended = True
        if (scene / JOURNAL).exists():
            with refused(f"a save of {scene} was cut off: `bas paint {scene}` finishes it"):
                shown(scene)
        rows = concepts_to_edit(open_draft(scene, None))
        assert not (scene / JOURNAL).exists()
        after = shown(scene)
        assert [row["handle"] for row in rows] == [handle for handle, *_ in after]
        outcomes.append(after)
        if ended:
            break
    wanted = [(f"<a{i}>", mask(i).tobytes(), mask(i + 5).tobytes() if i in (1, 2) else None) for i in order]
    assert outcomes[0] == before != wanted
    new = outcomes.index(wanted)
    assert outcomes == [before] * new + [wanted] * (len(outcomes) - new)
    assert len(outcomes) - new > len(order) + 2  # it was cut between the renames
    assert not list(scene.rglob(".*"))


def test_a_scene_that_another_begins_with_is_finished_first(tmp_path):
    """Also the first save of an image, which was cut off before the image itself was in its place."""
    Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 1)  # the note has its name
        with pytest.raises(Cut):
            write_draft(open_draft(tmp_path / "photo.png", None), [mask(0)], names(0))
    assert not (tmp_path / "photo" / "img.png").exists()
    (row,) = concepts_to_edit(open_draft(tmp_path / "photo", tmp_path / "other"))
    assert (row["handle"], row["word"], row["mask"].tobytes()) == ("<a0>", "word0", mask(0).tobytes())
    assert sorted(path.name for path in (tmp_path / "photo").iterdir()) == ["img.png", "mask0.png", "scene.json"]


def test_a_scene_json_that_is_no_object_is_not_written_over(tmp_path):
    """Nor called a model's file. Its other entries would be lost."""
    Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / "img.png")
    note, draft = tmp_path / "scene.json", open_draft(tmp_path, None)
    for text, said in (("[1]", ' is not {"concepts": [{"handle": '), ("{", " is not valid JSON (")):
        note.write_text(text)
        with refused(f"{note}{said}", "repair"):
            write_draft(draft, [mask(0)], names(0))
        assert note.read_text() == text
    note.write_text('{"title": "mine"}')
    write_draft(draft, [mask(0)], names(0))
    assert json.loads(note.read_text()) == {"title": "mine", "concepts": names(0)}


def test_a_failed_save_leaves_no_file_of_its_own(scene):
    """Not even when the note is written, and the folder cannot be flushed then."""
    before = {path: path.read_bytes() for path in scene.rglob("*.*")}

    def fail(path):
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        save(scene, {scene / "mask0.png": lambda path: path.write_bytes(b"new"), scene / "mask1.png": fail}, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bas.io.files.sync", lambda path: fail(path) if path == scene else None)
        with pytest.raises(OSError, match="no room"):
            save(scene, {scene / "mask0.png": lambda path: path.write_bytes(b"new")}, [scene / "mask2.png"])
    assert {path: path.read_bytes() for path in scene.rglob("*.*")} == before


@pytest.mark.parametrize("name", ["../mine.txt", "/mine.txt", "1/../../mine.txt", "..", "a/mine.txt", "1/2/mine.txt"])
@pytest.mark.parametrize("place", ["renamed", "removed"])
def test_a_note_from_elsewhere_reaches_no_other_file(scene, place, name):
    """It comes with a folder of another person, and may name what it likes."""
    mine = scene.parent / "mine.txt"
    mine.write_text("mine")
    renamed = {"mask0.png": name, name: "mask1.png"} if place == "renamed" else {}
    (scene / JOURNAL).write_text(json.dumps({"renamed": renamed, "removed": [name] if not renamed else []}))
    with refused(f"{scene / JOURNAL} names files that are not of a scene: remove it, and look at the masks"):
        finish_save(scene)
    assert mine.read_text() == "mine"
    (scene / JOURNAL).write_text("{}")
    with refused(f"{scene / JOURNAL} is not as bas wrote it (it has no re", "): remove it, and look at the masks"):
        open_draft(scene, None)


def test_the_version_of_a_scene_changes_with_its_files(scene):
    """With names, sizes and times; a link to nothing is a file, too, a folder that is not there has no files."""
    versions = [version(scene), version(scene.parent / "nothing")]
    os.utime(scene / "img.png", (1, 1))
    versions.append(version(scene))
    (scene / "link").symlink_to("nothing")
    versions.append(version(scene))
    (scene / "link").unlink()
    (scene / "link").symlink_to(scene / "mask0.png")
    versions.append(version(scene))
    os.utime(scene / "mask0.png", (2, 2))
    versions.append(version(scene))
    assert len({*versions}) == 6
    (scene / ".hidden").touch()
    assert version(scene) == versions[-1]


@pytest.mark.parametrize(
    ("name", "kind", "copy"),
    [("photo.JPE", "JPEG", "img.jpg"), ("photo.orig", "PNG", "img.png"), ("photo", "WEBP", "img.webp")],
)
def test_an_image_with_an_unusual_suffix_becomes_a_scene_that_is_read(tmp_path, name, kind, copy):
    """Its copy has the suffix of its format."""
    Image.new("RGB", (SIZE, SIZE), "red").save(tmp_path / name, format=kind)
    draft = open_draft(tmp_path / name, tmp_path / "scene")
    write_draft(draft, [mask(0)], names(0))
    assert (tmp_path / "scene" / copy).is_file()
    assert load_scene(TrainConfig(instance_data_dir=str(tmp_path / "scene"))).handles == ("<a0>",)
