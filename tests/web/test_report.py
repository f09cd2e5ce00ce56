"""The page of a run: nothing outside it, numbers as in metrics.jsonl, names as text; and it works in a browser."""

import base64
import io
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bas.cli.entry import main
from bas.config import TrainConfig
from bas.data.scene_folder import load_scene
from bas.io.figures import grid, overlay_attention
from bas.io.run_files import read_rows
from bas.presets import PLAIN
from bas.pretrained.hashes import weights_hash
from bas.sampling.gallery import save_grid
from bas.training.preview import write_image
from bas.training.timing import Timing, peak_memory
from bas.web.elements import spread
from bas.web.report import UNTRAINED, line, page, renew_report, running_mean, write_report
from tests.helpers import tiny
from tests.helpers.browser import Browser

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;'
HANDLES = ("<creature>", "<bowl>")


def run_folder(folder, handles=HANDLES, steps=40, **settings):
    """A run folder as training leaves it, without any training: an image, two masks, previews at two steps, losses."""
    draw = np.random.default_rng(0)
    scene = tiny.write_scene(folder / "scene", concepts=2, size=(96, 64))
    photo = Image.open(scene / "img.png")
    for step in (20, 40):
        place = folder / "previews" / "pictures" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for name in (0, 1, "all"):
            Image.fromarray(draw.integers(0, 255, (64, 96, 3), np.uint8)).save(place / f"sample-{name}.png")
        for i in range(2):
            overlay_attention(draw.random((4, 6), np.float32), photo, i).save(place / f"attention-{i}.png")
    config = asdict(TrainConfig(phase1_train_steps=steps // 2, phase2_train_steps=steps // 2, **settings))
    facts = {"config": config, "handles": list(handles), "base": "cd" * 32, "version": "0.1.0"}
    (folder / "settings.json").write_text(json.dumps(facts))
    rows = []
    for step in range(1, steps + 1):
        row = {"phase": "phase1" if step <= steps // 2 else "phase2", "step": step, "lr": 5e-4 if step <= 20 else 2e-6}
        row |= {"loss": 0.4 / step + draw.random() / 9, "reconstruction": draw.random() / 7}
        row |= {"prior": draw.random()} if step > steps // 2 else {}
        rows.append(row | {"attention": draw.random() / 3, "grad_norm": float("inf") if step == 3 else draw.random()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Timing().note("preparation", folder, torch.device("cpu"))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("report") / "creature")


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, source: str):
        super().__init__()
        self.elements, self.texts, self.scripts, self.inside = [], [], [], None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.texts).append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def test_nothing_points_outside_and_every_image_is_there(run):
    source = page(run)
    parsed = Page(source)
    around = re.sub(r'src="data:image/jpeg;base64,[A-Za-z0-9+/=]+"', "", source)
    assert re.findall(r"(?:https?:)?//[a-z]|url\(|@import|src=", around) == []
    assert not {"link", "iframe", "object", "base", "form"} & {tag for tag, _ in parsed.elements}
    assert all("src" not in script for script in parsed.all("script"))
    images = parsed.all("img")
    # image, both masks together and alone; per handle image, mask, 2 x 2 previews; 2 of all handles
    assert len(images) == 4 + 2 * 6 + 2
    for tag in images:
        data = base64.b64decode(tag["src"].removeprefix("data:image/jpeg;base64,"))
        assert Image.open(io.BytesIO(data)).size == (int(tag["width"]), int(tag["height"])) == (96, 64)


def test_extra_images_are_shown(tmp_path):
    """Those of the folder by number, then the close-ups; each names the concepts it has a mask of."""
    folder = run_folder(tmp_path / "run")
    for name in ("10", "2", "close-up-1"):
        tiny.write_scene(folder / "scene" / name, concepts=2)
    (folder / "scene" / "2" / "mask0.png").unlink()
    shown = [image["alt"] for image in Page(page(folder)).all("img") if image["alt"].startswith("image ")]
    assert shown == ["image 2: <bowl>", "image 10: <creature>, <bowl>", "image close-up-1: <creature>, <bowl>"]


def test_the_sheet_of_the_demo_comes_first_and_words_are_explained(tmp_path):
    """The sheet stands before every other image; one sentence each says what handle, attention map and phases are."""
    folder = run_folder(tmp_path / "run")
    Image.new("RGB", (300, 200)).save(folder / "demo.png")
    parsed = Page(page(folder))
    assert (parsed.all("img")[0]["width"], parsed.all("img")[0]["height"]) == ("300", "200")
    assert len(parsed.all("img")) == 1 + 4 + 2 * 6 + 2
    text = "".join(parsed.texts)
    for word in ("Handle:", "Attention map:", "Two phases:"):
        assert text.count(word) == 1


def test_a_preview_of_phase_1_says_that_it_cannot_look_like_the_concept_yet(run):
    """Phase 1 has 20 of 40 steps: of the previews at 20 and 40 the first one says so, for two handles and for both."""
    captions = [image["alt"] for image in Page(page(run)).all("img") if image["alt"].startswith("step")]
    assert captions == [f"step 20, in phase 1: {UNTRAINED}", "step 40"] * 3


def test_a_baseline_trains_from_its_first_step(tmp_path):
    """It has one phase: none of its previews is said to be of phase 1."""
    source = page(run_folder(tmp_path / "run", method="db", **PLAIN))
    captions = [image["alt"] for image in Page(source).all("img") if image["alt"].startswith("step")]
    assert captions == ["step 20", "step 40"] * 3


def test_the_curves_are_metrics_jsonl(run):
    rows, data = read_rows(run / "metrics.jsonl"), Page(page(run)).data
    assert data["steps"] == [row["step"] for row in rows]
    assert data["phases"] == [row["phase"] for row in rows]
    assert list(data["series"]) == ["reconstruction", "attention", "prior", "loss", "grad_norm", "lr"]
    for name, values in data["series"].items():
        assert values == [None if (v := row.get(name)) in (None, float("inf")) else v for row in rows]


def test_a_curve_is_drawn_where_its_values_are(run):
    rows, parsed = read_rows(run / "metrics.jsonl"), Page(page(run))
    drawn = next(path["d"] for path in parsed.all("path") if path["class"] == "raw")
    points = [tuple(map(float, point.split())) for point in re.findall(r"[ML]([^ML]+)", drawn)]
    values = np.array([row["reconstruction"] for row in rows])
    low, high = np.log([values.min(), values.max()])
    logarithmic = values.max() > 20 * values.min()
    heights = (np.log(values) - low) / (high - low) if logarithmic else (values - values.min()) / np.ptp(values)
    assert [x for x, _ in points] == pytest.approx(np.linspace(0, 1000, 40), abs=0.01)
    assert [y for _, y in points] == pytest.approx(95 - 90 * heights, abs=0.01)
    borders = [line["x1"] for line in parsed.all("line") if line["class"] == "border"]
    assert borders == [f"{1000 * 20 / 39:.1f}"] * 6


def test_gaps_means_and_choices():
    assert line([(0, 1), None, (2, 3), (4, 5)]) == "M0.00 1.00M2.00 3.00L4.00 5.00"
    assert running_mean([1.0, 3.0, None, 5.0], 2) == [1.0, 2.0, None, 5.0]
    assert spread(list(range(5)), 12) == [0, 1, 2, 3, 4]
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]


def test_names_from_data_stay_text(tmp_path):
    folder = run_folder(tmp_path / "<b>run", (HOSTILE, "<bowl>"), class_prompt=(HOSTILE,), output_dir=HOSTILE)
    gallery = folder / "<i>gallery"
    gallery.mkdir()
    grid([[Image.new("RGB", (8, 8))]], [["x"]], 64).save(gallery / "grid.png")
    source = page(folder)
    parsed = Page(source)
    assert "<img src=x" not in source
    assert not {"b>run", "i>gallery"} & {tag for tag, _ in parsed.elements}
    assert all("onerror" not in attributes for _, attributes in parsed.elements)
    assert len(parsed.all("script")) == 2
    text = "".join(parsed.texts)
    assert text.count(HOSTILE) >= 4  # chip, its section, two settings
    assert "<i>gallery" in text


def test_settings_hashes_times_and_memory_are_told(run):
    text = " ".join(Page(page(run)).texts)
    for told in ("phase1_train_steps", "20", "cd" * 32, torch.__version__, "preparation", "40 of 40", "unfinished"):
        assert told in text
    held = peak_memory(torch.device("cpu"))["process_bytes"]
    assert 50e6 < held < 50e9
    assert "in the process" in text


def test_sessions_of_a_resumed_run_add_up(tmp_path):
    first, second = Timing(), Timing()
    second.session["started"] = "later"
    for times, stages in ((first, ("preparation", "phase1")), (second, ("preparation", "phase2"))):
        for stage in stages:
            times.note(stage, tmp_path, torch.device("cpu"))
    sessions = json.loads((tmp_path / "times.json").read_text())["sessions"]
    assert [[stage["stage"] for stage in session["stages"]] for session in sessions] == [
        ["preparation", "phase1"],
        ["preparation", "phase2"],
    ]
    assert all(stage["seconds"] >= 0 for session in sessions for stage in session["stages"])


def test_a_run_that_has_barely_begun_has_a_page(tmp_path):
    config = asdict(TrainConfig())
    facts = {"config": config, "handles": ["<a>"], "base": "00", "version": "0.1.0"}
    (tmp_path / "settings.json").write_text(json.dumps(facts))
    (tmp_path / "metrics.jsonl").write_text('{"phase": "phase1", "step": 1, "lr": 0.1, "loss": 1.0}\n{"phase": "ph')
    text = " ".join(Page(page(tmp_path)).texts)
    assert "1 of 800" in text
    assert "Fewer than two steps are logged." in text
    assert "This run has no previews" in text


def test_images_that_cannot_be_read_are_left_out(tmp_path, caplog):
    """Cut off by a kill, as earlier versions could leave them: the page shows the others, and a line names each."""
    folder = run_folder(tmp_path / "run")
    tiny.write_scene(folder / "scene" / "1", concepts=2)
    (folder / "gallery").mkdir()
    grid([[Image.new("RGB", (8, 8))]], [["x"]], 64).save(folder / "gallery" / "grid.png")
    whole = len(Page(page(folder)).all("img"))
    images = "previews/pictures/step-000020"
    cases = [  # a file, and how many images need it
        (f"{images}/sample-all.png", 1),
        (f"{images}/attention-1.png", 2),  # with the sample beside it
        ("gallery/grid.png", 1),
        ("scene/1/mask0.png", 0),  # its image is shown with the other mask
        ("scene/1/img.png", 1),
        ("scene/mask1.png", 3),  # in the scene, and in its handle's row beside the image
        ("scene/img.png", 5),
    ]
    for name, fewer in cases:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:60])
        caplog.clear()
        whole -= fewer
        assert len(Page(page(folder)).all("img")) == whole, name
        assert f"{folder / name}" in caplog.text


