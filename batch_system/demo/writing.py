"""Writes the ledger of the story, in the order of its instants: the clock stands at the instant
that is written.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from batch_system import clock
from batch_system.batch.incidents.watch import Watch
from batch_system.batch.incidents.watched import Thresholds
from batch_system.batch.ledger import json_rows, run_logs, runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.run_logs import Block, LogLine
from batch_system.batch.ledger.runs import Claimed, NewRun, claimed_from
from batch_system.batch.ledger.states import RunState
from batch_system.batch.nodes import ledger_poll
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.tasks.registry import Task
from batch_system.database import types
from batch_system.database.engine import Database
from batch_system.demo.failing import Failure, stamp
from batch_system.demo.ordinary import SEED, Made
from batch_system.demo.times import SERVICES
from batch_system.operations.asking.actor import Actor
from batch_system.operations.asking.context import Loaded
from batch_system.operations.operations import Operations
from batch_system.settings.settings import Settings

AT_ONCE = 2_000
"""So many rows are written by one statement."""
ADDRESSES = {"mara": "10.4.0.17", "jonas": "10.4.0.23", "lena": "10.4.0.31"}

Act = Callable[[], Awaitable[None]]


@contextmanager
def ids_of_the_story() -> Iterator[None]:
    """Within the block new ids have the time of the moved clock, and the same digits whenever the
    story is made.
    """
    digits = random.Random(SEED)

    def unix_ns() -> int:
        return int(clock.now().timestamp() * 1_000_000) * 1_000

    with (
        patch.object(clock, "unix_ns", unix_ns),
        patch.object(types, "secrets", SimpleNamespace(randbits=digits.getrandbits)),
    ):
        yield


def id_at(instant: datetime) -> str:
    """A new id that was made at this instant."""
    with clock.moved(instant):
        return types.new_id()


@dataclass
class Stage:
    """The databases, and what is still to be written.

    Attributes:
        nodes: The id of each service of SERVICES.
        made: The ordinary runs.
        told_of: The ids of those by which something that is told ends.
        watcher: The id of the service that has the duty of the watch now.
    """

    ledger: Database
    application: Database
    tasks: Mapping[str, Task]
    settings: Settings
    nodes: list[str] = field(default_factory=lambda: [id_at(service.start) for service in SERVICES])
    made: list[Made] = field(default_factory=list)
    told_of: set[str] = field(default_factory=set)
    watcher: str = ""
    _watch: Watch | None = None
    _acts: list[tuple[datetime, int, bool, Act]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)
    _position: int = 0

    def by(self, person: str) -> Operations:
        """The operations, for a person at the pages."""
        actor = Actor(person, "operator", "page", ADDRESSES[person])
        loaded = Loaded(self.tasks, [])
        operations = Operations(
            self.ledger,
            self.application,
            lambda: loaded,
            self.settings,
            node=self.watcher,
            are_ready=True,
        )
        return operations.by(actor)

    def node_at(self, instant: datetime, host: str = "node-a") -> str:
        """The id of the service of this host that ran at an instant."""
        return next(
            node
            for node, service in zip(self.nodes, SERVICES, strict=True)
            if service.host == host and service.is_up(instant, instant)
        )

    def add(self, instant: datetime, act: Act, *, looks: bool = True) -> None:
        """Let `act` be awaited at an instant. `looks`: the watch looks at the ledger after it."""
        heapq.heappush(self._acts, (instant, next(self._numbers), looks, act))

    def set_aside(self, before: datetime) -> list[Made]:
        """Take out the ordinary runs that have ended before an instant, but for those of which
        something is told.
        """
        aside = [
            made for made in self.made if made.ended < before and made.run["id"] not in self.told_of
        ]
        ids = {made.run["id"] for made in aside}
        self.made = [made for made in self.made if made.run["id"] not in ids]
        return aside

    async def play(self) -> None:
        """Write everything, within `clock.moved`."""
        self.made.sort(key=lambda made: made.ended)
        while self._acts:
            instant, _, looks, act = heapq.heappop(self._acts)
            await self._advance(instant)
            await act()
            if looks:
                await self.look()
        await self._advance(datetime.max.replace(tzinfo=clock.now().tzinfo), moves=False)

    async def _advance(self, instant: datetime, *, moves: bool = True) -> None:
        """Write the ordinary runs that have ended until then, and move the clock."""
        first = self._position
        while self._position < len(self.made) and self.made[self._position].ended <= instant:
            self._position += 1
        ended = self.made[first : self._position]
        if moves and instant > clock.now():
            clock.advance(instant - clock.now())
        await self.write(ended)

    async def write(self, ended: Sequence[Made]) -> None:
        """Write runs that have ended."""
        for begin in range(0, len(ended), AT_ONCE):
            await self._write(ended[begin : begin + AT_ONCE])

    async def _write(self, ended: Sequence[Made]) -> None:
        async with self.ledger.engine.begin() as connection:
            await json_rows.insert(connection, tables.runs, [made.run for made in ended])
            await json_rows.insert(
                connection, tables.attempts, [row for made in ended for row in made.attempts]
            )
            await run_logs.write(
                connection, run_logs.pack([block for made in ended for block in made.log])
            )

    # The watch

    def watch_by(self, node: str) -> None:
        """From now on this node has the duty of the watch."""
        thresholds = Thresholds(backup_after=self.settings.BATCH_ALERT_BACKUP_AFTER)
        self.watcher = node
        self._watch = Watch(
            self.ledger,
            self.application,
            node,
            thresholds,
            lambda names: [],
            lambda: None,
            Outage(),
        )

    async def look(self) -> None:
        """Let the watch notice what there is, and make its checks."""
        watch = self._watch
        if watch is None:
            return
        watch._changes = None  # the time since the last look is no outage
        async with self.ledger.reader.connect() as connection:
            watch.on_changes(await ledger_poll.read(connection, self.watcher))
        watch._checks.forget_all()  # ordinary runs come into the ledger when they end
        await watch._turn()

    # Single runs

    async def begin(self, new: NewRun, node: str, started: datetime | None = None) -> Claimed:
        """Write a run that a node starts now, or has started before."""
        new.start(node, started or clock.now())
        async with self.ledger.engine.begin() as connection:
            await runs.insert(connection, [new])
        return claimed_from(new)

    async def claim(self, run: str, node: str) -> Claimed:
        """Let a node claim a run that waits."""
        async with self.ledger.engine.begin() as connection:
            (claimed,) = await transitions.claim(connection, [run], node, clock.now())
        return claimed

    async def end(
        self,
        claimed: Claimed,
        node: str,
        failure: Failure | None = None,
        *,
        state: RunState = RunState.SUCCEEDED,
        wait: float | None = None,
        lines: Sequence[LogLine] = (),
        **values: Any,
    ) -> None:
        """End an attempt now. `wait`: the seconds until the next one. `values`: further ones of the
        outcome.
        """
        now = clock.now()
        if failure is not None:
            state = RunState.FAILED if wait is None else RunState.RETRYING
            follows = (
                f"; attempt {claimed.attempt + 1} follows in {wait:.1f} s"
                if wait is not None
                else ""
            )
            lines = [*lines, failure.line(now, follows)]
            values |= {"reason": failure.reason, "error": failure.facts}
            values["fingerprint"] = failure.fingerprint if wait is None else None
        outcome = Outcome(
            id=claimed.id,
            fence=claimed.fence,
            state=state,
            outcome=failure.outcome if failure is not None else state.value,
            number=claimed.attempt,
            node=node,
            task=claimed.task,
            slot=claimed.slot,
            started_at=claimed.attempt_started_at,
            ended_at=now,
            due_at=now + timedelta(seconds=wait) if wait is not None else None,
            **values,
        )
        async with self.ledger.engine.begin() as connection:
            assert await transitions.finish(connection, [outcome]) == []
            await run_logs.write(
                connection,
                run_logs.pack(
                    [Block(claimed.id, claimed.fence, claimed.attempt, 0, lines)] if lines else []
                ),
            )

    def new(self, task: str, slot: datetime | None, created: datetime, **values: Any) -> NewRun:
        """A new run of a slot, or one that code has asked for."""
        exclusive = self.tasks[task].exclusive
        with clock.moved(created):
            if slot is not None:
                return NewRun.scheduled(
                    task, slot, created, catch_up=False, exclusive=exclusive, priority=0
                )
            return NewRun.queued(task, None, created, exclusive=exclusive, priority=0, **values)


def info(task: str, at: datetime, text: str, level: str = "info") -> LogLine:
    """A line that the code of a task has logged."""
    return LogLine(stamp(at), level, f"tasks.{task}", text)
