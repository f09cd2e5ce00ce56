"""The mask painter: one page (templates/paint.html), served on loopback, that loads and saves one scene folder.

Only this machine reaches the server, and only with the random token in its address. The Host header is checked, so
that no foreign page reaches it through a name of its own (DNS rebinding).
"""

import base64
import io
import json
import logging
import secrets
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from shlex import quote
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, cast

from PIL import Image

from bas.data.mask_formats import MAX_MASKS
from bas.data.scene import bracketed, check_word
from bas.data.scene_folder import numbered_folders
from bas.data.scene_writer import Draft, concepts_to_edit, finish_save, version, write_draft
from bas.errors import InputError
from bas.io.figures import CONCEPT_COLOURS
from bas.models.text import check_name
from bas.web.elements import environment

log = logging.getLogger(__name__)

MAX_BODY = 2**26  # bytes of a request, far above the masks of a scene
MAX_WORD = 100  # characters
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'nonce-{nonce}'; "
    "style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# --- Saving ----------------------------------------------------------------------------------------------------------


def save_scene(draft: Draft, concepts: Any, seen: Any) -> tuple[str, str]:
    """Write mask0.png, mask1.png, ..., scene.json and the image. -> a line that says what to do next, and the version

    concepts: a list of {"from": its number until now or None, "handle", "word", "mask": a PNG in base64}, as the page
    sends it; seen: the version of the scene that the page has loaded or saved. Raises InputError for what training
    could not use, and for a scene of another version, before anything is written. Masks of removed concepts are
    removed, and those of extra images follow their concepts.
    """
    if not isinstance(concepts, list) or not 0 < len(concepts) <= MAX_MASKS:
        raise InputError(f"a scene has 1 to {MAX_MASKS} concepts")
    names = [_check_names(concept) for concept in concepts]
    if len({name["handle"] for name in names}) < len(names):
        raise InputError("two concepts have the same handle")
    masks = [_read_png(c.get("mask"), n["handle"], draft.image.size) for c, n in zip(concepts, names, strict=True)]
    now = write_draft(draft, masks, names, _origins(draft, concepts), seen if isinstance(seen, str) else "")
    return f"Saved {len(masks)} mask{'s' * (len(masks) > 1)} to {draft.folder}. {next_steps(draft)}", now


def next_steps(draft: Draft) -> str:
    """Return the commands that follow, for the page and the terminal."""
    folder = quote(str(draft.folder))
    return f"Next: `bas masks {folder}` checks them, `bas train {folder}` learns the concepts"


def _check_names(concept: Any) -> dict:
    """Check a handle, with or without < >, and an initial word, and return them. InputError for wrong ones."""
    handle, word = (concept.get("handle"), concept.get("word")) if isinstance(concept, dict) else (None, None)
    handle = bracketed(handle) if isinstance(handle, str) else None
    check_name(handle)
    if word is not None and not (isinstance(word, str) and len(word) <= MAX_WORD):
        raise InputError(f"the initial word of {handle} is not a text of {MAX_WORD} characters or fewer")
    check_word(word, str(handle))
    return {"handle": handle, "word": (word or "").strip() or None}


def _origins(draft: Draft, concepts: list[dict]) -> list[int | None] | None:
    """Return the number that each concept had until now. InputError if extra images need it and it was not sent."""
    extra = numbered_folders(draft.folder) if draft.folder.is_dir() else []
    if not extra:
        return None
    origins = [concept.get("from", -1) for concept in concepts]
    numbers = [number for number in origins if number is not None]
    if len({*map(str, numbers)}) < len(numbers) or not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"{extra[0]} has masks of these concepts, and their numbers are unknown: load the page again")
    return origins


