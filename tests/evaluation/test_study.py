"""The user study: what the pages show and hide, the page in a browser, and the statistics against scipy and by hand."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bas.cli.entry import main
from bas.config import StudyConfig
from bas.evaluation.ratings import Rating, compare, compare_marks, read_ratings
from bas.evaluation.study import FIELDS, choose_pages, cut_out, read_items, with_article, write_study
from tests.helpers.browser import Browser
from tests.helpers.tiny import refused, write_scene

METHODS = ("ablation", "bas", "db-m")
PLACES = ("at the beach", "in the snow")
ATTRIBUTE = {"picture": "image"}  # of an Item, where it is not named as the list's field


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """What `bas evaluate` leaves of two scenes with two concepts each, three methods, one seed."""
    root = tmp_path_factory.mktemp("evaluation")
    rng = np.random.default_rng(0)
    for scene in ("one", "two"):
        for method in METHODS:
            trial = root / "cells" / scene / method / "seed-0"
            write_scene(trial / "run" / "scene", concepts=2, size=(48, 32))
            images = []
            for concepts in ([0], [1], [1, 0]):
                for place in PLACES:
                    name = f"{len(images):04d}.png"
                    Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(trial / name)
                    prompt = "a photo of " + " and ".join(f"<asset{i}>" for i in concepts) + f" {place}"
                    row = {"file": name, "prompt": prompt, "concepts": concepts}
                    images.append(row)
            note = {"scene": scene, "method": method, "seed": 0, "handles": ["<asset0>", "<asset1>"]}
            note |= {"words": ["dog", None], "pictures": images}
            (trial / "cell.json").write_text(json.dumps(note))
    return root


# --- What is shown ------------------------------------------------------------------------------------------------


def test_an_evaluations_images_are_asked_about_once_for_each_object(evaluation):
    items = read_items(evaluation)
    assert len(items) == 2 * 3 * 8  # scenes, methods, and 2 + 2 + 2 * 2 images and objects
    item = next(item for item in items if item.image.name == "0004.png" and item.mask.name == "mask0.png")
    assert item.prompt == "a photo of an object and a dog at the beach"
    assert item.word == "dog"
    # The baselines train on images that were pasted together: every method is compared with the image itself.
    assert {item.reference for item in items} == {
        evaluation / "cells" / scene / "bas" / "seed-0" / "run" / "scene" / "img.png" for scene in ("one", "two")
    }


def test_a_damaged_trial_says_how_it_is_made_again(tmp_path):
    note = tmp_path / "cells" / "one" / "bas" / "seed-0" / "cell.json"
    note.parent.mkdir(parents=True)
    for text, wrong in (("[]", "as bas wrote it (it is [])"), ('{"words"', "valid JSON (Expecting ':' delimiter")):
        note.write_text(text)
        with refused(f"{note} is not {wrong}", ": remove it, and `bas evaluate` makes the trial again"):
            read_items(tmp_path)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("orange", "an orange"),
        ("dog", "a dog"),
        ("teddy bear", "a teddy bear"),
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("scissors", "scissors"),
        ("bus", "a bus"),
        ("glass", "a glass"),
        ("the cat", "the cat"),
        ("my old mug", "my old mug"),
    ],
)
def test_words_have_the_article_that_is_spoken(word, expected):
    assert with_article(word) == expected


def test_every_page_shows_the_same_from_each_method_and_no_two_pages_the_same(evaluation):
    pages = choose_pages(read_items(evaluation), StudyConfig(pages=4, questions=13, seed=3))
    assert [len(page) for page in pages] == [12] * 4
    for page in pages:
        units = {method: sorted(item.unit for item in page if item.method == method) for method in METHODS}
        assert units["bas"] == units["db-m"] == units["ablation"]
        assert len(set(units["bas"])) == 4
    shown = [item.unit for page in pages for item in page if item.method == "bas"]
    assert len(set(shown)) == 16  # all there are, none twice
    assert [item.method for item in pages[0]] != sorted(item.method for item in pages[0])
    assert choose_pages(read_items(evaluation), StudyConfig(pages=4, questions=13, seed=3)) == pages
    assert choose_pages(read_items(evaluation), StudyConfig(pages=4, questions=13, seed=4)) != pages


def test_what_one_method_lacks_is_not_shown(evaluation):
    items = [item for item in read_items(evaluation) if item.method != "bas" or item.scene == "one"]
    pages = choose_pages(items, StudyConfig(pages=1, questions=500))
    assert {item.scene for item in pages[0]} == {"one"}
    assert len(pages[0]) == 3 * 8


def test_studies_that_compare_nothing_are_refused(evaluation):
    items = read_items(evaluation)
    with refused("a study compares two methods or more: here is bas"):
        choose_pages([item for item in items if item.method == "bas"], StudyConfig())
    with refused("have no prompt of a scene in common"):
        choose_pages([item for item in items if (item.scene == "one") == (item.method == "bas")], StudyConfig())
    with refused("--questions is 2: a page needs one or more for each of the 3 methods"):
        choose_pages(items, StudyConfig(questions=2))


def test_the_object_is_cut_out_with_black_around_it(tmp_path):
    pixels = np.full((60, 80, 3), 200, np.uint8)
    mask = np.zeros((60, 80), np.uint8)
    mask[20:40, 30:60] = 255
    Image.fromarray(pixels).save(tmp_path / "img.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    obj = np.array(cut_out(tmp_path / "img.png", tmp_path / "mask.png"))
    assert obj.shape == (26, 36, 3)  # 20 x 30 and 3 on each side
    assert (obj[3:-3, 3:-3] == 200).all()
    assert obj.sum() == 20 * 30 * 3 * 200


def test_a_list_of_images_does_as_well(evaluation, tmp_path):
    rows = [{name: str(getattr(item, ATTRIBUTE.get(name, name))) for name in FIELDS} for item in read_items(evaluation)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [item.image for item in read_items(tmp_path / "list.jsonl")] == [
        item.image for item in read_items(evaluation)
    ]
    twice = [*read_items(tmp_path / "list.jsonl"), replace(read_items(evaluation)[0], image=tmp_path / "again.png")]
    with refused("again.png is a second image of "):
        choose_pages(twice, StudyConfig(pages=1))
    (tmp_path / "list.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps({"method": "bas"}))
    with refused("list.jsonl line 2 is not an object with the strings method, scene, prompt"):
        read_items(tmp_path / "list.jsonl")
    (tmp_path / "list.jsonl").write_bytes(b"\xff")
    with refused("is neither an evaluation's folder nor a list"):
        read_items(tmp_path / "list.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("none.jsonl", "does not exist"), ("pipe", "is not a file")):
        with refused(f"{tmp_path / name} {told}"):
            read_items(tmp_path / name)
    with refused("is not an evaluation: it has no cells"):
        read_items(tmp_path)


def test_no_page_tells_which_method_drew_what(evaluation, tmp_path):
    pages = write_study(read_items(evaluation), tmp_path, StudyConfig(pages=2, questions=6))
    key = json.loads((tmp_path / "key.json").read_text())
    assert len(key["questions"]) == 12
    for path in pages:
        text = path.read_text()
        data = json.loads(text.split('id="data">')[1].split("</script>")[0])
        assert all(set(question) == {"id", "text", "word", "image", "concept"} for question in data["questions"])
        assert not any(f'"{method}"' in text for method in METHODS)
        for question in data["questions"]:
            assert key["questions"][question["id"]]["prompt"] == question["text"]


# --- Statistics ---------------------------------------------------------------------------------------------------


def ratings(**marks):
    return [Rating("r", method, mark, 6 - mark) for method, values in marks.items() for mark in values]


def test_kruskal_wallis_by_hand():
    """Without ties: ranks 1 2 3 | 4 5, rank sums 6 and 9: H = 12 / (5 * 6) * (36 / 3 + 81 / 2) - 3 * 6 = 3."""
    pytest.importorskip("scipy", reason="scipy, which computes the statistics, is not installed")
    comparison = compare_marks({"a": [1, 2, 3], "b": [4, 5]})
    assert comparison.h == pytest.approx(3.0)
    assert comparison.p == pytest.approx(0.0832645)  # of chi square with one degree of freedom
    mean = comparison.means[0]
    assert (mean.count, mean.mean) == (3, 2)
    assert mean.high - mean.mean == pytest.approx(4.302653 / 3**0.5)  # t of two degrees of freedom, deviation 1


def test_tukeys_test_on_a_published_example():
    """Three groups of five, the example in the documentation of scipy's tukey_hsd, with the numbers it prints."""
    pytest.importorskip("scipy", reason="scipy, which computes the statistics, is not installed")
    groups = {
        "a": [24.5, 23.5, 26.4, 27.1, 29.9],
        "b": [28.4, 34.2, 29.5, 32.2, 30.1],
        "c": [26.1, 28.3, 24.3, 26.2, 27.8],
    }
    pairs = compare_marks(groups).pairs
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair.difference for pair in pairs] == pytest.approx([-4.6, -0.26, 4.34])
    assert [pair.p for pair in pairs] == pytest.approx([0.0144, 0.9804, 0.0203], abs=1e-4)
    assert (pairs[0].low, pairs[0].high) == pytest.approx((-8.24912, -0.95088), abs=1e-4)


