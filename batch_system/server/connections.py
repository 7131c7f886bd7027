"""Limits the number of open connections of the HTTP server, and the time that a connection waits
for its client.

Each connection takes a file descriptor, and runs need file descriptors, too. uvicorn counts a
connection only after it has read a request, and it waits without a limit for the request, and for a
client that does not read the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

from batch_system import clock
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

REQUEST_SECONDS = 10.0
"""The longest time from the connection, or from the end of the last response, to the end of a
request's headers.
"""
BODY_PAUSE_SECONDS = 10.0
"""The longest time between two parts of a request's body."""
BODY_SECONDS = 30.0
"""The longest time from the end of a request's headers to the end of its body."""
LAST_BODY_SECONDS = 2.0
"""The longest time from the stop of the server to the end of a request's body, because the server
waits for all open requests.
"""
UNREAD_SECONDS = 30.0
"""The longest time that a full buffer waits until the client has read some of it."""
MOST_HEADER_BYTES = 65_536
MOST_CONNECTIONS = 1000
SHARE = 4
"""Connections may use one of this many file descriptors of the process: a quarter."""
MOST_FILES = 65_536
WARN_SECONDS = 60.0
"""The time between two warnings that the limit is reached."""


def raise_file_limit() -> int:
    """Raise this process's limit of open files to its hard limit (at most MOST_FILES), and return
    the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = [MOST_FILES if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard)]
    raised = min(allowed[1], MOST_FILES)
    if raised > allowed[0]:
        # Some systems allow less than the hard limit that they report.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            return raised
    return allowed[0]


def share_of(files: int) -> int:
    """How many connections may be open in a process with a limit of `files` open files."""
    return max(1, min(MOST_CONNECTIONS, files // SHARE))


class Connections:
    """The open connections, at most `limit`.

    When another one is opened, the connection that has been idle for the longest time is closed, or
    the new one if none is idle. A connection is idle if it has no complete request to answer: no
    request was sent yet, its headers or its body are not complete, or the last one was answered. A
    request's headers have to arrive within `request_seconds`, and its body within `body_seconds`,
    with at most `body_pause_seconds` between two parts. If an answer fills the buffer, the client
    has to read some of it within `unread_seconds`.
    """

    def __init__(
        self,
        limit: int,
        request_seconds: float = REQUEST_SECONDS,
        body_pause_seconds: float = BODY_PAUSE_SECONDS,
        body_seconds: float = BODY_SECONDS,
        unread_seconds: float = UNREAD_SECONDS,
    ) -> None:
        self.limit = limit
        self.request_seconds = request_seconds
        self.body_pause_seconds = body_pause_seconds
        self.body_seconds = body_seconds
        self.unread_seconds = unread_seconds
        self._open: set[LimitedProtocol] = set()
        self._idle: dict[LimitedProtocol, None] = {}
        self._warned_at = -WARN_SECONDS

    def protocol(self, of: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
        """A subclass of uvicorn's protocol class `of` whose connections are limited by this
        object.
        """
        return type("LimitedProtocol", (LimitedProtocol, of), {"_all": self})

    def add(self, connection: LimitedProtocol) -> None:
        """Count a new connection, and close one if there are too many."""
        if len(self._open) >= self.limit:
            self._warn_full()
            closed = next(iter(self._idle), connection)
            closed.transport.abort()
            self.remove(closed)
            if closed is connection:
                return
        self._open.add(connection)
        self.idle(connection, True)

    def remove(self, connection: LimitedProtocol) -> None:
        """Stop counting a connection that was closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def idle(self, connection: LimitedProtocol, is_idle: bool) -> None:
        """Record whether an open connection is idle."""
        if not is_idle:
            self._idle.pop(connection, None)
        elif connection in self._open:
            self._idle.setdefault(connection)

    def _warn_full(self) -> None:
        if clock.monotonic() - self._warned_at >= WARN_SECONDS:
            self._warned_at = clock.monotonic()
            logger.warning(
                f"more than {self.limit} HTTP connections at a time: those idle for the longest "
                "time are closed, so that runs can open files. A higher limit of open files "
                "(`ulimit -n`) allows more"
            )


class LimitedProtocol(asyncio.Protocol):
    """A mixin for uvicorn's HTTP protocols that closes a connection whose request does not arrive
    in time.
    """

    _all: Connections
    transport: Any
    cycle: Any
    flow: Any
    loop: asyncio.AbstractEventLoop
    _timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _unread = 0
    _body_timer: asyncio.TimerHandle | None = None
    _body_of: Any = None  # the request whose body is awaited
    _body_began_at = _body_moved_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect_request()
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_unread_timer()
        self._stop_body_timer()
        self._all.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_body_left:
            self._stop_waiting()
            self._expect_body()
        elif self._is_answered:
            self._stop_body_timer()
            if not self.transport.is_closing():
                self._expect_request()
                self._unread += len(data)
                if self._unread > MOST_HEADER_BYTES:
                    self.transport.abort()
        else:
            self._stop_waiting()
            self._stop_body_timer()
        self._all.idle(self, self._is_idle)

    def shutdown(self) -> None:
        """The server stops, and waits until the open requests are answered."""
        super().shutdown()  # type: ignore[misc]
        if self._is_body_left:
            self.loop.call_later(LAST_BODY_SECONDS, self._give_up_body_of, self.cycle)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stop_unread_timer()
        self._unread_timer = self.loop.call_later(self._all.unread_seconds, self._give_up)

    def resume_writing(self) -> None:
        self._stop_unread_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        self._all.idle(self, self._is_idle)

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: the request is answered without an upgrade, and uvicorn would log how to
        install WebSockets.
        """

    @property
    def _is_idle(self) -> bool:
        return self._is_answered or self._is_body_left

    @property
    def _is_answered(self) -> bool:
        """Whether there is no request whose headers have arrived and whose response is not
        complete.
        """
        return self.cycle is None or bool(self.cycle.response_complete)

    @property
    def _is_body_left(self) -> bool:
        """Whether the headers of a request have arrived and its body is not complete.

        Its response may be complete, in which case the rest of the body is discarded.
        """
        return self.cycle is not None and bool(self.cycle.more_body)

    def _expect_request(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self._all.request_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        self._unread = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expect_body(self) -> None:
        """Begin or continue to wait for a body, of which a part has just arrived."""
        self._body_moved_at = clock.monotonic()
        if self._body_of is not self.cycle:
            self._stop_body_timer()
            self._body_of = self.cycle
            self._body_began_at = self._body_moved_at
        if self._body_timer is None:
            self._check_body()

    def _check_body(self) -> None:
        """End the connection if the body is late, and otherwise check again when it would be."""
        now = clock.monotonic()
        # While the application does not read the received data, the client can send no more.
        if self.flow.read_paused:
            self._body_began_at = self._body_moved_at = now
        late_at = min(
            self._body_moved_at + self._all.body_pause_seconds,
            self._body_began_at + self._all.body_seconds,
        )
        if now >= late_at:
            self._give_up()
        else:
            self._body_timer = self.loop.call_later(late_at - now, self._check_body)

    def _stop_body_timer(self) -> None:
        self._body_of = None
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _stop_unread_timer(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None

    def _give_up_body_of(self, cycle: Any) -> None:
        if self.cycle is cycle and self._is_body_left:
            self._give_up()

    def _give_up(self) -> None:
        self.transport.abort()
