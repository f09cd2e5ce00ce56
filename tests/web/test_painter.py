"""The mask painter: its server without a network, and its page in a real browser."""

import base64
import io
import json
import re
import socket
import struct
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bas.cli.entry import main
from bas.config import TrainConfig
from bas.data.scene_folder import load_scene
from bas.data.scene_writer import open_draft, version
from bas.web.painter import MAX_BODY, Handler, Server, Session
from tests.helpers.browser import Browser
from tests.helpers.faults import full_disk
from tests.helpers.tiny import refused

W, H = 48, 32
PORT = 8123


@pytest.fixture
def photo(tmp_path):
    """An image of 48x32 pixels."""
    Image.new("RGB", (W, H), (90, 120, 60)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def session(photo):
    """What the server of `bas paint photo.png` holds."""
    return Session(open_draft(photo, None))


def talk(session, request):
    """Send these bytes and nothing more -> all that is answered."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(30)
        sender = threading.Thread(target=lambda: (ours.sendall(request), ours.shutdown(socket.SHUT_WR)))
        sender.start()
        Handler(theirs, ("127.0.0.1", 1), SimpleNamespace(session=session, server_address=("127.0.0.1", PORT)))
        theirs.shutdown(socket.SHUT_RDWR)
        answer = b"".join(iter(lambda: ours.recv(65536), b""))
        sender.join(timeout=30)
    return answer


def ask(session, method="GET", place="", host=f"127.0.0.1:{PORT}", path=None, body=b"", **headers):
    """One request over a pair of sockets -> status, headers and body of the answer."""
    ours, theirs = socket.socketpair()
    sent = {"Host": host, "Content-Length": str(len(body)), "Content-Type": "application/json"}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path or f'/{session.token}/{place}'} HTTP/1.0", *(f"{k}: {v}" for k, v in sent.items() if v)]
    with ours, theirs:
        ours.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        Handler(theirs, ("127.0.0.1", 1), SimpleNamespace(session=session, server_address=("127.0.0.1", PORT)))
        theirs.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: ours.recv(65536), b""))
    head, _, rest = answer.partition(b"\r\n\r\n")
    status, *fields = head.decode().split("\r\n")
    return int(status.split()[1]), dict(field.split(": ", 1) for field in fields), rest


def png(mask):
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def soft(shift=0):
    """A mask with every value from 0 to 255."""
    return np.roll(np.arange(W * H).reshape(H, W) % 256, shift, axis=1).astype(np.uint8)


def save(session, *concepts, seen=None, **headers):
    """As a page sends it that has just been loaded, or that has seen this version."""
    seen = version(session.draft.folder) if seen is None else seen
    body = json.dumps({"version": seen, "concepts": list(concepts)}).encode()
    status, _, answer = ask(session, "POST", "save", body=body, **headers)
    return status, json.loads(answer)["message"]


# --- The scene folder ---------------------------------------------------------------------------------------------


def test_what_is_saved_is_a_scene_to_train_on_and_is_loaded_again(session, photo):
    folder = photo.parent / "photo"
    first, second = {"handle": "<toy>", "word": "toy"}, {"handle": "<bowl>", "word": None}
    assert save(session, first | {"mask": png(soft())}, second | {"mask": png(soft(7))}) == (
        200,
        f"Saved 2 masks to {folder}. Next: `bas masks {folder}` checks them, `bas train {folder}` learns the concepts",
    )
    assert (folder / "img.png").read_bytes() == photo.read_bytes()
    assert np.array_equal(np.asarray(Image.open(folder / "mask1.png")), soft(7))
    assert json.loads((folder / "scene.json").read_text()) == {"concepts": [first, second]}
    scene = load_scene(TrainConfig(instance_data_dir=str(folder)))
    assert (scene.handles, scene.words) == (("<toy>", "<bowl>"), ("toy", None))
    assert np.array_equal(scene.masks[0], soft())

    for again in (session, Session(open_draft(photo, None)), Session(open_draft(folder, None))):
        content = json.loads(ask(again, place="scene")[2])
        assert (content["name"], content["width"], content["height"]) == (str(folder), W, H)
        assert [{k: row[k] for k in ("handle", "word")} for row in content["concepts"]] == [first, second]
        sent = content["concepts"][1]["mask"].removeprefix("data:image/png;base64,")
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(sent)))), soft(7))


def test_masks_of_removed_concepts_go_and_other_notes_stay(session, photo):
    folder = photo.parent / "photo"
    rows = [{"handle": f"<a{i}>", "word": " " * i, "mask": png(soft(i))} for i in range(3)]
    save(session, *rows)
    (folder / "scene.json").write_text(json.dumps({"title": "mine", "concepts": []}))
    assert save(session, rows[2])[1].startswith(f"Saved 1 mask to {folder}. Next: `bas masks ")
    assert sorted(path.name for path in folder.iterdir()) == ["img.png", "mask0.png", "scene.json"]
    assert np.array_equal(np.asarray(Image.open(folder / "mask0.png")), soft(2))
    notes = json.loads((folder / "scene.json").read_text())
    assert notes == {"title": "mine", "concepts": [{"handle": "<a2>", "word": None}]}


def test_what_was_changed_elsewhere_is_not_overwritten(session, photo):
    """A second page, and a second painter, that have not seen a save are refused, and the masks stay; once loaded
    again they save. A page that saves twice goes on with the version of its first save."""
    folder, painter = photo.parent / "photo", Session(open_draft(photo, None))
    pages = [json.loads(ask(each, place="scene")[2])["version"] for each in (session, session, painter)]
    rows = [{"from": i, "handle": f"<a{i}>", "mask": png(soft(i))} for i in range(2)]
    body = json.dumps({"version": pages[0], "concepts": rows}).encode()
    status, _, answer = ask(session, "POST", "save", body=body)
    assert status == 200
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    late = {"from": None, "handle": "<b>", "mask": png(soft(9))}
    for each, seen in ((session, pages[1]), (painter, pages[2]), (session, ""), (session, 3)):
        assert save(each, late, seen=seen) == (400, "the scene was changed elsewhere: load the page again")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert save(session, *rows[::-1], seen=json.loads(answer)["version"])[0] == 200
    assert save(painter, late, seen=json.loads(ask(painter, place="scene")[2])["version"])[0] == 200
    assert np.array_equal(np.asarray(Image.open(folder / "mask0.png")), soft(9))


@pytest.fixture
def with_extra(session, photo):
    """A saved scene of three concepts, with an extra image of concepts 1 and 2: its folder and the rows of the page."""
    rows = [{"from": i, "handle": f"<a{i}>", "word": None, "mask": png(soft(i))} for i in range(3)]
    save(session, *rows)
    extra = photo.parent / "photo" / "1"
    extra.mkdir()
    Image.new("RGB", (W, H), (9, 9, 9)).save(extra / "img.png")
    for i in (1, 2):
        Image.fromarray(soft(10 + i)).save(extra / f"mask{i}.png")
    return extra, rows


@pytest.mark.parametrize("order", [(1, 2), (2, 1, 0), (0, None, 1, 2), (2,), (0, 1, 2)])
def test_masks_of_extra_images_follow_their_concepts(session, with_extra, order):
    """Concepts that were removed, moved or added: each mask of the extra image still shows the concept of its name."""
    extra, rows = with_extra
    new = {"from": None, "handle": "<new>", "word": None, "mask": png(soft(5))}
    assert save(session, *(new if i is None else rows[i] for i in order))[0] == 200
    scene = load_scene(TrainConfig(instance_data_dir=str(extra.parent)))
    shown = {scene.handles[i]: mask for i, mask in scene.extra_images[0].masks.items()}
    assert shown.keys() == {f"<a{i}>" for i in (1, 2) if i in order}
    assert all(np.array_equal(mask, soft(10 + int(handle[2]))) for handle, mask in shown.items())
    assert not list(extra.glob(".*"))


def test_what_would_lose_masks_of_extra_images_is_refused(session, with_extra):
    extra, rows = with_extra
    before = {path: path.read_bytes() for path in extra.parent.rglob("*.*")}
    alone = f"{extra} shows removed concepts alone: move this folder away, or keep one of them"
    assert save(session, rows[0]) == (400, alone)
    unknown = f"{extra} has masks of these concepts, and their numbers are unknown: load the page again"
    for wrong in ({"from": 1}, {"from": True}, {"from": -1}, {"from": "2"}, {"from": [2]}):
        assert save(session, rows[1], rows[2] | wrong) == (400, unknown)
    assert save(session, {key: rows[1][key] for key in ("handle", "word", "mask")}) == (400, unknown)
    assert {path: path.read_bytes() for path in extra.parent.rglob("*.*")} == before
    Image.fromarray(soft()).save(extra / "mask3.png")  # of no concept, where <a2> would go
    new = {"from": None, "handle": "<new>", "word": None, "mask": png(soft(5))}
    message = f"{extra / 'mask3.png'} shows none of the 3 concepts: move it away, or give it their number"
    assert save(session, new, *rows) == (400, message)


def test_a_full_disk_leaves_the_masks_of_extra_images(session, with_extra):
    extra, rows = with_extra
    noise = np.random.default_rng(0).integers(0, 256, (H, W), np.uint8)
    Image.fromarray(noise).save(extra / "mask2.png")
    before = {path: path.read_bytes() for path in extra.parent.rglob("*.*")}
    with full_disk(room=H * W // 2):
        status, message = save(session, *(row | {"mask": png(np.eye(H, W, dtype=np.uint8))} for row in rows[1:]))
    assert (status, message) == (500, f"could not write: [Errno 27] File too large: '{extra / 'mask1.png'}'")
    assert {path: path.read_bytes() for path in extra.parent.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"handle": "a toy"}, "handle '<a toy>': expected <name> with 1 to 32 letters a-z or A-Z, digits, _ or -"),
        ({"handle": "<../../x>"}, "handle '<../../x>': expected <name>"),
        ({"handle": None}, "handle None: expected <name>"),
        ({"word": 3}, "the initial word of <a> is not a text of 100 characters or fewer"),
        ({"word": "x" * 101}, "the initial word of <a> is not a text of 100 characters or fewer"),
        ({"word": "\ud800"}, "the initial word of <a>, '\\ud800', holds control characters: write it again"),
        ({"word": "a\udfffb"}, "the initial word of <a>, 'a\\udfffb', holds control characters: write it again"),
        ({"word": "a\x1b[2J"}, "the initial word of <a>, 'a\\x1b[2J', holds control characters: write it again"),
        ({"word": "a\u202eb"}, "the initial word of <a>, 'a\\u202eb', holds control characters: write it again"),
        ({"mask": "?"}, "the mask of <a> is not a PNG"),
        ({"mask": None}, "the mask of <a> is not a PNG"),
        ({"mask": png(soft()[:-1])}, "the mask of <a> does not have the size of the image"),
        ({"mask": png(soft() * 0)}, "nothing is painted for <a>: paint it, or remove it"),
        ({"mask": png(soft() * 0 + 255)}, "everything is painted for <a>: leave out what is not the concept"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(session, photo, changes, message):
    good = {"handle": "<b>", "word": None, "mask": png(soft())}
    status, said = save(session, good, {"handle": "<a>", "word": None, "mask": png(soft(1))} | changes)
    assert status == 400
    assert said.startswith(message)
    assert not (photo.parent / "photo").exists()


def test_a_full_disk_leaves_the_scene_as_it_was(session, photo):
    """The second mask finds no room: the first one does not take the place of the old one."""
    folder = photo.parent / "photo"
    save(session, {"handle": "<a>", "mask": png(soft())}, {"handle": "<b>", "mask": png(soft(7))})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    noise = np.random.default_rng(0).integers(0, 256, (H, W), np.uint8)
    rows = [{"handle": "<c>", "mask": png(np.eye(H, W, dtype=np.uint8))}, {"handle": "<d>", "mask": png(noise)}]
    with full_disk(room=H * W // 2):
        status, message = save(session, *rows)
    assert (status, message) == (500, f"could not write: [Errno 27] File too large: '{folder / 'mask1.png'}'")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_scenes_that_are_none(session):
    row = {"handle": "<a>", "word": None, "mask": png(soft())}
    assert save(session, row, row) == (400, "two concepts have the same handle")
    assert save(session) == (400, "a scene has 1 to 64 concepts")
    assert save(session, 3) == (400, "handle None: expected <name> with 1 to 32 letters a-z or A-Z, digits, _ or -")
    for body in (b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000):
        status, _, answer = ask(session, "POST", "save", body=body)
        assert (status, json.loads(answer)) == (400, {"message": "expected a scene as JSON"})


def test_a_mistake_of_bas_is_no_bad_scene(session, monkeypatch):
    """It is not answered as one, and reaches the server, which logs it."""

    def mistaken(*args):
        raise TypeError("a mistake")

    monkeypatch.setattr("bas.web.painter.write_draft", mistaken)
    with pytest.raises(TypeError, match="a mistake"):
        save(session, {"handle": "<a>", "word": None, "mask": png(soft())})


def test_a_folder_that_is_spoilt_meanwhile_is_told(session, photo):
    save(session, {"handle": "<a>", "word": None, "mask": png(soft())})
    (photo.parent / "photo" / "mask0.png").write_text("no image")
    status, _, answer = ask(session, place="scene")
    assert status == 400
    assert "mask0.png is not a readable" in json.loads(answer)["message"]


def test_other_images_and_other_kinds_of_masks_are_not_overwritten(photo, tmp_path):
    other = tmp_path / "scene"
    other.mkdir()
    Image.new("RGB", (W, H)).save(other / "img.png")
    with refused(f"{other} holds another image, img.png: name another --output_dir"):
        open_draft(photo, other)
    np.save(other / "masks.npy", (soft() > 9)[None])
    with refused(f"{other} has its masks in masks.npy, not in mask0.png: name another --output_dir"):
        open_draft(other, None)
    with refused(f"{photo} is a file: name another --output_dir"):
        open_draft(other, photo)
    with refused(f"{tmp_path} needs exactly one image named img.jpg"):
        open_draft(tmp_path, None)
    with refused("missing.png does not exist"):
        open_draft(tmp_path / "missing.png", None)
    session = Session(open_draft(other / "img.png", tmp_path / "new"))  # but they can be the start of a new scene
    (row,) = json.loads(ask(session, place="scene")[2])["concepts"]
    assert save(session, row | {"mask": row["mask"].partition(",")[2]})[0] == 200
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "mask0.png")) > 0, soft() > 9)


# --- The server ---------------------------------------------------------------------------------------------------


def test_the_page_asks_nobody_else(session):
    status, headers, page = ask(session)
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert b"{nonce}" not in page
    assert b"http" not in page
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; img-src 'self' data:; connect-src 'self'")
    assert headers["Content-Security-Policy"] != ask(session)[1]["Content-Security-Policy"]
    assert (headers["Cache-Control"], headers["Referrer-Policy"]) == ("no-store", "no-referrer")


def test_the_image_is_sent_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (W, H)).save(tmp_path / "turned.jpg", exif=exif)
    session = Session(open_draft(tmp_path / "turned.jpg", None))
    status, headers, image = ask(session, place="image")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert Image.open(io.BytesIO(image)).size == (H, W)


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/", "/wrong/", "/wrong/save", "*", "//", "http://evil/", "/é/"])
def test_without_the_token_nothing_is_answered(session, method, path):
    status, _, answer = ask(session, method, path=path)
    assert status == 403
    assert json.loads(answer) == {"message": "open the address that bas paint printed, token included"}


@pytest.mark.parametrize("host", [None, "evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1", "0.0.0.0"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_other_hosts_are_refused(session, method, host):
    status, _, answer = ask(session, method, "save" if method == "POST" else "", host=host)
    assert status == 403
    assert json.loads(answer) == {"message": "this server answers at 127.0.0.1 alone"}


def test_localhost_is_this_machine(session):
    assert ask(session, host=f"localhost:{PORT}")[0] == 200


@pytest.mark.parametrize("place", ["../../etc/passwd", "%2e%2e/x", "paint.html", "image/", "save", "scene?x"])
def test_no_path_leads_anywhere_else(session, place):
    assert ask(session, place=place)[0] == 404
    assert ask(session, "POST", "image")[0] == 404


def test_other_pages_cannot_save(session):
    row = {"handle": "<a>", "word": None, "mask": png(soft())}
    assert save(session, row, Origin="http://evil.example")[0] == 403
    assert save(session, row, Origin="null")[0] == 403
    assert save(session, row, Content_Type="text/plain")[0] == 415
    assert save(session, row, Content_Type="application/x-www-form-urlencoded")[0] == 415
    assert save(session, row, Origin=f"http://127.0.0.1:{PORT}")[0] == 200


@pytest.mark.parametrize(
    ("length", "status"),
    [(str(MAX_BODY + 1), 413), ("9" * 5000, 413), ("0" * 60000, 413), ("-1", 411), ("a", 411), ("²", 411), (None, 411)],
)
def test_too_large_or_unmeasured_bodies_stay_unread(session, length, status):
    assert ask(session, "POST", "save", Content_Length=length)[0] == status


def test_handles_may_be_given_without_brackets(session, photo):
    rows = [{"handle": name, "word": None, "mask": png(soft(i))} for i, name in enumerate(("dog", "<cat>", "<cow"))]
    assert save(session, *rows)[0] == 200
    concepts = json.loads((photo.parent / "photo" / "scene.json").read_text())["concepts"]
    assert [concept["handle"] for concept in concepts] == ["<dog>", "<cat>", "<cow>"]
    assert save(session, rows[0], rows[1] | {"handle": "<dog>"}) == (400, "two concepts have the same handle")


def bomb(width, height):
    """A PNG header of any size, and next to nothing behind it, in base64."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return base64.b64encode(head + b"\0\0\1\0IDAT").decode()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (bomb(12_000, 12_000), "the mask of <a> does not have the size of the image"),
        (bomb(60_000, 60_000), "the mask of <a> is not a PNG"),
        (bomb(W, H), "the mask of <a> is not a PNG"),
    ],
)
def test_masks_that_are_header_bombs_are_refused(session, mask, message):
    assert save(session, {"handle": "<a>", "word": None, "mask": mask}) == (400, message)