def test_marks_that_are_all_alike_differ_in_nothing():
    pytest.importorskip("scipy", reason="scipy, which computes the statistics, is not installed")
    alike = compare(ratings(a=[3, 3, 3], b=[3, 3]))["identity"]
    assert (alike.h, alike.p, alike.pairs) == (0, 1, ())
    with refused("two methods or more, with two ratings or more each"):
        compare(ratings(a=[3, 3, 3], b=[3]))


def test_scipy_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.stats", None)
    with refused("scipy is not installed: pip install scipy"):
        compare_marks({"a": [1, 2], "b": [3, 4]})


# --- The command --------------------------------------------------------------------------------------------------


def answer(folder, page, rater, marks):
    """What a page saves when a participant gives each method its marks of identity and prompt; returns the path."""
    text = (folder / f"page-{page}.html").read_text()
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    key = json.loads((folder / "key.json").read_text())["questions"]
    answers = {}
    for question in data["questions"]:
        identity, prompt = marks[key[question["id"]]["method"]]
        answers[question["id"]] = {"identity": identity, "prompt": prompt, "seconds": 2.5}
    path = folder / f"answers-{page}-{rater}.json"
    path.write_text(json.dumps({"study": data["study"], "page": page, "rater": rater, "answers": answers}))
    return path


