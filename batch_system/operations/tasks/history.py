"""History: how a task has done on each day of the last 13 weeks, and its last runs.

What it reads does not grow with the history of the task. Days with a tally are summed by the
database. The runs of earlier days are counted up to a bound, and days beyond it are not known. How
long runs took on a day, and how late they began, is measured on a few slots of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from statistics import median
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger import buckets, database_time, parts, schedules
from batch_system.batch.ledger.buckets import KEPT, LENGTH, bucket_of
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, missed, runs
from batch_system.batch.night import tally, task_tally
from batch_system.batch.night.task_tally import SECOND, Piece
from batch_system.errors import NoLedger
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.night.page import WORST_FIRST
from batch_system.operations.people.redacting import hidden_tasks
from batch_system.operations.tasks import strip
from batch_system.operations.tasks.strip import Strip

WEEKS = 13
LAST_RUNS = 100
LAST_DAYS = 14
"""So many days stand beside a verdict."""
MOST_RUNS, MOST_BESIDE_TALLY = 9_000, 3_000
"""The slots of a task with more runs in the 13 weeks are read from the tally, where it is kept; of
those beside it at most the second number is counted, the newest ones.
"""
MOST_RANGES = 200
MOST_GAPS = 20
ON_DAY = timedelta(days=1)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class Day(Result):
    """The slots of a day by class. `worst`: the worst that became of one; None: none was due, or it
    is not known.

    `took`, `late`: the medians of the slots that were looked at, in seconds: of how long those that
    succeeded took, and of how long after its slot a run began. None: there is none.
    """

    date: date
    worst: str | None
    counts: dict[str, int]
    took: float | None = None
    late: float | None = None


class LastRun(Result):
    """A run, or a range of slots that did not run, which has no `run`.

    `at`: its slot, or when it was made; `until`: the last slot of a range. `seconds`: of its last
    attempt; None: it goes on or never began. `late`: how many seconds after its slot it began.
    `items`: how many it has processed.
    """

    run: str | None
    state: str
    at: datetime
    until: datetime | None = None
    number: int = 1
    seconds: float | None = None
    late: float | None = None
    reason: str | None = None
    fingerprint: str | None = None
    items: int | None = None
    is_of_slot: bool = True


class TaskHistory(Result):
    """`zone`: of the schedule, in which days are counted. `days`: 13 weeks, the oldest first, up to
    today.

    `known_from`: earlier days are not known, because the task is younger, its runs were deleted, or
    there are too many of them. `runs`: the newest first, with the slots between them that did not
    run.
    """

    now: datetime
    zone: str
    strip: Strip
    days: list[Day]
    counts: dict[str, int]
    known_from: date | None
    runs: list[LastRun]


async def history(context: Context, name: str, zone_name: str) -> TaskHistory:
    """How a task has done. `zone_name`: the zone in which the days of a task without a schedule are
    counted. Raises NoLedger.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        now = await database_time.now_of(connection)
        row = await schedules.open_schedule(connection, name)
        schedule = row.schedule if row is not None and row.is_usable else None
        zone = schedule.zone if schedule is not None else zone_of(zone_name)
        today = now.astimezone(zone).date()
        first = today - timedelta(days=today.weekday(), weeks=WEEKS - 1)
        pieces = _pieces(first, today, zone)
        by_day = await _by_day(connection, name, pieces, now)
        is_hidden = name in await hidden_tasks(connection, context)
        last = await _last_runs(connection, name, is_hidden)
        medians = (
            await _medians(connection, name, pieces)
            if schedule is not None
            else _medians_of(last, first, zone)
        )
        shown = [
            _day(first + timedelta(days=piece.day), by_day[piece.day], medians.get(piece.day))
            for piece in pieces
        ]
        return TaskHistory(
            now=now,
            zone=str(zone),
            strip=await strip.strip(connection, name, row, now),
            days=shown,
            counts=tally.summed(by_day.values()),
            known_from=min((each.date for each in shown if each.counts), default=None),
            runs=last,
        )


