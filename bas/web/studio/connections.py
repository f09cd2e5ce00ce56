"""The connections of the studio's server: a request has to begin in time, and their number is limited.

Whoever reaches the port can open a connection, before any token or password is asked for.
"""

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from bas.web.studio import guard

MOST = 100  # open connections: a browser opens six, and a process may have 256 files or more
AT_ONCE = 32  # new connections that are taken before the first of them is looked at


class Connection(H11Protocol):
    """One connection. It is closed if no head of a request comes in time, or if it waits and others need the room."""

    made = 0.0
    timer: asyncio.TimerHandle | None = None

    @property
    def waits(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Make room for a new connection: if there are too many, close the oldest one that waits."""
        super().connection_made(transport)
        self.made = self.loop.time()
        self.watch()
        if len(self.connections) > MOST:
            ours = (each for each in self.connections if isinstance(each, Connection))
            min(ours, key=lambda each: (not each.waits, each.made)).drop()

    def data_received(self, data: bytes) -> None:
        """Read on; how long a head takes is counted from its first part."""
        super().data_received(data)
        self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.end_watch()
        super().connection_lost(exc)

    def watch(self) -> None:
        """Count the time while no request is there."""
        if not self.waits:
            self.end_watch()
        elif self.timer is None:
            self.timer = self.loop.call_later(guard.PATIENCE, self.drop)

    def end_watch(self) -> None:
        """Count no more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def drop(self) -> None:
        """Close it at once."""
        self.connections.discard(self)  # not only when the loop comes to it: others are made until then
        self.transport.abort()


def server_of(app: guard.Guard) -> uvicorn.Server:
    """Make the server of the guarded application. It ends at once and logs nothing."""
    options: dict[str, Any] = {"log_level": "critical", "access_log": False, "server_header": False, "lifespan": "off"}
    config = uvicorn.Config(app, timeout_graceful_shutdown=1, http=Connection, ws="none", backlog=AT_ONCE, **options)
    return uvicorn.Server(config)