@pytest.mark.parametrize(
    "request_head",
    [
        "GET /{token}/ HTTP/1.1\r\n" + "".join(f"X-{i}: 1\r\n" for i in range(200)) + "\r\n",
        "GET /{token}/ HTTP/1.1\r\nX: " + "x" * 70_000 + "\r\n\r\n",
        "GET /{token}/" + "x" * 70_000 + " HTTP/1.1\r\n\r\n",
        "GET /{token}/ HTTP/9.9\r\n\r\n",
        "\x00\x01\x02\r\n\r\n",
    ],
    ids=["200 headers", "a long header", "a long address", "another version", "no request"],
)
def test_requests_that_are_none_are_answered_without_a_trace(session, request_head, capsys):
    answer = talk(session, request_head.replace("{token}", session.token).encode())
    assert re.match(rb"HTTP/1.\d (400|414|431|505) ", answer) or answer.startswith(b"<!DOCTYPE")
    assert capsys.readouterr() == ("", "")


def test_an_incomplete_body_is_not_saved(session, photo):
    body = json.dumps({"concepts": [{"handle": "<a>", "word": None, "mask": png(soft())}]}).encode()
    head = f"POST /{session.token}/save HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\nContent-Type: application/json\r\n"
    answer = talk(session, f"{head}Content-Length: {len(body) + 1}\r\n\r\n".encode() + body)
    assert b"the request is incomplete" in answer
    assert not (photo.parent / "photo").exists()


