"""The studio's application: which request is answered by what.

Answers are imported when they are first asked for, so that the page is there before PyTorch is loaded.
"""

import importlib
import json
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from bas.errors import InputError, RunError
from bas.web.studio.jobs import Lane
from bas.web.studio.refusal import Refusal, missing
from bas.web.studio.store import Home

log = logging.getLogger(__name__)

STATIC = Path(__file__).parents[1] / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}  # our own: the registry of Windows knows others


@dataclass
class Ask:
    """One request, as an answer needs it."""

    home: Home
    lane: Lane
    path: dict[str, str] = field(default_factory=dict)  # what the address names
    query: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    expected: str | None = None  # the version that the page has seen

    @property
    def json(self) -> dict[str, Any]:
        """The body as JSON. Refusal for anything else than an object."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Refusal(400, "the body is not a JSON object", "bad")
        return found

    def number(self, name: str, default: int = 0) -> int:
        """Return a whole number of the address. Refusal for anything else."""
        text = self.path.get(name, self.query.get(name, str(default)))
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise Refusal(400, f"{name} is not a number", "bad", name)
        return int(text)


# Method, address below the token, and the file and function of this folder that answer it.
ADDRESSES = (
    ("GET", "/api/about", "planning.about"),
    ("GET", "/api/state", "answers.state"),
    ("POST", "/api/quit", "leave"),
    ("POST", "/api/scenes", "answers.add_scene"),
    ("POST", "/api/example", "answers.add_example"),
    ("GET", "/api/scenes/{scene}", "answers.get_scene"),
    ("PATCH", "/api/scenes/{scene}", "answers.name_concepts"),
    ("DELETE", "/api/scenes/{scene}", "answers.delete_scene"),
    ("GET", "/api/trash", "answers.list_trash"),
    ("POST", "/api/trash/{name}", "answers.restore"),
    ("GET", "/api/scenes/{scene}/view", "answers.view_photo"),
    ("GET", "/api/segmenters", "proposals.list_segmenters"),
    ("GET", "/api/scenes/{scene}/masks/{number}", "answers.get_mask"),
    ("PATCH", "/api/scenes/{scene}/masks/{number}", "answers.put_mask"),
    ("POST", "/api/check", "planning.check_masks"),
    ("GET", "/api/settings", "planning.list_settings"),
    ("POST", "/api/plan", "planning.plan_training"),
    ("POST", "/api/jobs", "planning.add_job"),
    ("POST", "/api/jobs/{job}/stop", "answers.stop_job"),
    ("POST", "/api/jobs/{job}/accept", "answers.accept_job"),
    ("POST", "/api/jobs/{job}/move", "answers.move_job"),
    ("GET", "/api/jobs/{job}/log", "answers.read_log"),
    ("GET", "/api/jobs/{job}/image", "answers.view_edited"),
    ("GET", "/api/jobs/{job}/mask", "proposals.get_mask"),
    ("GET", "/api/runs/{run}", "answers.get_run"),
    ("DELETE", "/api/runs/{run}", "answers.delete_run"),
    ("GET", "/api/runs/{run}/metrics", "answers.get_metrics"),
    ("GET", "/api/runs/{run}/pictures", "answers.list_pictures"),
    ("PATCH", "/api/runs/{run}/pictures", "answers.mark_picture"),
    ("DELETE", "/api/runs/{run}/pictures", "answers.delete_picture"),
    ("GET", "/api/runs/{run}/edited", "answers.compare_edit"),
    ("GET", "/api/runs/{run}/exports", "planning.list_exports"),
    ("GET", "/api/runs/{run}/zip", "answers.zip_run"),
    ("GET", "/api/runs/{run}/cutout/{concept}", "answers.get_cutout"),
    ("GET", "/api/runs/{run}/file/{file:path}", "answers.get_file"),
    ("GET", "/api/runs/{run}/thumb/{file:path}", "answers.get_thumb"),
    ("GET", "/api/compare", "answers.compare_runs"),
)


def served(path: Path) -> bytes:
    """Return a file of the page as it is sent: without indentation, comment lines and the spaces of CSS."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    text = "".join(f"{line}\n" for line in lines if not line.startswith("//"))
    return (re.sub(r"(?<=[:;]) | (?={)", "", text) if path.suffix == ".css" else text).encode()


def build(home: Home, lane: Lane, leave: Callable[[], None]) -> Starlette:
    """Build the application below the token. leave: ends the server."""
    files = {path.name: served(path) for path in STATIC.iterdir() if path.suffix in TYPES}

    async def page(request: Request) -> Response:
        name = request.path_params.get("file", "index.html")
        if name not in files:
            return refused(missing("the page"))
        return Response(files[name], media_type=TYPES[Path(name).suffix])

    routes = [Route("/", page), Route("/a/{file}", page)]
    for method, address, name in ADDRESSES:
        answer = leaving(leave) if name == "leave" else partial(reply, home, lane, name)
        routes.append(Route(address, answer, methods=[method]))
    app = Starlette(routes=routes, exception_handlers={404: nowhere, 405: nowhere})
    app.router.redirect_slashes = False
    return app


async def nowhere(_request: Request, _error: Exception) -> Response:
    """Answer a request for an address that does not exist."""
    return refused(missing("the page"))


def leaving(leave: Callable[[], None]) -> Callable[[Request], Awaitable[Response]]:
    """Answer, and end the server."""

    async def answer(_request: Request) -> Response:
        leave()
        return JSONResponse({})

    return answer


async def reply(home: Home, lane: Lane, name: str, request: Request) -> Response:
    """Answer a request in a thread of its own, and turn errors into what the page shows."""
    body = await request.body()
    ask = Ask(home, lane, request.path_params, dict(request.query_params), body, request.headers.get("if-match"))
    return await run_sync(answer, name, ask)


def answer(name: str, ask: Ask) -> Response:
    """Call the answer of a request."""
    try:
        file, _, function = name.partition(".")
        found = getattr(importlib.import_module(f"bas.web.studio.{file}"), function)(ask)
    except Refusal as refusal:
        return refused(refusal)
    except (InputError, RunError) as error:
        return refused(Refusal(422, str(error), "input"))
    except OSError as error:
        log.error("%s: %s", name, error)
        full = error.errno == 28
        return refused(Refusal(507 if full else 500, f"could not be written: {error.strerror or error}", "disk"))
    except Exception as error:
        log.exception("%s failed", name)
        return refused(Refusal(500, f"bas made a mistake here: {type(error).__name__}: {error}"[:300], "fault"))
    return found if isinstance(found, Response) else JSONResponse(found)


def refused(refusal: Refusal) -> Response:
    """Answer with a refusal."""
    return JSONResponse(refusal.content(), refusal.status)
