"""Live events: one reader of the ledger in each process, for any number of streams.

It reads once a second while somebody watches, compares with what it has read before, and gives each stream what has
changed in its topics. Ids of events are `process.number`: a stream that comes back gets what it has missed, as far as
it is kept, and otherwise one event `reload`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from service import clock
from service.errors import BatchError
from service.logs import get_logger
from service.operations.live import Look
from service.operations.operations import Operations
from service.operations.results import Result

logger = get_logger("service.batch")

LOOK_SECONDS = 1.0
KEPT_SECONDS = 60.0
MOST_KEPT_BYTES = 2_000_000
MOST_WAITING_BYTES = 500_000
"""A stream that has so many bytes waiting gets `reload` instead of them."""
MOST_STREAMS = 1_000
MOST_STREAMS_OF_ONE = 50
MOST_RUNS = 200
"""How many single runs are watched in one process at most."""


class Event(NamedTuple):
    """An event. `topic`: runs, tasks, nodes or run:ID. `name`: "run", "task", "node" or "reload"."""

    id: str
    topic: str
    name: str
    data: str
    at: float

    @property
    def size(self) -> int:
        return len(self.data) + 100

    def encoded(self) -> bytes:
        """The event as it is sent. JSON has no line breaks outside of its strings, where they are escaped."""
        return f"id: {self.id}\nevent: {self.name}\ndata: {self.data}\n\n".encode()


class TooManyStreams(BatchError):
    """The caller, or all callers together, have too many streams open."""

    kind = "unavailable"


class Stream:
    """What one client watches. `topics`: as in Event."""

    def __init__(self, topics: frozenset[str], owner: str) -> None:
        self.topics, self.owner = topics, owner
        self._waiting: deque[Event] = deque()
        self._bytes = 0
        self._has_missed = False
        self._wake = asyncio.Event()

    def put(self, event: Event) -> None:
        """Add an event, or note that the client is too slow."""
        if self._bytes + event.size > MOST_WAITING_BYTES:
            self._waiting.clear()
            self._bytes, self._has_missed = 0, True
        else:
            self._waiting.append(event)
            self._bytes += event.size
        self._wake.set()

    async def next(self, feed: Feed, seconds: float) -> list[Event]:
        """The events that wait; after `seconds` without one: none."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()
        events = [*self._waiting]
        self._waiting.clear()
        self._bytes = 0
        if self._has_missed:
            self._has_missed = False
            events.insert(0, feed.reload())
        return events


class Feed:
    """The events of one process. `is_stopping`: whether the service has begun to stop, which ends all streams."""

    def __init__(self, operations: Operations, process: str, is_stopping: Callable[[], bool]) -> None:
        self._operations = operations
        self._process = process
        self.is_stopping = is_stopping
        self._number = 0
        self._kept: deque[Event] = deque()
        self._kept_bytes = 0
        self._streams: set[Stream] = set()
        self._reader: asyncio.Task[None] | None = None
        self._last: dict[str, dict[str, Any]] = {}

    def open(self, topics: frozenset[str], owner: str, last_id: str | None) -> Stream:
        """Begin a stream. `last_id`: the last event that the client has got. Raises TooManyStreams."""
        owners = Counter(stream.owner for stream in self._streams)
        runs = self._runs() | {topic for topic in topics if topic.startswith("run:")}
        if owners[owner] >= MOST_STREAMS_OF_ONE or len(self._streams) >= MOST_STREAMS or len(runs) > MOST_RUNS:
            raise TooManyStreams("too many streams are open: close some, or watch fewer runs")
        stream = Stream(topics, owner)
        for event in self._missed(last_id):
            if event.topic in topics or event.name == "reload":
                stream.put(event)
        self._streams.add(stream)
        if self._reader is None or self._reader.done():
            self._last.clear()
            self._reader = asyncio.get_running_loop().create_task(self._read())
        return stream

    def close(self, stream: Stream) -> None:
        """End a stream. Without streams the ledger is not read."""
        self._streams.discard(stream)

    def reload(self) -> Event:
        """The event that tells a client to read everything again."""
        return Event(f"{self._process}.{self._number}", "", "reload", "{}", clock.monotonic())

    def _missed(self, last_id: str | None) -> Iterable[Event]:
        if last_id is None:
            return []
        process, _, number = last_id.rpartition(".")
        if process != self._process or not number.isdigit() or len(number) > 18:
            return [self.reload()]
        oldest = self._number - len(self._kept)
        if int(number) < oldest or int(number) > self._number:
            return [self.reload()]
        return [event for event in self._kept if int(event.id.rpartition(".")[2]) > int(number)]

    def _runs(self) -> set[str]:
        return {topic for stream in self._streams for topic in stream.topics if topic.startswith("run:")}

    async def _read(self) -> None:
        while self._streams and not self.is_stopping():
            began = clock.monotonic()
            topics = {topic for stream in self._streams for topic in stream.topics}
            runs = {topic.removeprefix("run:") for topic in topics if topic.startswith("run:")}
            try:
                self._compare(await self._operations.look(topics, runs), topics, runs)
            except BatchError as error:
                logger.debug(f"live events: {error.message}")
            except Exception:  # the background loop's boundary
                logger.exception("live events could not be read")
            await asyncio.sleep(max(0.0, LOOK_SECONDS - (clock.monotonic() - began)))

    def _compare(self, look: Look, topics: set[str], runs: set[str]) -> None:
        """Publish what is different from the last look."""
        if "runs" in topics:
            self._changed("runs", "run", look.runs)
        for run in runs:
            if run in look.runs:
                self._changed(f"run:{run}", "run", {run: look.runs[run]})
        if "tasks" in topics:
            self._changed("tasks", "task", look.tasks)
        if "nodes" in topics:
            self._changed("nodes", "node", look.nodes)
        self._last = {topic: rows for topic, rows in self._last.items() if topic in topics}

    def _changed(self, topic: str, name: str, rows: dict[str, Any]) -> None:
        before = self._last.get(topic)
        now = {key: _significant(row) for key, row in rows.items()}
        if before is not None:
            for key in [key for key, value in now.items() if before.get(key) != value]:
                self._publish(topic, name, rows[key].model_dump_json())
        self._last[topic] = now

    def _publish(self, topic: str, name: str, data: str) -> None:
        self._number += 1
        event = Event(f"{self._process}.{self._number}", topic, name, data, clock.monotonic())
        self._kept.append(event)
        self._kept_bytes += event.size
        oldest = clock.monotonic() - KEPT_SECONDS
        while self._kept and (self._kept_bytes > MOST_KEPT_BYTES or self._kept[0].at < oldest):
            self._kept_bytes -= self._kept.popleft().size
        for stream in self._streams:
            if topic in stream.topics:
                stream.put(event)


def _significant(row: Result) -> dict[str, Any]:
    """The fields whose change is told. A beat and an expected end change all the time."""
    return row.model_dump(exclude={"beats", "seen_at", "loop_lag", "rate", "eta", "progress_at"})
