"""Jobs: commands of bas that the studio runs in processes of their own, one after another.

    job.json       what was asked: kind, name of the run, the command's words
    log.txt        what the command prints; it exists from the start on
    lock           held by the process while it runs
    stop           "save" or "now", written to ask it to stop
    events.jsonl   the progress of its stages
    exit.json      the exit code and the command's last line, written at its end
    place          where it was moved to in the queue: a time, as if it had been asked for then

A job's state is read from these files each time, and is never stored: no log is waiting, a held lock is running, an
exit code is done, refused, failed or stopped, and a lock that nobody holds without an exit code is lost.

A job that was not asked for on this machine (own.py) is foreign until somebody here accepts it: it is never started,
and no file of it is written or locked.
"""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bas.errors import InputError
from bas.io.files import write_text
from bas.io.json_files import read_record, write_json
from bas.web.studio import own
from bas.web.studio.refusal import Refusal, missing
from bas.web.studio.store import JOBS, Home, stamp
from bas.web.studio.unchanged import while_unchanged

JOB, LOG, LOCK, STOP, EVENTS, EXIT = "job.json", "log.txt", "lock", "stop", "events.jsonl", "exit.json"
PLACE = "place"
STARTING = 15.0  # seconds without a lock, after which a job does not start any more
TAIL = 2**14  # bytes at the end of a file that are read for its last line
SPARE = "-"  # in place of a job's folder
FORKS = sys.platform == "linux"  # elsewhere a process that has imported PyTorch cannot be forked, or not safely
PAGE_OPEN, NOBODY_ASKS = 10.0, 300.0  # seconds since a page last asked
STATES = {0: "done", 2: "refused", 130: "stopped", 143: "stopped"}
ALIVE = ("waiting", "running")
FOREIGN, DOWNLOAD = "foreign", "download"
NUMBER = (int, float)
ASKED = {"kind": str, "name": str, "command": [str], "asked": dict, "made": NUMBER}  # of job.json
ENDED = {"code": int}  # of exit.json
COMMANDS = ("masks", "train", "sample", "vary", "explore", "attend", "edit", "export", DOWNLOAD)  # that a job can be


def make(
    home: Home,
    kind: str,
    name: str,
    words: list[str],
    asked: dict[str, Any],
    files: dict[str, bytes],
    here: bool = True,
) -> str:
    """Put a job into the queue and return its name. files: what its command reads from the job's folder.

    here: whether its command was made here; else it waits until it is accepted.
    """
    folder = home.make_folder(JOBS, f"{stamp()}-{kind}-{name}")
    for file, content in files.items():
        (folder / file).write_bytes(content)
    words = [word.replace("{job}", str(folder)) for word in words]
    content = {"kind": kind, "name": name, "command": words, "asked": asked, "made": time.time()}
    write_json(folder / JOB, content | ({"mark": own.mark(folder, content)} if here else {}))
    return folder.name


def read_job(folder: Path) -> dict[str, Any] | None:
    """Read what a job was asked for: job.json. None for a damaged one."""
    try:
        return read_record(folder / JOB, ASKED, "remove its folder")
    except InputError:
        return None


def words_of(folder: Path) -> list[str]:
    """Return the words of a job's command."""
    job = read_job(folder)
    return job["command"] if job else []


