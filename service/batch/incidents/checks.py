"""The regular checks of the watch: what is over, and what has gone wrong without a row that says so."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.chunks import quarantine
from service.batch.execution.fingerprint import QUARANTINE
from service.batch.incidents import deadline_check, made_good, overdue, telling
from service.batch.incidents.made_good import Successes
from service.batch.incidents.telling import Channels
from service.batch.incidents.watched import Thresholds, WatchedTask, watched_tasks
from service.batch.ledger.incidents import incidents
from service.batch.ledger.incidents.incidents import OF_RUNS, Closed, IncidentKind, Opening
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import OPEN_FAILURE_SQL, missed, runs
from service.database.engine import Database

CHECK_SECONDS = 5.0
"""While an incident is open or a run is going on, the checks are made so often."""

MOST = 1_000


@dataclass(frozen=True)
class Checked:
    """`next_at`: when something may go wrong or be told next; None: not known. `has_told`: a message was written."""

    next_at: datetime | None
    has_told: bool


class Checks:
    """The checks of one node. It remembers which successes it has looked at."""

    def __init__(self, ledger: Database, application: Database, thresholds: Thresholds, channels: Channels) -> None:
        self._ledger, self._application = ledger, application
        self._thresholds, self._channels = thresholds, channels
        self._successes = Successes()

    def forget(self, tasks: Collection[str]) -> None:
        """Look at all successes of these tasks again, because which runs are failed has changed."""
        for task in tasks:
            self._successes.forget(task)

    async def redriven(self) -> list[str]:
        """The ids of runs whose items in quarantine were all processed since. Call it outside a transaction."""
        query = select(runs.c.id).where(runs.c.fingerprint == QUARANTINE, text(OPEN_FAILURE_SQL)).limit(MOST)
        async with self._ledger.reader.connect() as connection:
            opened = await incidents.are_open(connection, [IncidentKind.QUARANTINE])
            ids = list((await connection.execute(query)).scalars()) if opened else []
        if not ids:
            return []
        try:
            left = await quarantine.left(self._application, ids)
        except (DBAPIError, OSError):  # other parts report that the database can't be read
            return []
        return [run for run in ids if run not in left]

    async def check(self, connection: AsyncConnection, redriven: Sequence[str], now: datetime) -> Checked:
        """Make all checks in the caller's transaction. `redriven`: what `redriven()` has returned."""
        watched = await watched_tasks(connection)
        await made_good.by_themselves(connection, redriven, now)
        opened = await incidents.are_open(connection)
        good = await self._find_good(connection, opened, watched, now)
        wrong, instants = await self._find_wrong(connection, watched, now)
        over = await self._find_over(connection, opened, wrong)
        closed = [
            *await incidents.close(connection, good, Closed.MADE_GOOD, now),
            *await incidents.close(connection, over, Closed.OVER, now),
        ]
        known = {(row.kind, row.task, row.subject, row.fingerprint) for row in opened}
        new = [opening for opening in wrong if opening.key not in known]
        await incidents.open_or_continue(connection, new, now)
        told, held_until = await telling.tell(connection, watched, self._channels, now)
        await telling.tell_of_the_end(connection, closed, watched, self._channels, now)
        if self._thresholds.repeat:
            every = timedelta(seconds=self._thresholds.repeat)
            told += await telling.repeat(connection, watched, self._channels, every, now)
        following = [instant for instant in (*instants, held_until) if instant is not None]
        if len(opened) + len(new) > len(closed):
            following.append(now + timedelta(seconds=CHECK_SECONDS))
        return Checked(min(following, default=None), bool(told or closed))

    async def _find_wrong(
        self, connection: AsyncConnection, watched: Mapping[str, WatchedTask], now: datetime
    ) -> tuple[list[Opening], list[datetime | None]]:
        silent, next_silent = await overdue.silent_tasks(connection, watched, now)
        missed_deadlines, next_deadline = await deadline_check.check(connection, watched, now)
        old, next_old = await overdue.old_backups(connection, watched, self._thresholds, now)
        wrong = [
            *await overdue.late_slots(connection, watched, self._thresholds, now),
            *await overdue.slow_runs(connection, watched, self._thresholds, now),
            *silent,
            *missed_deadlines,
            *old,
        ]
        return wrong, [next_silent, next_deadline, next_old]

    async def _find_good(
        self,
        connection: AsyncConnection,
        opened: Sequence[Row[Any]],
        watched: Mapping[str, WatchedTask],
        now: datetime,
    ) -> list[str]:
        """Record which failed runs later successes have made good. Returns the ids of the incidents that are over."""
        by_task: dict[str, list[Row[Any]]] = {}
        for incident in opened:
            if incident.kind in OF_RUNS:
                by_task.setdefault(incident.task, []).append(incident)
        still_bad: set[str] = set()
        for name, its in by_task.items():
            task = watched.get(name)
            patient = await _not_good_yet(connection, its, task)
            still_bad |= {incident.id for incident in patient}
            failures = await made_good.open_failures(connection, name)
            if not failures:
                continue
            since = min(failure.created_at for failure in failures)
            successes = await self._successes.find(connection, name, since, now)
            waiting = {incident.fingerprint for incident in patient}
            candidates = [failure for failure in failures if failure.fingerprint not in waiting]
            each_counts = task is None or task.each_slot_counts
            await made_good.record(connection, made_good.matches(candidates, successes, each_counts), now)
            if patient:
                self._successes.forget(name)
        return [incident for incident in await incidents.without_open_runs(connection) if incident not in still_bad]

    async def _find_over(
        self, connection: AsyncConnection, opened: Sequence[Row[Any]], wrong: Sequence[Opening]
    ) -> list[str]:
        """The ids of the open incidents whose condition is over."""
        present = {opening.key for opening in wrong}
        over = [
            row.id
            for row in opened
            if row.kind in _CONDITIONS and (row.kind, row.task, row.subject, row.fingerprint) not in present
        ]
        over = [incident for incident in over if incident not in await _bad_backups(connection, opened)]
        over += [row.id for row in opened if row.kind == IncidentKind.DOWN]
        for row in opened:
            if (is_over := _IS_OVER.get(row.kind)) is not None and await is_over(connection, row):
                over.append(row.id)
        return over


