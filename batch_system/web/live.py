"""Live events: one reader of the ledger in each process, for any number of streams.

While there are streams, it reads once a second, compares the result with the one before, and gives
each stream the changes in its topics. Ids of events are `process.number`: a stream that comes back
gets what it has missed, if its topics were watched all the time and the events are kept, and
otherwise one event `reload`.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from batch_system import clock, tracing
from batch_system.batch.ledger.states import FINAL
from batch_system.errors import BatchError
from batch_system.logs import get_logger
from batch_system.operations.asking.results import Result
from batch_system.operations.operations import Operations
from batch_system.operations.system import live
from batch_system.operations.system.live import NEWEST, Look
from batch_system.web.stream import Event, Stream

logger = get_logger("batch_system.batch")

LOOK_SECONDS = 1.0
LINGER_SECONDS = 10.0
"""A topic is watched for this time after its last stream, so that a client that comes back has
missed nothing.
"""
KEPT_SECONDS = 60.0
MOST_KEPT_BYTES = 2_000_000
MOST_STREAMS = 1_000
MOST_STREAMS_OF_ONE = 50
MOST_RUNS = 200
"""At most this many single runs are watched in one process."""
MOST_FOLLOWED = 2_000
"""At most this many unfinished runs are followed to their end after they have left the list of the
newest ones.
"""


class TooManyStreams(BatchError):
    """The caller, or all callers together, have too many streams open."""

    kind = "unavailable"


class Feed:
    """The events of one process. `stopping`: set when the service begins to stop, which ends all
    streams.

    `revoked`: changes when a token or a session is revoked, in any process. It is read while
    streams are open.
    """

    def __init__(self, operations: Operations, process: str, stopping: asyncio.Event) -> None:
        self.stopping = stopping
        self.revoked: object = None
        self._operations = operations
        self._process = process
        self._number = 0
        self._kept: deque[Event] = deque()
        self._kept_bytes = 0
        self._forgotten = 0  # the number of the last event that is not kept any more
        self._streams: set[Stream] = set()
        self._turns = asyncio.Lock()
        self._lingering: dict[str, float] = {}
        self._reader: asyncio.Task[None] | None = None
        self._last: dict[str, dict[str, Any]] = {}
        self._since: dict[
            str, int
        ] = {}  # the number since which a topic has been watched without a gap

    def open(self, topics: frozenset[str], owner: str, last_id: str | None) -> Stream:
        """Begin a stream. `last_id`: the last event that the client has got. Raises
        TooManyStreams.
        """
        owners = Counter(stream.owner for stream in self._streams)
        runs = {topic for topic in (*topics, *self._topics()) if topic.startswith("run:")}
        if (
            owners[owner] >= MOST_STREAMS_OF_ONE
            or len(self._streams) >= MOST_STREAMS
            or len(runs) > MOST_RUNS
        ):
            raise TooManyStreams("too many streams are open: close some, or watch fewer runs")
        if self._reader is None or self._reader.done():
            self._last.clear()
            self._since.clear()
            with tracing.suppressed():
                self._reader = asyncio.get_running_loop().create_task(self._read())
        stream = Stream(topics, owner, is_new=last_id is None)
        missed = self._missed(topics, last_id) if last_id is not None else None
        if missed is not None:
            stream.begin(missed)
        else:
            self._begin(stream)
        self._streams.add(stream)
        return stream

    async def stop(self) -> None:
        """End the reading of the ledger."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])

    def close(self, stream: Stream) -> None:
        """End a stream. Without streams, it stops reading the ledger after a while."""
        self._streams.discard(stream)
        until = clock.monotonic() + LINGER_SECONDS
        for topic in stream.topics:
            self._lingering.pop(topic, None)
            self._lingering[topic] = until
        while len(self._lingering) > MOST_RUNS:
            self._lingering.pop(next(iter(self._lingering)))

    async def turn(self) -> None:
        """Wake streams one by one, yielding to the event loop in between.

        Otherwise all of them would send at once, and nothing else would run meanwhile.
        """
        async with self._turns:
            await asyncio.sleep(0)

    def event(self, topic: str, name: str, data: str = "{}") -> Event:
        """An event with the number of the last one."""
        return Event.of(f"{self._process}.{self._number}", topic, name, data, clock.monotonic())

    def reload(self) -> Event:
        """The event that tells a client to read everything again."""
        return self.event("", "reload")

    def _begin(self, stream: Stream) -> None:
        """Begin a stream if all of its topics have been read: what the client reads from now on is
        not older.
        """
        if stream.topics <= self._since.keys():
            start = self.event("", "start")
            stream.begin([start] if stream.is_new else [self.reload()])

    def _missed(self, topics: frozenset[str], last_id: str) -> Iterable[Event] | None:
        """The events after this one in these topics; None if not all of them are known."""
        process, _, digits = last_id.rpartition(".")
        if process != self._process or not digits.isdecimal() or len(digits) > 18:
            return None
        number = int(digits)
        oldest = max((self._since.get(topic, self._number + 1) for topic in topics), default=0)
        if not max(oldest, self._forgotten) <= number <= self._number:
            return None
        return [event for event in self._kept if event.number > number and event.topic in topics]

    def _topics(self) -> set[str]:
        return {topic for stream in self._streams for topic in stream.topics}

    def _watched(self) -> set[str]:
        now = clock.monotonic()
        self._lingering = {topic: until for topic, until in self._lingering.items() if until > now}
        return self._topics() | self._lingering.keys()

    async def _read(self) -> None:
        while not self.stopping.is_set() and (topics := self._watched()):
            began = clock.monotonic()
            runs = {topic.removeprefix("run:") for topic in topics if topic.startswith("run:")}
            try:
                look = await live.look(self._operations.context, topics, runs | self._followed())
                self.revoked = look.revoked
                self._compare(look, topics, runs)
            except BatchError as error:
                logger.debug(f"live events: {error.message}")
            except Exception:  # the background loop's boundary
                logger.exception("live events could not be read")
            await asyncio.sleep(max(0.0, LOOK_SECONDS - (clock.monotonic() - began)))

    def _followed(self) -> set[str]:
        """The runs of the list that have not ended, which may leave the list of the newest ones
        before they do.
        """
        return {
            run
            for run, fields in self._last.get("runs", {}).items()
            if fields["state"] not in FINAL
        }

    def _compare(self, look: Look, topics: set[str], runs: set[str]) -> None:
        """Publish what has changed since the last reading, and begin the streams whose topics have
        been read now.
        """
        if "runs" in topics:
            self._list_of_runs(look)
        for run in runs:
            self._changed(f"run:{run}", "run", {run: look.runs[run]} if run in look.runs else {})
        if "tasks" in topics:
            self._changed("tasks", "task", look.tasks)
        if "nodes" in topics:
            self._changed("nodes", "node", look.nodes)
        if new := topics - self._since.keys():
            self._number += 1  # an id from before a gap is never one from after it
            self._since |= dict.fromkeys(new, self._number)
        for topic in self._since.keys() - topics:
            del self._since[topic]
            self._last.pop(topic, None)
        for stream in self._streams:
            if not stream.has_begun:
                self._begin(stream)

    def _list_of_runs(self, look: Look) -> None:
        before = self._last.get("runs")
        listed = {
            *look.newest,
            *(run for run, row in look.runs.items() if row.state == "running"),
            *(before or ()),
        }
        rows = {run: row for run, row in look.runs.items() if run in listed}
        is_overrun = len(look.newest) >= NEWEST and not any(
            run in (before or ()) for run in look.newest
        )
        if before is not None and (is_overrun or len(rows) > MOST_FOLLOWED):
            kept = {
                run: row
                for run, row in rows.items()
                if run in look.newest or row.state == "running"
            }
            self._last["runs"] = {run: _significant(row) for run, row in kept.items()}
            self._publish("runs", "reload")
        else:
            self._changed("runs", "run", rows)

    def _changed(self, topic: str, name: str, rows: Mapping[str, Result]) -> None:
        before = self._last.get(topic)
        now = {key: _significant(row) for key, row in rows.items()}
        if before is not None:
            for key in [key for key, value in now.items() if before.get(key) != value]:
                # The look does not count.
                self._publish(topic, name, rows[key].model_dump_json(exclude={"quarantined"}))
        self._last[topic] = now

    def _publish(self, topic: str, name: str, data: str = "{}") -> None:
        self._number += 1
        event = self.event(topic, name, data)
        self._kept.append(event)
        self._kept_bytes += event.size
        oldest = clock.monotonic() - KEPT_SECONDS
        while self._kept and (self._kept_bytes > MOST_KEPT_BYTES or self._kept[0].at < oldest):
            forgotten = self._kept.popleft()
            self._kept_bytes -= forgotten.size
            self._forgotten = forgotten.number
        for stream in self._streams:
            if topic in stream.topics:
                stream.put(event)


def _significant(row: Result) -> dict[str, Any]:
    """The fields whose changes are published. A beat and an expected end change all the time."""
    return row.model_dump(exclude={"beats", "seen_at", "loop_lag", "rate", "eta", "progress_at"})
