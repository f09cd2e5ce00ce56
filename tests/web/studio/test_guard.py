"""The guard of the studio: what it refuses, with which status, and that nothing is written then."""

import asyncio
import hashlib
import io
import os
import socket
import stat
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from bas.cli.commands.studio import read_password
from bas.cli.entry import main
from bas.errors import InputError
from bas.io.files import cache_dir
from bas.web.studio.guard import LIMITS, Guard
from bas.web.studio.login import Door
from bas.web.studio.own import KEY
from bas.web.studio.store import Home
from tests.web.studio.conftest import ORIGIN, PORT

JSON, BYTES = "application/json", "application/octet-stream"
FOREIGN_HOSTS = (
    *("127.0.0.1", f"127.0.0.1:{PORT + 1}", f"127.0.0.1.:{PORT}", f"example.org:{PORT}", "localhost", f"[::1]:{PORT}"),
    *(
        f"0.0.0.0:{PORT}",
        f"127.0.0.1.example.org:{PORT}",
        f"LOCALHOST.:{PORT}",
        "",
        f"127.1:{PORT}",
        f"user@127.0.0.1:{PORT}",
    ),
)
FOREIGN_ORIGINS = (
    *(None, "null", "", "http://example.org", "http://127.0.0.1", f"http://127.0.0.1:{PORT + 1}"),
    *(f"https://127.0.0.1:{PORT}", f"http://localhost:{PORT}", f"http://127.0.0.1:{PORT}.example.org", f"{ORIGIN}/"),
)
WRITES = (("POST", "api/example", JSON), ("POST", "api/scenes?name=x", BYTES), ("POST", "api/quit", JSON))


def files(studio):
    """Every path below HOME."""
    return sorted(str(path) for path in studio.home.folder.rglob("*"))


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_another_host_is_refused(studio, host):
    """Against DNS rebinding, with the right token."""
    assert studio.ask("GET", "", host=host).status_code == 403
    assert studio.ask("GET", "api/state", host=host).status_code == 403


@pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE", "PUT"])
@pytest.mark.parametrize("origin", FOREIGN_ORIGINS)
def test_another_origin_is_refused(studio, origin, method):
    before = files(studio)
    headers = {"Content-Type": JSON} | ({} if origin is None else {"Origin": origin})
    answer = studio.client.request(method, f"/{studio.guard.token}/api/example", headers=headers, content=b"{}")
    assert answer.status_code == 403
    assert files(studio) == before


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "anything"])
def test_a_request_that_another_page_starts_is_refused(studio, site):
    assert studio.ask("POST", "api/example", sec_fetch_site=site).status_code == 403
    assert studio.ask("GET", "", sec_fetch_site=site).status_code == (200 if site == "none" else 403)
    assert studio.ask("GET", "", sec_fetch_site="same-origin").status_code == 200


def test_without_the_token_there_is_nothing(studio):
    token = studio.guard.token
    assert len(token) >= 22  # 128 bits
    wrong = (
        "",
        "/",
        f"/{token[:-1]}/",
        f"/{token}x/",
        f"/{token.swapcase()}/",
        "/api/state",
        f"//{token}/",
        f"/%00{token}/",
        "/../",
        "/é/",
    )
    for path in wrong:
        assert studio.client.get(path, follow_redirects=False).status_code == 403, path
    assert studio.client.get(f"/{token}", follow_redirects=False).headers["location"] == f"/{token}/"
    mode = stat.S_IMODE(os.stat(cache_dir() / KEY).st_mode)
    assert mode == 0o600
    assert studio.home.token() == token  # bookmarks live on
    assert token not in "".join(path.read_text() for path in studio.home.folder.rglob("*") if path.is_file())
    assert Home(studio.home.folder.parent / "copy").token() != token


def test_the_code_for_the_browser_works_once(studio, monkeypatch):
    code = studio.guard.opening_code()
    first = studio.client.get(f"/open/{code}", follow_redirects=False)
    assert (first.status_code, first.headers["location"]) == (303, f"/{studio.guard.token}/")
    assert studio.client.get(f"/open/{code}", follow_redirects=False).status_code == 403
    late = studio.guard.opening_code()
    monkeypatch.setattr("bas.web.studio.guard.time.monotonic", lambda: 1e12)
    assert studio.client.get(f"/open/{late}", follow_redirects=False).status_code == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ""]
)
def test_a_body_that_a_foreign_form_could_send_is_refused(studio, kind):
    before = files(studio)
    for method, path, _ in WRITES:
        assert studio.ask(method, path, content_type=kind).status_code == 415
    assert files(studio) == before