_CONDITIONS = (IncidentKind.LATE, IncidentKind.SLOW, IncidentKind.SILENT, IncidentKind.BACKUP)


async def _not_good_yet(
    connection: AsyncConnection, its: Sequence[Row[Any]], task: WatchedTask | None
) -> list[Row[Any]]:
    """Those of these incidents of a task after which not enough runs have succeeded yet."""
    if task is None or task.close_after == 1:
        return []
    return [
        incident
        for incident in its
        if await made_good.successes_since(connection, task.name, incident.last_at, task.close_after) < task.close_after
    ]


async def _bad_backups(connection: AsyncConnection, opened: Sequence[Row[Any]]) -> set[str]:
    """The ids of the open incidents of backups of which a check has failed, and without a newer good one."""
    bad = {row.subject: row for row in opened if row.kind == IncidentKind.BACKUP and row.subject}
    good = await overdue.newer_good_backups(connection, {place: row.last_at for place, row in bad.items()})
    return {row.id for place, row in bad.items() if place not in good}


async def _are_resumed(connection: AsyncConnection, incident: Row[Any]) -> bool:
    """Whether no run of the lost node waits for another one any more."""
    waiting = text(f"(state || '') = '{RunState.INTERRUPTED}'")
    query = select(runs.c.id).where(runs.c.node == incident.subject, waiting).limit(1)
    return (await connection.execute(query)).first() is None


async def _are_met(connection: AsyncConnection, incident: Row[Any]) -> bool:
    """Whether the slots whose deadline was missed have succeeded by now."""
    slots = [datetime.fromisoformat(slot) for slot in (incident.details or {}).get("slots", [])]
    return not await deadline_check.unmet_slots(connection, incident.task, slots)


async def _goes_on(connection: AsyncConnection, incident: Row[Any]) -> bool:
    """Whether the task runs by its schedule again after the slots that were missed."""
    last = select(func.max(missed.c.last_slot)).where(missed.c.task == incident.task).scalar_subquery()
    newer = select(runs.c.id).where(runs.c.task == incident.task, runs.c.origin != "manual", runs.c.slot > last)
    return (await connection.execute(newer.limit(1))).first() is not None


_IS_OVER: dict[str, Callable[[AsyncConnection, Row[Any]], Awaitable[bool]]] = {
    IncidentKind.NODE: _are_resumed,
    IncidentKind.DEADLINE: _are_met,
    IncidentKind.MISSED: _goes_on,
}
