"""The account: every slot of an interval, computed anew from the schedules that a task had, and what became of it.

A schedule has the slots in (valid_from, valid_until]. Whoever changes one first handles the old one's slots up to that
instant, itself included, and the new one counts after it; so a slot at the very instant of a change belongs to the old.

No cursor takes part in finding slots. It only tells one that is yet to be handled, which is no gap, from one that is
taken for handled and has no row. All of it uses this machine's time zones: where those changed since, it differs.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import Row, and_, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.account.account import Account, Entry, Finding, Kind, Range, Ranges
from service.batch.cron.cron import Schedule, schedule
from service.batch.firing.misfires import INSTANT, ON_TIME
from service.batch.ledger import database_time
from service.batch.ledger.states import Origin, RunState
from service.batch.ledger.tables import missed, nodes, runs, schedules, tasks
from service.concurrency.offload import offload
from service.errors import InvalidSchedule

PAGE = 500
"""Runs read at once: their rows are made on the event loop. More than one page of one task is never held."""

CHUNK = 2_000
"""Slots computed at once, in a thread."""


def ignore(entry: Entry) -> None:
    """For who wants no single entry."""


async def accounts(
    connection: AsyncConnection,
    since: datetime,
    until: datetime | None = None,
    task: str | None = None,
    lease: float = 30.0,
    see: Callable[[Entry], None] = ignore,
) -> AsyncIterator[Account]:
    """The accounts of all tasks, or of one, that had a schedule in the interval; up to now at most.

    Slots are computed in a thread. `see` is called with each, in order, on the event loop. A node counts as running
    when it was seen within `lease` seconds. All is read from one snapshot: a transaction that is open on this
    connection ends.
    """
    await connection.rollback()
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
    now = await database_time.now_of(connection)
    until = min(until or now, now)
    running = await _tasks_of_running_nodes(connection, now - timedelta(seconds=lease))
    for name, spans in (await _spans(connection, since, until, task)).items():
        found = Account(name, max(since, spans[0].accounted_from or since), until)
        await _fill(found, connection, spans, now - ON_TIME if name in running else since, see)
        yield found


@dataclass
class _Span:
    """A schedule's part of the interval: the slots in (after, until]. Those after `handled` are yet to be fired."""

    accounted_from: datetime | None
    after: datetime
    until: datetime
    handled: datetime
    schedule: Schedule | None
    error: str = ""


async def _tasks_of_running_nodes(connection: AsyncConnection, since: datetime) -> set[str]:
    is_running = and_(
        nodes.c.stopped_at.is_(None), nodes.c.fires, nodes.c.draining.is_(False), nodes.c.seen_at >= since
    )
    found = await connection.execute(select(nodes.c.tasks).where(is_running))
    return {name for names in found.scalars() for name in names}


async def _spans(
    connection: AsyncConnection, since: datetime, until: datetime, task: str | None
) -> dict[str, list[_Span]]:
    """By task, in the order of their names, the schedules that were valid in the interval."""
    statement = (
        select(schedules, tasks.c.accounted_from)
        .join(tasks, tasks.c.name == schedules.c.task, isouter=True)
        .where(schedules.c.valid_from < until)
        .where(or_(schedules.c.valid_until.is_(None), schedules.c.valid_until >= since))
        .order_by(schedules.c.task, schedules.c.valid_from)
    )
    if task is not None:
        statement = statement.where(schedules.c.task == task)
    found: dict[str, list[_Span]] = {}
    for row in await connection.execute(statement):
        found.setdefault(row.task, []).append(_span(row, since, until))
    return found


def _span(row: Row[Any], since: datetime, until: datetime) -> _Span:
    begin = max(since, row.accounted_from or since)
    is_open = row.valid_until is None
    span = _Span(
        accounted_from=row.accounted_from,
        after=max(row.valid_from, begin - INSTANT),
        until=until if is_open else min(row.valid_until, until),
        handled=max(row.fired_until, row.valid_from) if is_open else until,
        schedule=None,
    )
    try:
        span.schedule = schedule(row.cron, row.timezone)
    except InvalidSchedule as error:
        span.error = error.message
    return span


