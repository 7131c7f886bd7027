"""Backfill: runs for slots of the past, by the schedule that the task has now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.cron.cron import Schedule
from service.batch.firing.misfires import INSTANT, ON_TIME
from service.batch.ledger import database_time, runs, schedules
from service.batch.ledger.runs import NewRun
from service.batch.ledger.states import FINAL, Rank
from service.batch.ledger.tables import runs as runs_table
from service.batch.queue.retry import again
from service.batch.tasks.registry import Task
from service.concurrency.offload import offload
from service.database.engine import Database
from service.errors import InvalidParameters

PAGE = 250
"""Slots handled in one transaction, whose rows are made on the event loop."""


class Fate(StrEnum):
    """What becomes of a slot: it gets a run, its run goes again, or its run is left as it is."""

    NEW = "new"
    AGAIN = "again"
    LEFT = "left"


class Entry(NamedTuple):
    """`run` and `state`: of the run that the slot has already."""

    slot: datetime
    fate: Fate
    run: str | None = None
    state: str | None = None


@dataclass(frozen=True)
class Interval:
    """From `since` to `until`, both included. None of the slots to come are in it: they fire by themselves."""

    schedule: Schedule
    since: datetime
    until: datetime

    async def count(self, most: int) -> int:
        """How many slots it has; `most` + 1 stands for more."""
        return await offload(lambda: sum(1 for _ in islice(self.slots(), most + 1)))

    def slots(self) -> Iterable[datetime]:
        return self.schedule.between(self.since - INSTANT, self.until)


async def interval_of(connection: AsyncConnection, task: str, since: datetime, until: datetime) -> Interval:
    """By the schedule that is in force in the ledger. Raises InvalidParameters where there is none, or no interval.

    A slot that may still be fired on time is left to that: a service decides by it about others of the task.
    """
    opened = (await schedules.open_schedules(connection)).get(task)
    if opened is None or not opened.is_usable:
        raise InvalidParameters(f"task {task}: the ledger has no schedule of it now, so there are no slots to backfill")
    if since > until:
        raise InvalidParameters(f"there are no slots from {since:%Y-%m-%d %H:%M:%S} to {until:%Y-%m-%d %H:%M:%S} UTC")
    handled = max(opened.fired_until, await database_time.now_of(connection) - ON_TIME)
    return Interval(opened.schedule, since, min(until, handled))


def ignore(entry: Entry) -> None:
    """For who wants no single slot."""


@dataclass(frozen=True)
class Backfill:
    """Runs of `task` for slots that have none; with `redo`, also a new attempt of each run that is over.

    They queue behind all that is on time or was started by hand, and don't stand in its way.
    """

    ledger: Database
    application: Database
    task: Task
    by: str
    redo: bool = False

    async def look(self, interval: Interval, see: Callable[[Entry], None] = ignore) -> Counter[Fate]:
        """What `make` would do; changes nothing."""
        counts: Counter[Fate] = Counter()
        found = iter(interval.slots())
        while page := await offload(lambda: list(islice(found, PAGE))):
            for entry in await self._entries(page):
                counts[entry.fate] += 1
                see(entry)
        return counts

    async def make(self, interval: Interval, see: Callable[[Entry], None] = ignore) -> Counter[Fate]:
        """Page by page, each in a transaction of its own: made once, however often it is asked for."""
        counts: Counter[Fate] = Counter()
        found = iter(interval.slots())
        while page := await offload(lambda: list(islice(found, PAGE))):
            for entry in await self._make(await self._entries(page)):
                counts[entry.fate] += 1
                see(entry)
        return counts

    async def _make(self, entries: list[Entry]) -> list[Entry]:
        """Returns what became of them: somebody else may have been first."""
        new = [entry.slot for entry in entries if entry.fate == Fate.NEW]
        async with self.ledger.engine.begin() as connection:
            now = await database_time.now_of(connection)
            made = [self._new(slot, now) for slot in new]
            went = await runs.insert(connection, made)
        there = {run.slot for run in made if run.id not in went}
        redone = [entry.run for entry in entries if entry.fate == Fate.AGAIN and entry.run]
        if redone:
            went |= await again(self.ledger, self.application, redone, Rank.CATCH_UP, self.by)
        lost = {entry.slot for entry in entries if entry.fate == Fate.AGAIN and entry.run not in went} | there
        return [entry._replace(fate=Fate.LEFT) if entry.slot in lost else entry for entry in entries]

    async def _entries(self, page: list[datetime]) -> list[Entry]:
        statement = (
            select(runs_table.c.slot, runs_table.c.id, runs_table.c.state)
            .where(runs_table.c.task == self.task.name, text("origin <> 'manual'"))  # to the letter as in the index
            .where(runs_table.c.slot.between(page[0], page[-1]))
        )
        async with self.ledger.reader.connect() as connection:
            there = {slot: (run, state) for slot, run, state in await connection.execute(statement)}
        return [self._entry(slot, *there.get(slot, (None, None))) for slot in page]

    def _entry(self, slot: datetime, run: str | None, state: str | None) -> Entry:
        if run is None:
            return Entry(slot, Fate.NEW)
        return Entry(slot, Fate.AGAIN if self.redo and state in FINAL else Fate.LEFT, run, state)

    def _new(self, slot: datetime, now: datetime) -> NewRun:
        task = self.task
        asked: dict[str, Any] = {"priority": task.policies.priority, "requested_by": self.by}
        return NewRun.queued(task.name, slot, now, is_backfill=True, exclusive=task.exclusive, **asked)
