"""One stream of live events, with those that wait for its client, which may be slow."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple

MOST_WAITING_BYTES = 500_000
"""A stream that has this many bytes waiting gets `reload` instead of them."""


class Event(NamedTuple):
    """An event, as it is sent in `text`. `topic`: runs, tasks, nodes or run:ID. `at`: on the
    monotonic clock.

    It is "run", "task", "node" or "reload"; or "start", which only tells the client the id that it
    begins with.
    """

    number: int
    topic: str
    text: bytes
    at: float

    @classmethod
    def of(cls, id: str, topic: str, name: str, data: str, at: float) -> Event:
        """JSON has no line breaks outside of its strings, where they are escaped."""
        named = f"event: {name}\ndata: {data}\n" if name != "start" else ""
        return cls(int(id.rpartition(".")[2]), topic, f"id: {id}\n{named}\n".encode(), at)

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.text) + 200


class Stream:
    """What one client watches. `topics`: as in Event. `is_new`: the client has got no event
    before.
    """

    def __init__(self, topics: frozenset[str], owner: str, is_new: bool) -> None:
        self.topics = topics
        self.owner = owner
        self.is_new = is_new
        self.has_begun = False
        self._waiting: deque[Event] = deque()
        self._bytes = 0
        self._has_missed = False
        self._wake = asyncio.Event()

    def begin(self, first: Iterable[Event]) -> None:
        """Begin with these events. Until then the client gets none."""
        self.has_begun = True
        for event in first:
            self.put(event)
        self._wake.set()

    def put(self, event: Event) -> None:
        """Add an event, or note that the client is too slow."""
        if not self.has_begun or self._has_missed:
            return
        if self._bytes + event.size > MOST_WAITING_BYTES:
            self._waiting.clear()
            self._bytes = 0
            self._has_missed = True
        else:
            self._waiting.append(event)
            self._bytes += event.size
        self._wake.set()

    def wake(self) -> None:
        """Let `next` return."""
        self._wake.set()

    async def next(self, reload: Callable[[], Event], seconds: float) -> list[Event]:
        """The events that wait; empty after `seconds` without one. `reload`: makes the event that a
        slow client gets instead.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()
        events = [reload()] if self._has_missed else [*self._waiting]
        self._waiting.clear()
        self._bytes = 0
        self._has_missed = False
        return events
