"""How many connections the HTTP server holds open, and how long one may be without a request.

Each takes a file descriptor, and runs need those too. uvicorn counts connections only when it has read a request, and
waits for that for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

from service import clock
from service.logs import get_logger

logger = get_logger("service.batch")

REQUEST_SECONDS = 10.0
"""From the connection, or from the first byte of a further request, to the end of the request's headers."""
MOST_HEADER_BYTES = 65_536
MOST_CONNECTIONS = 1000
SHARE = 4
"""Connections may take one in so many of the process's file descriptors."""
MOST_FILES = 65_536
SAY_SECONDS = 60.0


def raise_file_limit() -> int:
    """Allow this process as many open files as its hard limit says, and return how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = [MOST_FILES if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)]
    raised = min(allowed[1], MOST_FILES)
    if raised > allowed[0]:
        with contextlib.suppress(ValueError, OSError):  # a system may allow less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            return raised
    return allowed[0]


def share_of(files: int) -> int:
    """How many connections may be open where a process may have so many files."""
    return max(1, min(MOST_CONNECTIONS, files // SHARE))


class Connections:
    """The open connections, at most `limit`. For a further one the longest idle one is closed, and itself if none is.

    An idle connection has no request that is being answered: none was sent yet, or not its whole headers, or the last
    one is over. `request_seconds`: how long a request may take to come, once it has begun.
    """

    def __init__(self, limit: int, request_seconds: float = REQUEST_SECONDS) -> None:
        self.limit = limit
        self.request_seconds = request_seconds
        self._open: set[LimitedProtocol] = set()
        self._idle: dict[LimitedProtocol, None] = {}
        self._said_at = -SAY_SECONDS

    def protocol(self, of: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
        """The same as this class of uvicorn's, with its connections counted here."""
        return type("LimitedProtocol", (LimitedProtocol, of), {"_all": self})

    def add(self, connection: LimitedProtocol) -> None:
        if len(self._open) >= self.limit:
            self._say_full()
            closed = next(iter(self._idle), connection)
            closed.transport.abort()
            self.remove(closed)
            if closed is connection:
                return
        self._open.add(connection)
        self.idle(connection, True)

    def remove(self, connection: LimitedProtocol) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def idle(self, connection: LimitedProtocol, is_idle: bool) -> None:
        if not is_idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def _say_full(self) -> None:
        if clock.monotonic() - self._said_at >= SAY_SECONDS:
            self._said_at = clock.monotonic()
            logger.warning(
                f"more than {self.limit} HTTP connections at a time: those that are idle for longest are closed, so "
                "that runs can open files. A higher limit of open files (`ulimit -n`) allows more"
            )


class LimitedProtocol(asyncio.Protocol):
    """Comes before one of uvicorn's protocols for HTTP, and closes a connection whose request does not come."""

    _all: Connections
    transport: Any
    cycle: Any
    loop: asyncio.AbstractEventLoop
    _timer: asyncio.TimerHandle | None = None
    _unread = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_request()
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._is_idle:
            self._stop_waiting()
        elif not self.transport.is_closing():
            self._expect_request()
            self._unread += 0 if self._is_body_left else len(data)
            if self._unread > MOST_HEADER_BYTES:
                self.transport.abort()
        self._all.idle(self, self._is_idle)

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        self._all.idle(self, self._is_idle)

    def _unsupported_upgrade_warning(self) -> None:
        """It is answered as if no upgrade had been asked for; uvicorn would log how to install WebSockets."""

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    @property
    def _is_body_left(self) -> bool:
        """The answer came before the end of the request: what comes now is thrown away."""
        return self.cycle is not None and self.cycle.more_body

    def _expect_request(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._all.request_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        self._unread = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self.transport.abort()
