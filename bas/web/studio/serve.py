"""The studio's server: one for each HOME, on loopback, until Ctrl+C. It ends at once; jobs go on.

With `--listen` it answers at an address of a network as well, after a login.
"""

import importlib
import logging
import os
import signal
import socket
import threading
import webbrowser
from contextlib import ExitStack

import uvicorn
from filelock import FileLock, Timeout

from bas.errors import InputError
from bas.web.studio.app import build
from bas.web.studio.connections import server_of
from bas.web.studio.guard import Guard
from bas.web.studio.jobs import Lane
from bas.web.studio.login import Door, host
from bas.web.studio.store import Home

log = logging.getLogger(__name__)

PORT = 8765  # if it is free, so that a bookmark stays right
SERVING = ".serving"  # held while a studio serves HOME
TICK = 0.5  # seconds between two looks at the queue


def serve(home: Home, port: int | None, browser: bool, listen: tuple[str, str] | None = None) -> None:
    """Serve one HOME. listen: an address in a network, and the password. InputError for what cannot be used."""
    home.make()
    lock = FileLock(home.folder / SERVING)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"a studio serves {home.folder} already: open its address, or name another folder") from None
    with ExitStack() as stack:
        places = [stack.enter_context(bound(port))]
        number = places[0].getsockname()[1]
        door = Door(listen[0], number, listen[1]) if listen else None
        if door:
            places.append(stack.enter_context(bound_at(door)))
        lane = Lane(home)
        holder: list[uvicorn.Server] = []
        app = build(home, lane, lambda: setattr(holder[0], "should_exit", True))
        guard = Guard(app, home.token(), number, door)
        server = server_of(guard)
        holder.append(server)
        print(f"Open http://127.0.0.1:{number}/{home.token()}/ in a browser on this machine.", flush=True)
        if door:
            print(f"Open http://{host(door.address, number)}/ on another machine, and give the password.", flush=True)
            print("What passes there is not encrypted: use it in a network that you trust.", flush=True)
        print(f"All work is in {home.folder}. Ctrl+C ends the page; a training goes on.", flush=True)
        ended = threading.Event()
        threading.Thread(target=keep_going, args=(lane, server, ended), daemon=True).start()
        if browser:
            address = f"http://127.0.0.1:{number}/open/{guard.opening_code()}"
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        try:
            server.run(sockets=places)
        finally:
            ended.set()
            lock.release()


def bound(port: int | None) -> socket.socket:
    """Return a socket on loopback: the port that is asked for, else the usual one if it is free, else any."""
    problem: Exception | None = None
    for wanted in (port,) if port is not None else (PORT, 0):
        place = socket.socket()
        if os.name == "posix":
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("127.0.0.1", wanted))
            place.listen()  # before the address is printed: early requests wait
        except (OSError, OverflowError) as error:
            place.close()
            problem = error
        else:
            return place
    raise InputError(f"--port {port} cannot be used: {problem}")


def bound_at(door: Door) -> socket.socket:
    """Return a socket at a network address, with the port that loopback has. InputError if it is not this machine's."""
    try:
        return socket.create_server(
            (door.place, door.port), family=socket.AF_INET6 if ":" in door.place else socket.AF_INET
        )
    except OSError as error:
        raise InputError(f"--listen {door.address} cannot be used: {error.strerror or error}") from None


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


def run_until_interrupted(home: Home, port: int | None, browser: bool, listen: tuple[str, str] | None = None) -> None:
    """Serve until Ctrl+C, which is not an error."""
    try:
        serve(home, port, browser, listen)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