@pytest.mark.parametrize("sent", [b"", b"GET /", b"GET /{token}/image HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n"])
def test_clients_that_hang_up_leave_no_trace(session, capfd, caplog, sent):
    with Server(session.draft, 0) as server:
        token, port = server.session.token.encode(), str(server.server_address[1]).encode()
        ours, theirs = socket.socketpair()
        ours.sendall(sent.replace(b"{token}", token).replace(b"{port}", port))
        ours.close()
        server.process_request_thread(theirs, ("127.0.0.1", 1))
    assert capfd.readouterr() == ("", "")
    assert not caplog.messages


def test_a_fault_of_the_server_is_one_line(session, caplog, capfd, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: 1 / 0)
    with Server(session.draft, 0) as server:
        ours, theirs = socket.socketpair()
        with ours:
            ours.sendall(b"GET / HTTP/1.1\r\n\r\n")
            server.process_request_thread(theirs, ("127.0.0.1", 1))
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == ["a request failed: ZeroDivisionError: division by zero"]


def test_other_methods_are_unknown(session):
    assert ask(session, "PUT", "save")[0] == 501
    assert ask(session, "DELETE", "save")[0] == 501


def test_the_server_is_bound_to_loopback_and_a_taken_port_is_one_line(photo):
    draft = open_draft(photo, None)
    with Server(draft, 0) as server:
        host, port = server.server_address
        assert host == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{port}/{server.session.token}/"
        assert len(server.session.token) >= 20
        with refused(f"--port {port} cannot be used"):
            Server(draft, port)
    with refused("--port 99999 cannot be used"):
        Server(draft, 99999)