def test_images_are_whole_or_absent(tmp_path, monkeypatch):
    """A kill while one is saved leaves none under its name."""

    def cut_short(image, path, **options):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", cut_short)
    image, masks = torch.zeros(3, 8, 8), {0: torch.zeros(8, 8)}
    for write in (
        lambda: write_image(tmp_path / "image", image, masks),
        lambda: save_grid([[Image.new("RGB", (8, 8))]], [["x"]], "", tmp_path),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"config": None}, " is not as bas wrote it"),
        ({"handles": []}, " is not as bas wrote it"),
        ({"handles": [3]}, " is not as bas wrote it"),
        ({"base": 3}, " is not as bas wrote it"),
        ({"config": {"phase1_train_steps": "400"}}, ": phase1_train_steps is '400': expected a whole number"),
        ({"config": {"phase2_train_steps": None}}, ": phase2_train_steps is None: expected a whole number"),
        ({"config": {"pretrained_model_name_or_path": 3}}, ": pretrained_model_name_or_path is 3: expected a string"),
    ],
)
def test_spoilt_notes_of_a_run_are_named(tmp_path, spoilt, message):
    facts = {"config": {}, "handles": ["<a>"], "base": "00", "version": "0.1.0"} | spoilt
    (tmp_path / "settings.json").write_text(json.dumps(facts))
    with tiny.refused(f"{tmp_path / 'settings.json'}{message}"):
        page(tmp_path)


