"""The regular checks of the watch: which incidents have ended, and what has gone wrong without a
row that shows it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Any

from sqlalchemy import Row, and_, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.chunks import quarantine
from batch_system.batch.execution.fingerprint import QUARANTINE
from batch_system.batch.firing.unfired import NotFired
from batch_system.batch.incidents import (
    deadlines,
    durations,
    forecast_check,
    made_good,
    noticing,
    outages,
    overdue,
    telling,
)
from batch_system.batch.incidents.durations import Durations, UsualDurations
from batch_system.batch.incidents.made_good import Successes
from batch_system.batch.incidents.pool_check import PoolCheck
from batch_system.batch.incidents.telling import Channels
from batch_system.batch.incidents.watched import Thresholds, WatchedTask, WatchedTasks
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.incidents import incidents, marks
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.states import OF_RUNS, Closed, IncidentKind
from batch_system.batch.ledger.tables import (
    LEFT_SQL,
    OF_SLOT_SQL,
    OPEN_FAILURE_SQL,
    missed,
    runs,
    tasks,
)
from batch_system.concurrency.offload import offload
from batch_system.database.engine import Database
from batch_system.database.statement_blocker import statement_blocker_in_words

CHECK_SECONDS = 5.0
"""The interval of the checks while an incident is open or a run is active."""

MOST = 1_000
MOST_COUNTED = 10_000
"""The most runs that are counted to see whether missed slots were backfilled. If more slots were
missed, a person has to acknowledge them.
"""


@dataclass(frozen=True)
class Findings:
    """The findings of the checks, which have to be written.

    `made_good`: failed runs, each with the run that made it good. `redriven`: runs whose items in
    quarantine were all processed. `good`, `over`: ids of incidents that can be closed. `deadlines`:
    tasks whose deadlines were checked. `must_tell`: a message has to be written. `next_at`: when
    something may go wrong next, if known.
    """

    watched: WatchedTasks
    opened: Sequence[Row[Any]]
    made_good: Mapping[str, str]
    redriven: Sequence[str]
    good: Sequence[str]
    over: Sequence[str]
    new: Sequence[Opening]
    deadlines: Sequence[str]
    durations: Sequence[Durations]
    must_tell: bool
    next_at: datetime | None

    @property
    def are_none(self) -> bool:
        """Whether nothing has to be written."""
        parts = (
            self.made_good,
            self.redriven,
            self.good,
            self.over,
            self.new,
            self.deadlines,
            self.durations,
        )
        return not any(parts) and not self.must_tell


@dataclass(frozen=True)
class Written:
    """`open`: the number of open incidents. `held_until`: when a message that is held back may be
    written.
    """

    has_told: bool
    open: int
    held_until: datetime | None


class Checks:
    """The checks of one node. They remember which successes they have looked at."""

    def __init__(
        self, ledger: Database, application: Database, thresholds: Thresholds, channels: Channels
    ) -> None:
        self._ledger = ledger
        self._application = application
        self._thresholds = thresholds
        self._channels = channels
        self._successes = Successes()
        self._pools = PoolCheck()
        self._may_be_ahead = True

    def clock_was_set_back(self) -> None:
        """Check again whether cursors are ahead of now. Otherwise this is checked only while some
        are.
        """
        self._may_be_ahead = True

    def forget(self, tasks: Collection[str]) -> None:
        """Look at all successes of these tasks again, because the set of failed runs has
        changed.
        """
        for task in tasks:
            self._successes.forget(task)

    def forget_all(self) -> None:
        """Look at everything again, because the findings may not have been written, or another node
        may have written some.
        """
        self._successes = Successes()
        self._may_be_ahead = True

    async def redriven(self) -> list[str]:
        """The ids of runs whose items in quarantine were all processed since. Call it outside a
        transaction.
        """
        query = (
            select(runs.c.id)
            .where(runs.c.fingerprint == QUARANTINE, text(OPEN_FAILURE_SQL))
            .limit(MOST)
        )
        async with self._ledger.reader.connect() as connection:
            opened = await incidents.are_open(connection, [IncidentKind.QUARANTINE])
            ids = list((await connection.execute(query)).scalars()) if opened else []
        if not ids:
            return []
        try:
            left = await quarantine.left(self._application, ids)
        except (DBAPIError, OSError):  # other parts report this error
            return []
        return [run for run in ids if run not in left]

    async def look(
        self,
        connection: AsyncConnection,
        watched: WatchedTasks,
        redriven: Sequence[str],
        now: datetime,
        unfired: NotFired | None = None,
        blocked: Mapping[str, bool] = MappingProxyType({}),
        is_doubtful: bool = False,
    ) -> Findings:
        """Make all checks, and write nothing. `redriven`: the result of `redriven()`.

        `unfired`: due slots that no service fires. `blocked`: nodes whose event loop stands still,
        and whether that is certain. `is_doubtful`: the ledger could not be used a moment ago, so it
        may not know yet that some runs have ended.
        """
        opened = await incidents.are_open(connection)
        usual = UsualDurations(connection, now)
        known = {(row.kind, row.task, row.subject, row.fingerprint) for row in opened}
        wrong, checked, instants = await self._find_wrong(
            connection, watched, usual, known, blocked, now
        )
        wrong += await noticing.blocked_nodes(
            connection, [node for node, is_certain in blocked.items() if is_certain]
        )
        if unfired is not None:
            wrong.append(outages.of_living(unfired, now))
        held_until, must_tell = telling.may_tell(
            opened, watched, timedelta(seconds=self._thresholds.repeat), now
        )
        following = [instant for instant in (*instants, held_until) if instant is not None]
        patient = await self._not_good_yet(connection, opened, watched)
        new = [
            each
            for each in wrong
            if each.key not in known and not (is_doubtful and each.kind in _OF_TIME)
        ]
        return Findings(
            watched=watched,
            opened=opened,
            made_good=await self._find_good(connection, opened, patient, watched, now),
            redriven=redriven,
            good=[
                each
                for each in await incidents.without_open_runs(connection)
                if each not in patient
            ],
            over=await self._find_over(connection, opened, wrong),
            new=[
                each if each.kind != IncidentKind.SLOW else await self._with_holder(each)
                for each in new
            ],
            deadlines=checked,
            durations=usual.computed,
            must_tell=must_tell,
            next_at=min(following, default=None),
        )

    async def write(
        self, connection: AsyncConnection, findings: Findings, now: datetime
    ) -> Written:
        """Write the findings, in the caller's transaction."""
        watched = findings.watched
        await marks.mark(connection, findings.redriven, {"made_good_at": now})
        await marks.made_good(connection, findings.made_good, now)
        patient = await self._not_good_yet(connection, findings.opened, watched)
        good = [
            each for each in await incidents.without_open_runs(connection) if each not in patient
        ]
        cancelled = await incidents.with_cancelled_runs(connection, good)
        closed = [
            *await incidents.close(connection, set(good) - cancelled, Closed.MADE_GOOD, now),
            *await incidents.close(connection, {*findings.over, *cancelled}, Closed.OVER, now),
        ]
        await incidents.open_or_continue(connection, findings.new, now)
        await deadlines.record(connection, findings.deadlines, now)
        await durations.keep(connection, findings.durations)
        told, held_until = await telling.tell(connection, watched, self._channels, now)
        await telling.tell_of_the_end(connection, closed, watched, self._channels, now)
        if self._thresholds.repeat:
            every = timedelta(seconds=self._thresholds.repeat)
            told += await telling.repeat(connection, watched, self._channels, every, now)
        left = len(findings.opened) + len(findings.new) - len(closed)
        return Written(bool(told or closed), left, held_until)

    async def _find_wrong(
        self,
        connection: AsyncConnection,
        watched: Mapping[str, WatchedTask],
        usual: UsualDurations,
        known: Collection[tuple[str, str, str, str]],
        blocked: Collection[str],
        now: datetime,
    ) -> tuple[list[Opening], list[str], list[datetime | None]]:
        """What is wrong now, the tasks whose deadlines were checked, and when something may go
        wrong next.
        """
        silent, next_silent = await overdue.silent_tasks(watched, usual, now)
        forgotten, next_forgotten = overdue.forgotten_pauses(watched, self._thresholds, now)
        missed_deadlines, checked, next_deadline = await deadlines.check(connection, watched, now)
        at_risk, next_promise = await forecast_check.at_risk(connection, watched, now)
        old, next_old = await overdue.old_backups(connection, watched, self._thresholds, now)
        unasked = await overdue.failing_limits(connection, watched, now)
        unserved, next_unserved = await self._pools.check(connection, known, now)
        late_slots = await overdue.late_slots(connection, watched, self._thresholds, now)
        ahead = await overdue.cursors_ahead(connection, now) if self._may_be_ahead else []
        self._may_be_ahead = bool(ahead)
        wrong = [
            *unserved,
            *unasked,
            *(late for late in late_slots if late.task not in self._pools.tasks),
            *await overdue.slow_runs(connection, watched, usual, self._thresholds, blocked, now),
            *silent,
            *forgotten,
            *missed_deadlines,
            *at_risk,
            *old,
            *ahead,
        ]
        following = [
            next_silent,
            next_forgotten,
            next_deadline,
            next_promise,
            next_old,
            next_unserved,
        ]
        return wrong, checked, following

    async def _with_holder(self, slow: Opening) -> Opening:
        """A slow run may have ended without its node being able to write that, because another
        connection has locked its row.
        """
        locking = select(runs.c.id).where(runs.c.id == slow.newest_run).with_for_update()
        holder = await statement_blocker_in_words(self._ledger, locking)
        if holder is None:
            return slow
        text = (
            f"the ledger can't be told how it goes on, since its row is locked by {holder}; end "
            "that transaction"
        )
        return replace(slow, text=text)

    async def _find_good(
        self,
        connection: AsyncConnection,
        opened: Sequence[Row[Any]],
        patient: Collection[str],
        watched: Mapping[str, WatchedTask],
        now: datetime,
    ) -> dict[str, str]:
        """Which failed runs later successes have made good. `patient`: ids of incidents that have
        to wait for more successes.
        """
        good: dict[str, str] = {}
        for name in sorted({incident.task for incident in opened if incident.kind in OF_RUNS}):
            failures = await made_good.open_failures(connection, name)
            if not failures:
                continue
            since = min(failure.created_at for failure in failures)
            successes = await self._successes.find(connection, name, since, now)
            waiting = {
                incident.fingerprint
                for incident in opened
                if incident.task == name and incident.id in patient
            }
            if waiting:
                self._successes.forget(name)
            candidates = [failure for failure in failures if failure.fingerprint not in waiting]
            task = watched.get(name)
            each_slot_counts = task is None or task.each_slot_counts
            good |= await offload(made_good.matches, candidates, successes, each_slot_counts)
        return good

    async def _not_good_yet(
        self,
        connection: AsyncConnection,
        opened: Sequence[Row[Any]],
        watched: Mapping[str, WatchedTask],
    ) -> set[str]:
        """The ids of the incidents after which too few runs of their task have succeeded so far."""
        patient = set()
        for incident in opened:
            task = watched.get(incident.task)
            if incident.kind in OF_RUNS and task is not None and task.close_after > 1:
                good = await made_good.successes_since(
                    connection, task.name, incident.last_at, task.close_after
                )
                if good < task.close_after:
                    patient.add(incident.id)
        return patient

    async def _find_over(
        self, connection: AsyncConnection, opened: Sequence[Row[Any]], wrong: Sequence[Opening]
    ) -> list[str]:
        """The ids of the open incidents whose condition has ended."""
        present = {opening.key for opening in wrong}
        still = await _bad_backups(connection, opened)
        over = [
            row.id
            for row in opened
            if (row.kind == IncidentKind.DOWN and row.told_at is not None)
            or (
                row.kind in _CONDITIONS
                and (row.kind, row.task, row.subject, row.fingerprint) not in present
                and row.id not in still
                and (row.told_at is not None or not outages.has_slots(row))
            )
        ]
        asked = [(row.id, _IS_OVER[row.kind], row) for row in opened if row.kind in _IS_OVER]
        return over + [
            incident for incident, is_over, row in asked if await is_over(connection, row)
        ]


