"""The guard before every request: who asks, from which page, for what, and how much is sent.

The page can start programs and write files, so whoever can ask it can do both. A request passes with the right Host
(against DNS rebinding), the token in its path, our own Origin for all but GET, and a body of a known type and size. A
request that comes over the network (`--listen`) needs the cookie of a login as well (login.py).
"""

import asyncio
import ipaddress
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bas.web.studio.login import Door

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

JSON = "application/json"
LIMITS = {JSON: 2**22, "application/octet-stream": 2**27}  # bytes of a body by its type
LOGIN = 4096  # bytes of the request that brings a password
PATIENCE = 30.0  # seconds between two parts of a body
OPENS = 60.0  # seconds that the address handed to the browser's command line works, once
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    "require-trusted-types-for 'script'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


class Stopped(Exception):
    """The body is too large, or comes too slowly."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Guard:
    """An ASGI application around another: it answers what is not allowed, and passes on the rest below the token."""

    def __init__(self, app: Application, token: str, port: int, door: "Door | None" = None):
        self.app, self.token, self.door = app, token, door
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self.entrance: Application | None = door.build(token) if door else None
        self.codes: dict[str, float] = {}  # that open the page once, with the time until which they do

    def opening_code(self) -> str:
        """Make a code for the browser's command line. It works once, because other users of the machine can read it."""
        code = secrets.token_urlsafe(16)
        self.codes[code] = time.monotonic() + OPENS
        return code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        door = self.door if is_remote(scope) else None
        refused = self.refuse_place(scope, headers) or self.refuse_origin(scope, headers)
        if door and not refused:
            if not door.knows(headers.get("cookie", "")):
                await self.ask_in(scope, receive, send, headers)
                return
            if scope["path"] == "/":
                await answer(send, 303, "", {"location": f"/{self.token}/"})
                return
        first, _, rest = scope["path"].removeprefix("/").partition("/")
        refused = refused or self.refuse_token(scope, door is None) or refuse_body(scope, headers, LIMITS)
        if refused:
            await answer(send, *refused)
        elif first == "open" or (
            not rest and not scope["path"].endswith("/")
        ):  # modules are named relative to the page
            await answer(send, 303, "", {"location": f"/{self.token}/"})
        else:
            await self.pass_on(self.app, {**scope, "path": f"/{rest}", "raw_path": b""}, receive, send, headers)

    async def ask_in(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        """Answer a browser on another machine that is not logged in: with the page that asks for the password alone."""
        path = scope["path"]
        refused = refuse_body(scope, headers, {JSON: LOGIN})
        if refused:
            await answer(send, *refused)
        elif self.entrance and (path in ("/", "/login") or path.startswith("/a/")):
            await self.pass_on(self.entrance, scope, receive, send, headers, LOGIN)
        elif scope["method"] == "GET" and path.count("/") <= 2 and path.endswith("/"):  # a bookmark
            await answer(send, 303, "", {"location": "/"})
        else:
            await answer(send, 403, "log in first: load the page again")

    def refuse_place(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and reason for a request under a name at which the studio does not answer."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        known = self.hosts if not is_remote(scope) else self.door.hosts if self.door else set()
        if len(hosts) != 1 or headers["host"] not in known:
            return (
                403,
                "the studio answers at 127.0.0.1 alone" if known is self.hosts else "the studio has another name",
            )
        return None

    def refuse_origin(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return the status and the reason for a request that another page sends."""
        site, reads = headers.get("sec-fetch-site", "same-origin"), scope["method"] in ("GET", "HEAD")
        known = site == "same-origin" or (scope["method"] == "GET" and site == "none")
        if not known or not (reads or headers.get("origin") == f"http://{headers['host']}"):
            return 403, "the request comes from another page"
        return None

    def refuse_token(self, scope: Scope, here: bool) -> tuple[int, str] | None:
        """Return status and reason for a request without the token. here: a browser's command line may have a code."""
        first, _, rest = scope["path"].removeprefix("/").partition("/")
        if secrets.compare_digest(first.encode(), self.token.encode()):
            return None
        if here and scope["method"] == "GET" and first == "open" and self.codes.pop(rest, 0) > time.monotonic():
            return None
        return 403, "open the address that bas studio printed, token included"

    async def pass_on(
        self,
        app: Application,
        scope: Scope,
        receive: Receive,
        send: Send,
        headers: dict[str, str],
        most: int | None = None,
    ) -> None:
        """Let an application answer, with our headers; count the body on its way, and wait for it only so long.

        most: bytes of a body (default: what its type may have).
        """
        most = LIMITS.get(kind_of(headers), 0) if most is None else most
        seen, whole, begun = 0, False, False
        stopped: Stopped | None = None

        async def counted() -> Message:
            nonlocal seen, whole, stopped
            if whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), PATIENCE)
            except TimeoutError:
                stopped = Stopped(408, "the body came too slowly")
                raise stopped from None
            seen += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if seen > most:
                stopped = Stopped(413, too_large(most))
                raise stopped
            return message

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if stopped:  # the application's answer to that: ours follows
                return
            if message["type"] == "http.response.start":
                begun = True
                names = {name for name, _ in message["headers"]}
                ours = {"cache-control": "no-store", **HEADERS}
                more = [(k.encode(), v.encode()) for k, v in ours.items() if k.encode() not in names]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            await app(scope, counted, with_headers)
        except Stopped as stop:
            if not begun:
                await answer(send, stop.status, str(stop))


def is_remote(scope: Scope) -> bool:
    """Return whether a request came over the network: by the address that it reached, not by what it says."""
    try:
        return not ipaddress.ip_address(scope["server"][0].partition("%")[0]).is_loopback
    except (ValueError, TypeError, KeyError):
        return True


def kind_of(headers: dict[str, str]) -> str:
    """Return the type of a body."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def too_large(most: int) -> str:
    """Say how large a body may be."""
    return f"a body of this type has at most {most >> 20} MiB" if most >> 20 else f"this body has at most {most} bytes"


def refuse_body(scope: Scope, headers: dict[str, str], limits: dict[str, int]) -> tuple[int, str] | None:
    """Return the status and the reason for a body of a wrong type or size, as its headers state them."""
    if scope["method"] in ("GET", "HEAD"):
        return None
    kind = kind_of(headers)
    if kind not in limits:
        return 415, f"a body is {' or '.join(limits)}"
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdecimal()):
        return 400, "the length is not a number"
    if len(length) > 12 or int(length) > limits[kind]:
        return 413, too_large(limits[kind])
    return None


async def answer(send: Send, status: int, message: str, more: dict[str, str] | None = None) -> None:
    """Send a short answer. The connection is closed: the rest of a refused body stays unread."""
    body = b"" if status == 303 else json.dumps({"code": "guard", "message": message}).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "cache-control": "no-store",
        "connection": "close",
        **HEADERS,
        **(more or {}),
    }
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})