async def _fill(
    found: Account, connection: AsyncConnection, spans: list[_Span], late: datetime, see: Callable[[Entry], None]
) -> None:
    """Computed slots and rows side by side, one page of runs after the other. What is due before `late` is late."""
    unreadable = [span for span in spans if span.schedule is None and span.after < span.until]
    for span in unreadable:
        found.tell(Finding(Kind.UNREADABLE, span.after, span.until, 1, span.error))
    ranges = Ranges(await _missed(connection, found))
    handled = min(span.handled for span in spans)
    after = found.since - INSTANT
    while after < found.until:
        page = await _runs(connection, found.task, after, found.until)
        upto = page[-1].slot if len(page) == PAGE else found.until
        entries = _entries(found.task, _slots(spans, after, upto), page, ranges, handled, late)
        is_last = False
        while not is_last:
            counted, is_last = await offload(_count, found, entries, unreadable)
            for entry in counted:
                see(entry)
        after = upto
    await offload(_tell_wrong_ranges, found, ranges, unreadable)


def _count(found: Account, entries: Iterator[Entry], unreadable: list[_Span]) -> tuple[list[Entry], bool]:
    """Add the next entries to the account; returns those that count, and whether they were the last."""
    chunk = list(islice(entries, CHUNK))
    counted = [e for e in chunk if e.kind != Kind.SURPLUS or not _is_within(unreadable, e.slot, e.slot)]
    for entry in counted:
        found.add(entry)
    return counted, len(chunk) < CHUNK


def _tell_wrong_ranges(found: Account, ranges: Ranges, unreadable: list[_Span]) -> None:
    for wrong in ranges.wrong():
        is_whole = found.since <= wrong.first and wrong.last <= found.until
        if is_whole and not _is_within(unreadable, wrong.first, wrong.last):
            found.tell(wrong)


def _is_within(spans: list[_Span], first: datetime, last: datetime) -> bool:
    """Whether one of these has a part of the time from `first` to `last`."""
    return any(span.after < last and first <= span.until for span in spans)


def _slots(spans: list[_Span], after: datetime, until: datetime) -> Iterator[datetime]:
    """The slots of all schedules in (after, until], each once: a clock that was set back lets schedules overlap."""
    each = [
        span.schedule.between(max(span.after, after), min(span.until, until))
        for span in spans
        if span.schedule is not None and span.after < until and span.until > after
    ]
    before = None
    for slot in heapq.merge(*each):
        if slot != before:
            yield slot
        before = slot


def _entries(
    task: str,
    due: Iterator[datetime],
    page: list[Row[Any]],
    ranges: Ranges,
    handled: datetime,
    late: datetime,
) -> Iterator[Entry]:
    by_slot = {run.slot: run for run in page}
    for slot in due:
        range_ = ranges.holding(slot)
        run = by_slot.pop(slot, None)
        if run is not None:
            kind = Kind.SKIPPED if run.state == RunState.SKIPPED else Kind.RUN
            yield Entry(task, slot, kind, run.id, run.state, run.reason)
        elif range_ is not None:
            yield Entry(task, slot, Kind.MISSED, reason=range_.reason)
        elif slot > handled:
            yield Entry(task, slot, Kind.LATE if slot < late else Kind.DUE)
        else:
            yield Entry(task, slot, Kind.GAP)
    for run in by_slot.values():
        if run.origin == Origin.SCHEDULE:  # a person may backfill a time that had no schedule
            yield Entry(task, run.slot, Kind.SURPLUS, run.id, run.state, run.reason)


async def _runs(connection: AsyncConnection, task: str, after: datetime, until: datetime) -> list[Row[Any]]:
    statement = (
        select(runs.c.slot, runs.c.id, runs.c.state, runs.c.reason, runs.c.origin)
        .where(runs.c.task == task, text("origin <> 'manual'"))  # to the letter as in the index
        .where(runs.c.slot > after, runs.c.slot <= until)
        .order_by(runs.c.slot)
        .limit(PAGE)
    )
    return list(await connection.execute(statement))


async def _missed(connection: AsyncConnection, of: Account) -> list[Range]:
    statement = (
        select(missed.c.id, missed.c.first_slot, missed.c.last_slot, missed.c.count, missed.c.reason)
        .where(missed.c.task == of.task, missed.c.last_slot >= of.since, missed.c.first_slot <= of.until)
        .order_by(missed.c.first_slot, missed.c.id)
    )
    return [Range(*row) for row in await connection.execute(statement)]
