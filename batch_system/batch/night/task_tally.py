"""What became of the slots of one task on each day, read so that the cost does not grow with the
history of the task: the database counts a bounded number of runs, sums what is tallied where there
are more, and looks at a few slots of each day.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Column, Integer, Row, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.account.slots import Span
from batch_system.batch.cron.counting import count
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.buckets import CLASSES, buckets
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.states import ACTIVE
from batch_system.batch.ledger.tables import OF_SLOT_SQL, runs
from batch_system.batch.night import counting
from batch_system.concurrency.offload import offload
from batch_system.database import sql

LOOKED_AT = 4
"""So many slots of a day are looked at, at equal distances."""
SECOND = timedelta(seconds=1)
_INSTANT = buckets.c.bucket.type
_COLUMNS = (Column("day", Integer), Column("begin", _INSTANT), Column("until", _INSTANT))
_OF_RUN = ("slot", "origin", "state", "gate", "started_at", "attempt_started_at", "finished_at")

Interval = tuple[datetime, datetime]


class Piece(NamedTuple):
    """A part of the day with this number, from `begin` up to `until` (excluded)."""

    day: int
    begin: datetime
    until: datetime


def divided(days: Sequence[Piece], intervals: Sequence[Interval]) -> list[Piece]:
    """These intervals, divided into the parts that are of one day."""
    return [
        Piece(day.day, max(begin, day.begin), min(until, day.until))
        for begin, until in intervals
        for day in days
        if begin < day.until and day.begin < until
    ]


async def tallied(
    connection: AsyncConnection, task: str, pieces: Sequence[Piece]
) -> list[tuple[int, int, Counter[str]]]:
    """For each day how many buckets in these pieces have a tally, and the sums of them by class."""
    kind = connection.dialect.name
    sums = ", ".join(f"coalesce(sum(t.{each}), 0) AS {each}" for each in CLASSES)
    # From the index on buckets alone, and that on the few that have to be counted again.
    statement = text(
        f"SELECT v.day AS day, count(*) AS number, {sums} "
        f"FROM {json_rows.source(_COLUMNS, kind)} CROSS JOIN batch_buckets b "
        "LEFT JOIN batch_tally t ON t.bucket = b.bucket AND t.task = :task "
        "WHERE b.bucket >= v.begin AND b.bucket < v.until AND NOT EXISTS "
        "(SELECT 1 FROM batch_buckets d WHERE d.bucket = b.bucket AND d.counted_at IS NULL) "
        "GROUP BY v.day"
    )
    rows = await connection.execute(statement, {"rows": _rows(pieces, kind), "task": task})
    return [
        (row.day, row.number, Counter({each: int(row._mapping[each]) for each in CLASSES}))
        for row in rows
    ]


async def known(
    connection: AsyncConnection,
    task: str,
    days: Sequence[Piece],
    intervals: Sequence[Interval],
    most: int,
) -> list[Interval]:
    """These intervals, the newest first, as far back as they have fewer than `most` runs together.
    The day in which that is reached is left out, because it would not be whole.
    """
    found, left = [], most
    for begin, end in intervals:
        within = (runs.c.slot >= begin, runs.c.slot < end)
        newest = run_rows(("slot",), runs.c.task == task, OF_SLOT_SQL, *within)
        some = newest.order_by(runs.c.slot.desc()).limit(left).subquery()
        number, oldest = (
            await connection.execute(select(func.count(), func.min(some.c.slot)))
        ).one()
        if number == left:
            whole = next((day.begin for day in days if day.begin > oldest), end)
            found.append((min(end, whole), end))
            break
        found.append((begin, end))
        left -= number
    return found


async def unaccounted(
    connection: AsyncConnection, task: str, pieces: Sequence[Piece]
) -> list[tuple[int, int]]:
    """By day how many slots in these pieces the tally has not found."""
    kind = connection.dialect.name
    statement = text(
        "SELECT v.day AS day, sum(t.unaccounted) AS number "
        f"FROM {json_rows.source(_COLUMNS, kind)} CROSS JOIN batch_tally t "
        "WHERE t.task = :task AND t.unaccounted > 0 "
        "AND t.bucket >= v.begin AND t.bucket < v.until GROUP BY v.day"
    )
    rows = await connection.execute(statement, {"rows": _rows(pieces, kind), "task": task})
    return [(row.day, int(row.number)) for row in rows]


async def counted(
    connection: AsyncConnection, task: str, pieces: Sequence[Piece]
) -> list[tuple[int, str, int]]:
    """The number of runs of slots in these pieces, by day and state; `active` for those that have
    not ended.
    """
    kind = connection.dialect.name
    statement = text(
        "SELECT v.day AS day, r.state AS state, count(*) AS number "
        f"FROM {json_rows.source(_COLUMNS, kind)} "
        f"CROSS JOIN batch_runs r WHERE r.task = :task AND r.{OF_SLOT_SQL} "
        "AND r.slot >= v.begin AND r.slot < v.until GROUP BY v.day, r.state"
    )
    rows = await connection.execute(statement, {"rows": _rows(pieces, kind), "task": task})
    return [(day, "active" if state in ACTIVE else state, number) for day, state, number in rows]


async def not_run(
    connection: AsyncConnection, task: str, days: Sequence[Piece], ranges: Sequence[Row[Any]]
) -> list[tuple[int, str, int]]:
    """The number of slots in these missed ranges that have not been run since, by day and class."""
    if not ranges or not days:
        return []
    begin, until = min(each.begin for each in days), max(each.until for each in days)
    spans = await counting.spans_of(connection, begin, until, task)
    found = []
    for cause in ("paused", "missed"):
        its = [
            (each.first_slot, each.last_slot + SECOND)
            for each in ranges
            if (each.cause == Cause.PAUSED) == (cause == "paused")
        ]
        pieces = divided(days, its)
        numbers = await offload(_slots, spans, pieces)
        found += [(day, cause, number) for day, number in numbers]
        run = await counted(connection, task, pieces)
        found += [(day, cause, -number) for day, _, number in run]
    return found


def _slots(spans: Sequence[Span], pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """How many slots each of these pieces has."""
    found = []
    for piece in pieces:
        begin, end = piece.begin - SECOND, piece.until - SECOND
        its = ((each.schedule, max(each.after, begin), min(each.until, end)) for each in spans)
        number = sum(count(schedule, a, b) for schedule, a, b in its if schedule and a < b)
        found.append((piece.day, number))
    return found


async def looked_at(
    connection: AsyncConnection, task: str, days: Sequence[Piece]
) -> Sequence[Row[Any]]:
    """The run of the first slot in each of LOOKED_AT parts of each of these days, with the number
    of its `day`.
    """
    kind = connection.dialect.name
    names = ", ".join(f"r.{each}" for each in _OF_RUN)
    # PostgreSQL would read all runs for each place, if it met the subquery in the join.
    statement = sql.statement(
        "WITH q AS MATERIALIZED (SELECT v.day AS day, (SELECT s.id FROM batch_runs s "
        f"WHERE s.task = :task AND s.{OF_SLOT_SQL} "
        "AND s.slot >= v.begin AND s.slot < v.until ORDER BY s.slot LIMIT 1) AS id "
        f"FROM {json_rows.source(_COLUMNS, kind)}) "
        f"SELECT q.day, {names} FROM q JOIN batch_runs r ON r.id = q.id"
    ).columns(_COLUMNS[0], *(runs.c[each] for each in _OF_RUN))
    pieces = []
    for day in days:
        length = (day.until - day.begin) / LOOKED_AT
        begins = [day.begin + length * number for number in range(LOOKED_AT)]
        pieces += [Piece(day.day, begin, begin + length) for begin in begins]
    rows = await offload(_rows, pieces, kind)
    return (await connection.execute(statement, {"rows": rows, "task": task})).all()


def _rows(pieces: Sequence[Piece], kind: str) -> str:
    return json_rows.encode([each._asdict() for each in pieces], kind)
