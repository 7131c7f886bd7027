"""Counts what became of each slot of an interval, for all tasks at once, with the cron code.

Unlike the account it finds no details: it only counts. Both classify a slot by `kind_of`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Select, bindparam, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.account.slots import Kind, Ranges, Span, kind_of, slots_of
from batch_system.batch.firing.misfires import INSTANT
from batch_system.batch.ledger import calendars, json_rows
from batch_system.batch.ledger.buckets import bucket_of
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.states import ACTIVE
from batch_system.batch.ledger.tables import OF_SLOT_SQL, missed, runs, schedules, tasks
from batch_system.batch.tasks.declaration import ON_TIME
from batch_system.concurrency.offload import offload
from batch_system.database import sql

NEVER = datetime.max.replace(tzinfo=UTC)

Counts = dict[tuple[datetime, str], Counter[str]]
"""The number of slots of each class, for each bucket and task that has slots."""

Note = Callable[[str, datetime, Kind], None]
"""Called with the task and the slot of what is unaccounted for, and with its kind: gap or late."""


def ignore(_task: str, _slot: datetime, _kind: Kind) -> None:
    """For callers that need only the counts."""


class _Range(NamedTuple):
    """A missed range; both slots belong to it."""

    first: datetime
    last: datetime
    cause: str


@dataclass
class _Task:
    """The ledger's facts about the slots of one task. `handled`: the cursor of its open schedule;
    later slots were not handled yet.
    """

    handled: datetime = NEVER
    spans: list[Span] = field(default_factory=list)
    states: dict[datetime, str] = field(default_factory=dict)
    ranges: list[_Range] = field(default_factory=list)


@dataclass
class Counted:
    """`unhandled`: the buckets with slots that were not handled yet."""

    counts: Counts
    unhandled: set[datetime]


async def count(
    connection: AsyncConnection,
    since: datetime,
    until: datetime,
    now: datetime,
    note: Note = ignore,
    task: str | None = None,
) -> Counted:
    """Count the slots from `since` up to `until` (excluded; both aware), by their class at `now`:
    those of all tasks, or of this one.

    Reads within the caller's transaction. The slots are computed in a thread, which also calls
    `note`.
    """
    last = until - INSTANT
    spans = await _spans(connection, since, last, task)
    found = await offload(_with_slots, spans, since, last)
    if found:
        await _read_states(connection, found, since, last)
        await _read_ranges(connection, found, since, last)
    return await offload(_count, found, since, last, now, note)


def _with_slots(
    spans: Sequence[tuple[Span, Collection[str]]], since: datetime, last: datetime
) -> dict[str, _Task]:
    """The tasks that have slots in the interval (both ends included): the others need not be looked
    up.
    """
    found: dict[str, _Task] = {}
    for span, names in spans:
        if next(slots_of([span], since - INSTANT, last), None) is not None:
            for name in names:
                found.setdefault(name, _Task()).spans.append(span)
    for span, names in spans:
        for name in found.keys() & names:
            found[name].handled = min(found[name].handled, span.handled)
    return found


def _count(
    found: Mapping[str, _Task], since: datetime, last: datetime, now: datetime, note: Note
) -> Counted:
    counts: Counts = defaultdict(Counter)
    unhandled: set[datetime] = set()
    late = now - ON_TIME + INSTANT  # what has been due for exactly a minute is late here
    # Many tasks have the same schedule.
    names_by_spans: dict[tuple[Span, ...], list[str]] = defaultdict(list)
    for name, task in found.items():
        names_by_spans[tuple(task.spans)].append(name)
    for spans, names in names_by_spans.items():
        slots = [(slot, bucket_of(slot)) for slot in slots_of(spans, since - INSTANT, last)]
        for name in names:
            task = found[name]
            ranges = Ranges(sorted(task.ranges)) if task.ranges else None
            for slot, bucket in slots:
                around = ranges.at(slot) if ranges is not None else ()
                of_class = _class_of(slot, task, around, late)
                counts[bucket, name][of_class] += 1
                if of_class == "unaccounted":
                    note(name, slot, kind_of(slot, None, False, task.handled, late))
                if slot > task.handled:
                    unhandled.add(bucket)
    return Counted(dict(counts), unhandled)


def _class_of(slot: datetime, task: _Task, around: Sequence[_Range], late: datetime) -> str:
    if (state := task.states.get(slot)) is not None:
        return "active" if state in ACTIVE else state
    if around:
        return "paused" if around[0].cause == Cause.PAUSED else "missed"
    is_due = kind_of(slot, None, False, task.handled, late) == Kind.DUE
    return "active" if is_due else "unaccounted"


async def spans_of(
    connection: AsyncConnection, since: datetime, last: datetime, task: str
) -> Sequence[Span]:
    """The schedules that a task had in the interval (both ends included)."""
    found = await _spans(connection, since, last, task)
    return [span for span, _ in found if span.schedule is not None and span.after < span.until]


async def _spans(
    connection: AsyncConnection, since: datetime, last: datetime, task: str | None
) -> list[tuple[Span, Collection[str]]]:
    """The schedules in the interval, each with the tasks that have it. Slots before the beginning
    of a task's account are left out.

    Many tasks have the same schedule since the same instant, so the database puts them together.
    """
    statement = _schedules(connection.dialect.name)
    if task is not None:
        statement = statement.where(schedules.c.task == task)
    rows = (await connection.execute(statement, {"since": since, "last": last})).all()
    await calendars.read(connection, (row.cron for row in rows))
    return [(Span.of(row, since, last), row.collected) for row in rows]


@cache
def _schedules(kind: str) -> Select[Any]:
    columns = [
        *(schedules.c[name] for name in ("cron", "timezone", "valid_from", "valid_until")),
        schedules.c.fired_until,
        tasks.c.accounted_from,
    ]
    goes_on = schedules.c.valid_until >= bindparam("since")
    return (
        select(*columns, json_rows.collected(schedules.c.task, kind))
        .select_from(schedules.join(tasks, tasks.c.name == schedules.c.task, isouter=True))
        .where(schedules.c.valid_from < bindparam("last"))
        .where(or_(schedules.c.valid_until.is_(None), goes_on))
        .group_by(*columns)
    )


async def _read_states(
    connection: AsyncConnection, found: Mapping[str, _Task], since: datetime, last: datetime
) -> None:
    """Read the state of the run of each slot, by the unique index on task and slot.

    The rows are grouped by instant, with the names of all tasks of an instant in one row, because
    many tasks have the same slots.
    """
    kind = connection.dialect.name
    values = {"rows": _rows(found, kind), "since": since, "last": last}
    for slot, state, its in await connection.execute(_states(kind), values):
        for task in its:
            found[task].states[slot] = state


@cache
def _states(kind: str) -> TextualSelect:
    source = json_rows.source([runs.c.task], kind)
    names = "jsonb_agg(r.task)" if kind == "postgresql" else "json_group_array(r.task)"
    return sql.statement(
        f"SELECT r.slot, r.state, {names} AS result FROM {source} "
        "JOIN batch_runs r ON r.task = v.task "
        f"WHERE r.{OF_SLOT_SQL} AND r.slot >= :since AND r.slot <= :last GROUP BY r.slot, r.state",
        since=runs.c.slot,
        last=runs.c.slot,
    ).columns(runs.c.slot, runs.c.state, runs.c.result)


async def _read_ranges(
    connection: AsyncConnection, found: Mapping[str, _Task], since: datetime, last: datetime
) -> None:
    kind = connection.dialect.name
    values = {"rows": _rows(found, kind), "since": since, "last": last}
    for task, first, end, cause in await connection.execute(_ranges(kind), values):
        found[task].ranges.append(_Range(first, end, cause))


@cache
def _ranges(kind: str) -> TextualSelect:
    source = json_rows.source([missed.c.task], kind)
    columns = [missed.c[name] for name in ("task", "first_slot", "last_slot", "cause")]
    return sql.statement(
        f"SELECT m.task, m.first_slot, m.last_slot, m.cause FROM {source} "
        "JOIN batch_missed m ON m.task = v.task "
        "WHERE m.last_slot >= :since AND m.first_slot <= :last",
        since=runs.c.slot,
        last=runs.c.slot,
    ).columns(*columns)


def _rows(names: Iterable[str], kind: str) -> str:
    return json_rows.encode([{"task": name} for name in sorted(names)], kind)