_OF_TIME = (IncidentKind.LATE, IncidentKind.SLOW, IncidentKind.AT_RISK)
_CONDITIONS = (
    IncidentKind.LATE,
    IncidentKind.SLOW,
    IncidentKind.AT_RISK,
    IncidentKind.SILENT,
    IncidentKind.BACKUP,
    IncidentKind.PAUSED,
    IncidentKind.POOL,
    IncidentKind.LIMIT,
    IncidentKind.CLOCK,
    IncidentKind.UNFIRED,
)


async def _bad_backups(connection: AsyncConnection, opened: Sequence[Row[Any]]) -> set[str]:
    """The ids of the open incidents about a backup that failed a check, if its place has no newer
    good one.
    """
    bad = {row.subject: row for row in opened if row.kind == IncidentKind.BACKUP and row.subject}
    good = await overdue.newer_good_backups(
        connection, {place: row.last_at for place, row in bad.items()}
    )
    return {row.id for place, row in bad.items() if place not in good}


async def _are_resumed(connection: AsyncConnection, incident: Row[Any]) -> bool:
    """Whether all runs of the lost node were resumed; or whether the nodes of a host live again, or
    the event loop of a node works again.
    """
    if incident.subject.startswith(noticing.BLOCK_OF):
        return not await noticing.blocked_nodes(
            connection, [incident.subject.removeprefix(noticing.BLOCK_OF)]
        )
    if incident.subject.startswith(noticing.CRASHES_OF):
        crashes = await noticing.crash_loops(connection, await database_time.now_of(connection))
        return incident.subject not in {crash.subject for crash in crashes}
    query = select(runs.c.id).where(runs.c.node == incident.subject, text(LEFT_SQL)).limit(1)
    return (await connection.execute(query)).first() is None


