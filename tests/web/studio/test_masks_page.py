"""The studio's rooms Home and Masks in a real browser: painting, proposals, changes from elsewhere, dropped files."""

import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from bas.web.studio import scenes
from bas.web.studio.tiles import pack
from tests.helpers.studio_page import (
    HANDLE,
    PLAYROOM,
    SAVED,
    WORD,
    bring,
    choose,
    click,
    concepts_in,
    fill,
    place_of,
    read_mask,
    until,
    visit,
    wait_long,
    write_scene,
)

pytestmark = pytest.mark.browser
KEEP = "aside .card.bad button:not(.main)"


def test_a_stroke_is_sent_at_its_end_and_outlives_the_page(page, server, tmp_path):
    photo = tmp_path / "closed.png"
    photo.write_bytes((PLAYROOM / "img.png").read_bytes())
    bring(page, server, photo)
    page.run("window.setTimeout = () => 0; window.sent = []; window.before = window.fetch; 0")
    page.run("window.fetch = (...all) => { sent.push(all[1].method, all[1].keepalive); return before(...all); }; 0")
    server.process.send_signal(signal.SIGSTOP)
    try:
        page.drag(place_of(page, 0.3, 0.3), place_of(page, 0.5, 0.5))
        page.wait("sent.length")
        assert page.run("sent") == ["PATCH", True]
        page.send("Page.navigate", url="about:blank")
    finally:
        server.process.send_signal(signal.SIGCONT)
    until((server.home / "scenes" / "closed" / "mask0.png").exists)


def test_undo_and_the_tools(page, server, tmp_path):
    """Brush, undo, eraser, fill, and Space that is let go elsewhere; then a finger paints, and two fingers zoom."""
    photo = tmp_path / "tools.png"
    photo.write_bytes((PLAYROOM / "img.png").read_bytes())
    bring(page, server, photo)
    path = server.home / "scenes" / "tools" / "mask0.png"

    def share():
        page.wait(SAVED)
        return np.asarray(Image.open(path)).mean() / 255 if path.exists() else 0

    # A concept that comes and goes leaves undo and redo of the others as they were.
    page.drag(place_of(page, 0.2, 0.2), place_of(page, 0.4, 0.2))
    first = share()
    page.drag(place_of(page, 0.2, 0.8), place_of(page, 0.4, 0.8))
    both = share()
    page.press("z", control=True)
    click(page, "#add")
    click(page, "[aria-label='Remove <asset1>']")
    page.run("document.querySelector('.stage').focus()")
    page.press("z", control=True)
    assert share() == 0 < first < both
    page.press("y", control=True)
    assert share() == first
    page.press("y", control=True)
    assert share() == both

    page.press("e")
    for _ in range(3):
        page.press("]")
    page.drag(place_of(page, 0.1, 0.8), place_of(page, 0.5, 0.8))
    assert share() == first

    for key in "[[[b":
        page.press(key)
    page.drag(*(place_of(page, x, y) for x, y in ((0.6, 0.6), (0.9, 0.6), (0.9, 0.9), (0.6, 0.9), (0.6, 0.6))))
    ring = share()
    page.press("f")
    page.drag(place_of(page, 0.75, 0.75))
    assert share() > ring + 0.02
    assert np.asarray(Image.open(path))[192, 192] == 255

    page.press("b")
    space = {"key": " ", "windowsVirtualKeyCode": 32}
    page.send("Input.dispatchKeyEvent", type="keyDown", **space)
    page.run("document.querySelector('.concepts input').focus()")
    page.send("Input.dispatchKeyEvent", type="keyUp", **space)
    page.drag(place_of(page, 0.7, 0.2), place_of(page, 0.8, 0.2))
    share()
    assert np.asarray(Image.open(path))[51, 192] == 255

    page.show(360, 740, phone=True)
    page.wait("document.querySelector('.stage img').getBoundingClientRect().width < 360")
    before = share()
    page.touch(place_of(page, 0.4, 0.5), place_of(page, 0.6, 0.5))
    painted = share()
    assert painted > before
    width = "document.querySelector('.stage img').getBoundingClientRect().width"
    narrow = page.run(width)
    page.pinch(place_of(page, 0.5, 0.5), 20, 60)
    assert page.run(width) == pytest.approx(3 * narrow, rel=0.05)
    assert share() == painted


