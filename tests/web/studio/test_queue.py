"""The queue of the studio: its order, and that nothing in a folder from elsewhere starts by itself."""

import contextlib
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from filelock import FileLock

from bas.cli.entry import attempt
from bas.errors import InputError
from bas.io.run_files import METRICS, SETTINGS
from bas.training.run_folder import locked
from bas.web.studio import jobs
from bas.web.studio.jobs import Lane
from bas.web.studio.store import Home
from bas.web.studio.worker import work

tick = Lane.tick  # the fixture `studio` turns it off


def ask_for(studio, name, kind="train", words=("train", "scene")):
    """A job that waits."""
    return studio.home.folder / "jobs" / jobs.make(studio.home, kind, name, list(words), {}, {})


@pytest.fixture
def started(monkeypatch):
    """The folders of the jobs that would be started."""
    found = []
    alive = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(jobs, "start", lambda folder: (found.append(folder), alive)[1])
    return found


def waiting(studio):
    """The names of what waits, as the page shows them in order."""
    rows = [job for job in studio.get("api/state")["jobs"] if job["state"] == "waiting"]
    return [job["name"] for job in sorted(rows, key=lambda job: job["place"])]


def test_what_waits_is_moved_taken_out_and_started_in_the_order_shown(studio, started):
    first, second, third = (ask_for(studio, name) for name in ("first", "second", "third"))
    assert waiting(studio) == ["first", "second", "third"]
    studio.post(f"api/jobs/{third.name}/move", {"up": True})
    assert waiting(studio) == ["first", "third", "second"]
    studio.post(f"api/jobs/{first.name}/move", {"up": False})
    assert waiting(studio) == ["third", "first", "second"]
    for job, up in ((third, True), (second, False)):  # at the ends nothing changes
        studio.post(f"api/jobs/{job.name}/move", {"up": up})
    assert waiting(studio) == ["third", "first", "second"]
    studio.post(f"api/jobs/{third.name}/stop", {"how": "save"})
    assert waiting(studio) == ["first", "second"]
    assert studio.ask("POST", f"api/jobs/{third.name}/move", {"up": True}).status_code == 409
    studio.post(f"api/jobs/{second.name}/move", {"up": True})
    tick(studio.lane)
    assert started == [second]


def test_requests_of_one_moment_are_jobs_of_their_own(studio, monkeypatch):
    """All of them see the same names taken, as threads do that run at once, and each gets its own folder."""
    monkeypatch.setattr(jobs, "stamp", lambda: "20260101-000000")
    together, free_name = threading.Barrier(8), Home.free_name

    def slowly(home, kind, wanted):
        name = free_name(home, kind, wanted)
        if not name.endswith(tuple("23456789")):  # the first time
            together.wait(10)
        return name

    monkeypatch.setattr(Home, "free_name", slowly)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: jobs.make(studio.home, "sample", "run", ["info"], {"n": i}, {}), range(8)))
    asked = {name: json.loads((studio.home.folder / "jobs" / name / jobs.JOB).read_text())["asked"] for name in made}
    assert sorted(asked) == ["20260101-000000-sample-run", *(f"20260101-000000-sample-run-{i}" for i in range(2, 9))]
    assert [asked[name]["n"] for name in made] == [*range(8)]


def test_a_training_is_paused_for_a_drawing_and_goes_on(studio, started):
    """The drawing comes next, then the rest of the training, then one that waits; too early, it is refused."""
    training = ask_for(studio, "toy")
    (training / jobs.LOG).write_text("")
    second, drawing = ask_for(studio, "other"), ask_for(studio, "drawn", kind="sample")
    run, body = studio.home.folder / "runs" / "toy", {"kind": "pause", "job": training.name}
    run.mkdir()
    with FileLock(training / jobs.LOCK):
        assert studio.ask("POST", "api/jobs", body).json()["code"] == "early"
        for name, text in ((SETTINGS, "{}"), (METRICS, '{"step": 1}\n')):
            (run / name).write_text(text)
        rest = studio.home.folder / "jobs" / studio.post("api/jobs", body)["id"]
        assert (training / jobs.STOP).read_text() == "save"
        assert jobs.words_of(rest) == ["train", "scene", "--resume_from_checkpoint", "latest"]
        tick(studio.lane)
        assert started == []  # it is still being saved
    assert studio.ask("POST", "api/jobs", body).status_code == 409
    for next_one in (drawing, rest, second):
        tick(studio.lane)
        studio.lane.started.clear()
        assert started[-1] == next_one
        (next_one / jobs.EXIT).write_text('{"code": 0}')


