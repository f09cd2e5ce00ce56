"""Proposals of masks in the studio: tiny random models give what `bas masks --auto` gives; what is missing is said."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from bas.cli.entry import attempt
from bas.config import ProposalConfig
from bas.data.mask_proposals import METHODS, load_segmenter, propose
from bas.web.studio import jobs
from bas.web.studio.proposals import by_method
from bas.web.studio.tiles import lay, unpack
from bas.web.studio.worker import work
from tests.helpers.segmenters import write_clipseg, write_sam
from tests.helpers.tiny import refused

W, H = 60, 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models by their method, as `--segmenter` finds them."""
    root = tmp_path_factory.mktemp("segmenters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return by_method([str(write_sam(root / "sam")), str(write_clipseg(root / "clipseg"))])


@pytest.fixture
def image(studio):
    """The photograph of the scene `toy`."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (5, 8, 3), dtype=np.uint8)).resize((W, H), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    noise.save(file, "PNG")
    assert studio.ask("POST", "api/scenes?name=toy", raw=file.getvalue()).status_code == 200
    return noise


def ask_for(studio, **body):
    """Ask for a proposal -> the folder of its job."""
    return studio.home.folder / "jobs" / studio.post("api/jobs", {"kind": "masks", "scene": "toy"} | body)["id"]


def shown(studio, job):
    """The mask that the page shows of a proposal, (H, W) bool."""
    mask = np.zeros((H, W), np.uint8)
    lay(mask, unpack(studio.ask("GET", f"api/jobs/{job.name}/mask").content, (W, H)))
    return mask == 255


def test_clicks_and_words_give_the_masks_of_the_command(studio, image, folders):
    """The scene stays as it is, and the next proposal removes the one before."""
    studio.home.segmenters = folders
    assert studio.get("api/segmenters") == {"sam": None, "clipseg": None}
    scene = studio.get("api/scenes/toy")
    first = ask_for(studio, method="sam", points=[[30, 5], [40.04, 30]])
    assert studio.ask("GET", f"api/jobs/{first.name}/mask").status_code == 404
    again = studio.ask("POST", "api/jobs", {"kind": "masks", "scene": "toy", "method": "sam", "points": [[1, 1]]})
    assert (again.status_code, again.json()["code"]) == (409, "running")
    assert work(first, attempt) == 0
    config = ProposalConfig(segmenter=folders["sam"], points=("30,5+40,30",))
    (clicked,) = propose("sam", image, config, torch.device("cpu"))
    assert np.array_equal(shown(studio, first), clicked.mask)

    model, processor = load_segmenter(METHODS["clipseg"], folders["clipseg"])
    with torch.no_grad():
        logits = model(**processor(text=["bowl"], images=[image], padding=True, return_tensors="pt")).logits
    threshold = float(logits.sigmoid().median())
    second = ask_for(studio, method="clipseg", word="bowl", threshold=threshold)
    assert not first.exists()
    assert work(second, attempt) == 0
    config = ProposalConfig(segmenter=folders["clipseg"], words=("bowl",), threshold=threshold)
    (named,) = propose("clipseg", image, config, torch.device("cpu"))
    assert np.array_equal(shown(studio, second), named.mask)
    assert studio.get("api/scenes/toy") == scene


def test_what_cannot_be_proposed_is_one_line_and_leaves_no_job(studio, image, folders):
    studio.home.segmenters = folders
    for body, status, message in (
        ({"scene": "../toy"}, 404, "is not here"),
        ({"method": "/etc"}, 400, "method is sam or clipseg"),
        ({"points": []}, 400, "points are 1 to 20 pairs of numbers"),
        ({"points": [["/etc", 1]]}, 400, "a point is a pair of numbers"),
        ({"points": [[float("nan"), 1]]}, 400, "a point is a pair of numbers"),
        ({"points": [[61, 1]]}, 422, "'61.0,1.0': expected x,y in pixels, inside 60x40"),
        ({"threshold": "x"}, 422, "--threshold is 'x'"),
        ({"method": "clipseg", "word": " "}, 422, "write a word for what to find"),
    ):
        asked = {"kind": "masks", "scene": "toy", "method": "sam", "points": [[1, 1]]} | body
        answer = studio.ask("POST", "api/jobs", asked)
        assert (answer.status_code, message in answer.json()["message"]) == (status, True), answer.text
    assert jobs.Lane(studio.home).folders() == []


def test_without_models_the_page_says_what_to_give(studio, image, folders, tmp_path):
    for method, name in (("sam", "facebook/sam-vit-base"), ("clipseg", "CIDAS/clipseg-rd64-refined")):
        line = f"{name} is not downloaded yet: run `hf download {name}`, or name a folder with bas studio --segmenter"
        assert studio.get("api/segmenters")[method] == line
        asked = {"kind": "masks", "scene": "toy", "method": method, "points": [[1, 1]], "word": "toy"}
        answer = studio.ask("POST", "api/jobs", asked)
        assert (answer.status_code, answer.json()["message"]) == (422, line)
    with refused("bas studio --segmenter names two models of type sam: name one"):
        by_method([folders["sam"]] * 2)
    (tmp_path / "config.json").write_text('{"model_type": "mask2former"}')
    with refused(f"{tmp_path} is a model of type mask2former: bas studio --segmenter takes sam and clipseg"):
        by_method([str(tmp_path)])