def test_from_an_evaluation_to_the_tables(evaluation, tmp_path, capsys):
    pytest.importorskip("scipy", reason="scipy, which computes the statistics, is not installed")
    folder = tmp_path / "study"
    assert main(["study", str(evaluation), "--output_dir", str(folder), "--pages", "2", "--questions", "12"]) == 0
    assert str(folder / "page-1.html") in capsys.readouterr().out
    first = {"bas": (4, 4), "db-m": (5, 1), "ablation": (1, 5)}
    second = {"bas": (3, 5), "db-m": (4, 2), "ablation": (2, 4)}
    paths = [answer(folder, 0, "x", first), answer(folder, 1, "y", second)]
    assert main(["study", str(folder), "--analyse", *map(str, paths)]) == 0
    shown = capsys.readouterr().out
    assert "24 ratings of 2 participants" in shown
    assert "| db-m | 8 | 4.50 |" in shown
    numbers = json.loads((folder / "analysis.json").read_text())
    assert numbers["ratings"] == 24
    means = {row["method"]: row["mean"] for row in numbers["prompt"]["means"]}
    assert means == {"bas": 4.5, "db-m": 1.5, "ablation": 4.5}
    assert numbers["identity"]["p"] < 0.001
    assert len(numbers["identity"]["pairs"]) == 3


