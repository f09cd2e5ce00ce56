"""Jobs of the studio: their state is what the folders say, and their result that of the command."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from filelock import FileLock

from bas.cli.entry import main
from bas.io.run_files import CONCEPTS
from bas.web.studio import jobs, worker
from bas.web.studio.serve import bound
from bas.web.studio.store import Home
from tests.helpers.kills import forkserver, on_threads
from tests.helpers.tiny import Bench

PATIENCE = 120  # seconds for a job of a tiny model, on a busy machine


def job(home, name="20260101-000000-sample-run", words=("info",)):
    """A job that waits."""
    return home.folder / "jobs" / jobs.make(home, "sample", name, list(words), {"prompt": "x"}, {})


def test_the_state_is_what_the_folder_says(studio):
    folder = job(studio.home)
    assert jobs.state(folder) == "waiting"
    (folder / jobs.LOG).write_text("")
    assert jobs.state(folder) == "running"  # it has just been started
    os.utime(folder / jobs.LOG, (1, 1))
    assert jobs.state(folder) == "lost"  # and never came up
    held = FileLock(folder / jobs.LOCK)
    with held:
        assert jobs.state(folder) == "running"
    assert jobs.state(folder) == "lost"
    for code, state in (
        (0, "done"),
        (1, "failed"),
        (2, "refused"),
        (130, "stopped"),
        (143, "stopped"),
        (139, "failed"),
    ):
        (folder / jobs.EXIT).write_text(json.dumps({"code": code, "line": "why"}))
        assert jobs.state(folder) == state
    (folder / jobs.EXIT).write_text("{damaged")
    assert jobs.state(folder) == "failed"


def test_what_waits_is_taken_out_and_what_has_ended_is_not_stopped(studio):
    folder = job(studio.home)
    stopped = studio.post(f"api/jobs/{folder.name}/stop", {"how": "save"})
    assert (stopped["state"], stopped["line"]) == ("stopped", "taken out of the queue")
    assert studio.ask("POST", f"api/jobs/{folder.name}/stop", {"how": "save"}).status_code == 409
    assert studio.ask("POST", f"api/jobs/{folder.name}/stop", {"how": "soon"}).status_code == 400


def test_a_damaged_job_is_left_out(studio):
    folder = job(studio.home)
    (folder / jobs.JOB).write_text("[]")
    (folder / jobs.EVENTS).write_text('{"name": "phase1"}\n{"name": "cut o')
    assert studio.get("api/state")["jobs"] == []
    assert jobs.last_row(folder / jobs.EVENTS) == {"name": "phase1"}


@pytest.fixture
def bench(tmp_path):
    """A tiny model, a scene, and settings for it."""
    return Bench(tmp_path / "bench")


class Forked:
    """A job's process as `jobs.launch` starts it, but a fork of one that has imported PyTorch: seconds less."""

    def __init__(self, folder, _, log):
        work = (torch.get_num_threads(), run_forked, folder, log.name)  # the order of sums depends on the threads
        self.process = forkserver().Process(target=on_threads, args=work)
        self.process.start()
        self.pid = self.process.pid

    def wait(self, timeout):
        self.process.join(timeout)
        assert self.process.exitcode is not None, "waited in vain"
        return self.process.exitcode


def run_forked(folder, log):
    """What `python -m bas studio --job FOLDER` does, with its output in the job's log."""
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.exit(main(["studio", "--job", folder]))


@pytest.fixture
def forked(monkeypatch):
    """Jobs are forks. Those that a server starts, and the spare process, are processes of their own."""
    monkeypatch.setattr(jobs, "launch", Forked)


def run_job(home, words, name="run"):
    """Start the process of a job as the lane does."""
    folder = home.folder / "jobs" / jobs.make(home, "train", name, words, {}, {})
    return folder, jobs.start(folder)


def wait_for(what):
    """Until something is true."""
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def training(bench, output, *more, steps=30):
    """The words of a short training on the tiny model."""
    flags = f"--phase1_train_steps {steps} --phase2_train_steps 4 --img_log_steps 0 --device cpu --log_steps 1"
    classes = ["--class_data_dir", str(bench.class_images), "--num_class_images", "2"]
    words = ["train", str(bench.scene), "--weights", str(bench.model), "--output_dir", str(output)]
    return [*words, *flags.split(), *classes, *more]


