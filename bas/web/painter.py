"""A mask painter: one page (templates/paint.html) served on loopback, which loads and saves one scene folder.

Only this machine can reach the server, and only with the random token in its address; the Host header is checked, so
that no foreign page can reach it through a name of its own (DNS rebinding).
"""

import base64
import binascii
import io
import json
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from PIL import Image

from bas.data.mask_formats import MAX_MASKS
from bas.data.scene_writer import Draft, concepts_to_edit, write_draft
from bas.errors import InputError
from bas.io.figures import CONCEPT_COLOURS
from bas.models.text import check_name

PAGE = Path(__file__).parent / "templates" / "paint.html"
MAX_BODY = 2**26  # bytes of a request; masks compress well, so this is plenty
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; script-src 'nonce-{nonce}'; "
    "style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


# --- Saving ----------------------------------------------------------------------------------------------------------


def save_scene(draft: Draft, concepts: Any) -> str:
    """Write mask0.png, mask1.png, ..., scene.json and the picture; returns a line for people.

    concepts: a list of {"handle", "word", "mask": a PNG in base64}, as the page sends it. Everything is checked before
    anything is written: InputError for what no training could use. Masks of concepts that are gone are removed.
    """
    if not isinstance(concepts, list) or not 0 < len(concepts) <= MAX_MASKS:
        raise InputError(f"a scene has 1 to {MAX_MASKS} concepts")
    names = [_check_names(concept) for concept in concepts]
    if len({name["handle"] for name in names}) < len(names):
        raise InputError("two concepts have the same handle")
    masks = [_read_png(c.get("mask"), n["handle"], draft.image.size) for c, n in zip(concepts, names, strict=True)]
    write_draft(draft, masks, names)
    return f"Saved {len(masks)} mask{'s' * (len(masks) > 1)} to {draft.folder}"


def _check_names(concept: Any) -> dict:
    """Handle and initial word of one concept, checked."""
    handle, word = (concept.get("handle"), concept.get("word")) if isinstance(concept, dict) else (None, None)
    check_name(handle)
    if word is not None and not (isinstance(word, str) and len(word) <= 100):
        raise InputError(f"the initial word of {handle} is no short text")
    return {"handle": handle, "word": word or None}


def _read_png(text: Any, handle: str, size: tuple[int, int]) -> Image.Image:
    """A mask sent by the page, as a grey picture of the photograph's size that shows something and leaves some out."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
            if picture.size != size:
                raise InputError(f"the mask of {handle} is not of the picture's size")
            mask = picture.convert("L")
    except InputError:
        raise
    except (TypeError, ValueError, binascii.Error, OSError, SyntaxError) as error:
        raise InputError(f"the mask of {handle} is no PNG") from error
    if mask.getextrema()[1] == 0:
        raise InputError(f"nothing is painted for {handle}: paint it, or remove it")
    if mask.getextrema()[0] == 255:
        raise InputError(f"everything is painted for {handle}: leave out what is not the concept")
    return mask


# --- The server ---------------------------------------------------------------------------------------------------


@dataclass
class Studio:
    """What every request shares."""

    draft: Draft
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    lock: threading.Lock = field(default_factory=threading.Lock)  # one save at a time


class Server(ThreadingMixIn, TCPServer):
    """An HTTP server that only this machine can reach. Port 0 takes any free one."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, draft: Draft, port: int):
        self.studio = Studio(draft)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"--port {port} cannot be used: {error}") from error

    @property
    def url(self) -> str:
        """The address of the page, token included."""
        return f"http://127.0.0.1:{self.server_address[1]}/{self.studio.token}/"


class Handler(BaseHTTPRequestHandler):
    """Answers four addresses below /TOKEN/: the page itself, image, scene, and save."""

    timeout = 60  # seconds that a silent client may keep a thread

    def do_GET(self):
        """The page, the photograph as JPEG, or the scene as JSON."""
        place = self._place()
        draft = self.server.studio.draft
        if place == "":
            nonce = secrets.token_urlsafe(16)
            page = PAGE.read_text(encoding="utf-8").replace("{nonce}", nonce)
            self._answer(200, page.encode(), "text/html; charset=utf-8", POLICY.replace("{nonce}", nonce))
        elif place == "image":
            self._answer(200, _encode(draft.image, "JPEG"), "image/jpeg")
        elif place == "scene":
            self._describe(draft)
        elif place is not None:
            self._refuse(404, "there is no such page")

    def do_POST(self):
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
        elif not length.isdecimal():
            self._refuse(411, "how long is it?")
        elif int(length) > MAX_BODY:
            self._refuse(413, "the masks are too large")
        else:
            self._save(self.rfile.read(int(length)))

    def _describe(self, draft: Draft) -> None:
        try:
            content = describe(draft)
        except InputError as error:  # the folder was sound at the start, but has changed since
            self._refuse(400, str(error))
        else:
            self._answer(200, json.dumps(content).encode())

    def _save(self, body: bytes) -> None:
        try:
            content = json.loads(body)
            with self.server.studio.lock:
                message = save_scene(self.server.studio.draft, content["concepts"])
        except InputError as error:
            self._refuse(400, str(error))
        except (ValueError, TypeError, KeyError, RecursionError):
            self._refuse(400, "expected a scene as JSON")
        except OSError as error:
            self._refuse(500, f"could not write: {error}")
        else:
            self._answer(200, json.dumps({"message": message}).encode())

    def _place(self) -> str | None:
        """What is asked for below /TOKEN/, or None after a refusal."""
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            self._refuse(403, "this server answers to 127.0.0.1 alone")
            return None
        root, token, place = [*self.path.split("/", 2), "", ""][:3]
        if root or not secrets.compare_digest(token.encode(), self.server.studio.token.encode()):
            self._refuse(403, "open the address that bas paint printed, token included")
            return None
        return place

    def _refuse(self, status: int, message: str) -> None:
        self.close_connection = True  # whatever else was sent stays unread
        self._answer(status, json.dumps({"message": message}).encode())

    def _answer(self, status: int, body: bytes, kind: str = "application/json", policy: str = "default-src 'none'"):
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
        """What the Server header says."""
        return "bas paint"

    def log_message(self, *args) -> None:
        """Say nothing: the page tells what happens."""


def describe(draft: Draft) -> dict:
    """What the page needs to begin: sizes, colours, and the concepts with their masks as data URLs."""
    concepts = [
        {**concept, "mask": _data_url(Image.fromarray(concept["mask"])) if concept["mask"] is not None else None}
        for concept in concepts_to_edit(draft)
    ]
    width, height = draft.image.size
    name = str(draft.folder)
    return {"name": name, "width": width, "height": height, "colours": CONCEPT_COLOURS, "concepts": concepts}


def _encode(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, quality=92)
    return buffer.getvalue()


def _data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_encode(picture, "PNG")).decode()
