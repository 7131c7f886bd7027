"""The slots that did not run, by their cause. Their sum equals the missed, paused and skipped slots
of the verdict.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.incidents.tables import incidents
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.states import IncidentKind
from batch_system.batch.ledger.tables import missed, tasks
from batch_system.operations.night import skipped_slots
from batch_system.operations.night.results import DidNotRun

MOST_RANGES = 10_000


async def by_cause(
    connection: AsyncConnection,
    not_run: Mapping[str, Counter[str]],
    since: datetime,
    until: datetime,
    hidden: frozenset[str],
) -> list[DidNotRun]:
    """`not_run`: by task, how many slots of the window were missed, paused and skipped."""
    ranges = await _ranges(
        connection,
        [task for task, counts in not_run.items() if counts["missed"] or counts["paused"]],
        since,
        until,
    )
    has_missed = any(counts["missed"] for counts in not_run.values())
    outages = await _outages(connection, since, until) if has_missed else []
    downs: dict[tuple[int, str], list[Part]] = defaultdict(list)
    rest: list[DidNotRun] = []
    has_paused = any(counts["paused"] for counts in not_run.values())
    still_paused = await _paused(connection) if has_paused else {}
    for task, counts in not_run.items():
        its = ranges.get(task, [])
        if counts["paused"]:
            by = next((each.reason for each in reversed(its) if each.cause == Cause.PAUSED), None)
            by = by.removeprefix("paused by ") if by is not None else still_paused.get(task)
            rest.append(
                DidNotRun(
                    cause="paused",
                    by=by,
                    task=task,
                    slots=counts["paused"],
                    goes_on=task in still_paused,
                    tasks={},
                    **_span([each for each in its if each.cause == Cause.PAUSED]),
                )
            )
        parts = _parts(counts["missed"], [each for each in its if each.cause != Cause.PAUSED])
        for part in parts:
            outage = _outage_of(part, outages)
            if outage is not None:
                downs[outage, _left_at(part)].append(part)
            else:
                rest.append(_alone(part, hidden))
        if counts["missed"] and not parts:
            rest.append(DidNotRun(cause=Cause.OTHER, task=task, slots=counts["missed"], tasks={}))
    down = [_down(parts, outages[number], hidden) for (number, _), parts in sorted(downs.items())]
    has_skipped = any(counts["skipped"] for counts in not_run.values())
    skipped = await skipped_slots.by_reason(connection, since, until, hidden) if has_skipped else []
    return [*down, *sorted(rest, key=lambda each: (each.cause, each.task or "")), *skipped]


class Part(NamedTuple):
    """A missed range, and how many of the counted slots are in it."""

    range: Row[Any]
    slots: int


def _parts(number: int, ranges: Sequence[Row[Any]]) -> list[Part]:
    """Divide the missed slots of a task among its ranges: the last one gets the remainder."""
    parts = []
    for position, each in enumerate(ranges):
        is_last = position == len(ranges) - 1
        slots = number if is_last else min(number, each._mapping["count"])
        number -= slots
        if slots:
            parts.append(Part(each, slots))
    return parts


def _outage_of(part: Part, outages: Sequence[tuple[datetime, datetime]]) -> int | None:
    last = part.range.last_slot
    return next(
        (n for n, (begin, end) in enumerate(outages) if begin <= last <= end + _LATER), None
    )


def _left_at(part: Part) -> str:
    return part.range.left_at.isoformat() if part.range.left_at is not None else ""


def _alone(part: Part, hidden: frozenset[str]) -> DidNotRun:
    row = part.range
    more = {**_span([row]), **_left([row], hidden)}
    return DidNotRun(
        cause=row.cause, task=row.task, reason=row.reason, slots=part.slots, tasks={}, **more
    )


def _down(
    parts: Sequence[Part], outage: tuple[datetime, datetime], hidden: frozenset[str]
) -> DidNotRun:
    """The slots of an outage that a person has left as they are in one action, or those that nobody
    has left.
    """
    by_task: Counter[str] = Counter()
    for part in parts:
        by_task[part.range.task] += part.slots
    ranges = [part.range for part in parts]
    return DidNotRun(
        cause="down",
        begin=outage[0],
        until=outage[1],
        slots=by_task.total(),
        tasks=dict(by_task.most_common()),
        **_span(ranges),
        **_left(ranges, hidden),
    )


def _span(ranges: Sequence[Row[Any]]) -> dict[str, Any]:
    first = min((each.first_slot for each in ranges), default=None)
    return {
        "first_slot": first,
        "last_slot": max((each.last_slot for each in ranges), default=None),
    }


def _left(ranges: Sequence[Row[Any]], hidden: frozenset[str]) -> dict[str, Any]:
    """Who has left these ranges as they are, when and why. They were left together."""
    row = ranges[0]
    note = None if any(each.task in hidden for each in ranges) else row.left_note
    return {"left_at": row.left_at, "left_by": row.left_by, "left_note": note}


_LATER = timedelta(minutes=1)


async def _ranges(
    connection: AsyncConnection, names: Sequence[str], since: datetime, until: datetime
) -> dict[str, list[Row[Any]]]:
    """The missed ranges of these tasks that touch the window, by task, in the order of their
    slots.
    """
    if not names:
        return {}
    theirs = json_rows.is_among(missed.c.task, names, connection.dialect.name)
    query = select(missed).where(theirs, missed.c.last_slot >= since, missed.c.first_slot < until)
    found: dict[str, list[Row[Any]]] = {}
    for row in await connection.execute(query.order_by(missed.c.last_slot).limit(MOST_RANGES)):
        found.setdefault(row.task, []).append(row)
    return found


async def _outages(
    connection: AsyncConnection, since: datetime, until: datetime
) -> list[tuple[datetime, datetime]]:
    """The start and the end of the outages that were noticed in the window, or touch it."""
    query = select(incidents.c.details).where(
        incidents.c.kind == IncidentKind.DOWN,
        incidents.c.opened_at >= since,
        incidents.c.opened_at < until + _LATER,
    )
    rows = (await connection.execute(query.order_by(incidents.c.opened_at))).scalars()
    return [
        (datetime.fromisoformat(details["since"]), datetime.fromisoformat(details["until"]))
        for details in rows
        if details and "what" not in details
    ]


async def _paused(connection: AsyncConnection) -> dict[str, str]:
    query = select(tasks.c.name, tasks.c.paused_by).where(tasks.c.paused_at.is_not(None))
    return {row.name: row.paused_by or "somebody" for row in await connection.execute(query)}