def test_a_polygon_is_painted_with_clicks_and_with_keys(page, server, tmp_path):
    """Its first corner or Enter closes it, Escape drops it, undo takes back a corner, or what it has filled."""
    photo = tmp_path / "corners.png"
    photo.write_bytes((PLAYROOM / "img.png").read_bytes())
    bring(page, server, photo)
    path = server.home / "scenes" / "corners" / "mask0.png"
    click(page, "[data-tool=polygon]")
    for corner in ((0.2, 0.2), (0.6, 0.2), (0.7, 0.9)):
        page.drag(place_of(page, *corner))
    page.press("z", control=True)
    page.drag(place_of(page, 0.6, 0.6))
    page.drag(place_of(page, 0.2, 0.2))
    until(path.exists)
    assert np.asarray(Image.open(path)).mean() / 255 == pytest.approx(0.4 * 0.4 / 2, abs=0.004)
    page.press("z", control=True)
    until(lambda: not path.exists())

    page.press("ArrowRight")
    for keys in (" ", *["ArrowRight"] * 10, " ", "Escape", " ", *["ArrowLeft"] * 10, " ", *["ArrowDown"] * 20, " "):
        page.press(keys)
    page.press("Enter")
    until(path.exists)
    assert np.asarray(Image.open(path)).mean() / 255 == pytest.approx(0.1 * 0.2 / 2, abs=0.002)


def test_a_click_proposes_a_mask_that_is_taken_or_dropped(page, server, tmp_path):
    """What is shown is not saved; taken, it is the concept's mask, and undo brings back what was painted before."""
    photo = tmp_path / "clicked.png"
    photo.write_bytes((PLAYROOM / "img.png").read_bytes())
    bring(page, server, photo)
    scene, box = server.home / "scenes" / "clicked", "document.querySelector('aside details').textContent"
    assert "hf download CIDAS/clipseg-rd64-refined" in page.run(box)
    page.drag(place_of(page, 0.2, 0.25), place_of(page, 0.3, 0.5))
    until((scene / "mask0.png").exists)
    page.wait(SAVED)
    painted = (scene / "mask0.png").read_bytes()

    before = place_of(page, 0.5, 0.5)
    for tool in ("eraser", "fill", "polygon", "brush", "click"):  # none moves the image under the hand
        click(page, f"[data-tool={tool}]")
        page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        assert place_of(page, 0.5, 0.5) == before
    page.drag(before)
    wait_long(page, "document.querySelector('#take') !== null")
    (job,) = (server.home / "jobs").glob("*-masks-clicked")
    proposed = np.asarray(Image.open(job / "proposal" / "mask0.png"))
    click(page, "#drop")
    page.wait("document.querySelector('#take') === null")
    assert (scene / "mask0.png").read_bytes() == painted

    page.drag(place_of(page, 0.5, 0.5))
    wait_long(page, "document.querySelector('#take') !== null")
    page.press("Enter")
    until(lambda: np.array_equal(np.asarray(Image.open(scene / "mask0.png")), proposed))
    page.wait(SAVED)
    page.press("z", control=True)
    until(lambda: (scene / "mask0.png").read_bytes() == painted)


def test_a_scene_that_was_changed_elsewhere_is_not_overwritten(page, server, tmp_path):
    photo = tmp_path / "twice.png"
    photo.write_bytes((PLAYROOM / "img.png").read_bytes())
    bring(page, server, photo)
    theirs = np.zeros((256, 256), np.uint8)
    theirs[10:60, 10:60] = 255
    path = server.home / "scenes" / "twice" / "mask0.png"
    Image.fromarray(theirs).save(path)
    page.drag(place_of(page, 0.7, 0.7), place_of(page, 0.8, 0.8))
    page.wait("document.querySelector('aside .card.bad') !== null")
    assert np.array_equal(np.asarray(Image.open(path)), theirs)
    click(page, "aside .card.bad button.main")
    page.wait("document.querySelector('.share')?.textContent === '3.8 %'")