def place_of(folder: Path) -> float:
    """Return where a job stands in the queue: the time it was asked for, or the time that its last move gave it."""
    try:
        return float((folder / PLACE).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return (read_job(folder) or {"made": math.inf})["made"]


def read_end(folder: Path) -> dict[str, Any]:
    """Read how a job has ended: exit.json. A damaged one counts as failed."""
    try:
        return _read_end(folder / EXIT)
    except (InputError, OSError):
        return {"code": 1}


@while_unchanged
def _read_end(path: Path) -> dict[str, Any]:
    return read_record(path, ENDED, "")


def accept(folder: Path, command: list[str]) -> None:
    """Put a foreign job into the queue. command: its words as they were shown. Refusal if they are others by now."""
    job = read_job(folder)
    if job is None:
        raise missing("this job")
    if state(folder) != FOREIGN or job["command"] != command or command[:1] != [job["kind"]]:
        raise Refusal(409, "this job is not what was shown: load the page again", "changed")
    if job["kind"] not in COMMANDS:
        raise Refusal(403, f"the studio starts no bas {job['kind']}", "bad")
    content = {name: job[name] for name in ASKED}
    write_json(folder / JOB, content | {"mark": own.mark(folder, content)})


def state(folder: Path) -> str:
    """Return the state of a job: waiting, running, done, refused, failed, stopped, lost or foreign."""
    if (folder / EXIT).exists():
        return STATES.get(read_end(folder)["code"], "failed")
    job = read_job(folder)
    if job is None or not own.is_marked(folder, job):
        return FOREIGN
    if not (folder / LOG).exists():
        return "waiting"
    if not (folder / LOCK).exists():
        return "running" if time.time() - (folder / LOG).stat().st_mtime < STARTING else "lost"
    if held(folder / LOCK):
        return "running"
    return state(folder) if (folder / EXIT).exists() else "lost"  # it may have ended in between


def held(path: Path) -> bool:
    """Return whether a process holds a lock. False for a link: taking it would write to another file."""
    if path.is_symlink():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def describe(folder: Path) -> dict[str, Any] | None:
    """Describe a job for the page: what was asked, its state, progress and last line. None for a damaged one.

    What has ended is read once.
    """
    path = folder / EXIT
    return _ended(path) if path.exists() else described(folder)


@while_unchanged
def _ended(path: Path) -> dict[str, Any] | None:
    return described(path.parent)


def described(folder: Path) -> dict[str, Any] | None:
    """Read a job for the page from its files."""
    job = read_job(folder)
    if job is None:
        return None
    found = {"id": folder.name, **{key: job[key] for key in ("kind", "name", "asked", "made")}}
    found |= {"state": state(folder), "here": own.is_marked(folder, job), "progress": last_row(folder / EVENTS)}
    if found["state"] == "waiting":
        found["place"] = place_of(folder)
    if (folder / STOP).exists() and found["state"] == "running":
        found["stopping"] = True
    if (folder / EXIT).exists():
        ended = read_end(folder)
        found |= {"line": ended.get("line"), "ended": ended.get("ended")}
    return found


def last_row(path: Path) -> dict[str, Any] | None:
    """Return the last whole line of a file of JSON lines, None without one."""
    for line in reversed(tail(path).split("\n")[:-1]):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        return row if isinstance(row, dict) else None
    return None


def tail(path: Path) -> str:
    """Return the last part of a text file; nothing without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def stop(folder: Path, how: str) -> None:
    """Ask a job to stop: "save" after its step, once its state is saved, or "now". One that waits never starts."""
    if how not in ("save", "now"):
        raise Refusal(400, "how is save or now", "bad", "how")
    current = state(folder)
    if current in ("waiting", FOREIGN):
        write_json(folder / EXIT, {"code": 130, "line": "taken out of the queue", "ended": time.time()})
    elif current == "running":
        (folder / STOP).write_text(how, encoding="ascii")
    else:
        raise Refusal(409, f"this job is not running: it is {current}", "ended")


def in_order(states: dict[Path, str]) -> list[Path]:
    """Return the jobs that wait, the next one first."""
    return sorted((folder for folder, current in states.items() if current == "waiting"), key=place_of)


class Lane:
    """The queue: at most one job runs at a time, in the order in which they were asked for, unless they were moved.

    Downloads wait for each other alone: they need the network, not the device.

    The processes outlive the server. Only starting the next one needs it.
    """

    def __init__(self, home: Home):
        self.home = home
        self.started: list[subprocess.Popen] = []
        self.starting: dict[Path, subprocess.Popen] = {}  # jobs that do not hold their locks yet
        self.spare: subprocess.Popen | None = None  # has imported what jobs need, and forks itself for each, or is one
        self.asked = -math.inf  # when a page last asked for anything
        self.turn = threading.Lock()

    def folders(self) -> list[Path]:
        """Return all jobs, oldest first."""
        place = self.home.folder / JOBS
        return sorted(path for path in place.iterdir() if (path / JOB).is_file())

    def tick(self) -> None:
        """Start the next job if none is running."""
        with self.turn:
            self.started = [process for process in self.started if process.poll() is None]
            self.wait_for_locks()
            states = {folder: state(folder) for folder in self.folders()}
            alive = {folder: current for folder, current in states.items() if current in ALIVE}
            downloads = {folder: current for folder, current in alive.items() if words_of(folder)[:1] == [DOWNLOAD]}
            for lane in (downloads, {folder: alive[folder] for folder in alive if folder not in downloads}):
                waiting = in_order(lane)
                if waiting and "running" not in lane.values():
                    process = self.hand_over(waiting[0]) or start(waiting[0])
                    self.starting[waiting[0]] = process
                    if process is not self.spare:
                        self.started.append(process)

    def wait_for_locks(self) -> None:
        """Do not count jobs as lost while their processes live: on a busy machine their imports take long."""
        self.starting = {
            folder: process
            for folder, process in self.starting.items()
            if process.poll() is None and (folder / LOG).exists() and not (folder / LOCK).exists()
        }
        for folder in self.starting:
            (folder / LOG).touch()

    def move(self, folder: Path, up: bool) -> None:
        """Let a job that waits change places with the one before it, or behind it. Refusal if it does not wait."""
        with self.turn:
            waiting = in_order({each: state(each) for each in self.folders()})
            if folder not in waiting:
                raise Refusal(409, "this job does not wait any more", "ended")
            at = waiting.index(folder)
            pair = waiting[max(0, at - 1) : at + 1] if up else waiting[at : at + 2]
            for each, place in zip(pair, [place_of(each) for each in reversed(pair)], strict=True):
                write_text(each / PLACE, repr(place))

    def prefer(self, folders: list[Path]) -> None:
        """Put jobs before all others that wait, in this order."""
        with self.turn:
            waiting = in_order({each: state(each) for each in self.folders()})
            first = min((place_of(each) for each in waiting), default=time.time())
            for i, each in enumerate(folders):
                write_text(each / PLACE, repr(first - 1e-3 * (len(folders) - i)))

    def hand_over(self, folder: Path) -> subprocess.Popen | None:
        """Give a job to the spare process, which saves seconds. None if there is none, or if it has ended."""
        spare, self.spare = self.spare, None
        if spare is None or spare.stdin is None or spare.poll() is not None:
            return None
        (folder / LOG).touch()
        try:
            spare.stdin.write(f"{folder}\n".encode())
            if FORKS:
                spare.stdin.flush()
                self.spare = spare
            else:
                spare.stdin.close()
        except OSError:
            return None
        return spare

    def keep_spare(self) -> None:
        """Have a spare process while a page is open, and none when nobody has asked for a while: it takes memory."""
        with self.turn:
            if self.spare is None and time.monotonic() - self.asked < PAGE_OPEN:
                self.spare = launch(SPARE, subprocess.PIPE, subprocess.DEVNULL)
            elif self.spare is not None and time.monotonic() - self.asked > NOBODY_ASKS:
                self.end_spare()

    def end_spare(self) -> None:
        """Let the spare process end: it reads the end of its input."""
        if self.spare is not None and self.spare.stdin is not None:
            self.spare.stdin.close()
            self.started.append(self.spare)
        self.spare = None


def start(folder: Path) -> subprocess.Popen:
    """Run a job in a process of its own, which goes on when the server, the terminal or the page is closed."""
    with (folder / LOG).open("ab") as log:
        return launch(str(folder), subprocess.DEVNULL, log)


def launch(job: str, stdin: Any, output: Any) -> subprocess.Popen:
    """Start a process for a job that is named by its folder, or SPARE for one that is told on its input."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    options: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        options = {"creationflags": subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore
    words = [sys.executable, "-m", "bas", "studio", "--job", job]
    return subprocess.Popen(words, stdin=stdin, stdout=output, stderr=output, env=environment, **options)
