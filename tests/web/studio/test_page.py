"""The studio's page in a real browser: the whole way on the miniature, a killed server, two pages, small screens."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bas.web.studio import jobs
from bas.web.studio.store import Home
from tests.helpers.studio_page import (
    PLAYROOM,
    SAVED,
    WORD,
    bring,
    click,
    concepts_in,
    drag_boxes,
    enter,
    fill,
    place_of,
    shape_of,
    until,
    visit,
    wait_long,
)

pytestmark = pytest.mark.browser
AXE = Path(find_spec("axe_core_python").origin).with_name("axe.min.js") if find_spec("axe_core_python") else None


def test_the_whole_way(page, server, tmp_path):
    """A photograph is painted and named, trained, stopped, continued, drawn with a box, edited, taken away."""
    photo = tmp_path / "my toys.png"
    photo.write_bytes((PLAYROOM / "img.png").read_bytes())
    bring(page, server, photo)
    scene = server.home / "scenes" / "my toys"

    # Paint two concepts and name them.
    page.drag(place_of(page, 0.2, 0.25), place_of(page, 0.2, 0.4), place_of(page, 0.3, 0.5))
    page.wait(SAVED)
    fill(page, ".concepts li:nth-child(1) label:nth-of-type(1) input", "moon")
    page.wait("document.querySelector('.concepts li:nth-child(1) label:nth-of-type(2) input').value === '<moon>'")
    click(page, "#add")
    page.wait("document.querySelectorAll('.concepts li').length === 2")
    page.drag(place_of(page, 0.7, 0.2), place_of(page, 0.75, 0.3))
    page.wait(SAVED)
    fill(page, ".concepts li:nth-child(2) label:nth-of-type(1) input", "tree")
    page.wait("document.querySelector('.concepts li:nth-child(2) label:nth-of-type(2) input').value === '<tree>'")
    page.wait(SAVED)
    masks = [np.asarray(Image.open(scene / f"mask{i}.png")) for i in range(2)]
    names = json.loads((scene / "scene.json").read_text())["concepts"]
    assert names == [{"handle": "<moon>", "word": "moon"}, {"handle": "<tree>", "word": "tree"}]
    assert masks[0][int(0.4 * 256), int(0.2 * 256)] == 255
    assert masks[0][:, 200:].max() == 0
    assert masks[1][int(0.2 * 256), int(0.7 * 256)] == 255
    assert 0.01 < masks[0].mean() / 255 < 0.1

    # Undo and redo are saved as well.
    page.run("document.querySelector('.stage').focus()")
    page.press("z", control=True)
    page.wait(SAVED)
    assert not (scene / "mask1.png").exists()
    page.press("y", control=True)
    page.wait(SAVED)
    assert np.array_equal(np.asarray(Image.open(scene / "mask1.png")), masks[1])

    # Train, stop, continue.
    click(page, ".next a")
    few = {"phase1_train_steps": 40, "phase2_train_steps": 1, "img_log_steps": 0, "train_batch_size": 1}
    page.wait("!!document.querySelector('#set-train_batch_size')")
    for name, value in few.items():
        fill(page, f"#set-{name}", value)
    page.run("document.querySelector('#set-with_prior_preservation').click()")
    enter(page, "#start")
    page.wait("location.hash === '#/watch/my%20toys'")
    page.wait("/^[1-9]\\d*\\/41/.test(document.querySelector('.live .large')?.textContent ?? '')")
    page.wait("/ at step ([1-9]|[1-3]\\d),/.test(document.querySelector('.curve')?.getAttribute('aria-label') ?? '')")
    enter(page, "#stop")
    wait_long(page, "document.querySelector('.card [id=continue]') !== null")
    run = server.home / "runs" / "my toys"
    stopped = sum(1 for _ in (run / "metrics.jsonl").open())
    assert 0 < stopped < 41
    assert (
        page.run("document.querySelector('.stack .card strong').textContent")
        == f"It was stopped after step {stopped} of 41."
    )
    enter(page, "#continue")
    wait_long(page, "document.querySelector('.good-card') !== null")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps == [*range(1, 42)]
    assert (run / "concepts.safetensors").exists()

    # Draw two images with a box.
    click(page, ".good-card a")
    page.wait("!!document.querySelector('#draw')")
    click(page, "[aria-label='<moon> stronger']")
    click(page, "[aria-label='<moon> stronger']")
    assert page.run("document.querySelector('#prompt').value") == "a photo of (<moon>:1.2) and <tree> at the beach"
    page.run("[...document.querySelectorAll('.chip')].find((chip) => chip.textContent === 'in the snow').click()")
    assert page.run("document.querySelector('#prompt').value") == "a photo of (<moon>:1.2) and <tree> in the snow"
    shapes = "[...document.querySelectorAll('.cut')].map((image) => [image.naturalWidth, image.naturalHeight])"
    page.wait(f"{shapes}.length === 2 && {shapes}.every(([width]) => width > 0)")
    assert page.run(shapes) == [shape_of(np.asarray(Image.open(run / "scene" / f"mask{i}.png"))) for i in range(2)]
    fill(page, "#draw-num_images", 2)
    fill(page, "#draw-num_inference_steps", 3)
    click(page, "[aria-label='Add a box for <moon>']")
    page.run("document.querySelector('.frame').closest('details').open = true")
    page.run("document.querySelector('.frame').scrollIntoView()")
    drag_boxes(page, (0.5, 0.5), (0.6, 0.4))  # moves it
    drag_boxes(page, (0.05, 0.05), (0.06, 0.06))  # a press beside it changes nothing
    page.run("[...document.querySelectorAll('.boxrow .chip')].find((chip) => chip.textContent === '<tree>').click()")
    drag_boxes(page, (0.05, 0.8), (0.3, 0.95))
    enter(page, "#draw")
    wait_long(page, "document.querySelectorAll('.shot').length === 2")
    drawn = sorted((run / "pictures").glob("*.png"))
    settings = [json.loads(Image.open(path).info["bas"]) for path in drawn]
    assert [row["seed"] for row in settings] == [0, 1]
    assert settings[0]["num_inference_steps"] == 3
    (job,) = (server.home / "jobs").glob("*sample*")
    boxes = json.loads((job / "layout.json").read_text())
    assert np.allclose(boxes["<moon>"], [0.35, 0.15, 0.85, 0.65], atol=0.02)
    assert np.allclose(boxes["<tree>"], [0.05, 0.8, 0.3, 0.95], atol=0.02)

    # One of them is a favourite, also after a reload. Favourites alone are shown.
    click(page, "li:nth-child(2) > .shot")
    click(page, ".chosen button[aria-pressed]")
    page.wait("document.querySelectorAll('.shot .star').length === 1")
    visit(page, server, "#/draw/my%20toys")
    page.wait("document.querySelectorAll('.shot').length === 2")
    favourite = "document.querySelector('.shot:has(.star)').dataset.file"
    kept = page.run(favourite)
    click(page, ".pictures input[type=checkbox]")
    page.wait("document.querySelectorAll('.shot').length === 1")
    assert page.run(favourite) == kept
    click(page, ".pictures input[type=checkbox]")
    page.wait("document.querySelectorAll('.shot').length === 2")

    # Edit the photograph: nothing changes outside of what was painted.
    visit(page, server, "#/edit/my%20toys")
    files = "[...document.querySelectorAll('#source option')].map((option) => option.value)"
    assert {f"pictures/{path.name}" for path in drawn} < set(page.run(files))
    page.wait(
        "!!document.querySelector('.stage img')?.complete && document.querySelector('.stage img').naturalWidth > 0"
    )
    page.drag(place_of(page, 0.4, 0.6), place_of(page, 0.6, 0.8))
    fill(page, "#draw-num_inference_steps", 4)
    enter(page, "#edit")
    wait_long(page, "document.querySelectorAll('.shot').length === 1")
    (edited,) = (run / "edits").glob("*.png")
    (job,) = (server.home / "jobs").glob("*edit*")
    before, after = np.asarray(Image.open(photo).convert("RGB")), np.asarray(Image.open(edited))
    painted = np.asarray(Image.open(job / "mask.png"))
    assert np.array_equal(before[painted == 0], after[painted == 0])
    assert (before[painted == 255] != after[painted == 255]).any()
    page.wait("document.querySelector('.slide .good')?.textContent === 'outside: unchanged, 0 pixels'")
    shown = "[...document.querySelectorAll('.slide img')].map((image) => [image.naturalWidth, image.style.clipPath])"
    page.wait(f"{shown}.every(([width]) => width === 256)")
    fill(page, ".slide input", 25)
    assert page.run(shown) == [[256, ""], [256, "inset(0px 75% 0px 0px)"]]  # before, up to 25 % of the width after

    # Take it away.
    visit(page, server, "#/runs/my%20toys")
    page.wait("!!document.querySelector('a[download=\"my toys.zip\"]')")
    address = page.run("document.querySelector('a[download=\"my toys.zip\"]').href")
    fetch = "import sys, urllib.request; urllib.request.urlretrieve(*sys.argv[1:])"  # tests reach no network themselves
    subprocess.run([sys.executable, "-c", fetch, address, str(tmp_path / "run.zip")], check=True)
    with zipfile.ZipFile(tmp_path / "run.zip") as found:
        assert found.testzip() is None
        inside = {name.removeprefix("my toys/") for name in found.namelist()}
        assert found.read("my toys/concepts.safetensors") == (run / "concepts.safetensors").read_bytes()
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "config.toml", "report.html"} <= inside
    assert not any(name.startswith(("pictures", "edits", "checkpoints")) for name in inside)


def test_finished_runs_are_compared_asked_and_taken_away(page, furnished):
    """Two small runs: what differs, where an image looked, an image deleted and restored, a LoRA."""
    server, runs = furnished, furnished.home / "runs"

    # Compare.
    visit(page, server, "#/runs/first")
    page.wait("document.querySelectorAll('.picks input').length >= 2")
    for name in ("first", "second"):
        page.run(f"[...document.querySelectorAll('.picks label')].find((e) => e.textContent === '{name}').click()")
    page.wait("document.querySelectorAll('.beside section').length === 2")
    cells = "[...document.querySelectorAll('table tr')].map((row) => [...row.children].map((cell) => cell.textContent))"
    assert page.run(cells) == [["Setting", "first", "second"], ["Rank", "4", "2"]]
    labels = "[...document.querySelectorAll('.curve')].map((curve) => curve.getAttribute('aria-label'))"
    assert page.run(labels) == [
        "sum, weighted: 1.33 at step 3, between 1.33 and 4",
        "sum, weighted: 0.667 at step 3, between 0.667 and 2",
    ]
    axes = "[...document.querySelectorAll('.axis')].map((axis) => [...axis.children].map((end) => end.textContent))"
    assert page.run(axes) == [["0.667", "4"]] * 2  # one axis for both, so that they can be compared

    # Take away: a LoRA, and what to type for it.
    click(page, "[aria-label='Make: LoRA for ComfyUI, A1111, InvokeAI']")
    click(page, "[aria-label='Make: LoRA for diffusers']")
    line = json.dumps("A1111, Forge: a photo of asset0 <lora:first:1>")
    wait_long(page, f"[...document.querySelectorAll('code')].some((code) => code.textContent === {line})")
    files = page.run("[...document.querySelectorAll('.files a')].map((link) => link.textContent)")
    names = ["asset0.safetensors", "asset1.safetensors", "first.safetensors"]
    assert [name for name in files if name.endswith(".safetensors")][:3] == names
    card = "[...document.querySelectorAll('.card')].find((card) => card.textContent.startsWith('LoRA for diffusers'))"
    wait_long(page, f"{card}.querySelectorAll('.files a').length > 2")
    exits = [job / "exit.json" for job in sorted((server.home / "jobs").glob("*export*"))]
    ends = [json.loads(path.read_text())["ended"] for path in exits]
    assert ends == sorted(ends)
    click(page, "a[href='#/watch/first']")
    page.wait("document.querySelectorAll('.curve').length === 1")

    # Where did it look? And an image comes back from the trash.
    visit(page, server, "#/draw/first")
    click(page, ".chosen figcaption button:nth-of-type(3)")
    wait_long(page, "document.querySelectorAll('.looks img').length === 2")
    page.wait("[...document.querySelectorAll('.looks img')].every((image) => image.naturalWidth > 0)")
    told = "[...document.querySelectorAll('.looks figcaption')].map((caption) => caption.textContent)"
    assert page.run(told) == ["<asset0>", "<asset1>"]
    click(page, "[aria-label='Where did each word look?']")
    wait_long(page, "document.querySelectorAll('.looks img').length > 2")
    page.wait("[...document.querySelectorAll('.looks img')].every((image) => image.naturalWidth > 0)")
    assert page.run(told) == ["a", "photo", "of", "<asset0>", "and", "<asset1>"]
    click(page, ".chosen figcaption button.plain")
    page.wait("document.querySelectorAll('.shot').length === 0")
    assert not (runs / "first/pictures/one.png").exists()
    click(page, "[aria-label='Restore The image']")
    page.wait("document.querySelectorAll('.shot').length === 1")
    assert (runs / "first/pictures/one.png").exists()

    # A run comes back from the list of the trash.
    visit(page, server, "#/home")
    click(page, "[aria-label='Delete second']")
    page.wait("document.querySelector('[aria-label=\"Restore The run second\"]') !== null")
    assert not (runs / "second").exists()
    click(page, "#trash summary")
    click(page, "[aria-label='Restore runs/second']")
    page.wait("document.querySelector('[aria-label=\"Delete second\"]') !== null")
    until((runs / "second" / "concepts.safetensors").exists)


def test_what_was_changed_outlives_the_server(page, server, tmp_path):
    """Stroke, word and new concept are saved when it is back, and the page warns until then. A training goes on."""
    shutil.copytree(PLAYROOM, server.home / "scenes" / "trained")
    settings = {
        "phase1_train_steps": 100_000,
        "with_prior_preservation": False,
        "img_log_steps": 0,
        "train_batch_size": 1,
    }
    body = json.dumps({"kind": "train", "scene": "trained", "settings": settings})
    visit(page, server, "#/home")
    sent = "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: BODY}".replace("BODY", repr(body))
    assert page.run(f"fetch('api/jobs', {sent}).then((answer) => answer.status)") == 200
    until((server.home / "runs" / "trained" / "metrics.jsonl").exists)
    photo = tmp_path / "away.png"
    photo.write_bytes((PLAYROOM / "img.png").read_bytes())
    bring(page, server, photo)
    server.end(signal.SIGKILL)
    page.drag(place_of(page, 0.3, 0.3), place_of(page, 0.5, 0.5))
    page.wait("document.querySelector('.saved').textContent.startsWith('not saved')")
    page.wait("!document.querySelector('#band').hidden")
    fill(page, WORD.format(1), "moon")
    click(page, "#add")
    page.asked, page.agrees = [], False
    page.send("Page.navigate", url="about:blank")
    page.agrees = True
    assert page.asked == ["beforeunload"]
    server.start()
    page.wait(SAVED)
    scene = server.home / "scenes" / "away"
    mask = np.asarray(Image.open(scene / "mask0.png"))
    assert mask[int(0.4 * 256), int(0.4 * 256)] == 255
    assert [(row["handle"], row["word"]) for row in concepts_in(scene / "draft.json")] == [
        ("<moon>", "moon"),
        ("<asset0>", None),
    ]
    page.asked = []
    visit(page, server, "#/masks/away")
    assert page.asked == []
    page.wait("document.querySelector('.share')?.textContent.endsWith('%')")
    assert page.run("document.querySelector('.share').textContent") == f"{100 * mask.mean() / 255:.1f} %"
    visit(page, server, "#/watch/trained")
    at = "parseInt(document.querySelector('.live .large')?.textContent)"
    page.wait(f"{at} > 0")
    page.wait(f"{at} > {page.run(at)}")
    click(page, ".live .plain")
    page.wait("document.querySelector('#continue') !== null")
    page.problems.clear()


# What can have the focus and shows no outline then; reached by Tab first, so that the browser shows the focus at all.
UNSEEN_FOCUS = """[...document.querySelectorAll('a[href], button, input, select, textarea, summary, [tabindex="0"]')]
  .filter((each) => each.checkVisibility() && !each.disabled).filter((each) => {
    each.focus();
    const style = getComputedStyle(each);
    return document.activeElement === each && (style.outlineStyle === 'none' || parseFloat(style.outlineWidth) < 2);
  }).map((each) => each.outerHTML.slice(0, 120))"""
AUDIT = """axe.run(document, {resultTypes: ['violations'], runOnly: RULES}).then(({violations}) =>
  violations.map(({id, nodes}) => `${id}: ${nodes.slice(0, 3).map((node) => node.html.slice(0, 150)).join(' | ')}`))"""
ALL_RULES = '["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]'


@pytest.mark.parametrize(
    ("place", "seen"),
    [
        ("home", ".card.run"),
        ("masks/playroom", ".grids canvas"),
        ("train/playroom", "#start:enabled"),
        ("watch/first", ".curve"),
        ("draw/first", ".chosen figcaption"),
        ("edit/first", "#edit"),
        ("runs/first", ".card a.main"),
        ("draw/nothing", ".empty"),
    ],
)
def test_everybody_can_use_every_room(page, furnished, place, seen):
    """No finding of axe, wide and light or dark; focus is seen; headings go down in steps; no room exceeds a phone."""
    page.show(360, 740, phone=True)
    visit(page, furnished, f"#/{place}")
    if place.startswith("masks"):
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.wait(f"!!document.querySelector({json.dumps(seen)})")
    assert page.run("document.documentElement.scrollWidth") == 360
    assert page.run("document.querySelector('#main').scrollWidth <= document.querySelector('#main').clientWidth")
    page.show(1280, 800)
    page.run("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    page.press("Tab")
    assert page.run(UNSEEN_FOCUS) == []
    levels = page.run("[...document.querySelectorAll('h1, h2, h3, h4')].map((each) => Number(each.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    if AXE is None:
        pytest.skip("axe-core-python is not installed: pip install -e '.[test]'")
    page.run(AXE.read_text(encoding="utf-8") + ";0")
    assert page.run(AUDIT.replace("RULES", ALL_RULES)) == []
    page.show(1280, 800, dark=True)
    assert page.run(AUDIT.replace("RULES", '{type: "rule", values: ["color-contrast"]}')) == []


def test_the_advice_is_for_the_hand_that_is_there(page, furnished):
    """Fingers are told of fingers, and a mouse that is plugged in later of its wheel; Edit tells of what may change."""
    page.show(360, 740, phone=True)
    visit(page, furnished, "#/masks/playroom")
    page.wait("document.querySelector('.hint')?.textContent === 'Paint over the concept. Two fingers move and zoom.'")
    page.show(1280, 800)
    page.wait("document.querySelector('.hint').textContent.startsWith('Paint over the concept. The wheel zooms')")
    visit(page, furnished, "#/edit/first")
    page.wait("document.querySelector('.hint')?.textContent.startsWith('Paint over what may change. The wheel zooms')")
    click(page, "[data-tool=eraser]")
    page.wait("document.querySelector('.hint').textContent.startsWith('Paint over what shall stay. The wheel zooms')")


def test_a_thousand_images_scroll(page, furnished):
    """The page holds only those near the window, in the order of time; the last is reached by scrolling and by keys."""
    visit(page, furnished, "#/draw/many")
    page.wait("document.querySelectorAll('.shot').length > 0")
    shots = "[...document.querySelectorAll('.shot')].map((shot) => shot.dataset.file.slice(9, 13))"
    first = page.run(shots)
    assert first == [f"{999 - i:04d}" for i in range(len(first))]
    assert len(first) <= 60
    page.run("document.querySelector('.roll').scrollTop = 1e6")
    page.wait(f"{shots}.at(-1) === '0000'")
    page.wait("[...document.querySelectorAll('.shot img')].at(-1).naturalWidth === 8")
    assert len(page.run(shots)) <= 90
    asked = "performance.getEntriesByType('resource').filter((each) => each.name.includes('/thumb/')).length"
    assert page.run(asked) <= 150
    page.run("document.querySelector('.roll').scrollTop = 0")
    page.wait(f"{shots}[0] === '0999'")
    page.run("document.querySelector('.shot').focus()")
    page.press("End")
    page.wait("document.activeElement.dataset.file === 'pictures/0000.png'")
    assert page.run("document.querySelector('.chosen p').textContent") == "a photo of <asset0>, 0"
    place = page.run("document.activeElement.getBoundingClientRect().bottom")
    assert place <= 800  # in the window


def test_two_pages_see_each_other(page, furnished):
    """A favourite of one page is one in the other, and an image that the other deletes is gone in the first."""
    pictures = furnished.home / "runs" / "second" / "pictures"
    pictures.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png")
    visit(page, furnished, "#/draw/second")
    page.wait("document.querySelectorAll('.shot').length === 2")
    with page.second_page() as switch:
        page.show(1280, 800)
        visit(page, furnished, "#/draw/second")
        page.wait("document.querySelectorAll('.shot').length === 2")
        click(page, ".chosen figcaption button[aria-pressed=false]")
        switch()
        page.wait("document.querySelectorAll('.star').length === 1")
        click(page, ".chosen figcaption button.plain")
        page.wait("document.querySelectorAll('.shot').length === 1")
        switch()
        page.wait("document.querySelectorAll('.shot').length === 1")
    assert len([*pictures.glob("*.png")]) == 1


def test_previews_stand_beside_their_masks_and_grow_with_the_window(page, furnished):
    """Each handle as it is drawn, where it looks, and its mask; curves grow, too. A phone folds what is not chosen."""
    run = furnished.home / "runs" / "first"
    pictures = run / "previews" / "pictures" / "step-000003"
    pictures.mkdir(parents=True)
    (run / "scene").mkdir(exist_ok=True)
    paths = [pictures / f"{name}.png" for name in ("sample-0", "sample-1", "sample-all", "attention-0", "attention-1")]
    for path in (*paths, run / "scene/img.png", run / "scene/mask0.png", run / "scene/mask1.png"):
        Image.new("RGB", (8, 8)).save(path)
    shutil.copy(paths[0], run / "previews" / "step-000003.png")
    visit(page, furnished, "#/watch/first")
    shown = "[...document.querySelectorAll('.shots figure')].map((each) => [...each.querySelectorAll('img')]"
    page.wait(f"{shown}.filter((image) => image.naturalWidth === 8).length).join() === '3,3,1'")
    files = page.run(f"{shown}.map((image) => image.src.split('/').at(-1)))")
    assert files == [[f"sample-{i}.png", f"attention-{i}.png", f"mask{i}.png"] for i in (0, 1)] + [["sample-all.png"]]
    sizes = "['.shots img', '.curve'].map((each) => document.querySelector(each).getBoundingClientRect().height)"
    before = page.run(sizes)
    page.show(2560, 1300)
    after = page.run(sizes)
    assert all(later > 1.5 * earlier for earlier, later in zip(before, after, strict=True))
    right = "document.querySelector('.curve-box').getBoundingClientRect().right"
    assert page.run(right) > 2500
    page.show(360, 740, phone=True)
    visit(page, furnished, "#/train/playroom")
    page.wait("document.querySelectorAll('.option').length > 2")
    assert page.run("[...document.querySelectorAll('.option')].filter((each) => each.checkVisibility()).length") == 1
    assert page.run("document.querySelector('.option :checked').value") == "mini"


def test_what_becomes_of_an_image_in_vain_is_said_above_it(page, furnished):
    """When its file is gone, and when the server is away."""
    pictures = furnished.home / "runs" / "second" / "pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(pictures / f"{name}.png")
    visit(page, furnished, "#/draw/second")
    page.wait("document.querySelectorAll('.shot').length === 2")
    said = "document.querySelector('.pictures .card.bad')?.textContent"
    (pictures / "b.png").unlink()
    click(page, ".chosen figcaption button.plain")
    page.wait(f"{said} === 'The image was not deletedthe run has no such file'")
    page.wait("document.querySelectorAll('.shot').length === 1")
    page.run("window.fetch = () => Promise.reject(new TypeError('away')); 0")
    click(page, ".chosen figcaption button[aria-pressed=false]")
    page.wait(f"{said} === 'The image was not markedbas studio does not answer'")


def test_a_run_that_was_refused_after_some_steps_can_be_continued(page, furnished):
    """The page says so, and offers it; one that was refused before its first step has not started, and does not."""
    home = Home(furnished.home)
    made = []
    for name, steps in (("later", 3), ("never", 0)):
        run = shutil.copytree(furnished.home / "runs" / "first", furnished.home / "runs" / name)
        (run / "concepts.safetensors").unlink()
        if not steps:
            (run / "metrics.jsonl").unlink()
        job = home.folder / "jobs" / jobs.make(home, "train", name, ["train", "nowhere"], {}, {})
        (job / jobs.EXIT).write_text(json.dumps({"code": 2, "line": "the disk is full", "ended": 0}))
        made += [run, job]
    card = "document.querySelector('.stack .card')"
    visit(page, furnished, "#/watch/never")
    page.wait(f"{card}?.textContent.startsWith('It has not started.the disk is full')")
    assert page.run("document.querySelector('#continue')") is None
    visit(page, furnished, "#/watch/later")
    page.wait(f"{card}?.textContent.startsWith('It was not continued.the disk is full')")
    before = {*jobs.Lane(home).folders()}
    click(page, "#continue")
    until(lambda: {*jobs.Lane(home).folders()} - before)
    (rest,) = {*jobs.Lane(home).folders()} - before
    assert jobs.words_of(rest) == ["train", "nowhere", "--resume_from_checkpoint", "latest"]
    until((rest / jobs.EXIT).exists)
    for folder in (*made, rest):
        shutil.rmtree(folder)


def test_prompts_of_class_images_are_lines_and_keep_their_commas(page, furnished):
    """What was written is in the command, and is shown again when the room is opened again."""
    visit(page, furnished, "#/train/playroom")
    field = "document.querySelector('#set-class_prompt')"
    page.wait(f"{field} !== null")
    usual = page.run(f"{field}.value")
    assert usual.split("\n")[:2] == ["a photo at the beach", "a photo in the jungle"]
    fill(page, "#set-class_prompt", "a photo, at the beach\n\n  a photo in the snow ")
    page.wait("document.querySelector('.plan pre')?.textContent.includes('--class_prompt')")
    said = "--class_prompt 'a photo, at the beach' 'a photo in the snow'"
    assert said in page.run("document.querySelector('.plan pre').textContent")
    visit(page, furnished, "#/train/playroom")
    page.wait(f"{field} !== null")
    assert page.run(f"{field}.value") == "a photo, at the beach\na photo in the snow"
    fill(page, "#set-class_prompt", usual)
    page.wait("document.querySelector('.columns').textContent.includes('As suits this base model.')")