async def _are_met(connection: AsyncConnection, incident: Row[Any]) -> bool:
    """Whether the slots whose deadline was missed have succeeded by now."""
    slots = [datetime.fromisoformat(slot) for slot in (incident.details or {}).get("slots", [])]
    return not await deadlines.unmet_slots(connection, incident.task, slots)


async def _are_dealt_with(connection: AsyncConnection, incident: Row[Any]) -> bool:
    """Whether the missed slots were backfilled, left as they are by a person, or caught up: by the
    task's policy, a newer slot has run.
    """
    first = datetime.fromisoformat((incident.details or {})["first"])
    is_open = (missed.c.cause != Cause.PAUSED, missed.c.left_at.is_(None))
    theirs = (missed.c.task == incident.task, missed.c.last_slot >= first, *is_open)
    columns = (func.max(missed.c.last_slot).label("last"), func.sum(missed.c.count).label("slots"))
    ranges = (await connection.execute(select(*columns).where(*theirs))).one()
    if ranges.last is None:
        return True
    has_run = (runs.c.task == incident.task, text(OF_SLOT_SQL))
    within = and_(runs.c.slot >= missed.c.first_slot, runs.c.slot <= missed.c.last_slot)
    found = select(runs.c.id).select_from(missed.join(runs, within)).where(*theirs, *has_run)
    number = select(func.count()).select_from(found.limit(MOST_COUNTED).subquery())
    if ranges.slots <= (await connection.execute(number)).scalar_one():
        return True
    policies = (
        await connection.execute(select(tasks.c.policies).where(tasks.c.name == incident.task))
    ).scalar() or {}
    if (policies.get("missed") or {}).get("policy") == "skip":
        return False
    newer = select(runs.c.id).where(*has_run, runs.c.slot > ranges.last).limit(1)
    return (await connection.execute(newer)).first() is not None


_IS_OVER: dict[str, Callable[[AsyncConnection, Row[Any]], Awaitable[bool]]] = {
    IncidentKind.NODE: _are_resumed,
    IncidentKind.DEADLINE: _are_met,
    IncidentKind.MISSED: _are_dealt_with,
}