def test_the_command_prints_the_address_and_ends_with_ctrl_c(photo, monkeypatch, capsys):
    def interrupted(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert main(["paint", str(photo), "--output_dir", str(photo.parent / "new")]) == 0
    printed = capsys.readouterr().out
    assert "Next:" not in printed  # nothing was saved
    assert printed.startswith("Open http://127.0.0.1:")
    assert f"saving writes {photo.parent / 'new'}. Ctrl+C ends." in printed
    assert main(["paint", str(photo.parent / "none.png")]) == 2
    assert capsys.readouterr().err == f"bas: {photo.parent / 'none.png'} does not exist\n"


# --- The page in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One headless Chromium for all tests of this file."""
    chromium = Browser(tmp_path_factory.mktemp("browser"))
    yield chromium
    chromium.close()


@pytest.fixture
def page(photo, browser):
    """The page of `bas paint photo.png` in a browser window, and the server behind it."""
    with Server(open_draft(photo, None), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        browser.problems.clear()
        browser.show(900, 600)
        open_page(browser, server.url)
        yield browser, server
        server.shutdown()
        thread.join()
    assert browser.problems == []


def open_page(browser, url):
    browser.send("Page.navigate", url=url)
    browser.wait("document.querySelector('#status')?.textContent.startsWith('Paint')")


def on_screen(browser, *points):
    """Where pixels of the image are in the window."""
    left, top, scale = browser.run("(({left, top, width: w}) => [left, top, w / width])(sheet.getBoundingClientRect())")
    return [(left + x * scale, top + y * scale) for x, y in points]


def saved(browser, folder):
    """Press s, wait, and read the masks from disk."""
    browser.run("say('')")
    browser.press("s")
    browser.wait("!['', 'Saving …'].includes(document.querySelector('#status').textContent)")
    assert browser.run("document.querySelector('#status').textContent").startswith("Saved ")
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("mask*.png"))]