def test_a_run_goes_on_with_its_own_settings_not_those_of_a_deleted_one_of_its_name(studio):
    """Also after it was continued once: the command is that of the newest training that began the run."""
    run = studio.home.folder / "runs" / "cat"
    for words in (("train", "deleted"), ("train", "cat")):
        training = ask_for(studio, "cat", words=words)
        (training / jobs.EXIT).write_text('{"code": 130}')
        run.mkdir()
        (run / SETTINGS).write_text("{}")
        if words[1] == "deleted":
            assert studio.ask("DELETE", "api/runs/cat").status_code == 200
    for _ in range(2):
        rest = studio.home.folder / "jobs" / studio.post("api/jobs", {"kind": "resume", "run": "cat"})["id"]
        assert jobs.words_of(rest) == ["train", "cat", "--resume_from_checkpoint", "latest"]
        (rest / jobs.EXIT).write_text('{"code": 130}')


def test_a_run_that_a_terminal_trains_is_not_deleted(studio):
    """A page that was loaded before still offers it. Once the terminal has ended, it goes."""
    run = studio.home.folder / "runs" / "cat"
    with locked(run):
        answer = studio.ask("DELETE", "api/runs/cat")
        assert (answer.status_code, answer.json()["code"]) == (409, "running")
        assert answer.json()["message"] == "a terminal trains this run: stop it there first"
        (run / SETTINGS).write_text("{}")
    assert studio.ask("DELETE", "api/runs/cat").status_code == 200
    assert not run.exists()


def test_a_scene_that_a_job_needs_is_not_deleted(studio):
    """The line says what to do; afterwards it goes, and one that no job needs goes at once."""
    scenes = studio.home.folder / "scenes"
    for name in ("toy", "toy 2"):
        (scenes / name).mkdir()
    training = ask_for(studio, "run", words=("train", str(scenes / "toy"), "--output_dir", "x"))
    assert studio.ask("DELETE", "api/scenes/toy 2").status_code == 200

    def said():
        answer = studio.ask("DELETE", "api/scenes/toy")
        assert answer.status_code == 409
        return answer.json()["message"]

    assert said() == "the training of run needs this scene: take it out of the queue first"
    (training / jobs.LOG).touch()
    assert said() == "the training of run needs this scene: stop it first"
    (training / jobs.EXIT).write_text('{"code": 130}')
    proposal = ask_for(studio, "toy", kind="masks", words=("masks", str(scenes / "toy" / "img.png")))
    assert said() == "the proposal of a mask of toy needs this scene: take it out of the queue first"
    studio.post(f"api/jobs/{proposal.name}/stop", {"how": "now"})
    assert studio.ask("DELETE", "api/scenes/toy").status_code == 200


def test_a_download_waits_for_downloads_alone(studio, started):
    """What trains does not hold it up, and it holds up nothing else."""
    for name in ("toy", "other"):
        ask_for(studio, name)
    fetched = studio.home.folder / "jobs" / studio.post("api/jobs", {"kind": "download", "base": "sd15"})["id"]
    assert jobs.words_of(fetched) == ["download", "sd15"]
    again = studio.ask("POST", "api/jobs", {"kind": "download", "base": "sd15"})
    assert (again.status_code, again.json()["code"]) == (409, "running")
    assert studio.ask("POST", "api/jobs", {"kind": "download", "base": "mini"}).status_code == 409
    assert studio.ask("POST", "api/jobs", {"kind": "download", "base": "../x"}).status_code == 422
    studio.post("api/jobs", {"kind": "download", "base": "sd21"})
    tick(studio.lane)
    assert [folder.name.split("-", 2)[2] for folder in started] == ["download-sd15", "train-toy"]
    for folder in started:
        (folder / jobs.LOG).touch()
    tick(studio.lane)
    assert len(started) == 2


