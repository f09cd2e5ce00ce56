"""The guard before every request: who asks, from which page, for what, and how much is sent.

The page can start programs and write files, so whoever can ask it can do both. A request passes with the right Host
(against DNS rebinding), the token in its path, our own Origin for all but GET, and a body of a known type and size.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LIMITS = {"application/json": 2**22, "application/octet-stream": 2**27}  # bytes of a body by its type
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

    def __init__(self, app: Application, token: str, port: int):
        self.app, self.token = app, token
        self.hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost")}
        self.codes: dict[str, float] = {}  # that open the page once, with the time until which they do

    def opening_code(self) -> str:
        """A code for the browser's command line, which other users of the machine can read: it works once."""
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
        refused = self.refuse(scope, headers)
        if refused:
            await answer(send, *refused)
            return
        first, _, rest = scope["path"].removeprefix("/").partition("/")
        if first == "open":
            await answer(send, 303, "", {"location": f"/{self.token}/"})
            return
        if not rest and not scope["path"].endswith("/"):  # modules are named relative to the page
            await answer(send, 303, "", {"location": f"/{self.token}/"})
            return
        await self.pass_on({**scope, "path": f"/{rest}", "raw_path": b""}, receive, send, headers)

    def refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and the reason for a request that may not pass."""
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or headers["host"] not in self.hosts:
            return 403, "the studio answers at 127.0.0.1 alone"
        method, (first, _, rest) = scope["method"], scope["path"].removeprefix("/").partition("/")
        known = secrets.compare_digest(first.encode(), self.token.encode())
        if not known and not (method == "GET" and first == "open" and self.codes.pop(rest, 0) > time.monotonic()):
            return 403, "open the address that bas studio printed, token included"
        site = headers.get("sec-fetch-site", "same-origin")
        if site != "same-origin" and not (method == "GET" and site == "none"):
            return 403, "the request comes from another page"
        if method in ("GET", "HEAD"):
            return None
        if headers.get("origin") != f"http://{headers['host']}":
            return 403, "the request comes from another page"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in LIMITS:
            return 415, f"a body is {' or '.join(LIMITS)}"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            return 400, "the length is not a number"
        if len(length) > 12 or int(length) > LIMITS[kind]:
            return 413, f"a body of this type has at most {LIMITS[kind] >> 20} MiB"
        return None

    async def pass_on(self, scope: Scope, receive: Receive, send: Send, headers: dict[str, str]) -> None:
        """Let the application answer, with our headers; count the body on its way, and wait for it only so long."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        most, seen, whole, begun = LIMITS.get(kind, 0), 0, False, False
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
                stopped = Stopped(413, f"a body of this type has at most {most >> 20} MiB")
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
            await self.app(scope, counted, with_headers)
        except Stopped as stop:
            if not begun:
                await answer(send, stop.status, str(stop))


async def answer(send: Send, status: int, message: str, more: dict[str, str] | None = None) -> None:
    """A short answer of the guard's own. The connection is closed: the rest of a refused body stays unread."""
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
