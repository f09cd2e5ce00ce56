"""A studio in a temporary folder, asked without a network."""

import json
from dataclasses import dataclass

import pytest
from starlette.testclient import TestClient

from bas.web.studio.app import build
from bas.web.studio.guard import Guard
from bas.web.studio.jobs import Lane
from bas.web.studio.store import Home

PORT = 8765
ORIGIN = f"http://127.0.0.1:{PORT}"


@dataclass
class Studio:
    """The server's parts, and requests as its own page sends them."""

    home: Home
    lane: Lane
    guard: Guard
    client: TestClient

    def ask(self, method, path, body=None, raw=None, **headers):
        """One request below the token."""
        kind = "application/octet-stream" if raw is not None else "application/json"
        sent = {"Origin": ORIGIN, "Content-Type": kind} if method != "GET" else {}
        content = raw if raw is not None else json.dumps(body or {}).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        options = {"content": content} if method != "GET" else {}
        address = f"/{self.guard.token}/{path}"
        return self.client.request(method, address, headers=sent | named, follow_redirects=False, **options)

    def get(self, path):
        """What a request gives that must succeed."""
        answer = self.ask("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path, body=None, **options):
        """As `get`, with a body."""
        answer = self.ask("POST", path, body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture
def studio(tmp_path, monkeypatch):
    """A studio whose jobs do not start by themselves."""
    monkeypatch.setattr("bas.web.studio.jobs.Lane.tick", lambda _lane: None)
    home = Home(tmp_path / "home")
    home.make()
    lane = Lane(home)
    guard = Guard(build(home, lane, lambda: None), home.token(), PORT)
    with TestClient(guard, base_url=ORIGIN, raise_server_exceptions=True) as client:
        yield Studio(home, lane, guard, client)
