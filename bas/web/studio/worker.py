"""The process of one job: it holds the job's lock, runs the command, and writes how it ended."""

import _thread
import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from bas.errors import InputError
from bas.io.json_files import write_json
from bas.runtime.progress import Stage, watch
from bas.web.studio.jobs import EVENTS, EXIT, FORKS, LOCK, LOG, STOP, read_job, tail
from bas.web.studio.own import is_marked

log = logging.getLogger(__name__)

NEEDED = (
    "bas.training.loop",
    "bas.sampling.blended_diffusion",
    "transformers.models.clip.modeling_clip",
    "bas.web.report",
)
LOOKS = 0.2  # seconds between two looks for a request to stop
STOPPED = 130  # the exit code after Ctrl+C


def wait_for_job() -> Path | None:
    """Import what jobs need, and read the folder of one from standard input. None at its end: no job is wanted.

    What is printed goes to the job's log from then on. Where processes can be forked, it returns in a fork for every
    folder that is read, and imports nothing again.
    """
    for name in NEEDED:
        importlib.import_module(name)
    line = sys.stdin.readline().rstrip("\n")
    while line and FORKS and not forked():
        line = sys.stdin.readline().rstrip("\n")
    if not line:
        return None
    folder = Path(line)
    log, nothing = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for number, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, number)
    if lost_gpu():
        os.execv(sys.executable, [sys.executable, "-m", "bas", "studio", "--job", line])
    return folder


def lost_gpu() -> bool:
    """Return whether CUDA was used before this process was forked: then it works in no fork."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda._is_in_bad_fork()


def forked() -> bool:
    """Fork this process: True in the new one, which nobody has to wait for and which has a session of its own.

    If there is no room for another process, return True in this one: it then does the job itself.
    """
    try:
        if child := os.fork():
            os.waitpid(child, 0)
            return False
        os.setsid()
        if os.fork():
            os._exit(0)
    except OSError:
        log.warning("there is no room for another process: this one does the job")
    return True


def work(folder: Path, run_command: Callable[[list[str]], int]) -> int:
    """Run a job and return its exit code. run_command: runs the words of a command of bas and returns its exit code."""
    job = read_job(folder)
    if job is None or not is_marked(folder, job):
        raise InputError(f"{folder} was not asked for on this machine")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=5)
    except Timeout:
        raise InputError(f"{folder} is running already") from None
    if (folder / EXIT).exists():
        raise InputError(f"{folder} has ended already")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a process without terminal it may be ignored
    threading.Thread(target=obey, args=(folder,), daemon=True).start()
    with (folder / EVENTS).open("a", encoding="utf-8") as events:

        def note(stage: Stage) -> None:
            events.write(json.dumps(stage._asdict() | {"at": time.time()}) + "\n")
            events.flush()

        with watch(note):
            code = 1
            try:
                code = run_command(job["command"])
            except KeyboardInterrupt:
                code = STOPPED
            finally:
                end(folder, code)
    lock.release()
    return code


def obey(folder: Path) -> None:
    """Wait for a request to stop. "save" acts like Ctrl+C; "now" ends the process."""
    asked = False
    while True:
        time.sleep(LOOKS)
        try:
            how = (folder / STOP).read_text(encoding="ascii")
        except OSError:
            continue
        if how == "now":
            end(folder, STOPPED, "stopped at once: what was saved before is kept")
            os._exit(STOPPED)
        if how == "save" and not asked:
            asked = True
            _thread.interrupt_main(signal.SIGINT)


def end(folder: Path, code: int, line: str | None = None) -> None:
    """Write the exit code and the command's last line."""
    if line is None:
        lines = [text.strip() for text in tail(folder / LOG).replace("\r", "\n").split("\n")]
        own = [text.removeprefix("bas: ") for text in lines if text.startswith("bas: ")] if code else lines
        line = next((text for text in reversed(own) if text), "")
    write_json(folder / EXIT, {"code": code, "line": line, "ended": time.time()})
