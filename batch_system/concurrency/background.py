"""A background loop of this process: it runs from its start until it is stopped.

Each loop takes turns. A turn has a time limit, because whatever it waits for may never answer. The
supervisor of the process (supervisor.py) watches all loops from a thread, for loops that have ended
and for turns that exceed their limit.
"""

from __future__ import annotations

import asyncio
import io
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from batch_system import tracing
from batch_system.concurrency.limits import LimitReached, limited

TURN_SECONDS = 10.0
"""How long a turn may take, unless its loop sets another limit: a third of the default of
LEASE_SECONDS.
"""
MOST_TIMES = 8
"""After a turn has reached its limit, the next one may take twice as long, up to this many times
the first limit.
"""
STOP_SECONDS = 3.0
"""How long a loop that is stopped may take until it is cancelled once more."""


OnEnd = Callable[["Background", BaseException | None], None]


class Turn:
    """A turn in progress. `age`: the seconds in which the event loop was able to work on it."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.age = 0.0


class Background(ABC):
    """A loop. Its name, for people, is that of its class."""

    turn_seconds = TURN_SECONDS
    """How long a turn of this loop may take at first."""
    turn: Turn | None = None
    """The turn in progress, if any."""
    work: asyncio.Task[None]
    _turn_limit: float | None = None

    def start(self, on_end: OnEnd | None = None) -> None:
        """Begin. `on_end`: called if the loop ends without being stopped, with its error if there
        is one.
        """
        self._is_asked_to_end = False
        self._on_unasked_end = on_end
        with tracing.suppressed():
            self.work = asyncio.create_task(self._loop(), name=f"batch-{self.name}")
        self.work.add_done_callback(self._after_end)

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def is_alive(self) -> bool:
        return not self.work.done()

    async def stop(self) -> None:
        """End the loop. Its cleanup has STOP_SECONDS, for after them it is cancelled again.

        With Python 3.11, older SQLAlchemy 2.0 drops a cancel that comes just as a wait for a
        connection ends.
        """
        self._is_asked_to_end = True
        while self.is_alive:
            self.work.cancel()
            await asyncio.wait([self.work], timeout=STOP_SECONDS)

    def stack(self) -> str:
        """Where the loop is now, as the lines of a traceback. Any thread may call it."""
        lines = io.StringIO()
        self.work.print_stack(file=lines)
        return lines.getvalue()

    @abstractmethod
    async def _loop(self) -> None: ...

    @asynccontextmanager
    async def limited_turn(self) -> AsyncIterator[None]:
        """One turn. Raises TimeoutError when it reaches its limit; the next turn may then take
        twice as long.
        """
        limit = self._turn_limit or self.turn_seconds
        self.turn = Turn(limit)
        try:
            async with limited(limit):
                yield
        except LimitReached:
            self._turn_limit = min(MOST_TIMES * self.turn_seconds, limit * 2)
            raise
        else:
            self._turn_limit = None
        finally:
            self.turn = None

    def _after_end(self, work: asyncio.Task[None]) -> None:
        if not self._is_asked_to_end and self._on_unasked_end is not None:
            self._on_unasked_end(self, None if work.cancelled() else work.exception())


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, at most this many seconds. Returns whether it is set.

    With asyncio.wait_for, Python 3.11 would drop a cancel that comes just as the event is set, and
    a stop would not end.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