async def last_days(context: Context, name: str, zone_name: str) -> tuple[Strip, list[Day]]:
    """The slots of a task around now, and what became of those of each of the last days, the oldest
    first. `zone_name`: as for `history`. Raises NoLedger.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        now = await database_time.now_of(connection)
        row = await schedules.open_schedule(connection, name)
        is_usable = row is not None and row.is_usable
        zone = row.schedule.zone if row is not None and is_usable else zone_of(zone_name)
        today = now.astimezone(zone).date()
        first = today - timedelta(days=LAST_DAYS - 1)
        pieces = _pieces(first, today, zone)
        by_day = await _by_day(connection, name, pieces, now)
        days = [_day(first + timedelta(days=each.day), by_day[each.day], None) for each in pieces]
        return await strip.strip(connection, name, row, now), days


def _pieces(first: date, last: date, zone: ZoneInfo) -> list[Piece]:
    """The days from the first to the last."""
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    return [
        Piece(number, _midnight(day, zone), _midnight(day + ON_DAY, zone))
        for number, day in enumerate(days)
    ]


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, time(), zone).astimezone(UTC)


def _day(
    day: date, counted: Mapping[str, int], medians: tuple[float | None, float | None] | None
) -> Day:
    counts = dict(+Counter(counted))
    took, late = medians or (None, None)
    worst = next((each for each in WORST_FIRST if counts.get(each)), None)
    return Day(date=day, worst=worst, counts=counts, took=took, late=late)


async def _by_day(
    connection: AsyncConnection, name: str, pieces: Sequence[Piece], now: datetime
) -> dict[int, Counter[str]]:
    """The slots of each day by class: from the runs and missed ranges, or from the tally, where it
    is kept, of a task with many slots.
    """
    by_day: dict[int, Counter[str]] = defaultdict(Counter)
    every = [(pieces[0].begin, now + SECOND)]
    known = await task_tally.known(connection, name, pieces, every, MOST_RUNS)
    if known == every:
        for day, number in await task_tally.unaccounted(connection, name, pieces):
            by_day[day]["unaccounted"] += number
    else:
        gaps = await _add_tally(connection, name, pieces, now, by_day)
        known = await task_tally.known(connection, name, pieces, gaps, MOST_BESIDE_TALLY)
    left = task_tally.divided(pieces, known)
    for day, state, number in await task_tally.counted(connection, name, left):
        by_day[day][state] += number
    ranges = await _ranges(connection, name, pieces[0].begin)
    for day, cause, number in await task_tally.not_run(connection, name, left, ranges):
        by_day[day][cause] += number
    return by_day


async def _add_tally(
    connection: AsyncConnection,
    name: str,
    pieces: Sequence[Piece],
    now: datetime,
    by_day: dict[int, Counter[str]],
) -> list[tuple[datetime, datetime]]:
    """Add what the tally has. Returns the intervals without a tally, the newest first; at most
    MOST_GAPS.

    A bucket is of the day in which it begins: some zones are 45 minutes beside whole hours.
    """
    begin, end = pieces[0].begin, now + SECOND
    since = max(begin, bucket_of(now - KEPT) + LENGTH)
    with_tally = task_tally.divided(pieces, [(since, end)])
    numbers: dict[int, int] = {}
    for day, number, counts in await task_tally.tallied(connection, name, with_tally):
        by_day[day].update(counts)
        numbers[day] = number
    gaps = [(begin, since)] if begin < since else []
    for piece in with_tally:
        every = [at for at in buckets.between(piece.begin, piece.until) if at >= piece.begin]
        if numbers.get(piece.day) != len(every):
            counted = await buckets.counted(connection, piece.begin, piece.until)
            rest = tally.intervals([at for at in every if at not in counted])
            gaps += [(at, min(until, end)) for at, until in rest]
    return sorted(gaps, reverse=True)[:MOST_GAPS]


async def _ranges(connection: AsyncConnection, name: str, begin: datetime) -> Sequence[Any]:
    query = select(missed).where(missed.c.task == name, missed.c.last_slot >= begin)
    return (
        await connection.execute(query.order_by(missed.c.last_slot.desc()).limit(MOST_RANGES))
    ).all()


async def _medians(
    connection: AsyncConnection, name: str, pieces: Sequence[Piece]
) -> dict[int, tuple[float | None, float | None]]:
    """For each day the medians of how long its runs took, and how late they began."""
    took: dict[int, list[float]] = defaultdict(list)
    late: dict[int, list[float]] = defaultdict(list)
    for row in await task_tally.looked_at(connection, name, pieces):
        if row.state == RunState.SUCCEEDED and (seconds := parts.seconds_taken(row)) is not None:
            took[row.day].append(seconds)
        if (seconds := _late(row)) is not None:
            late[row.day].append(seconds)
    return {
        day: (_median(took.get(day)), _median(late.get(day))) for day in took.keys() | late.keys()
    }


def _medians_of(
    last: Sequence[LastRun], first: date, zone: ZoneInfo
) -> dict[int, tuple[float | None, float | None]]:
    """The same of a task without a schedule, from its last runs."""
    took: dict[int, list[float]] = defaultdict(list)
    for run in last:
        if run.state == RunState.SUCCEEDED and run.seconds is not None:
            took[(run.at.astimezone(zone).date() - first).days].append(run.seconds)
    return {day: (median(seconds), None) for day, seconds in took.items()}


def _median(seconds: Sequence[float] | None) -> float | None:
    return median(seconds) if seconds else None


def _late(row: Any) -> float | None:
    """How long after its slot a run began, if it was not started later on purpose."""
    if row.origin != Origin.SCHEDULE or row.slot is None or row.started_at is None:
        return None
    return max(0.0, float((row.started_at - row.slot).total_seconds()))


async def _last_runs(connection: AsyncConnection, name: str, is_hidden: bool) -> list[LastRun]:
    """The last runs, and the slots between them that did not run, the newest first."""
    names = ("id", "state", "origin", "slot", "created_at", "gate", "started_at", "finished_at")
    more = ("attempt_started_at", "reason", "fingerprint", "count")
    query = run_rows((*names, *more), runs.c.task == name, NO_PART_SQL)
    rows = (await connection.execute(query.order_by(*NEWEST_FIRST).limit(LAST_RUNS))).all()
    found = [
        LastRun(
            run=row.id,
            state=row.state,
            at=row.slot or row.created_at,
            seconds=parts.seconds_taken(row),
            late=_late(row),
            reason=None if is_hidden else row.reason,
            fingerprint=row.fingerprint,
            items=row._mapping["count"],
            is_of_slot=row.slot is not None and row.origin != Origin.MANUAL,
        )
        for row in rows
    ]
    begin = found[-1].at if len(rows) == LAST_RUNS else _LONG_AGO
    for each in await _ranges(connection, name, begin):
        range_of = LastRun(
            run=None,
            state="paused" if each.cause == "paused" else "missed",
            at=each.first_slot,
            until=each.last_slot,
            number=each.count,
            reason=each.reason,
        )
        found.append(range_of)
    return sorted(found, key=lambda each: each.until or each.at, reverse=True)
