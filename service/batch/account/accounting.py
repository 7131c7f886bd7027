"""The account: computes all slots of an interval from the schedules of a task, and finds what
became of each.

A schedule has the slots in (valid_from, valid_until]. A change of schedule first handles the slots
of the old schedule up to and including the instant of the change, so a slot at that very instant
belongs to the old schedule.

Slots are computed without cursors. The cursor of a schedule only separates slots that are not
handled yet from gaps: slots before the cursor that have no row. Slots are computed with this
machine's time zone data; if that has changed since the slots were handled, the account differs from
the ledger.
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

from service.batch.account.account import (
    Account,
    AccountedSlot,
    AccountFinding,
    Kind,
    RecordedRange,
    RecordedRanges,
)
from service.batch.cron.cron import Schedule, schedule
from service.batch.firing.misfires import INSTANT
from service.batch.ledger import database_time
from service.batch.ledger.states import Origin, RunState
from service.batch.ledger.tables import OF_SLOT_SQL, missed, nodes, runs, schedules, tasks
from service.batch.tasks.declaration import ON_TIME
from service.concurrency.offload import offload
from service.errors import InvalidSchedule

PAGE = 500
"""How many runs of one task are read, and held in memory, at a time. Their rows are made on the
event loop.
"""

CHUNK = 2_000
"""How many slots are computed at a time, in a thread."""


def ignore(slot: AccountedSlot) -> None:
    """The default `see` of `accounts`, for callers that don't need the single slots."""


async def accounts(
    connection: AsyncConnection,
    since: datetime,
    until: datetime | None = None,
    task: str | None = None,
    lease: float = 30.0,
    see: Callable[[AccountedSlot], None] = ignore,
) -> AsyncIterator[Account]:
    """Yield the account of each task that had a schedule between `since` and `until`, or only of
    `task`.

    Both instants are aware and included; `until` is now by default, and never later. Slots are
    computed in a thread, and `see` is called on the event loop with each of them, in order. A node
    counts as running if it was seen within `lease` seconds. Everything is read from one snapshot,
    so a transaction that is open on `connection` is rolled back first.
    """
    await connection.rollback()
    if connection.dialect.name == "postgresql":
        await connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"))
    now = await database_time.now_of(connection)
    until = min(until or now, now)
    running = await tasks_of_running_nodes(connection, now - timedelta(seconds=lease))
    for name, spans in (await _spans(connection, since, until, task)).items():
        account = Account(name, max(since, spans[0].accounted_from or since), until)
        await _fill(account, connection, spans, now - ON_TIME if name in running else since, see)
        yield account


@dataclass
class _Span:
    """The part (after, until] of an interval in which a schedule was valid. Slots after `handled`
    are not fired yet.
    """

    accounted_from: datetime | None
    after: datetime
    until: datetime
    handled: datetime
    schedule: Schedule | None
    error: str = ""


async def tasks_of_running_nodes(connection: AsyncConnection, since: datetime) -> set[str]:
    """The tasks of running services that were seen since then."""
    is_running = and_(
        nodes.c.stopped_at.is_(None),
        nodes.c.fires,
        nodes.c.draining.is_(False),
        nodes.c.seen_at >= since,
    )
    names_by_node = await connection.execute(select(nodes.c.tasks).where(is_running))
    return {name for names in names_by_node.scalars() for name in names}


async def _spans(
    connection: AsyncConnection, since: datetime, until: datetime, task: str | None
) -> dict[str, list[_Span]]:
    """The schedules that were valid in the interval, by task, in the order of the tasks' names."""
    statement = (
        select(schedules, tasks.c.accounted_from)
        .join(tasks, tasks.c.name == schedules.c.task, isouter=True)
        .where(schedules.c.valid_from < until)
        .where(or_(schedules.c.valid_until.is_(None), schedules.c.valid_until >= since))
        .order_by(schedules.c.task, schedules.c.valid_from)
    )
    if task is not None:
        statement = statement.where(schedules.c.task == task)
    spans: dict[str, list[_Span]] = {}
    for row in await connection.execute(statement):
        spans.setdefault(row.task, []).append(_span(row, since, until))
    return spans


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
    account: Account,
    connection: AsyncConnection,
    spans: list[_Span],
    late: datetime,
    see: Callable[[AccountedSlot], None],
) -> None:
    """Compare the computed slots with the rows, one page of runs at a time. Slots due before `late`
    are late.
    """
    unreadable = [span for span in spans if span.schedule is None and span.after < span.until]
    for span in unreadable:
        account.report(AccountFinding(Kind.UNREADABLE, span.after, span.until, 1, span.error))
    ranges = RecordedRanges(await _missed(connection, account))
    handled = min(span.handled for span in spans)
    after = account.since - INSTANT
    while after < account.until:
        page = await _runs(connection, account.task, after, account.until)
        page_end = page[-1].slot if len(page) == PAGE else account.until
        slots = _accounted_slots(
            account.task, _slots(spans, after, page_end), page, ranges, handled, late
        )
        is_last = False
        while not is_last:
            counted, is_last = await offload(_count, account, slots, unreadable)
            for slot in counted:
                see(slot)
        after = page_end
    await offload(_report_wrong_ranges, account, ranges, unreadable)