def test_answers_that_do_not_fit_are_named(evaluation, tmp_path):
    write_study(read_items(evaluation), tmp_path, StudyConfig(pages=1, questions=6))
    good = answer(tmp_path, 0, "x", dict.fromkeys(METHODS, (3, 4)))
    content = json.loads(good.read_text())
    assert len(read_ratings(tmp_path, [good])) == 6

    def spoilt(**changes):
        path = tmp_path / "spoilt.json"
        path.write_text(json.dumps(content | changes))
        return [path]

    with refused("spoilt.json does not answer this study"):
        read_ratings(tmp_path, spoilt(study="other"))
    with refused("spoilt.json holds no answers"):
        read_ratings(tmp_path, spoilt(answers={}))
    with refused("answers nothing, which this study does not ask"):
        read_ratings(tmp_path, spoilt(answers={"nothing": {"identity": 1, "prompt": 1}}))
    for mark in (0, 6, 2.5, True, None, "3"):
        (name, *_) = content["answers"]
        with refused(f"the ratings of {name} are"):
            read_ratings(tmp_path, spoilt(answers={name: {"identity": mark, "prompt": 1}}))
    with refused("are the same participant's answers to one page: keep one"):
        read_ratings(tmp_path, [good, *spoilt()])
    typo, advice = tmp_path / "typo.json", "give the file that a page of the study saved"
    with refused(f"{typo} does not exist"):
        read_ratings(tmp_path, [typo])
    for text, wrong in (("[]", "as bas wrote it (it is [])"), ("{", "valid JSON (Expecting property name")):
        typo.write_text(text)
        with refused(f"{typo} is not {wrong}", f": {advice}"):
            read_ratings(tmp_path, [typo])
    with refused("is not a study of bas: it has no key.json"):
        read_ratings(tmp_path / "elsewhere", [good])


# --- The page in a browser ----------------------------------------------------------------------------------------


@pytest.mark.browser
def test_in_a_browser_keys_rate_and_the_marks_are_saved(evaluation, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    (page,) = write_study(read_items(evaluation), folder, StudyConfig(pages=1, questions=3))
    browser = Browser(tmp_path / "home")
    try:
        browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        browser.show(1000, 800)
        browser.send("Page.navigate", url=page.resolve().as_uri())
        browser.wait("document.readyState == 'complete' && shown == 'intro'")
        browser.press("Enter")
        browser.wait("shown == 'asking'")
        browser.press("Enter")  # without marks nothing goes on
        assert browser.run("at('number').textContent") == "1 of 3"
        for key in "42":
            browser.press(key)
        assert browser.run("at('next').disabled") is False
        browser.press("Enter")
        assert browser.run("at('number').textContent") == "2 of 3"
        browser.press("ArrowLeft")
        assert browser.run("[...document.querySelectorAll('input:checked')].map(i => i.value).join()") == "4,2"
        browser.press("Enter")
        browser.run("document.querySelectorAll('[data-question=prompt] input')[4].click()")  # the second question first
        browser.press("1")
        browser.run("localStorage.clear()")  # as in a browser that keeps nothing
        browser.send("Page.reload")  # nothing is lost
        browser.wait("document.readyState == 'complete' && shown == 'intro' && at('start').textContent == 'Go on'")
        browser.press("Enter")
        assert browser.run("at('number').textContent") == "2 of 3"
        browser.press("Enter")
        browser.show(390, 760, dark=True, phone=True)
        assert browser.run("document.documentElement.scrollWidth") <= 390
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 20, 22)"
        assert browser.run("[...document.querySelectorAll('.pair img')].every(image => image.naturalWidth > 0)")
        assert browser.run("at('next').getBoundingClientRect().bottom") < 760 + 200
        browser.run("document.querySelectorAll('input')[2].click(); document.querySelectorAll('input')[7].click()")
        assert browser.run("localStorage.getItem(place) == JSON.stringify(state)")  # for the page opened another day
        browser.run("at('next').click()")
        browser.wait("shown == 'end'")
        browser.run("save()")
        browser.wait("at('saved').textContent.startsWith('Saved as answers-0-')")
        content = json.loads(browser.run("answersFile()"))
        assert browser.problems == []
        for _ in range(200):
            saved = list(folder.glob("answers-0-*.json"))
            if saved and saved[0].stat().st_size:
                break
            browser.run("new Promise(done => setTimeout(done, 50))")
        assert json.loads(saved[0].read_text()) == content
    finally:
        browser.close()
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    marks = [content["answers"][question["id"]] for question in data["questions"]]
    assert [(mark["identity"], mark["prompt"]) for mark in marks] == [(4, 2), (1, 5), (3, 3)]
    assert len(read_ratings(folder, saved)) == 3
