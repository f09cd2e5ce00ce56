"""Walk through the studio on the miniature in a real browser, and take the screenshots of docs/studio.md.

Run: python -m tools.walk_studio [FOLDER] [--steps N]    (default: docs/pictures; needs Chromium and takes minutes)
     python -m tools.walk_studio --measure               (prints the seconds to the first page, and the frames per
                                                          second while one paints on 40 megapixels)

Everything in the screenshots is what a person would see: a real server, a real training of the shipped scene, real
drawing and editing. Each screenshot is studio-ROOM.png. Ctrl+C ends the server and the job at work.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from bas.web.studio import jobs
from bas.web.studio.store import Home
from tests.helpers.browser import Browser
from tools.command_line import run as run_tool

WIDE, PHONE = (1280, 800), (360, 740)
ALL_OF_DRAW, ALL_OF_HOME = (1280, 890), (1280, 1180)  # high enough for all attention maps, and for the run's card
PATIENCE = 1800  # seconds for a training or a drawing, on a busy machine
PROMPT = "a photo of <moon> and <clover> and <crown> at the beach"
HANDLES = ("<moon>", "<clover>", "<crown>")
LARGE = (7728, 5152)  # pixels of the photograph that is painted on to measure
BRUSHES = (16, 45, 63)  # places of the size's slider: 40, 525 and 1217 pixels of such a photograph
MOVES = 150  # of the mouse in a stroke
STARTS = 7
# The times of all frames, in milliseconds; FROM_HERE forgets those that have passed.
WATCH = "window.frames = []; (function each(at) { frames.push(at); requestAnimationFrame(each); })(performance.now())"
FROM_HERE = "frames.length = 0"
SETTLED = """new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() =>
  done([...document.images].every((image) => image.complete)))))"""


class Walk:
    """A browser in front of a studio."""

    def __init__(self, browser: Browser, url: str, folder: Path):
        self.browser, self.url, self.folder, self.begun = browser, url, folder, time.monotonic()

    def go(self, place: str) -> None:
        """Open a room."""
        print(f"{time.monotonic() - self.begun:4.0f} s  {place}", flush=True)
        self.browser.send("Page.navigate", url="about:blank")
        self.browser.send("Page.navigate", url=self.url + place)
        self.wait(
            "!!document.querySelector('#main h1') && !document.querySelector('#main').textContent.includes('Loading')"
        )

    def wait(self, script: str) -> None:
        """Until an expression is true, also for as long as a training takes."""
        end = time.monotonic() + PATIENCE
        while not self.browser.run(script):
            assert time.monotonic() < end, f"waited in vain for {script}"
            time.sleep(0.2)

    def click(self, selector: str) -> None:
        """Press a button, once it can be pressed."""
        found = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{found} && !{found}.disabled")
        self.browser.run(f"{found}.click()")

    def fill(self, selector: str, value: object) -> None:
        """Write into a field."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"!!{field}")
        self.browser.run(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('input'))")
        self.browser.run(f"{field}.dispatchEvent(new Event('change'))")

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the image, in shares, is in the window."""
        box = "document.querySelector('.stage img').getBoundingClientRect()"
        left, top, width, height = self.browser.run(f"(b => [b.left, b.top, b.width, b.height])({box})")
        return left + x * width, top + y * height

    def shoot(self, name: str, size: tuple[int, int] = WIDE, dark: bool = False) -> None:
        """Take a screenshot of the room, in few colours: it is for a page of documentation."""
        self.browser.show(*size, dark=dark, phone=size == PHONE)
        self.wait(SETTLED)
        path = self.folder / f"studio-{name}.png"
        self.browser.image(path)
        with Image.open(path) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(f"{time.monotonic() - self.begun:4.0f} s  {path}", flush=True)
        self.browser.show(*WIDE)


def walk(step: Walk, steps: int | None) -> None:
    """Go through all rooms. steps: of each phase of the training; None: what the page proposes."""
    step.browser.show(*WIDE)
    step.go("#/home")
    step.click("#choose + button")  # the playroom, whose masks are painted
    step.wait("document.querySelectorAll('.concepts li').length === 3")
    for i, handle in enumerate(HANDLES, start=1):
        step.fill(f".concepts li:nth-child({i}) label:nth-of-type(2) input", handle)
        step.wait(f"document.querySelector('.concepts li:nth-child({i}) .remove').ariaLabel === 'Remove {handle}'")
    step.wait("document.querySelector('.saved').textContent === 'saved ✓'")
    step.go("#/masks/playroom")
    step.browser.run(
        "[...document.querySelectorAll('summary')].find((each) => "
        "each.textContent.startsWith('What the losses see')).parentElement.open = true"
    )
    step.wait("document.querySelectorAll('.grids canvas').length === 6")
    step.shoot("masks")
    step.shoot("phone", PHONE, dark=True)
    step.go("#/train/playroom")
    previews = max(1, steps // 3) if steps else 100
    counts = {"phase1_train_steps": steps, "phase2_train_steps": steps} if steps else {}
    for name, value in {"img_log_steps": previews, **counts}.items():
        step.fill(f"#set-{name}", value)
    step.wait("!document.querySelector('#start').disabled")
    step.shoot("train")
    step.click("#start")
    over = "document.querySelector('.good-card') !== null"
    step.wait(f"parseInt(document.querySelector('.live .large')?.textContent) > {previews} || {over}")
    step.wait("document.querySelectorAll('.shots img').length > 3 && document.querySelectorAll('.curve').length > 0")
    step.shoot("watch", dark=True)
    step.wait(over)
    step.go("#/draw/playroom")
    step.fill("#prompt", PROMPT)
    step.fill("#draw-num_images", 8)
    step.click("#draw")
    step.wait("document.querySelectorAll('.shot').length === 8 && document.querySelector('.live') === null")
    step.click(".chosen figcaption button:nth-of-type(3)")  # where did it look?
    step.wait("document.querySelectorAll('.looks img').length === 3 && document.querySelector('.live') === null")
    step.shoot("draw", ALL_OF_DRAW)
    step.go("#/edit/playroom")
    step.wait("document.querySelector('.stage img').naturalWidth > 0")
    for i in range(12):  # over the crown
        y = 0.54 + 0.035 * i
        step.browser.drag(step.point(0.25, y), step.point(0.75, y))
    step.fill("#prompt", "a photo of a wooden floor")
    step.click("#edit")
    step.wait("document.querySelectorAll('.shot').length === 1 && document.querySelector('.slide .good') !== null")
    step.wait("document.querySelector('.live') === null")
    step.browser.run("document.querySelector('.chosen').scrollIntoView()")
    step.shoot("edit")
    step.go("#/runs/playroom")
    step.wait("document.querySelector('[download=\"playroom.zip\"]') !== null")
    step.shoot("runs")
    step.go("#/home")
    step.wait("document.querySelectorAll('.card.run img').length === 1")
    step.shoot("home", ALL_OF_HOME)


def measure_start(browser: Browser) -> None:
    """Start a studio several times, and print the seconds from its process to a page with a heading."""
    seconds = []
    for _ in range(STARTS):
        begun = time.monotonic()
        with studio() as (url, _):
            browser.send("Page.navigate", url=url)
            while not browser.run("!!document.querySelector('#main h1')"):
                time.sleep(0.01)
            seconds.append(time.monotonic() - begun)
            browser.send("Page.navigate", url="about:blank")
    print(f"from the start to the page: {np.median(seconds):.2f} s, at most {max(seconds):.2f} s, {STARTS} times")


def measure_painting(step: Walk) -> None:
    """Paint on a photograph of 40 megapixels, and print how many frames a second the page shows meanwhile."""
    step.browser.show(*WIDE)
    step.go("#/home")
    small = np.random.default_rng(0).integers(0, 255, (161, 242, 3), dtype=np.uint8)
    path = step.folder / "large.jpg"
    Image.fromarray(small).resize(LARGE, Image.Resampling.BICUBIC).save(path, quality=90)
    document = step.browser.send("DOM.getDocument")["root"]["nodeId"]
    node = step.browser.send("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
    step.browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
    step.wait("document.querySelector('.saved')?.textContent === 'saved ✓'")
    step.wait("document.querySelector('.stage img').naturalWidth > 0")
    step.browser.run(WATCH)
    for place in BRUSHES:
        step.fill("[aria-label='Size of the brush']", place)
        size = step.browser.run("document.querySelector('[aria-label=\"Size of the brush\"]').nextSibling.textContent")
        angles = np.linspace(0, 6 * np.pi, MOVES)
        points = [step.point(0.5 + 0.4 * np.cos(a), 0.5 + 0.4 * np.sin(1.3 * a)) for a in angles]
        step.browser.run(FROM_HERE)
        step.browser.drag(*points)
        gaps = np.diff(step.browser.run("[...frames]"))
        step.wait("document.querySelector('.saved').textContent === 'saved ✓'")
        rate, slow = 1000 / gaps.mean(), np.percentile(gaps, 95)
        print(f"brush {size}: {rate:.0f} frames a second, 95 % of them within {slow:.0f} ms ({len(gaps)} frames)")


@contextmanager
def studio() -> Iterator[tuple[str, Path]]:
    """The address of a studio in a temporary folder, and a folder for other files. Its jobs end with it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        home = Path(place) / "studio"
        words = [sys.executable, "-m", "bas", "studio", str(home), "--no_browser", "--port", "0"]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            found = re.search(r"http\S+", server.stdout.readline())
            assert found, "bas studio has not started: see the line above"
            yield found[0], Path(place)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait()
            end_jobs(home)


def end_jobs(home: Path) -> None:
    """End the job at work, which would outlive its server, and wait until its files are closed."""
    for folder in jobs.Lane(Home(home)).folders():
        if jobs.state(folder) in jobs.ALIVE:
            jobs.stop(folder, "now")
        while jobs.state(folder) == "running":
            time.sleep(0.1)


def main() -> None:
    """Walk or measure in a studio of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/pictures"))
    parser.add_argument("--steps", type=int, help="training steps of each phase (default: what the page proposes)")
    parser.add_argument(
        "--measure", action="store_true", help="measure the start, and painting on a large photograph, instead"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with studio() as (url, place):
        browser = Browser(place / "browser")
        try:
            if args.measure:
                measure_start(browser)
                measure_painting(Walk(browser, url, place))
            else:
                args.folder.mkdir(parents=True, exist_ok=True)
                walk(Walk(browser, url, args.folder), args.steps)
            assert browser.problems == [], browser.problems
        finally:
            browser.close()


if __name__ == "__main__":
    run_tool(main)