def _count(
    account: Account, slots: Iterator[AccountedSlot], unreadable: list[_Span]
) -> tuple[list[AccountedSlot], bool]:
    """Add the next slots to the account. Returns those that count, and whether they were the last
    ones.
    """
    chunk = list(islice(slots, CHUNK))
    counted = [
        each
        for each in chunk
        if each.kind != Kind.SURPLUS or not _overlaps(unreadable, each.slot, each.slot)
    ]
    for slot in counted:
        account.add(slot)
    return counted, len(chunk) < CHUNK


def _report_wrong_ranges(account: Account, ranges: RecordedRanges, unreadable: list[_Span]) -> None:
    for finding in ranges.with_wrong_counts():
        is_whole = account.since <= finding.first and finding.last <= account.until
        if is_whole and not _overlaps(unreadable, finding.first, finding.last):
            account.report(finding)


def _overlaps(spans: list[_Span], first: datetime, last: datetime) -> bool:
    """Whether one of the spans shares an instant with the time from `first` to `last`."""
    return any(span.after < last and first <= span.until for span in spans)


def _slots(spans: list[_Span], after: datetime, until: datetime) -> Iterator[datetime]:
    """The slots of all schedules in (after, until], each once: schedules overlap if a machine's
    clock was set back.
    """
    slots_by_span = [
        span.schedule.between(max(span.after, after), min(span.until, until))
        for span in spans
        if span.schedule is not None and span.after < until and span.until > after
    ]
    previous = None
    for slot in heapq.merge(*slots_by_span):
        if slot != previous:
            yield slot
        previous = slot


def _accounted_slots(
    task: str,
    due: Iterator[datetime],
    page: list[Row[Any]],
    ranges: RecordedRanges,
    handled: datetime,
    late: datetime,
) -> Iterator[AccountedSlot]:
    by_slot = {run.slot: run for run in page}
    for slot in due:
        missed_range = ranges.take(slot)
        run = by_slot.pop(slot, None)
        if run is not None:
            kind = Kind.SKIPPED if run.state == RunState.SKIPPED else Kind.RUN
            yield AccountedSlot(task, slot, kind, run.id, run.state, run.reason)
        elif missed_range is not None:
            yield AccountedSlot(task, slot, Kind.MISSED, reason=missed_range.reason)
        elif slot > handled:
            yield AccountedSlot(task, slot, Kind.LATE if slot < late else Kind.DUE)
        else:
            yield AccountedSlot(task, slot, Kind.GAP)
    for run in by_slot.values():
        if run.origin == Origin.SCHEDULE:  # a person may backfill a time without a schedule
            yield AccountedSlot(task, run.slot, Kind.SURPLUS, run.id, run.state, run.reason)


async def _runs(
    connection: AsyncConnection, task: str, after: datetime, until: datetime
) -> list[Row[Any]]:
    statement = (
        select(runs.c.slot, runs.c.id, runs.c.state, runs.c.reason, runs.c.origin)
        .where(runs.c.task == task, text(OF_SLOT_SQL))
        .where(runs.c.slot > after, runs.c.slot <= until)
        .order_by(runs.c.slot)
        .limit(PAGE)
    )
    return list(await connection.execute(statement))


async def _missed(connection: AsyncConnection, account: Account) -> list[RecordedRange]:
    statement = (
        select(
            missed.c.id, missed.c.first_slot, missed.c.last_slot, missed.c.count, missed.c.reason
        )
        .where(missed.c.task == account.task)
        .where(missed.c.last_slot >= account.since, missed.c.first_slot <= account.until)
        .order_by(missed.c.first_slot, missed.c.id)
    )
    return [RecordedRange(*row) for row in await connection.execute(statement)]
