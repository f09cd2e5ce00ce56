"""The way in from another machine (`bas studio --listen`): a page that asks for the password, and a cookie after it."""

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections import deque

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request, cookie_parser
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bas.errors import InputError
from bas.web.studio.app import STATIC, TYPES, served

SHORTEST = 8  # characters of a password
TRIES, WINDOW = 5, 60.0  # wrong passwords, of all machines together, within so many seconds
SESSIONS = 64  # browsers that are logged in at most; the oldest one is logged out
FILES = {"": "login.html", "login.js": "login.js", "studio.css": "studio.css", "icon.svg": "icon.svg"}


class Door:
    """What is known of the password and of those who gave it.

    address: the address at which other machines reach this one, as a number or a name. InputError for one that is not
    its own, or that is this machine alone, or every network at once; and for a short password.
    """

    def __init__(self, address: str, port: int, password: str):
        if len(password) < SHORTEST:
            raise InputError(f"the password has fewer than {SHORTEST} characters: choose a longer one")
        self.address, self.port = address, port
        self.place = resolve(address)
        self.hosts = {host(name, port) for name in (address, self.place)}
        self.salt = secrets.token_bytes(16)
        self.digest = self.digest_of(password)
        self.sessions: deque[str] = deque(maxlen=SESSIONS)
        self.wrong: deque[float] = deque(maxlen=TRIES)

    def digest_of(self, password: str) -> bytes:
        """Return the hash of a password. It takes equally long for each."""
        return hashlib.scrypt(password.encode("utf-8", "surrogatepass"), salt=self.salt, n=2**14, r=8, p=1)

    def closed_for(self) -> float:
        """Return the seconds until another password may be tried: 0 unless too many were wrong."""
        if len(self.wrong) < TRIES:
            return 0.0
        return max(0.0, self.wrong[0] + WINDOW - time.monotonic())

    def enter(self, password: str) -> str | None:
        """Open a session for the right password. Count a wrong one, and return None."""
        self.wrong.append(time.monotonic())  # before it is known, so that many at once do not get more tries
        if not hmac.compare_digest(self.digest_of(password), self.digest):
            return None
        self.wrong.clear()
        self.sessions.append(secrets.token_urlsafe(32))
        return self.sessions[-1]

    @property
    def cookie(self) -> str:
        """The cookie's name. Cookies are shared by all ports of a machine, so it holds the port."""
        return f"bas-studio-{self.port}"

    def knows(self, header: str) -> bool:
        """Return whether a cookie header is of a browser that is logged in."""
        given = cookie_parser(header).get(self.cookie, "").encode()
        return any(hmac.compare_digest(given, session.encode()) for session in self.sessions)

    def build(self, token: str) -> Starlette:
        """Build the application before the login: its page, and the address that takes the password."""
        files = {name: served(STATIC / file) for name, file in FILES.items()}

        async def page(request: Request) -> Response:
            name = request.path_params.get("file", "")
            if name not in files:
                return JSONResponse({"code": "missing", "message": "the page is not here"}, 404)
            return Response(files[name], media_type=TYPES[f".{FILES[name].rpartition('.')[2]}"])

        async def login(request: Request) -> Response:
            wait = self.closed_for()
            if wait:
                message = f"too many wrong passwords: try again in {wait:.0f} seconds"
                return JSONResponse({"code": "tries", "message": message}, 429)
            try:
                password = (await request.json())["password"]
            except (ValueError, TypeError, KeyError, RecursionError):
                password = None
            session = await run_sync(self.enter, password) if isinstance(password, str) else None
            if session is None:
                return JSONResponse({"code": "password", "message": "this is not the password"}, 403)
            answer = JSONResponse({"to": f"/{token}/"})
            answer.set_cookie(self.cookie, session, httponly=True, samesite="strict")
            return answer

        return Starlette(
            routes=[
                Route("/", page),
                Route("/a/{file}", page),
                Route("/login", login, methods=["POST"]),
            ]
        )


def resolve(address: str) -> str:
    """Return the number of an address. InputError unless it is one network's."""
    try:
        place = str(socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise InputError(f"--listen {address}: there is no such address ({error})") from None
    number = ipaddress.ip_address(place.partition("%")[0])
    if number.is_loopback:
        raise InputError(f"--listen {address} is this machine alone, which is served anyway: leave it out")
    if number.is_unspecified:
        raise InputError(f"--listen {address} is every network at once: name this machine's address in one of them")
    return place


def host(name: str, port: int) -> str:
    """Return the Host header of an address."""
    return f"[{name}]:{port}" if ":" in name else f"{name.lower()}:{port}"
