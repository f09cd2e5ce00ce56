"""Walk through the studio on the miniature in a real browser, and take the pictures of docs/studio.md.

Run: python -m tools.walk_studio [FOLDER]    (default: docs/pictures; needs Chromium and takes minutes)

Everything in the pictures is what a person would see: a real server, a real training of the shipped scene, real drawing
and editing. Each picture is studio-ROOM.png.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from tests.helpers.browser import Browser

WIDE, PHONE = (1280, 800), (360, 740)
PATIENCE = 1800  # seconds for the training
PROMPT = "a photo of <moon> and <clover> and <crown> at the beach"
HANDLES = ("<moon>", "<clover>", "<crown>")


class Walk:
    """A browser in front of a studio."""

    def __init__(self, browser: Browser, url: str, folder: Path):
        self.browser, self.url, self.folder = browser, url, folder

    def go(self, place: str) -> None:
        """Open a room."""
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
        """Take a picture of the room, in few colours: it is for a page of documentation."""
        self.browser.show(*size, dark=dark, phone=size == PHONE)
        time.sleep(1)
        path = self.folder / f"studio-{name}.png"
        self.browser.image(path)
        with Image.open(path) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
        print(path, flush=True)
        self.browser.show(*WIDE)


def walk(step: Walk) -> None:
    """The whole way."""
    step.browser.show(*WIDE)
    step.go("#/home")
    step.click("#choose + button")  # the playroom, whose masks are painted
    step.wait("document.querySelectorAll('.concepts li').length === 3")
    for i, handle in enumerate(HANDLES, start=1):
        step.fill(f".concepts li:nth-child({i}) label:nth-of-type(2) input", handle)
        step.wait(f"document.querySelector('.concepts li:nth-child({i}) .remove').ariaLabel === 'Remove {handle}'")
    time.sleep(1)
    step.wait("document.querySelector('.saved').textContent === 'saved ✓'")
    step.go("#/masks/playroom")
    step.browser.run("document.querySelector('details').open = true")
    step.wait("document.querySelectorAll('.grids canvas').length === 6")
    step.shoot("masks")
    step.shoot("phone", PHONE, dark=True)
    step.go("#/train/playroom")
    step.fill("#set-img_log_steps", 100)
    time.sleep(0.5)
    step.wait("!document.querySelector('#start').disabled")
    step.shoot("train")
    step.click("#start")
    step.wait("/^[1-5]\\d\\d\\/600/.test(document.querySelector('.live .large')?.textContent ?? '')")
    step.shoot("watch", dark=True)
    step.wait("document.querySelector('.good-card') !== null")
    step.go("#/draw/playroom")
    step.fill("#prompt", PROMPT)
    step.fill("#draw-num_images", 8)
    step.click("#draw")
    step.wait("document.querySelectorAll('.shot').length === 8")
    step.shoot("draw")
    step.go("#/edit/playroom")
    step.wait("document.querySelector('.stage img').naturalWidth > 0")
    for i in range(8):
        y = 0.55 + 0.04 * i
        step.browser.drag(step.point(0.08, y), step.point(0.3, y))
    step.fill("#prompt", "a photo of <crown>")
    step.click("#edit")
    step.wait("document.querySelectorAll('.shot').length === 1")
    step.shoot("edit")
    step.go("#/home")
    step.wait("document.querySelectorAll('.card.run img').length === 1")
    step.shoot("home")


def main() -> None:
    """Start a studio in a temporary folder, walk, and end it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/pictures"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        words = [sys.executable, "-m", "bas", "studio", f"{place}/studio", "--no_browser", "--port", "0"]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert server.stdout
        found = re.search(r"http\S+", server.stdout.readline())
        assert found
        browser = Browser(Path(place) / "browser")
        try:
            walk(Walk(browser, found[0], folder))
            assert browser.problems == [], browser.problems
        finally:
            browser.close()
            server.send_signal(signal.SIGINT)
            server.wait()


if __name__ == "__main__":
    main()
