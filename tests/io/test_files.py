"""Files as people and machines leave them: other encodings, damage, full disks, killed processes, long names."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bas.cli.entry import main
from bas.errors import InputError
from bas.io import files
from bas.io.files import (
    check_length,
    clear_leftovers,
    filling,
    is_running,
    naming,
    new_folder,
    replacing,
    write_text,
)
from bas.io.images import image_path
from bas.io.json_files import check_shape, read_cache, read_json, read_record, read_records
from bas.io.settings_file import read_toml
from bas.io.tensors import write_array
from tests.helpers.faults import full_disk
from tests.helpers.tiny import refused

# --- Errors -----------------------------------------------------------------------------------------------------------


def test_an_error_names_the_file_that_was_to_be_written(tmp_path):
    """Not the temporary one beside it, which pathlib names by a path and not by a text."""
    path = tmp_path / "none" / "out.png"
    with pytest.raises(FileNotFoundError) as failed, replacing(path):
        pass
    assert failed.value.filename == str(path)


# --- Encodings --------------------------------------------------------------------------------------------------------

TEXTS = {"json": '{"handle": "<Käthe>"}', "toml": 'handle = "<Käthe>"'}
READERS = {"json": read_json, "toml": read_toml}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_byte_order_mark_is_no_part_of_the_text(kind, tmp_path):
    """As Windows' editors write it."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(TEXTS[kind].encode("utf-8-sig"))
    assert READERS[kind](path) == {"handle": "<Käthe>"}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(
    ("encoding", "name"),
    [("utf-16", "UTF-16"), ("utf-32", "UTF-32"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16")],
)
def test_another_encoding_is_named(kind, encoding, name, tmp_path):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(TEXTS[kind].encode(encoding))
    with refused(f"{path} is not valid {kind.upper()}", f"it is {name}", "save it as UTF-8"):
        READERS[kind](path)


def test_settings_with_a_byte_order_mark_reach_the_command(bench, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_bytes("log_steps = 0".encode("utf-8-sig"))
    assert main(["train", str(bench.scene), "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"bas: {path}: log_steps is 0: expected a whole number from 1 to 1000000\n"


# --- Records ----------------------------------------------------------------------------------------------------------

SHAPE = {"step": int, "rows": [{"loss": (int, float)}], "seconds": {...: (int, float)}}


def test_a_shape_takes_what_it_describes_and_other_entries():
    check_shape({"step": 3, "rows": [{"loss": 1}, {"loss": 0.5, "more": None}], "seconds": {}, "more": 1}, SHAPE)
    check_shape({"step": 3, "rows": [], "seconds": {"a": 1, "b": 2.5}}, SHAPE)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[]", r"it is \[\]"),
        ("null", "it is None"),
        ("{}", "it has no step"),
        ('{"step": true}', "step is True"),
        ('{"step": 1.0}', "step is 1.0"),
        ('{"step": 1}', "it has no rows"),
        ('{"step": 1, "rows": {}}', "rows is {}"),
        ('{"step": 1, "rows": [1]}', "an entry of rows is 1"),
        ('{"step": 1, "rows": [{}]}', "an entry of rows has no loss"),
        ('{"step": 1, "rows": [{"loss": "x"}]}', "loss is 'x'"),
        ('{"step": 1, "rows": [], "seconds": {"a": null}}', "a is None"),
    ],
)
def test_a_record_of_another_shape_is_named_with_what_to_do(content, reason, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    with refused(f"{path} is not as bas wrote it ({reason.replace(chr(92), '')}): start again"):
        read_record(path, SHAPE, "start again")
    path.write_text(f"{content}\n{content}\n")
    with refused(f"{path} line 1 is not as bas wrote it"):
        read_records(path, SHAPE, "start again")


DAMAGE = (b"", b"{", b"\xff", b'{"a": 1}}', b'{"a": 1, "a": 2}', b"[" * 100_000, b'{"a": "\\ud800"}', b"9" * 5000)


@pytest.mark.parametrize("data", DAMAGE, ids=range(len(DAMAGE)))
def test_damage_is_one_line_with_what_to_do(data, tmp_path, caplog):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with refused(f"{path} is not valid JSON", ": start again"):
        read_record(path, {}, "start again")
    path.write_bytes(b"{}\n" + data + b"\n{}\n")
    with refused(f"{path} line 2 is not valid JSON", ": start again"):
        read_records(path, {}, "start again")
    assert read_cache(path) == {}
    assert caplog.text.count("it is made again") == 1


def test_a_line_that_is_still_written_is_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_records(path, {"a": int}, "") == [{"a": 1}, {"a": 2}]


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_with_its_file(tmp_path):
    """Whatever is written: the system's error names no file."""
    path = tmp_path / "a.txt"
    with full_disk(1000), pytest.raises(OSError, match="File too large") as caught:
        write_text(path, "a" * 100_000)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No space left") as caught, replacing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value) == f"[Errno 28] No space left on device: '{path}'"


def test_the_command_names_the_file(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = tmp_path / "a.png"
    monkeypatch.setattr(files, "sync", full)
    assert main(["sample", "--prompt", "a", "--num_inference_steps", "1", "--output_path", str(target)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"bas: {target}: No space left on device: make room"


def test_another_files_error_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, replacing(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert caught.value.filename == str(tmp_path / "b")


# --- What killed processes leave --------------------------------------------------------------------------------------


def killed_in_a_write(path) -> int:
    """Kill a process while it writes a file, and return its number."""
    code = (
        "import os, signal, sys; from pathlib import Path; from bas.io.files import replacing\n"
        "with replacing(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as process:
        assert process.wait() == -signal.SIGKILL
    return process.pid


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path):
    dead = killed_in_a_write(tmp_path / "a.json")
    leftover, own, old = (tmp_path / f".{name}.tmp" for name in (f"a.json.{dead}", f"a.json.{os.getpid()}", "a.json.1"))
    foreign = [
        tmp_path / name for name in (f"a.json.{dead}.tmp", ".a.tmp", ".a.json", f".a.{dead}.tmp.png", f".b.{dead}.tmp")
    ]
    for path in (own, old, *foreign):
        path.touch()
    os.utime(old, (time.time() - 100_000,) * 2)
    (tmp_path / "inside").mkdir()
    inside = tmp_path / "inside" / leftover.name
    inside.touch()
    assert leftover.exists()
    clear_leftovers(tmp_path, re.compile(r"a\.json"))
    assert {*tmp_path.iterdir()} == {own, *foreign, inside.parent}  # process 1 lives, but wrote nothing for a day
    assert inside.exists()


def test_threads_that_write_one_file_do_not_share_its_temporary(tmp_path):
    """Each writes it whole, none fails. What a killed thread left is cleared as what a process left."""
    path, together = tmp_path / "a.json", threading.Barrier(4)
    texts = [str(i) * 100_000 for i in range(4)]

    def write(text):
        together.wait(10)
        for _ in range(20):
            write_text(path, text)
        return files.temporary_path(path)

    with ThreadPoolExecutor(4) as pool:
        temporaries = [*pool.map(write, texts)]
        assert len({*temporaries, files.temporary_path(path)}) == 5
        temporaries[0].touch()
        clear_leftovers(tmp_path, re.compile(r"a\.json"))
        assert temporaries[0].exists()  # its thread lives
    assert path.read_text() in texts
    end = time.monotonic() + 30
    while is_running(int(temporaries[0].name.split(".")[-2])):  # a little longer than Python counts it
        assert time.monotonic() < end
        time.sleep(0.01)
    clear_leftovers(tmp_path, re.compile(r"a\.json"))
    assert [*tmp_path.iterdir()] == [path]


def test_which_processes_run():
    assert is_running(os.getpid())
    assert is_running(1)
    assert not is_running(2**22 + 1)  # beyond Linux's numbers
    assert not is_running(10**30)


def test_the_cache_is_cleared_where_it_is_written(tmp_path, monkeypatch):
    from bas.pretrained import hashes

    monkeypatch.setenv("BAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED", 0)
    (tmp_path / "cache").mkdir()
    killed_in_a_write(tmp_path / "cache" / "hashes.json")
    (tmp_path / "abc").write_bytes(b"abc")
    hashes.weights_hash(tmp_path / "abc")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["hashes.json"]
    assert len(json.loads((tmp_path / "cache" / "hashes.json").read_text())) == 1


# --- Whole folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "an empty folder"])
def test_a_folder_is_filled_as_a_whole_or_stays_as_it_was(there, tmp_path):
    folder = tmp_path / "a" / "b"
    if there:
        folder.mkdir(parents=True)

    def fill(folder):
        with filling(folder) as place:
            (place / "sub").mkdir()
            write_text(place / "sub" / "one.txt", "1")
            with naming(place / "sub" / "two.txt"):
                raise OSError(errno.ENOSPC, "No space")

    with pytest.raises(OSError, match="No space") as caught:
        fill(folder)
    assert caught.value.filename == str(folder / "sub" / "two.txt")
    assert list(tmp_path.rglob("*")) == ([folder.parent, folder] if there else [])
    with filling(folder) as place:
        write_text(place / "one.txt", "1")
    assert [path.name for path in folder.iterdir()] == ["one.txt"]


def test_what_others_put_into_a_folder_that_is_filled_stays(tmp_path):
    def fill(folder):
        with filling(folder) as place:
            write_text(place / "one.txt", "1")
            write_text(folder / "theirs.txt", "2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "theirs.txt"]


# --- Long names -------------------------------------------------------------------------------------------------------


def deep(length: int) -> str:
    """A relative path of so many characters."""
    return ("a" * 99 + "/") * (length // 100) + "a" * (length % 100)


@pytest.mark.parametrize("name", ["n" * 300, deep(4050), deep(5000)], ids=["name", "room for the folder", "path"])
def test_a_path_that_is_too_long_is_refused_before_the_work(name, bench, tmp_path, monkeypatch, capsys):
    """Also where the folder itself could be made, but not the files in it."""
    monkeypatch.chdir(tmp_path)
    message = "would be too long for this system: name a shorter path"
    with refused("--output_dir: ", message):
        new_folder(name)
    with refused("--output_path: ", message):
        image_path(f"{name}/{'a' * 30}.png")
    assert main(bench.command(name)) == 2
    error = capsys.readouterr().err
    assert error.startswith("bas: --output_dir: ")
    assert error.endswith(f"{message}\n")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_too_long_with_what_a_write_adds(tmp_path):
    """255 bytes are the most; `replacing` adds a dot, the process's number and .tmp."""
    check_length(tmp_path / ("a" * 200), "--output_path")
    with refused("--output_path: "):
        check_length(tmp_path / ("a" * 250), "--output_path")
    with refused("--output_path: "):
        image_path(str(tmp_path / f"{'ä' * 120}.png"))


def test_an_array_is_written_as_a_whole_or_not_at_all(tmp_path):
    path, values = tmp_path / "map0.npy", np.linspace(0, 1, 20_000, dtype=np.float32).reshape(100, 200)
    with full_disk(1000), pytest.raises(OSError, match="File too large") as caught:
        write_array(path, values)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == []
    write_array(path, values)
    assert np.array_equal(np.load(path), values)


@pytest.mark.parametrize(
    "words",
    [
        ["train", "{scene}", "--weights", "{model}", "--output_dir", "{link}"],
        ["paint", "{scene}", "--output_dir", "{link}"],
        ["sample", "{model}", "--prompt", "x", "--num_inference_steps", "1", "--output_path", "{link}/a.png"],
    ],
)
def test_a_link_that_leads_nowhere_is_told(bench, tmp_path, capsys, words):
    """Of such a folder the system says only that it exists."""
    link, target = tmp_path / "link", tmp_path / "unplugged" / "runs"
    link.symlink_to(target)
    place = {"scene": bench.scene, "model": bench.model, "link": link}
    assert main([word.format(**place) for word in words]) in (1, 2)
    said = capsys.readouterr().err
    assert f"the link {link} leads to {target}, which is not there: make that folder, or remove the link" in said


def test_a_path_with_the_null_character_is_refused():
    with pytest.raises(InputError, match="holds a character that no path can have: rename it"):
        check_length(Path("a\0b.png"), "--output_path")


@pytest.mark.parametrize("name", [".DS_Store", "._x", ".nfs0001"])
def test_hidden_files_of_the_system_do_not_make_a_folder_used(tmp_path, name):
    (tmp_path / name).touch()
    assert new_folder(str(tmp_path)) == tmp_path
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["a.png", ".123.tmp"])
def test_a_folder_that_holds_something_is_no_new_one(tmp_path, name):
    """What a killed command left half-written there counts."""
    (tmp_path / name).mkdir()
    with refused(f"--output_dir {tmp_path} is not empty: name a new folder"):
        new_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["~", "~/runs/a"])
def test_a_home_folder_that_no_shell_has_put_in_is_refused(tmp_path, monkeypatch, name):
    """A folder that is called so may be meant."""
    monkeypatch.chdir(tmp_path)
    with refused(f"--output_dir: in {name}/", "no shell has put your home folder in place of ~"):
        new_folder(name)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "~").mkdir()
    assert new_folder(name) == Path(name)
