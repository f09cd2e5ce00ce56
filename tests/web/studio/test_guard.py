"""The guard of the studio: what it refuses, with which status, and that nothing is written then."""

import asyncio
import os
import stat

import pytest

from bas.io.files import cache_dir
from bas.web.studio.guard import LIMITS
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