def test_a_run_of_another_version_has_a_page(tmp_path):
    """Settings that it lacks are at their defaults, one that is gone is shown as it is."""
    facts = {"config": {"seed": 7, "gone": [1]}, "handles": ["<a>"], "base": "00", "version": "0.1.0"}
    (tmp_path / "settings.json").write_text(json.dumps(facts))
    text = " ".join(Page(page(tmp_path)).texts)
    assert "0 of 800" in text
    assert "gone" in text


def test_the_command_writes_the_page_or_says_why_not(run, tmp_path, capsys):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"bas: {tmp_path} is not a run of bas: it has no settings.json\n"


def test_training_leaves_what_its_page_shows(tmp_path, capsys):
    model, scene = tiny.write_model(tmp_path / "model"), tiny.write_scene(tmp_path / "toy", concepts=2)
    folder = tmp_path / "run"
    flags = (
        "--phase1_train_steps 1 --phase2_train_steps 1 --num_class_images 1 --img_log_steps 1 --checkpointing_steps 0"
    )
    flags += " --preview_inference_steps 1 --device cpu"
    assert main(["train", str(scene), "--weights", str(model), "--output_dir", str(folder), *flags.split()]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / 'report.html'} shows how it went\n")
    parsed = Page((folder / "report.html").read_text())
    assert len(parsed.all("img")) == 4 + 2 * 6 + 2
    (session,) = json.loads((folder / "times.json").read_text())["sessions"]
    assert [stage["stage"] for stage in session["stages"]] == ["preparation", "phase1", "phase2", "saving"]
    assert weights_hash(folder) in parsed.texts

    again = load_scene(TrainConfig(instance_data_dir=str(folder / "scene")))
    whole = load_scene(TrainConfig(instance_data_dir=str(scene)))
    assert again.handles == whole.handles
    for ours, theirs in zip(again.tensors(32, 8), whole.tensors(32, 8), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.browser
def test_in_a_browser_hovering_shows_the_values(run, tmp_path):
    rows = read_rows(run / "metrics.jsonl")
    browser = Browser(tmp_path)
    try:
        browser.show(1200, 900)
        browser.send("Page.navigate", url=write_report(run).resolve().as_uri())
        browser.wait("document.querySelectorAll('.chart output').length == 6 && document.readyState == 'complete'")
        assert browser.run("document.getElementById('at').textContent") == "phase2, step 40"
        box = "document.querySelector('[data-series=reconstruction] .plot').getBoundingClientRect()"
        browser.run(f"window.scrollTo(0, {box}.top - 200)")
        x, y, width = (browser.run(f"{box}.{side}") for side in ("left", "top", "width"))
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + width * 9 / 39, y=y + 20)
        browser.wait("document.getElementById('at').textContent == 'phase1, step 10'")
        shown = browser.run("document.querySelector('[data-series=reconstruction] output').textContent")
        assert float(shown) == pytest.approx(rows[9]["reconstruction"], rel=5e-4)
        assert browser.run("document.querySelector('[data-series=prior] output').textContent") == "none"
        for width in (1200, 400):
            browser.show(width, 900, phone=width == 400)
            assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("[...document.images].every(image => image.naturalWidth == 96)")
        assert browser.problems == []
    finally:
        browser.close()


def test_a_gallery_beside_settings_of_others_has_no_page(tmp_path, caplog):
    """The gallery is complete by then, so it is no error; nothing is written."""
    (tmp_path / "settings.json").write_text('{"editor.fontSize": 14}')
    (tmp_path / "gallery").mkdir()
    assert renew_report(tmp_path / "gallery") is None
    assert len(caplog.messages) == 1
    assert f"{tmp_path} has no new page: " in caplog.messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery", "settings.json"]
