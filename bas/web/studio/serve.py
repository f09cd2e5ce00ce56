"""The studio's server: one for each HOME, on loopback, until Ctrl+C. It ends at once; jobs go on."""

import importlib
import logging
import os
import signal
import socket
import threading
import webbrowser
from pathlib import Path

import uvicorn
from filelock import FileLock, Timeout

from bas.errors import InputError
from bas.web.studio.app import build
from bas.web.studio.guard import Guard
from bas.web.studio.jobs import Lane
from bas.web.studio.store import Home

log = logging.getLogger(__name__)

PORT = 8765  # if it is free, so that a bookmark stays right
SERVING = ".serving"  # held while a studio serves HOME
TICK = 0.5  # seconds between two looks at the queue


def serve(folder: Path, port: int | None, browser: bool) -> None:
    """Serve one HOME. InputError where it, or the port, cannot be used."""
    home = Home(folder)
    home.make()
    lock = FileLock(home.folder / SERVING)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"a studio serves {home.folder} already: open its address, or name another folder") from None
    with bound(port) as place:
        number = place.getsockname()[1]
        lane = Lane(home)
        holder: list[uvicorn.Server] = []
        guard = Guard(build(home, lane, lambda: setattr(holder[0], "should_exit", True)), home.token(), number)
        options = {"log_level": "critical", "access_log": False, "server_header": False, "lifespan": "off"}
        server = uvicorn.Server(uvicorn.Config(guard, timeout_graceful_shutdown=1, **options))
        holder.append(server)
        print(f"Open http://127.0.0.1:{number}/{home.token()}/ in a browser on this machine.", flush=True)
        print(f"All work is in {home.folder}. Ctrl+C ends the page; a training goes on.", flush=True)
        ended = threading.Event()
        threading.Thread(target=keep_going, args=(lane, server, ended), daemon=True).start()
        if browser:
            address = f"http://127.0.0.1:{number}/open/{guard.opening_code()}"
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        try:
            server.run(sockets=[place])
        finally:
            ended.set()
            lock.release()


def bound(port: int | None) -> socket.socket:
    """A socket on loopback: the port that is asked for, else the usual one if it is free, else any."""
    problem: Exception | None = None
    for wanted in (port,) if port is not None else (PORT, 0):
        place = socket.socket()
        if os.name == "posix":
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("127.0.0.1", wanted))
            place.listen()  # before the address is told: who comes early waits
        except (OSError, OverflowError) as error:
            place.close()
            problem = error
        else:
            return place
    raise InputError(f"--port {port} cannot be used: {problem}")


def keep_going(lane: Lane, server: uvicorn.Server, ended: threading.Event) -> None:
    """Load what the answers need once the page can be asked for, then start the jobs that wait, one after another."""
    while not server.started and not ended.wait(0.02):
        pass
    if not ended.is_set():
        importlib.import_module("bas.web.studio.answers")
        importlib.import_module("bas.web.studio.planning")
    while not ended.wait(TICK):
        try:
            lane.tick()
            lane.keep_spare()
        except OSError as error:
            log.warning("the queue cannot be read: %s", error)
    lane.end_spare()


def run_until_interrupted(folder: Path, port: int | None, browser: bool) -> None:
    """Serve until Ctrl+C, which is no error."""
    try:
        serve(folder, port, browser)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