def test_a_job_that_is_stopped_and_continued_gives_the_bits_of_the_command(forked, studio, bench, tmp_path):
    """Stop after some steps, see the checkpoint, go on through the page's own request, and compare with one command."""
    run = studio.home.folder / "runs" / "toy"
    folder, process = run_job(studio.home, training(bench, run, steps=100), "toy")
    wait_for(lambda: (jobs.last_row(folder / jobs.EVENTS) or {}).get("done", 0) >= 3)
    os.kill(process.pid, signal.SIGSTOP)  # the steps are fast: it must not end before it is asked to
    assert jobs.state(folder) == "running"
    (found,) = studio.get("api/state")["runs"]
    assert (found["state"], found["total"]) == ("running", 104)
    studio.post(f"api/jobs/{folder.name}/stop", {"how": "save"})
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(PATIENCE) == 130
    assert jobs.state(folder) == "stopped"
    (found,) = studio.get("api/state")["runs"]
    assert found["state"] == "stopped"
    assert 3 <= found["done"] < 104
    assert "--resume_from_checkpoint latest continues" in found["line"]

    again = studio.post("api/jobs", {"kind": "resume", "run": "toy"})
    assert studio.ask("POST", "api/jobs", {"kind": "resume", "run": "toy"}).status_code == 409  # it waits already
    process = jobs.start(studio.home.folder / "jobs" / again["id"])
    assert process.wait(PATIENCE) == 0
    assert studio.get("api/state")["runs"][0]["state"] == "done"
    assert studio.ask("POST", "api/jobs", {"kind": "resume", "run": "toy"}).status_code == 409

    whole = tmp_path / "whole"
    assert main(training(bench, whole, steps=100)) == 0
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_killed_job_is_lost_and_a_server_that_comes_back_sees_it(forked, studio, bench):
    run = studio.home.folder / "runs" / "toy"
    folder, process = run_job(studio.home, training(bench, run, steps=2000), "toy")
    wait_for(lambda: (jobs.last_row(folder / jobs.EVENTS) or {}).get("done", 0) >= 1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(PATIENCE)
    assert jobs.state(folder) == "lost"
    found = studio.get("api/state")
    assert found["runs"][0]["state"] == "lost"
    assert found["jobs"][0]["state"] == "lost"


def test_stop_now_ends_a_job_at_once(forked, studio, bench):
    run = studio.home.folder / "runs" / "toy"
    folder, process = run_job(studio.home, training(bench, run, steps=100_000), "toy")
    wait_for(lambda: (jobs.last_row(folder / jobs.EVENTS) or {}).get("done", 0) >= 1)
    studio.post(f"api/jobs/{folder.name}/stop", {"how": "now"})
    assert process.wait(10) == 130
    assert jobs.state(folder) == "stopped"
    assert not (run / CONCEPTS).exists()


def test_a_refused_job_says_the_line_of_the_command(forked, studio, bench):
    folder, process = run_job(studio.home, training(bench, studio.home.folder / "runs" / "toy", "--resolution", "33"))
    assert process.wait(PATIENCE) == 2
    told = jobs.describe(folder)
    assert told["state"] == "refused"
    assert told["line"].startswith("--resolution 33")


SPARE = """
import sys
from bas.cli.entry import main
from bas.web.studio import jobs
jobs.FORKS = {forks}
from bas.web.studio import worker
worker.NEEDED = ()  # seconds of imports, which are not what is tried here
if {lost}:
    worker.lost_gpu, worker.work = (lambda: True), None  # the fork itself does no work
sys.exit(main(["studio", "--job", jobs.SPARE]))
"""


@pytest.mark.parametrize(("forks", "lost"), [(True, False), (True, True), (False, False)])
def test_a_spare_process_takes_jobs(tmp_path, monkeypatch, forks, lost):
    """Two where it can fork itself, also where its forks have lost the GPU; else it is the first one's process."""
    if forks and not jobs.FORKS:
        pytest.skip("processes are forked on Linux alone")
    monkeypatch.setattr(jobs, "FORKS", forks)
    words = [sys.executable, "-c", SPARE.format(forks=forks, lost=lost)]
    monkeypatch.setattr(jobs, "launch", lambda _, stdin, out: subprocess.Popen(words, stdin=stdin, stdout=out))
    home = Home(tmp_path / "home")
    home.make()
    lane = jobs.Lane(home)
    lane.keep_spare()
    assert lane.spare is None  # no page is open
    lane.asked = time.monotonic()
    lane.keep_spare()
    spare = lane.spare
    for name in ("nothing", "no more"):
        folder = job(home, words=("info", str(tmp_path / name)))
        lane.tick()
        assert lane.spare is (spare if forks else None)
        assert lane.started == ([] if forks else [spare])
        wait_for(lambda folder=folder: (folder / jobs.EXIT).exists())
        told = jobs.describe(folder)
        assert told["state"] == "refused"
        assert told["line"].startswith(f"{tmp_path / name} does not exist")
        if not forks:
            assert spare.wait(PATIENCE) == 2
            return
    lane.end_spare()
    assert spare.wait(PATIENCE) == 0


def test_a_fork_outlives_the_process_that_made_it(tmp_path):
    """In a session of its own, which Ctrl+C in a terminal does not reach."""
    told = tmp_path / "told"
    program = f"""
import os, time
from pathlib import Path
from bas.web.studio.worker import forked
first = os.getpid()
if forked():
    time.sleep(0.5)
    Path({str(told)!r}).write_text(f"{{first}} {{os.getppid()}} {{os.getsid(0)}}")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not told.exists()
    wait_for(lambda: told.exists() and told.read_text())
    first, parent, session = told.read_text().split()
    assert parent != first
    assert session not in (first, str(os.getsid(0)))


def test_without_room_for_a_fork_the_spare_process_does_the_job(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(BlockingIOError("no room")))
    assert worker.forked() is True


def test_a_job_that_starts_slowly_is_not_lost_while_its_process_lives(tmp_path, monkeypatch):
    """A second job waits for it. Once the process has ended without its lock, the first is lost, the second starts."""
    home = Home(tmp_path / "home")
    home.make()
    sleeper = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    monkeypatch.setattr(jobs, "launch", lambda *_: subprocess.Popen(sleeper, stdin=subprocess.PIPE))
    lane, (first, second) = jobs.Lane(home), (job(home), job(home))
    for _ in range(2):
        lane.tick()
        assert [jobs.state(folder) for folder in (first, second)] == ["running", "waiting"]
        os.utime(first / jobs.LOG, (1, 1))
    (process,) = lane.started
    process.communicate()
    assert jobs.state(first) == "lost"
    lane.tick()
    assert [jobs.state(folder) for folder in (first, second)] == ["lost", "running"]
    lane.started[0].communicate()


def test_a_spare_process_that_nobody_needs_ends(tmp_path, monkeypatch):
    """The lane closes its input, and a process whose input has ended asks for no job."""
    reader = [sys.executable, "-c", "import sys; sys.exit(len(sys.stdin.read()))"]
    monkeypatch.setattr(jobs, "launch", lambda *_: subprocess.Popen(reader, stdin=subprocess.PIPE))
    lane = jobs.Lane(Home(tmp_path / "home"))
    lane.asked = time.monotonic()
    lane.keep_spare()
    spare = lane.spare
    lane.asked -= jobs.NOBODY_ASKS + 1
    lane.keep_spare()
    assert lane.spare is None
    assert spare.wait(PATIENCE) == 0
    monkeypatch.setattr(worker, "NEEDED", ())
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert worker.wait_for_job() is None


def test_the_server_answers_ends_at_once_and_leaves_its_jobs(tmp_path):
    """In a process of its own: the address is printed, a second one is refused, Ctrl+C ends it without a trace."""
    home = tmp_path / "home"
    command = [sys.executable, "-m", "bas", "studio", str(home), "--no_browser", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        first = server.stdout.readline()
        assert first.startswith("Open http://127.0.0.1:")
        assert "Ctrl+C ends the page" in server.stdout.readline()
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "serves" in second.stderr
    finally:
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=PATIENCE)
    assert "Traceback" not in err
    assert server.returncode == 0


def test_a_training_outlives_its_server(studio, bench):
    """The server starts it from the queue and is killed; the training ends all the same, and the next one sees it."""
    run = studio.home.folder / "runs" / "toy"
    name = jobs.make(studio.home, "train", "toy", training(bench, run), {}, {})
    folder = studio.home.folder / "jobs" / name
    command = [sys.executable, "-m", "bas", "studio", str(studio.home.folder), "--no_browser", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: jobs.last_row(folder / jobs.EVENTS))
    assert jobs.state(folder) == "running"
    server.kill()
    server.wait(PATIENCE)
    wait_for(lambda: jobs.state(folder) != "running")
    assert jobs.describe(folder)["state"] == "done"
    assert studio.get("api/state")["runs"][0]["state"] == "done"
    assert (run / CONCEPTS).exists()


def test_a_port_that_is_taken_is_refused(tmp_path):
    with bound(0) as place:
        number = place.getsockname()[1]
        code = main(["studio", str(tmp_path / "home"), "--no_browser", "--port", str(number)])
    assert code == 2
