"""The studio's server: what it needs and sends; its connections, on a real socket: half a request holds up nobody."""

import contextlib
import importlib.util
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from bas.cli.entry import main
from bas.web.studio import connections, guard
from bas.web.studio.app import STATIC, served

HALF = b"GET / HTTP/1.1\r\nHost: x"
MOST, PATIENCE = 6, 0.15


async def hello(_scope, _receive, send):
    """Answer a request."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """Open a connection to a server that takes few of them and waits for a moment."""
    monkeypatch.setattr(connections, "MOST", MOST)
    monkeypatch.setattr(guard, "PATIENCE", PATIENCE)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(socket.socket(socket.AF_UNIX))  # tests reach no network themselves
        place.bind(str(tmp_path / "socket"))
        place.listen(connections.AT_ONCE)
        server = connections.server_of(hello)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()

        def opened(sent=b""):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(20)
            client.connect(str(tmp_path / "socket"))
            client.sendall(sent)
            return client

        yield opened
        server.should_exit = True
        thread.join()


def ask(client):
    """A whole request: the status line of its answer."""
    client.sendall(HALF + b"\r\n\r\n")
    answer = b""
    while not answer.endswith(b"hi"):
        answer += client.recv(1000)
    return answer.partition(b"\r\n")[0]


def is_closed(client, seconds):
    """Whether the server closes a connection in this time."""
    client.settimeout(seconds)
    try:
        return client.recv(1) == b""
    except ConnectionError:
        return True
    except TimeoutError:
        return False


def test_half_of_a_request_is_waited_for_so_long(connect):
    """Also where it comes bit by bit, after a whole one, or where nothing comes."""
    begun = time.monotonic()
    for sent in (b"", HALF):
        assert is_closed(connect(sent), 20)
    assert 2 * PATIENCE <= time.monotonic() - begun < 10
    again = connect()
    assert ask(again) == b"HTTP/1.1 200 OK"
    again.sendall(HALF)
    assert is_closed(again, 20)
    slow = connect(b"GET /")
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            slow.sendall(b"x")
            time.sleep(PATIENCE / 10)
    assert is_closed(slow, 0.1)


def test_among_many_halves_of_requests_the_page_is_answered(connect, monkeypatch):
    """The oldest of those that wait have to go, the latest stays."""
    monkeypatch.setattr(guard, "PATIENCE", 60)
    page = connect()
    halves = [connect(HALF) for _ in range(3 * MOST)]
    assert ask(connect()) == b"HTTP/1.1 200 OK"
    assert is_closed(page, 20)
    assert all(is_closed(each, 20) for each in halves[: 2 * MOST + 1])
    assert not is_closed(halves[-1], 0.05)


def test_without_its_packages_it_names_the_command_of_the_docs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert main(["studio", str(tmp_path / "home"), "--no_browser"]) == 2
    command = "pip install -c constraints.txt -e '.[studio]'"
    assert command in capsys.readouterr().err
    assert command in (Path(__file__).parents[3] / "docs" / "studio.md").read_text()
    assert not (tmp_path / "home").exists()


def test_the_page_is_small_and_asks_nobody_else():
    files = {path.name: path.read_text() for path in STATIC.iterdir()}
    sent = [line for path in STATIC.iterdir() for line in served(path).splitlines()]
    assert sum(map(len, sent)) <= 150_000
    assert not any(line.startswith((b" ", b"//")) for line in sent)
    for name, text in files.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            name
        )
        assert set(re.findall(r"https?://[^\"' )]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert text.count("\n") <= 400, name
        assert not name.endswith(".js") or max(map(len, text.splitlines())) <= 140, name
