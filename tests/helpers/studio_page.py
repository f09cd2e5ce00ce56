"""What the tests of the studio's page share: a studio in a process of its own, and hands for its page."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bas.pretrained import hub

PLAYROOM = hub.find(None) / "scenes" / "playroom"
WORD, HANDLE = (f".concepts li:nth-child({{}}) label:nth-of-type({i}) input" for i in (1, 2))
SAVED = "document.querySelector('.saved')?.textContent === 'saved ✓'"


class Server:
    """`bas studio` in a process of its own, which can be killed and started again at the same address."""

    def __init__(self, home: Path, *more: str):
        self.home, self.port, self.more = home, 0, more
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-m", "bas", "studio", str(self.home), *self.more]
        words += ["--no_browser", "--port", str(self.port)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = self.process.stdout.readline()
        self.url = re.search(r"http\S+", line)[0]
        self.port = int(re.search(r":(\d+)/", self.url)[1])

    def end(self, number=signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)
        self.process.stdout.close()


def visit(browser, server, place):
    browser.send("Page.navigate", url="about:blank")
    browser.send("Page.navigate", url=server.url + place)
    browser.wait(
        "!!document.querySelector('#main h1') && !document.querySelector('#main').textContent.includes('Loading')"
    )


def click(browser, selector):
    browser.wait(
        f"!!document.querySelector({json.dumps(selector)}) && !document.querySelector({json.dumps(selector)}).disabled"
    )
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def enter(browser, selector):
    """As `click`, by keyboard."""
    browser.wait(f"document.querySelector({json.dumps(selector)})?.disabled === false")
    browser.run(f"document.querySelector({json.dumps(selector)}).focus()")
    browser.press("Enter")


def fill(browser, selector, value):
    field = f"document.querySelector({json.dumps(selector)})"
    browser.run(f"{field}.value = {json.dumps(value)}; {field}.dispatchEvent(new Event('input', {{bubbles: true}}))")
    browser.run(f"{field}.dispatchEvent(new Event('change'))")


def wait_long(browser, script):
    """Until work of the miniature is done, on a busy machine."""
    for _ in range(4):
        try:
            return browser.wait(script)
        except AssertionError:
            continue
    return browser.wait(script)


def place_of(browser, x, y, what=".stage img"):
    """Where a point of the image, in shares, is in the window."""
    box = f"document.querySelector({json.dumps(what)}).getBoundingClientRect()"
    left, top, width, height = browser.run(f"(({{left, top, width, height}}) => [left, top, width, height])({box})")
    return left + x * width, top + y * height


def drag_boxes(browser, *points):
    """Drag on the square of boxes, from point to point, in its shares."""
    browser.drag(*(place_of(browser, *point, ".frame") for point in points))


def shape_of(mask):
    """Width and height of what a mask cuts out. A chip shows it as it is up to 72 pixels."""
    ys, xs = np.nonzero(mask)
    return [int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]


def choose(browser, server, *paths):
    """Choose files on Home."""
    visit(browser, server, "#/home")
    document = browser.send("DOM.getDocument")["root"]["nodeId"]
    node = browser.send("DOM.querySelector", nodeId=document, selector="#files")["nodeId"]
    browser.send("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])


def bring(browser, server, path):
    """Choose a file on Home, and wait for the room in which it is painted."""
    choose(browser, server, path)
    browser.wait("location.hash.startsWith('#/masks/') && document.querySelectorAll('.concepts li').length === 1")
    browser.wait(SAVED)


def write_scene(folder, *handles, boxes=((20, 20, 100, 100), (120, 20, 200, 100), (20, 120, 100, 200))):
    """A scene with a mask in each box (left, top, right, bottom)."""
    folder.mkdir(parents=True)
    shutil.copy(PLAYROOM / "img.png", folder)
    names = [{"handle": f"<{handle}>", "word": "ball"} for handle in handles]
    (folder / "scene.json").write_text(json.dumps({"concepts": names}))
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        mask = np.zeros((256, 256), np.uint8)
        mask[y0:y1, x0:x1] = 255
        Image.fromarray(mask).save(folder / f"mask{i}.png")


def concepts_in(path):
    return json.loads(path.read_text())["concepts"]


def read_mask(scene, number):
    return np.asarray(Image.open(scene / f"mask{number}.png"))


def until(what):
    """Wait until something outside of the page is true."""
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