@pytest.mark.parametrize("kind", [JSON, BYTES])
def test_a_body_that_is_too_large_is_refused(studio, kind, monkeypatch):
    """By its stated length, and by what comes where none is stated."""
    before = files(studio)
    answer = studio.ask("POST", "api/scenes", content_type=kind, content_length=str(LIMITS[kind] + 1))
    assert answer.status_code == 413
    assert studio.ask("POST", "api/scenes", content_type=kind, content_length="9" * 40).status_code == 413
    monkeypatch.setitem(LIMITS, kind, 1000)
    headers = {"Origin": ORIGIN, "Content-Type": kind}
    parts = (b"x" * 300 for _ in range(5))
    answer = studio.client.post(f"/{studio.guard.token}/api/scenes", headers=headers, content=parts)
    assert answer.status_code == 413
    assert files(studio) == before


def test_a_body_that_comes_too_slowly_is_given_up(studio, monkeypatch):
    """Between two parts of a photograph nothing comes."""
    monkeypatch.setattr("bas.web.studio.guard.PATIENCE", 0.05)
    before, sent = files(studio), []
    headers = {"host": f"127.0.0.1:{PORT}", "origin": ORIGIN, "content-type": BYTES}
    parts = iter([{"type": "http.request", "body": b"\x89PNG", "more_body": True}])

    async def receive():
        part = next(parts, None)
        if part is None:
            await asyncio.sleep(30)
        return part

    async def send(message):
        sent.append(message)

    path = f"/{studio.guard.token}/api/scenes"
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "root_path": "",
        "http_version": "1.1",
    }
    scope["server"] = ("127.0.0.1", PORT)
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(studio.guard(scope, receive, send))
    assert [message.get("status") for message in sent] == [408, None]
    assert files(studio) == before


@pytest.mark.parametrize(
    "name",
    [
        "%2E%2E",
        "../home",
        "%2e%2e",
        "..%2fruns",
        "%2e%2e%2f%2e%2e%2fetc",
        ".token",
        "a%00b",
        "a%5cb",
        "a/../../b",
        "~",
        "-rf",
        "x" * 200,
        "%F0%9F%90%B0/..",
    ],
)
def test_no_name_leads_out_of_home(studio, name, tmp_path):
    """Names of scenes, runs and jobs, and files of a run, in every address that takes one."""
    secret = tmp_path / "home" / "runs" / "run"
    (secret / "pictures").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(b"secret")
    (secret / "pictures" / "link.png").symlink_to(tmp_path / "outside.png")
    before = files(studio)
    reads = (
        *(f"api/scenes/{name}", f"api/scenes/{name}/view", f"api/scenes/{name}/masks/0", f"api/runs/{name}"),
        *(f"api/runs/{name}/metrics", f"api/runs/{name}/file/pictures/x.png", f"api/runs/run/file/{name}"),
        *(f"api/runs/run/file/pictures/{name}", f"api/runs/run/thumb/{name}", f"api/jobs/{name}/log", f"a/{name}"),
        *("api/runs/run/file/pictures/link.png", "api/runs/run/file/settings.json", "api/runs/run/file/.bas.lock"),
    )
    for path in reads:
        answer = studio.ask("GET", path)
        assert answer.status_code in (403, 404), (path, answer.status_code)
        assert b"secret" not in answer.content
    for method, path in (
        ("DELETE", f"api/scenes/{name}"),
        ("DELETE", f"api/runs/{name}"),
        ("POST", f"api/jobs/{name}/stop"),
    ):
        assert studio.ask(method, path, {"how": "now"}).status_code in (403, 404)
    for body in ({"scene": name}, {"scene": "/etc"}, {"scene": None}):
        assert studio.ask("POST", "api/plan", body).status_code == 404
    assert files(studio) == before