def distance(start, end):
    """Each pixel centre's distance from a line, (H, W)."""
    centres = np.stack(np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5), axis=-1)
    along = np.subtract(end, start)
    share = ((centres - start) @ along / max(along @ along, 1e-9)).clip(0, 1)
    return np.linalg.norm(centres - (np.array(start) + share[..., None] * along), axis=-1)


def assert_painted(mask, start, end, size):
    """White where a round brush went, black elsewhere, with a soft edge of a pixel between."""
    away = distance(start, end)
    assert (mask[away <= size / 2 - 0.8] == 255).all()
    assert (mask[away >= size / 2 + 0.8] == 0).all()
    assert 0 < ((mask > 0) & (mask < 255)).sum() < 120


@pytest.mark.browser
def test_painting_erasing_undoing_and_saving(page, photo):
    browser, server = page
    folder = server.session.draft.folder
    size = browser.run("brushSize()")
    assert size == 4
    start, end = (10, 8), (38, 22)
    browser.drag(*on_screen(browser, start, (24, 15), end))
    (mask,) = saved(browser, folder)
    assert mask.shape == (H, W)
    assert_painted(mask, start, end, size)

    browser.press("e")
    browser.press("]")
    wider = browser.run("brushSize()")
    assert wider > size
    browser.drag(*on_screen(browser, (24, 0), (24, 31)))
    (erased,) = saved(browser, folder)
    gone = distance((24, 0), (24, 31))
    assert (erased[gone <= wider / 2 - 0.8] == 0).all()
    assert np.array_equal(erased[gone >= wider / 2 + 0.8], mask[gone >= wider / 2 + 0.8])

    browser.press("z", control=True)
    assert np.array_equal(saved(browser, folder)[0], mask)
    browser.press("y", control=True)
    assert np.array_equal(saved(browser, folder)[0], erased)

    browser.run("document.querySelector('#add').click()")
    browser.press("b")
    browser.press("[")
    browser.drag(*on_screen(browser, (6, 26), (20, 26)))
    browser.run("const put = (i, v) => { const f = document.querySelectorAll('li input')[i]; f.value = v;"
                "f.dispatchEvent(new Event('input')); }; put(2, '<bowl>'); put(3, 'bowl')")  # fmt: skip
    first, second = saved(browser, folder)
    assert np.array_equal(first, erased)
    assert_painted(second, (6, 26), (20, 26), size)
    notes = json.loads((folder / "scene.json").read_text())["concepts"]
    assert notes == [{"handle": "<asset0>", "word": None}, {"handle": "<bowl>", "word": "bowl"}]

    open_page(browser, server.url)  # as loaded, every soft edge is saved again as it was
    again = saved(browser, folder)
    assert np.array_equal(again[0], first)
    assert np.array_equal(again[1], second)

    browser.press("1")
    browser.drag(*on_screen(browser, (4, 4)))
    assert browser.run("concepts.indexOf(active)") == 0
    (folder / "1").mkdir()  # an extra image that shows the second concept
    Image.fromarray(soft()).save(folder / "1" / "mask1.png")
    browser.run("document.querySelectorAll('.remove')[0].click()")
    (only,) = saved(browser, folder)
    assert np.array_equal(only, second)
    assert [path.name for path in (folder / "1").iterdir()] == ["mask0.png"]
    browser.press("z", control=True)
    back, _ = saved(browser, folder)
    assert [path.name for path in (folder / "1").iterdir()] == ["mask1.png"]
    assert_painted(np.where(distance((4, 4), (4, 4)) < 4, back, 0), (4, 4), (4, 4), size)


