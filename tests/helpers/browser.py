"""Headless Chromium for tests, through its DevTools protocol over two pipes: no driver, no extra package."""

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars"),
)
PATIENCE = 60  # seconds for one answer, on a busy machine
NAMED_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, "")}  # what Chromium must be told to act on them


class Browser:
    """One page of a headless Chromium. The test is skipped where there is none."""

    def __init__(self, home: Path):
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            pytest.skip(f"no browser on this machine: none of {', '.join(PROGRAMS)} was found")
        to_read, self.sink = os.pipe()
        self.source, to_write = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4; high copies first, so that neither overwrites the other.
        ours, theirs = (to_read, to_write), [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (to_read, to_write)]
        launch = 'exec 3<&{0} 4>&{1} {0}<&- {1}>&-; exec "$0" "$@"'.format(*theirs)
        self.process = subprocess.Popen(
            ["bash", "-c", launch, program, *FLAGS, f"--user-data-dir={home}", "about:blank"],
            pass_fds=theirs,
            stderr=subprocess.DEVNULL,
        )
        for each in (*ours, *theirs):
            os.close(each)
        self.count, self.buffer, self.session = itertools.count(1), b"", None
        self.asked: list[str] = []  # kinds of the dialogs that have opened
        self.agrees = True  # what each is answered
        self.problems: list[str] = []  # errors in the console, and requests to anywhere else than the page's server
        (page,) = (t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._attach(page["targetId"])

    def _attach(self, target: str) -> None:
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    @contextmanager
    def second_page(self) -> Iterator[Callable[[], None]]:
        """Another page in a window of its own, with a function that goes to and fro between both. Closed at the end."""
        first, self.session = self.session, None
        target = self.send("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        self._attach(target)
        pages = [first, self.session]

        def switch() -> None:
            self.session = pages[self.session == first]

        try:
            yield switch
        finally:
            self.session = None
            self.send("Target.closeTarget", targetId=target)
            self.session = first

    def send(self, method: str, **parameters) -> dict:
        """One command; returns its result."""
        number = self._write(method, parameters)
        while True:
            message = self._receive()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._note(message)

    def _write(self, method: str, parameters: dict) -> int:
        number = next(self.count)
        command = {"id": number, "method": method, "params": parameters}
        if self.session:
            command["sessionId"] = self.session
        left = memoryview(json.dumps(command).encode() + b"\0")
        while left:  # a pipe may take a part of a long command
            left = left[os.write(self.sink, left) :]
        return number

    def _receive(self) -> dict:
        while b"\0" not in self.buffer:
            assert select.select([self.source], [], [], PATIENCE)[0], "the browser does not answer"
            data = os.read(self.source, 65536)
            assert data, "the browser ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, message: dict) -> None:
        what, details = message.get("method"), message.get("params", {})
        if what == "Page.javascriptDialogOpening":
            self.asked.append(details["type"])
            self._write("Page.handleJavaScriptDialog", {"accept": self.agrees})
        elif what == "Runtime.exceptionThrown":
            self.problems.append(details["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif what == "Log.entryAdded" and details["entry"]["level"] == "error":
            self.problems.append(details["entry"]["text"])
        elif what == "Network.requestWillBeSent":
            url = details["request"]["url"]
            if not url.startswith(("data:", "about:", "blob:", "file:", "http://127.0.0.1:")):
                self.problems.append(f"asked for {url}")

    def run(self, script: str):
        """The value of an expression in the page; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression becomes true."""
        end = time.monotonic() + PATIENCE
        while not self.run(script):
            assert time.monotonic() < end, f"waited in vain for {script}"
            time.sleep(0.05)

    def show(self, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """The size of the window, the colour scheme, and whether there are fingers instead of a mouse."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, move it through the others, release it at the last."""
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def touch(self, *points: tuple[float, float]) -> None:
        """Put a finger down at the first point, move it through the others, lift it."""
        for kind, (x, y) in zip(["touchStart", *["touchMove"] * (len(points) - 1)], points, strict=True):
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def pinch(self, middle: tuple[float, float], before: float, after: float) -> None:
        """Put two fingers down so many pixels left and right of a point, move them apart or together, lift them."""
        (x, y), kinds = middle, ("touchStart", "touchMove", "touchMove")
        for kind, apart in zip(kinds, (before, (before + after) / 2, after), strict=True):
            points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def drop(self, *paths: Path) -> None:
        """Drop files and folders in the middle of the window, as from the desktop."""
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=400, y=300, data=data)

    def press(self, key: str, control: bool = False) -> None:
        """One key, with its text unless Control is held or the key has a name, as Tab."""
        code, text = NAMED_KEYS.get(key, (0, key if len(key) == 1 else ""))
        more = {"windowsVirtualKeyCode": code} if code else {}
        written = {"text": text} if text and not control else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=2 if control else 0, **more, **written)
            written = {}

    def image(self, path: Path, **options) -> None:
        """A screenshot."""
        data = self.send("Page.captureScreenshot", format="png", **options)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.sink)
        os.close(self.source)