def test_every_answer_carries_the_headers(studio):
    for path in ("", "a/app.js", "a/studio.css", "api/state", "api/none", "a/none"):
        headers = studio.ask("GET", path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
    assert studio.ask("GET", "a/app.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert "content-security-policy" in studio.client.get("/").headers  # a refusal, too


# --- Over the network ---------------------------------------------------------------------------------------------

ADDRESS, PASSWORD = "192.0.2.7", "open sesame"
OUTSIDE = f"http://{ADDRESS}:{PORT}"


@pytest.fixture
def network(studio, monkeypatch):
    """A browser on another machine, which reaches the studio at --listen. Nothing is waited for."""
    monkeypatch.setattr("bas.web.studio.login.resolve", lambda _address: ADDRESS)
    monkeypatch.setattr(hashlib, "scrypt", lambda password, salt, **_cost: hashlib.sha256(salt + password).digest())
    studio.guard = Guard(studio.guard.app, studio.guard.token, PORT, Door("Desk.local", PORT, PASSWORD))
    with TestClient(studio.guard, base_url=OUTSIDE, follow_redirects=False) as client:
        yield client


def give(client, password, **headers):
    """Log in as the page does."""
    return client.post("/login", json={"password": password}, headers={"Origin": OUTSIDE} | headers)


def test_over_the_network_the_password_comes_first(studio, network):
    """The token alone opens nothing, nor the cookie alone; the page before the login shows nothing of the studio."""
    token, before = studio.guard.token, files(studio)
    assert b'type="password"' in network.get("/").content
    assert network.get("/a/login.js").status_code == 200
    for path in (
        f"/{token}/api/state",
        f"/{token}/a/app.js",
        "/a/app.js",
        "/a/..%2flogin.html",
        f"/open/{token}",
        "/x",
    ):
        answer = network.get(path)
        assert answer.status_code in (403, 404), path
        assert token not in answer.text
    assert network.get(f"/{token}/").headers["location"] == "/"  # a bookmark
    assert network.get("/guess/").headers["location"] == "/"
    write = {"Origin": OUTSIDE, "Content-Type": JSON}
    assert network.post(f"/{token}/api/example", headers=write, content=b"{}").status_code == 403
    assert files(studio) == before

    entered = give(network, PASSWORD)
    assert entered.json() == {"to": f"/{token}/"}
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(entered.headers["set-cookie"].split("; "))
    assert network.get("/").headers["location"] == f"/{token}/"
    assert network.get(f"/{token}/api/state").status_code == 200
    assert network.get("/guess/api/state").status_code == 403
    network.cookies.clear()
    assert network.get(f"/{token}/api/state").status_code == 403


@pytest.mark.parametrize("cookie", ["", "x", "bas-studio-8765=", "bas-studio-8765=x", "bas-studio-8765=é", "=;=;"])
def test_a_cookie_of_nobody_opens_nothing(studio, network, cookie):
    give(network, PASSWORD)
    network.cookies.clear()
    answer = network.get(f"/{studio.guard.token}/api/state", headers={"Cookie": cookie.encode("latin-1")})
    assert answer.status_code == 403


@pytest.mark.parametrize(
    "host",
    [*FOREIGN_HOSTS, f"127.0.0.1:{PORT}", f"localhost:{PORT}", ADDRESS, f"{ADDRESS}:{PORT + 1}", f"desk:{PORT}"],
)
def test_over_the_network_only_its_own_names_are_answered(network, host):
    """One that says it came to loopback is no nearer for that."""
    assert network.get("/", headers={"Host": host}).status_code == 403
    assert give(network, PASSWORD, Host=host, Origin=f"http://{host}").status_code == 403
    assert network.get("/", headers={"Host": f"desk.local:{PORT}"}).status_code == 200


@pytest.mark.parametrize("origin", [*FOREIGN_ORIGINS, ORIGIN])
def test_another_page_cannot_log_in(network, origin):
    headers = {} if origin is None else {"Origin": origin}
    assert network.post("/login", json={"password": PASSWORD}, headers=headers).status_code == 403


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"password": "' + b"x" * 5000 + b'"}', JSON, 413),
        ((part for part in [b"x" * 3000] * 3), JSON, 413),
        (b'{"password": "open sesame"}', "text/plain", 415),
        (b'{"password": "open sesame"}', BYTES, 415),
        (b"password=open sesame", "application/x-www-form-urlencoded", 415),
        (b"[]", JSON, 403),
        (b'{"password": ["open sesame"]}', JSON, 403),
        (b'{"password": null}', JSON, 403),
        (b'{"password": "\\ud800"}', JSON, 403),  # half of a character, which UTF-8 does not have
        (b"{", JSON, 403),
        (b"[" * 4000, JSON, 403),
    ],
)
def test_a_login_that_is_none_is_refused(network, content, kind, status):
    answer = network.post("/login", content=content, headers={"Origin": OUTSIDE, "Content-Type": kind})
    assert answer.status_code == status
    assert "set-cookie" not in answer.headers