@pytest.mark.browser
def test_fingers_paint_and_two_of_them_only_zoom(page):
    browser, server = page
    browser.show(390, 844, phone=True)
    open_page(browser, server.url)
    assert browser.run("document.documentElement.scrollWidth") == 390
    start, end = (12, 10), (36, 10)
    browser.touch(*on_screen(browser, start, end))
    (a, b), (c, d) = on_screen(browser, (10, 24), (20, 24))
    for fingers in ([(a, b)], [(a, b), (c, d)], [(a - 40, b), (c + 40, d)], []):
        kind = "touchEnd" if not fingers else "touchMove" if fingers[0][0] != a else "touchStart"
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(fingers)]
        browser.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    assert browser.run("zoom") > 1.5
    (mask,) = saved(browser, server.session.draft.folder)
    assert_painted(mask, start, end, browser.run("brushSize()"))


@pytest.mark.browser
def test_what_the_server_refuses_is_said_on_the_page(page):
    browser, server = page
    browser.press("s")
    browser.wait("document.querySelector('#status').className === 'bad'")
    said = browser.run("document.querySelector('#status').textContent")
    assert said == "nothing is painted for <asset0>: paint it, or remove it"
    assert browser.problems.pop().endswith("400 (Bad Request)")
    assert not server.session.draft.folder.exists()
