"""A studio in a temporary folder, asked without a network; and one in a process, with a browser in front of it."""

import json
import os
import shutil
from dataclasses import dataclass

import pytest
import torch
from PIL import Image, PngImagePlugin
from starlette.testclient import TestClient

from bas.cli.entry import main
from bas.web.studio.app import build
from bas.web.studio.guard import Guard
from bas.web.studio.jobs import Lane
from bas.web.studio.store import Home
from tests.helpers.browser import Browser
from tests.helpers.segmenters import write_sam
from tests.helpers.small_runs import LORA, write_base, write_small_run
from tests.helpers.studio_page import PLAYROOM, Server

PORT = 8765
ORIGIN = f"http://127.0.0.1:{PORT}"


@dataclass
class Studio:
    """The server's parts, and requests as its own page sends them."""

    home: Home
    lane: Lane
    guard: Guard
    client: TestClient

    def ask(self, method, path, body=None, raw=None, **headers):
        """One request below the token."""
        kind = "application/octet-stream" if raw is not None else "application/json"
        sent = {"Origin": ORIGIN, "Content-Type": kind} if method != "GET" else {}
        content = raw if raw is not None else json.dumps(body or {}).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        options = {"content": content} if method != "GET" else {}
        address = f"/{self.guard.token}/{path}"
        return self.client.request(method, address, headers=sent | named, follow_redirects=False, **options)

    def get(self, path):
        """What a request gives that must succeed."""
        answer = self.ask("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path, body=None, **options):
        """As `get`, with a body."""
        answer = self.ask("POST", path, body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A studio whose jobs do not start by themselves."""
    monkeypatch.setattr("bas.web.studio.jobs.Lane.tick", lambda _lane: None)
    home = Home(tmp_path / "home")
    home.make()
    lane = Lane(home)
    guard = Guard(build(home, lane, lambda: None), home.token(), PORT)
    with TestClient(guard, base_url=ORIGIN, raise_server_exceptions=True) as client:
        yield Studio(home, lane, guard, client)


# --- In a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One headless Chromium for all tests of a file."""
    chromium = Browser(tmp_path_factory.mktemp("browser"))
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def server(browser, tmp_path_factory):
    """A studio that all tests of a file use, with a tiny SAM."""
    folder = tmp_path_factory.mktemp("studio")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        started = Server(folder / "home", "--segmenter", str(write_sam(folder / "sam")))
    yield started
    started.end()


@pytest.fixture(scope="module")
def furnished(server, tmp_path_factory):
    """What needs no training: the playroom; the runs `first` and `second`, which differ; `many` with 1000 images."""
    shutil.copytree(PLAYROOM, server.home / "scenes" / "playroom")
    base, runs = tmp_path_factory.mktemp("furnished") / "base", server.home / "runs"
    write_base(base, "sd1", whole_vocabulary=True)
    for name, rank in (("first", 4), ("second", 2)):
        run = write_small_run(runs / name, base, **LORA | {"rank": rank, "attention_grid": 8})
        rows = [
            {"phase": phase, "step": step, "loss": rank / step} for step, phase in ((1, "one"), (2, "one"), (3, "two"))
        ]
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shutil.copytree(runs / "first", runs / "many")
    words = ["sample", str(runs / "first"), "--prompt", "a photo of <asset0> and <asset1>"]
    assert main([*words, "--num_inference_steps", "2", "--output_path", str(runs / "first/pictures/one.png")]) == 0
    (runs / "many" / "pictures").mkdir()
    for i in range(1000):
        info = PngImagePlugin.PngInfo()
        info.add_text("bas", json.dumps({"prompt": f"a photo of <asset0>, {i}", "seed": i}))
        path = runs / "many" / "pictures" / f"{i:04d}.png"
        Image.new("RGB", (8, 8), (i % 256, 0, 0)).save(path, pnginfo=info)
        os.utime(path, (i, i))
    return server


@pytest.fixture
def page(browser):
    """A window, without the problems of an earlier test."""
    browser.problems.clear()
    browser.show(1280, 800)
    yield browser
    assert [line for line in browser.problems if not line.startswith("Failed to load resource")] == []