def test_passwords_are_not_tried_without_end(studio, network, monkeypatch):
    """After five wrong ones none is compared for a minute, the right one neither; who is in stays in."""
    entered = give(network, PASSWORD).headers["set-cookie"].partition(";")[0]
    network.cookies.clear()
    now = [1000.0]
    monkeypatch.setattr("bas.web.studio.login.time", SimpleNamespace(monotonic=lambda: now[0]))
    for password in ("", "open", "Open sesame", "open sesame ", "x" * 100):
        assert give(network, password).status_code == 403
    assert give(network, PASSWORD).status_code == 429
    assert network.get(f"/{studio.guard.token}/api/state", headers={"Cookie": entered}).status_code == 200
    now[0] += 61
    assert give(network, PASSWORD).status_code == 200


def test_loopback_asks_for_no_password_and_gives_no_way_in(studio, network):
    """Beside --listen the page of this machine stays as it is: its token, and no login."""
    with TestClient(studio.guard, base_url=ORIGIN) as here:
        assert here.get(f"/{studio.guard.token}/api/state").status_code == 200
        for path in ("/", "/login", "/a/login.js"):
            assert here.get(path).status_code == 403
        assert here.get("/", headers={"Host": f"{ADDRESS}:{PORT}"}).status_code == 403


@pytest.mark.parametrize(
    ("address", "password", "line"),
    [
        ("127.0.0.1", PASSWORD, "is this machine alone"),
        ("::1", PASSWORD, "is this machine alone"),
        ("0.0.0.0", PASSWORD, "is every network at once"),
        ("::", PASSWORD, "is every network at once"),
        ("192.0.2.7", "short", "fewer than 8 characters"),
        ("192.0.2.7", PASSWORD, "--listen 192.0.2.7 cannot be used: not mine"),
    ],
)
def test_listen_takes_one_address_of_this_machine(tmp_path, monkeypatch, capsys, address, password, line):
    def refused(*_args, **_options):
        raise OSError(99, "not mine")

    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *_args, **_options: [(0, 0, 0, "", (name, 0))])
    monkeypatch.setattr("bas.web.studio.serve.socket.create_server", refused)
    monkeypatch.setenv("BAS_STUDIO_PASSWORD", password)
    assert main(["studio", str(tmp_path / "home"), "--no_browser", "--port", "0", "--listen", address]) == 2
    assert line in capsys.readouterr().err
    assert "BAS_STUDIO_PASSWORD" not in os.environ  # the processes of jobs do not inherit it


def test_a_password_without_listen_is_told(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr("bas.web.studio.serve.run_until_interrupted", lambda home, port, browser, listen: print(listen))
    words = ["studio", str(tmp_path / "home"), "--no_browser"]
    monkeypatch.setenv("BAS_STUDIO_PASSWORD", PASSWORD)
    assert main(words) == 0
    assert capsys.readouterr().out == "None\n"
    assert caplog.messages == ["BAS_STUDIO_PASSWORD has no effect: only with --listen a password is asked for"]
    assert "BAS_STUDIO_PASSWORD" not in os.environ
    (tmp_path / "password.txt").write_text(PASSWORD)
    assert main([*words, "--password_file", str(tmp_path / "password.txt")]) == 2
    line = "bas: --password_file needs --listen ADDRESS: this machine alone is asked for no password\n"
    assert capsys.readouterr().err.endswith(line)


def test_the_password_comes_from_a_file_or_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "password.txt").write_text("from a file\nmore\n")
    assert read_password(str(tmp_path / "password.txt"), "set") == "from a file"
    assert read_password(None, "set") == "set"
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(InputError, match="name a --password_file, or set BAS_STUDIO_PASSWORD"):
        read_password(None, None)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda _text: "typed")
    assert read_password(None, None) == "typed"
