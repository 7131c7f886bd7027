"""Counts what became of each slot of an interval, for all tasks at once, with the cron code.

Unlike the account it only counts, without details. `batch account` and this module agree on every
slot, as a test checks.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BindParameter, bindparam, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.cron.cron import Schedule, schedule
from service.batch.firing.misfires import INSTANT
from service.batch.ledger import json_rows
from service.batch.ledger.buckets import CLASSES, bucket_of
from service.batch.ledger.missed_ranges import Cause
from service.batch.ledger.states import ACTIVE
from service.batch.ledger.tables import OF_SLOT_SQL, missed, runs, schedules, tasks
from service.batch.tasks.declaration import ON_TIME
from service.concurrency.offload import offload
from service.errors import InvalidSchedule

NEVER = datetime.max.replace(tzinfo=UTC)

Counts = dict[tuple[datetime, str], Counter[str]]
"""The number of slots of each class, for each bucket and task that has slots."""

Note = Callable[[str, datetime, bool], None]
"""Called with the task and the slot of each unaccounted slot, and with whether a service has moved
its cursor past the slot.
"""


def ignore(_task: str, _slot: datetime, _is_handled: bool) -> None:
    """For callers that need only the counts."""


@dataclass(frozen=True)
class _Span:
    """A part of the time in which a task had a schedule. Its slots are those after `after`, up to
    and including `until`.
    """

    schedule: Schedule
    after: datetime
    until: datetime


@dataclass
class _Task:
    """The ledger's facts about the slots of one task. `handled`: the cursor of its open schedule;
    later slots were not handled yet.
    """

    handled: datetime = NEVER
    spans: list[_Span] = field(default_factory=list)
    states: dict[datetime, str] = field(default_factory=dict)
    ranges: list[tuple[datetime, datetime, str]] = field(default_factory=list)


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
) -> Counted:
    """Count the slots from `since` up to `until` (excluded; both aware), by their class at `now`.

    Reads within the caller's transaction. The slots are computed in a thread, which also calls
    `note`.
    """
    last = until - INSTANT
    found = await _spans(connection, since, last)
    await _read_states(connection, found, since, last)
    await _read_ranges(connection, found, since, last)
    return await offload(_count, found, since, last, now, note)


def _count(
    found: Mapping[str, _Task], since: datetime, last: datetime, now: datetime, note: Note
) -> Counted:
    counts: Counts = defaultdict(Counter)
    unhandled: set[datetime] = set()
    # Many tasks have the same schedule.
    names_by_spans: dict[tuple[_Span, ...], list[str]] = defaultdict(list)
    for name, task in found.items():
        names_by_spans[tuple(task.spans)].append(name)
    for spans, names in names_by_spans.items():
        slots = [(slot, bucket_of(slot)) for slot in _slots(spans, since - INSTANT, last)]
        for name in names:
            task, ranges = found[name], _Ranges(found[name].ranges)
            for slot, bucket in slots:
                found_class = _class_of(slot, task, ranges.cause_at(slot), now)
                counts[bucket, name][found_class] += 1
                if found_class == "unaccounted":
                    note(name, slot, slot <= task.handled)
                if slot > task.handled:
                    unhandled.add(bucket)
    return Counted(dict(counts), unhandled)


def _class_of(slot: datetime, task: _Task, cause: str | None, now: datetime) -> str:
    if (state := task.states.get(slot)) is not None:
        return "active" if state in ACTIVE else state
    if cause is not None:
        return "paused" if cause == Cause.PAUSED else "missed"
    return "active" if slot > task.handled and slot > now - ON_TIME else "unaccounted"


class _Ranges:
    """The missed ranges of a task, each as its first slot, its last slot and its cause."""

    def __init__(self, ranges: list[tuple[datetime, datetime, str]]) -> None:
        self._later = deque(sorted(ranges))
        self._current: list[tuple[datetime, datetime, str]] = []

    def cause_at(self, slot: datetime) -> str | None:
        """The cause of the first range that contains this slot. Call it for the slots in order."""
        while self._later and self._later[0][0] <= slot:
            self._current.append(self._later.popleft())
        if self._current:
            self._current = [each for each in self._current if each[1] >= slot]
        return self._current[0][2] if self._current else None


def _slots(spans: Sequence[_Span], after: datetime, until: datetime) -> Iterator[datetime]:
    """The slots of all spans in (after, until], each once: spans overlap if a machine's clock was
    set back.
    """
    iterators = [
        span.schedule.between(max(span.after, after), min(span.until, until))
        for span in spans
        if span.after < until and span.until > after
    ]
    previous = None
    for slot in iterators[0] if len(iterators) == 1 else heapq.merge(*iterators):
        if slot != previous:
            yield slot
        previous = slot


async def _spans(connection: AsyncConnection, since: datetime, last: datetime) -> dict[str, _Task]:
    """The tasks with a schedule in the interval. Slots before the beginning of a task's account are
    left out.
    """
    columns = [
        schedules.c[name]
        for name in ("task", "cron", "timezone", "valid_from", "valid_until", "fired_until")
    ]
    statement = (
        select(*columns, tasks.c.accounted_from)
        .select_from(schedules.join(tasks, tasks.c.name == schedules.c.task, isouter=True))
        .where(schedules.c.valid_from < last)
        .where(or_(schedules.c.valid_until.is_(None), schedules.c.valid_until >= since))
    )
    found: dict[str, _Task] = {}
    for row in await connection.execute(statement):
        is_open = row.valid_until is None
        task = found.setdefault(row.task, _Task())
        if is_open:
            task.handled = min(task.handled, max(row.fired_until, row.valid_from))
        begin = max(since, row.accounted_from or since) - INSTANT
        try:
            readable = schedule(row.cron, row.timezone)
        except InvalidSchedule:  # another version of the service wrote it
            continue
        span = _Span(
            readable, max(row.valid_from, begin), last if is_open else min(row.valid_until, last)
        )
        if span.after < span.until:
            task.spans.append(span)
    return {name: task for name, task in found.items() if task.spans}


async def _read_states(
    connection: AsyncConnection, found: Mapping[str, _Task], since: datetime, last: datetime
) -> None:
    """Read the state of the run of each slot, by the unique index on task and slot.

    The rows are grouped by instant, with the names of all tasks of an instant in one row, because
    many tasks have the same slots.
    """
    kind = connection.dialect.name
    source = json_rows.source([runs.c.task], kind)
    names = "jsonb_agg(r.task)" if kind == "postgresql" else "json_group_array(r.task)"
    statement = text(
        f"SELECT r.slot, r.state, {names} AS result FROM {source} "
        "JOIN batch_runs r ON r.task = v.task "
        f"WHERE r.{OF_SLOT_SQL} AND r.slot >= :since AND r.slot <= :last GROUP BY r.slot, r.state"
    )
    bound = statement.bindparams(*_instants()).columns(runs.c.slot, runs.c.state, runs.c.result)
    values = {"rows": _rows(found, kind), "since": since, "last": last}
    for slot, state, its in await connection.execute(bound, values):
        for task in its:
            found[task].states[slot] = state


async def _read_ranges(
    connection: AsyncConnection, found: Mapping[str, _Task], since: datetime, last: datetime
) -> None:
    kind = connection.dialect.name
    source = json_rows.source([missed.c.task], kind)
    statement = text(
        f"SELECT m.task, m.first_slot, m.last_slot, m.cause FROM {source} "
        "JOIN batch_missed m ON m.task = v.task "
        "WHERE m.last_slot >= :since AND m.first_slot <= :last"
    )
    columns = [missed.c[name] for name in ("task", "first_slot", "last_slot", "cause")]
    bound = statement.bindparams(*_instants()).columns(*columns)
    values = {"rows": _rows(found, kind), "since": since, "last": last}
    for task, first, end, cause in await connection.execute(bound, values):
        found[task].ranges.append((first, end, cause))


def _rows(names: Iterable[str], kind: str) -> str:
    return json_rows.encode([{"task": name} for name in sorted(names)], kind)


def _instants() -> tuple[BindParameter[Any], BindParameter[Any]]:
    return bindparam("since", type_=runs.c.slot.type), bindparam("last", type_=runs.c.slot.type)


def summed(counts: Collection[Mapping[str, int]]) -> dict[str, int]:
    """The sums of these counts, with all classes."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return {name: total[name] for name in CLASSES}