def test_a_download_without_a_network_says_so(studio, monkeypatch):
    """In the line that the page shows at the model: what was tried, and what to do."""

    def unreachable(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    folder = studio.home.folder / "jobs" / studio.post("api/jobs", {"kind": "download", "base": "sd15"})["id"]
    log = (folder / jobs.LOG).open("w", buffering=1)
    with log, contextlib.redirect_stderr(log):
        assert work(folder, attempt) == 2
    line = jobs.describe(folder)["line"]
    assert line.startswith(
        "sd15 could not be downloaded (stable-diffusion-v1-5/stable-diffusion-v1-5: no route to host"
    )
    assert "check the network" in line
    (row,) = [row for row in studio.get("api/about")["bases"] if row["name"] == "sd15"]
    assert row == {"name": "sd15", "title": "Stable Diffusion 1.5", "license": "CreativeML Open RAIL-M"} | {
        "here": False,
        "bytes": 4_264_941_228,
    }


@pytest.fixture
def copied(studio, tmp_path):
    """A job that waits, in a folder that was copied to here, as a zip from another person would bring it."""
    theirs = Home(tmp_path / "theirs")
    theirs.make()
    name = jobs.make(theirs, "train", "toy", ["train", "their_scene", "--output_dir", "anywhere"], {}, {})
    return shutil.copytree(theirs.folder / "jobs" / name, studio.home.folder / "jobs" / name)


def forged(folder):
    """A job of somebody who does not have the key: without a mark, with a wrong one, with one of another job."""
    job = json.loads((folder / jobs.JOB).read_text())
    marks = [{}, {"mark": None}, {"mark": "0" * 64}, {"mark": job["mark"]}]
    return [{name: value for name, value in job.items() if name != "mark"} | mark for mark in marks]


def test_a_job_from_elsewhere_is_neither_started_nor_touched(studio, copied, started):
    """Its files may be links to files of this user, which a lock or a request to stop would write to."""
    victim = studio.home.folder.parent / "diary.txt"
    victim.write_text("mine")
    for name in (jobs.LOG, jobs.LOCK, jobs.STOP):
        (copied / name).symlink_to(victim)
    for content in forged(copied):
        (copied / jobs.JOB).write_text(json.dumps(content))
        tick(studio.lane)
        assert jobs.state(copied) == "foreign"
        with pytest.raises(InputError, match="was not asked for on this machine"):
            work(copied, lambda _words: started.append("ran"))
    assert started == []
    assert victim.read_text() == "mine"


def test_a_job_from_elsewhere_starts_once_its_command_was_seen(studio, copied, started):
    (told,) = studio.get("api/state")["jobs"]
    assert (told["state"], told["here"]) == ("foreign", False)
    shown = studio.get(f"api/jobs/{copied.name}/log")
    assert shown["command"] == "bas train their_scene --output_dir anywhere"
    address = f"api/jobs/{copied.name}/accept"
    for words in (None, [], ["train"], [*shown["words"], "--seed=1"]):
        assert studio.ask("POST", address, {"words": words}).status_code == 409
    assert jobs.state(copied) == "foreign"
    accepted = studio.post(address, {"words": shown["words"]})
    assert (accepted["state"], accepted["here"]) == ("waiting", True)
    tick(studio.lane)
    assert started == [copied]


def test_only_what_the_page_starts_itself_is_accepted(studio, copied, started):
    for kind, words in (("info", ["info", "x"]), ("train", ["paint", "x"]), ("train", [])):
        job = {"kind": kind, "name": "toy", "command": words, "asked": {}, "made": 1.0}
        (copied / jobs.JOB).write_text(json.dumps(job))
        assert studio.ask("POST", f"api/jobs/{copied.name}/accept", {"words": words}).status_code in (403, 409)
    studio.post(f"api/jobs/{copied.name}/stop", {"how": "now"})
    assert studio.get("api/state")["jobs"][0]["state"] == "stopped"
    tick(studio.lane)
    assert started == []


def test_a_run_from_elsewhere_goes_on_only_once_its_command_was_seen(studio, started):
    """Its settings name the scene and files: they are a command of somebody else until it was accepted."""
    run = studio.home.folder / "runs" / "toy"
    run.mkdir()
    settings = {"config": {"instance_data_dir": "their_scene"}, "handles": ["<toy>"], "base": "", "version": "1"}
    (run / SETTINGS).write_text(json.dumps(settings))
    asked = studio.post("api/jobs", {"kind": "resume", "run": "toy"})
    assert asked["state"] == "foreign"
    assert studio.get("api/state")["runs"][0]["state"] == "foreign"
    tick(studio.lane)
    assert started == []
    words = studio.get(f"api/jobs/{asked['id']}/log")["words"]
    assert words[:2] == ["train", "their_scene"]
    assert words[-4:] == ["--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    assert studio.ask("POST", "api/jobs", {"kind": "resume", "run": "toy"}).status_code == 409  # it waits for that
    studio.post(f"api/jobs/{asked['id']}/accept", {"words": words})
    tick(studio.lane)
    assert [folder.name for folder in started] == [asked["id"]]


@pytest.mark.parametrize("content", ["[]", '{"kind": {}, "name": []}', '{"kind": 3', "\0", '{"name": "x"}'])
def test_a_damaged_job_leaves_the_page_whole(studio, content):
    folder, whole = ask_for(studio, "toy"), ask_for(studio, "other")
    (folder / jobs.JOB).write_text(content)
    (whole / jobs.EXIT).write_text(content)
    assert [job["state"] for job in studio.get("api/state")["jobs"]] == ["failed"]