def test_mine_is_kept_beside_what_was_changed_elsewhere(page, server):
    """Each concept by its handle: what was removed or painted there stays so, unless it was changed here."""
    scene = server.home / "scenes" / "both"
    write_scene(scene, "ball", "tree", "cube")
    visit(page, server, "#/masks/both")
    page.wait(SAVED)
    tree, cube = (read_mask(scene, i) for i in (1, 2))
    handles = "[...document.querySelectorAll('.concepts label:nth-of-type(2) input')].map((field) => field.value)"

    def elsewhere(*rows):
        """What a terminal or another page does to the concepts."""
        rows = [{"from": place, "handle": name, "word": "ball"} for place, name in rows]
        return scenes.put_concepts(scene, rows, scenes.open_scene(scene).version)

    # The ball is removed there, the tree is painted here.
    elsewhere((1, "tree"), (2, "cube"))
    click(page, ".concepts li:nth-child(2) .pick")
    page.drag(place_of(page, 0.5, 0.9), place_of(page, 0.7, 0.9))
    click(page, KEEP)
    page.wait(SAVED)
    assert page.run(handles) == ["<tree>", "<cube>"]
    assert [row["handle"] for row in concepts_in(scene / "scene.json")] == ["<tree>", "<cube>"]
    painted = read_mask(scene, 0)
    assert ((painted >= tree).all(), painted.sum() > tree.sum()) == (True, True)
    assert np.array_equal(read_mask(scene, 1), cube)

    # The cube is painted there and a concept comes in; here the tree gets another name.
    opened = elsewhere((0, "tree"), (1, "cube"), (None, "star"))
    scenes.put_tiles(scene, 1, pack(255 - cube), opened.version)
    fill(page, HANDLE.format(1), "oak")
    click(page, KEEP)
    page.wait(SAVED)
    assert page.run(handles) == ["<oak>", "<cube>", "<star>"]
    assert np.array_equal(read_mask(scene, 0), painted)
    assert np.array_equal(read_mask(scene, 1), 255 - cube)
    named = [("<oak>", "ball", True), ("<cube>", "ball", True), ("<star>", "ball", False)]
    assert [tuple(row.values()) for row in concepts_in(scene / "draft.json")] == named

    # What is painted here and removed there comes back whole, also if the room is left before that is said.
    elsewhere((0, "oak"))
    click(page, ".concepts li:nth-child(2) .pick")
    page.drag(place_of(page, 0.7, 0.2), place_of(page, 0.9, 0.2))
    page.wait(f"!!document.querySelector('{KEEP}')")
    page.asked = []
    page.run("location.hash = '#/home'")
    page.wait("document.querySelector('h1').textContent === 'Home' && !!document.querySelector('.card.scene')")
    assert page.asked == ["confirm"]
    assert [row["handle"] for row in concepts_in(scene / "scene.json")] == ["<oak>", "<cube>"]
    assert (read_mask(scene, 1) >= 255 - cube).all()


def test_a_word_makes_a_handle_where_its_letters_can_be_one(page, server):
    """A wrong handle is said, and saved is the rest."""
    scene = server.home / "scenes" / "words"
    scene.mkdir()
    shutil.copy(PLAYROOM / "img.png", scene)
    visit(page, server, "#/masks/words")
    page.wait(SAVED)
    for word, handle in (("мяч", "<asset0>"), ("- -", "<asset0>"), ("Café au lait!", "<cafe-au-lait>")):
        fill(page, WORD.format(1), word)
        page.wait(SAVED)
        (row,) = concepts_in(scene / "draft.json")
        assert (row["handle"], row["word"]) == (handle, word)
        assert page.run(f"document.querySelector('{HANDLE.format(1)}').value") == handle
    fill(page, HANDLE.format(1), "a b")
    page.wait("document.querySelector('.saved').textContent === 'not saved: a handle'")
    assert "letters a-z or A-Z, digits, _ or -" in page.run("document.querySelector('.concepts .error').textContent")
    fill(page, WORD.format(1), "ball")
    until(lambda: concepts_in(scene / "draft.json")[0]["word"] == "ball")
    assert page.run(f"document.querySelector('{HANDLE.format(1)}').value") == "a b"
    assert page.run("document.querySelector('.saved').textContent") != "saved ✓"
    fill(page, HANDLE.format(1), "ball")
    page.wait(SAVED)
    assert concepts_in(scene / "draft.json")[0]["handle"] == "<ball>"