def _read_png(text: Any, handle: str, size: tuple[int, int]) -> Image.Image:
    """Read a mask sent by the page, as a grey image. InputError for another size, an empty mask and a full one."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.size != size:
                raise InputError(f"the mask of {handle} does not have the size of the image")
            mask = image.convert("L")
    except InputError:
        raise
    except Exception as error:  # a broken file makes Pillow raise nearly anything
        raise InputError(f"the mask of {handle} is not a PNG") from error
    if mask.getextrema()[1] == 0:
        raise InputError(f"nothing is painted for {handle}: paint it, or remove it")
    if mask.getextrema()[0] == 255:
        raise InputError(f"everything is painted for {handle}: leave out what is not the concept")
    return mask


# --- The server ---------------------------------------------------------------------------------------------------


@dataclass
class Session:
    """The scene being painted, shared by all requests."""

    draft: Draft
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    lock: threading.Lock = field(default_factory=threading.Lock)  # the scene is read or saved
    saved: bool = False


class Server(ThreadingMixIn, TCPServer):
    """An HTTP server that only this machine can reach. Port 0 takes any free one."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, draft: Draft, port: int):
        self.session = Session(draft)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"--port {port} cannot be used: {error}") from error

    @property
    def url(self) -> str:
        """The address of the page, token included."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.session.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault in one line. A client that hangs up is not a fault."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            log.error("a request failed: %s: %s", type(error).__name__, error)


class Handler(BaseHTTPRequestHandler):
    """Answer four addresses below /TOKEN/: the page itself, image, scene, and save."""

    timeout = 60  # seconds that a silent client may keep a thread

    @property
    def session(self) -> Session:
        """The server's."""
        return cast("Server", self.server).session

    def do_GET(self) -> None:
        """Send the page, the image as JPEG, or the scene as JSON."""
        place = self._place()
        draft = self.session.draft
        if place == "":
            nonce = secrets.token_urlsafe(16)
            page = environment().get_template("paint.html").render(nonce=nonce)
            self._answer(200, page.encode(), "text/html; charset=utf-8", POLICY.replace("{nonce}", nonce))
        elif place == "image":
            self._answer(200, _encode(draft.image, "JPEG"), "image/jpeg")
        elif place == "scene":
            self._describe(draft)
        elif place is not None:
            self._refuse(404, "there is no such page")

    def do_POST(self) -> None:
        """Save the scene."""
        place = self._place()
        if place is None:
            return
        length = self.headers.get("Content-Length", "")
        origin = self.headers.get("Origin")
        if place != "save":
            self._refuse(404, "there is no such page")
        elif origin not in (None, f"http://{self.headers['Host']}"):
            self._refuse(403, "the request comes from another page")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(415, "expected JSON")
        elif not (length.isascii() and length.isdecimal()):
            self._refuse(411, "the request states no length")
        elif len(length) > len(str(MAX_BODY)) or int(length) > MAX_BODY:
            self._refuse(413, "the masks are too large")
        elif len(body := self.rfile.read(int(length))) < int(length):
            self._refuse(400, "the request is incomplete")
        else:
            self._save(body)

    def _describe(self, draft: Draft) -> None:
        try:
            with self.session.lock:
                content = describe(draft)
        except InputError as error:  # the folder was sound at the start, but has changed since
            self._refuse(400, str(error))
        else:
            self._answer(200, json.dumps(content).encode())

    def _save(self, body: bytes) -> None:
        try:
            sent = json.loads(body)
            concepts, seen = sent["concepts"], sent.get("version")
        except (ValueError, TypeError, KeyError, RecursionError):
            self._refuse(400, "expected a scene as JSON")
            return
        try:
            with self.session.lock:
                message, now = save_scene(self.session.draft, concepts, seen)
                self.session.saved = True
        except InputError as error:
            self._refuse(400, str(error))
        except OSError as error:
            self._refuse(500, f"could not write: {error}")
        else:
            self._answer(200, json.dumps({"message": message, "version": now}).encode())

    def _place(self) -> str | None:
        """Return the path below /TOKEN/. Without the right host and token, answer 403 and return None."""
        port = cast("Server", self.server).server_address[1]
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._refuse(403, "this server answers at 127.0.0.1 alone")
            return None
        root, token, place = [*self.path.split("/", 2), "", ""][:3]
        if root or not secrets.compare_digest(token.encode(), self.session.token.encode()):
            self._refuse(403, "open the address that bas paint printed, token included")
            return None
        return place

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # the rest of the request stays unread
        self._answer(status, json.dumps({"message": message}).encode())

    def _answer(
        self, status: int, body: bytes, kind: str = "application/json", policy: str = "default-src 'none'"
    ) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        """Return the Server header."""
        return "bas paint"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the page shows what happens."""


def describe(draft: Draft) -> dict:
    """Return the state that the page begins with: sizes, colours, and the concepts with their masks as data URLs.

    Its version comes with each save, which is refused if the scene has another one by then.
    """
    finish_save(draft.folder)
    now = version(draft.folder)  # before it is read: what is changed meanwhile is another version
    concepts = [
        {**concept, "mask": _data_url(Image.fromarray(concept["mask"])) if concept["mask"] is not None else None}
        for concept in concepts_to_edit(draft)
    ]
    width, height = draft.image.size
    size = {"width": width, "height": height}
    return {"name": str(draft.folder), "version": now, **size, "colours": CONCEPT_COLOURS, "concepts": concepts}


def _encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=92)
    return buffer.getvalue()


def _data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_encode(image, "PNG")).decode()