def test_a_folder_that_is_dropped_is_a_scene_or_said_to_be_none(page, server, tmp_path):
    """With its extra images, and without files of others. Beside the scenes stands which folders are not shown."""
    folder, album = tmp_path / "my scene", tmp_path / "album"
    shutil.copytree(PLAYROOM, folder)
    (folder / "1").mkdir()
    for path in (PLAYROOM / "img.png", PLAYROOM / "mask0.png"):
        shutil.copy(path, folder / "1")
    (folder / ".DS_Store").write_text("no part of it")
    album.mkdir()
    shutil.copy(PLAYROOM / "img.png", album / "holidays.png")
    (server.home / "runs" / "100% toys").mkdir()
    visit(page, server, "#/home")
    page.wait("[...document.querySelectorAll('.card.bad')].some((card) => card.textContent.includes('runs/100% toys'))")
    page.drop(album)
    page.wait("document.querySelectorAll('.card.bad').length === 2")
    assert "album cannot be used" in page.run("document.querySelector('.card.bad').textContent")
    assert "drop the files alone" in page.run("document.querySelector('.card.bad').textContent")
    page.drop(folder)
    page.wait("location.hash === '#/masks/my%20scene' && document.querySelectorAll('.concepts li').length === 3")
    made = server.home / "scenes" / "my scene"
    found = {path.relative_to(made): path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert found == {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".DS_Store"
    }
    (server.home / "runs" / "100% toys").rmdir()


def test_the_files_of_a_scene_that_are_chosen_together_are_one_scene(page, server):
    """Image, masks and names."""
    names = ("img.png", "mask0.png", "mask1.png", "mask2.png", "scene.json")
    choose(page, server, *(PLAYROOM / name for name in names))
    page.wait("location.hash === '#/masks/scene' && document.querySelectorAll('.concepts li').length === 3")
    made = server.home / "scenes" / "scene"
    assert {path.name: path.read_bytes() for path in made.iterdir()} == {n: (PLAYROOM / n).read_bytes() for n in names}


def test_a_warning_stands_beside_the_mask_that_it_is_about(page, server, tmp_path):
    """And a refusal, in its colour. Both go when the mask is mended."""
    boxes = [(0, 0, 256, 240), (200, 200, 202, 202), (210, 245, 250, 255)]
    write_scene(server.home / "scenes" / "warned", "moon", "tree", "ball", boxes=boxes)
    visit(page, server, "#/masks/warned")
    notes = "[...document.querySelectorAll('.concepts li')].map((item) => [...item.querySelectorAll('.warning')]"
    notes += ".map((note) => `${note.textContent}${note.matches('.bad') ? ' !' : ''}`))"
    page.wait("document.querySelectorAll('.concepts .warning').length === 4")
    small = "cells: make it larger, or raise Resolution in Train"
    assert page.run(notes) == [
        ["the mask of <moon> covers 94 % of the image: is it inverted?"],
        [
            f"the mask of <tree> vanishes on the attention grid of 16x16 {small}",
            "100 % of the mask of <tree> lies in the mask of <moon>: their handles will share what is there",
            f"the mask of <tree> vanishes on the loss grid of 16x16 {small} !",
        ],
        [],
    ]
    assert page.run("document.querySelectorAll('aside .warning').length") == 4  # none stands elsewhere
    click(page, "[aria-label='Clear the mask of concept 1']")
    click(page, ".concepts li:nth-child(2) .pick")
    page.drag(place_of(page, 0.7, 0.2), place_of(page, 0.75, 0.3))
    page.wait("document.querySelector('.saved')?.textContent === 'saved ✓'")
    page.wait("document.querySelectorAll('.concepts .warning').length === 0")


def test_an_image_that_cannot_be_read_is_said_where_it_was_brought(page, server, tmp_path):
    """The others that came with it are there."""
    for name in ("before.png", "after.png"):
        shutil.copy(PLAYROOM / "img.png", tmp_path / name)
    (tmp_path / "notes.png").write_text("no image")
    choose(page, server, *(tmp_path / name for name in ("before.png", "notes.png", "after.png")))
    page.wait("['before', 'after'].every((name) => document.querySelector(`[aria-label='Paint ${name}']`))")
    said = page.run("[...document.querySelectorAll('.card.bad')].map((card) => card.textContent)")
    assert len(said) == 1
    assert said[0].startswith("notes.png cannot be used")
    assert "it is none of these, or damaged" in said[0]
    assert page.run("location.hash") == "#/home"
