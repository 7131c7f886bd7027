"""History: the next slots of a task, its last 90 days, and how long its last
runs took.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import and_, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger import buckets, database_time, parts, schedules
from batch_system.batch.ledger.buckets import KEPT, LENGTH, bucket_of
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.states import ACTIVE
from batch_system.batch.ledger.tables import NO_PART_SQL, OF_SLOT_SQL, missed, runs
from batch_system.batch.night import tally
from batch_system.concurrency.offload import offload
from batch_system.errors import NoLedger
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.night.clock_changes import clock_changes
from batch_system.operations.night.page import WORST_FIRST

DAYS = 90
NEXT = 10
LAST_RUNS = 100
MOST_RUNS = 10_000
"""At most this many runs are read for the days without a tally: the newest ones."""
MOST_RANGES = 200
MOST_GAPS = 20
SECOND = timedelta(seconds=1)
ON_DAY = timedelta(days=1)


class FireTime(Result):
    """A slot to come; `local`: in the zone of the schedule. `is_new`: its offset differs from that
    of the slot before.

    `change`: if the clocks will change on its day, their times before and after, such as 03:00 and
    02:00.
    """

    slot: datetime
    local: datetime
    is_new: bool
    change: tuple[str, str] | None


class Day(Result):
    """The slots of a day by class. `worst`: the worst that became of one; None: none was due, or it
    is not known.
    """

    date: date
    worst: str | None
    counts: dict[str, int]


class Took(Result):
    """A run. `at`: its slot, or when it was made. `seconds`: of its last attempt; None: it goes on
    or never began.
    """

    run: str
    state: str
    at: datetime
    seconds: float | None


class TaskHistory(Result):
    """`zone`: of the schedule, in which days are counted. `days`: the oldest first, up to today.

    `known_from`: earlier days are not known, because the task is younger, or its runs were deleted.
    `took`: the oldest run first.
    """

    now: datetime
    zone: str
    next: list[FireTime]
    days: list[Day]
    counts: dict[str, int]
    known_from: date | None
    took: list[Took]


async def history(context: Context, name: str, zone_name: str) -> TaskHistory:
    """The next slots of a task, its last 90 days, and how long its last runs took.

    `zone`: the one in which the days of a task without a schedule are counted. Raises NoLedger.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            raise NoLedger("there is no ledger yet: no service has ever run")
        now = await database_time.now_of(connection)
        row = (await schedules.open_schedules(connection)).get(name)
        schedule = row.schedule if row is not None and row.is_usable else None
        zone = schedule.zone if schedule is not None else zone_of(zone_name)
        today = now.astimezone(zone).date()
        first = today - timedelta(days=DAYS - 1)
        begin = _midnight(first, zone)
        by_day = await _by_day(connection, name, schedule, zone, begin, now)
        days = [_day(first + timedelta(days=number), by_day) for number in range(DAYS)]
        is_paused = row is not None and row.paused_by is not None
        return TaskHistory(
            now=now,
            zone=str(zone),
            next=await offload(_next, schedule, now)
            if schedule is not None and not is_paused
            else [],
            days=days,
            counts=tally.summed(by_day.values()),
            known_from=min((day for day, counts in by_day.items() if counts), default=None),
            took=await _took(connection, name),
        )


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime.combine(day, time(), zone).astimezone(UTC)


def _day(day: date, by_day: Mapping[date, Mapping[str, int]]) -> Day:
    counts = dict(+Counter(by_day.get(day, {})))
    return Day(
        date=day,
        worst=next((each for each in WORST_FIRST if counts.get(each)), None),
        counts=counts,
    )


async def _by_day(
    connection: AsyncConnection,
    name: str,
    schedule: Schedule | None,
    zone: ZoneInfo,
    begin: datetime,
    now: datetime,
) -> dict[date, Counter[str]]:
    """The slots of each day by class: from the tally where it is kept, else from the runs and
    missed ranges.
    """
    since = max(begin, bucket_of(now - KEPT) + LENGTH)
    counted = await buckets.counted(connection, since, now)
    by_day: dict[date, Counter[str]] = defaultdict(Counter)
    kept = (await tally.of_tasks(connection, [name], counted))[name]
    for bucket, counts in kept.items():
        by_day[bucket.astimezone(zone).date()].update(counts)
    gaps = _gaps(counted, begin, now)
    states = await _states(connection, name, gaps)
    for day, state in await offload(_states_by_day, states, counted, zone):
        by_day[day][state] += 1
    ranges = await _ranges(connection, name, begin)
    for day, cause, number in await offload(_missed_by_day, ranges, schedule, zone, gaps):
        by_day[day][cause] += number
    return by_day


def _states_by_day(
    states: Sequence[tuple[datetime, str]], counted: Collection[datetime], zone: ZoneInfo
) -> list[tuple[date, str]]:
    return [
        (slot.astimezone(zone).date(), "active" if state in ACTIVE else state)
        for slot, state in states
        if bucket_of(slot) not in counted
    ]


def _gaps(
    counted: Collection[datetime], begin: datetime, now: datetime
) -> list[tuple[datetime, datetime]]:
    """The intervals without a tally, the newest first; at most MOST_GAPS."""
    gaps, end = [], now + SECOND
    for bucket in sorted(counted, reverse=True):
        if bucket + LENGTH < end:
            gaps.append((bucket + LENGTH, end))
        end = min(end, bucket)
    if begin < end:
        gaps.append((begin, end))
    return gaps[:MOST_GAPS]


async def _states(
    connection: AsyncConnection, name: str, gaps: Sequence[tuple[datetime, datetime]]
) -> list[tuple[datetime, str]]:
    if not gaps:
        return []
    within = or_(*(and_(runs.c.slot >= begin, runs.c.slot < end) for begin, end in gaps))
    query = run_rows(("slot", "state"), runs.c.task == name, OF_SLOT_SQL, within)
    query = query.where(runs.c.slot >= gaps[-1][0]).order_by(runs.c.slot.desc()).limit(MOST_RUNS)
    return [(row.slot, row.state) for row in await connection.execute(query)]


async def _ranges(connection: AsyncConnection, name: str, begin: datetime) -> Sequence[Any]:
    query = select(missed).where(missed.c.task == name, missed.c.last_slot >= begin)
    return (
        await connection.execute(query.order_by(missed.c.last_slot.desc()).limit(MOST_RANGES))
    ).all()


def _missed_by_day(
    ranges: Sequence[Any],
    schedule: Schedule | None,
    zone: ZoneInfo,
    gaps: Sequence[tuple[datetime, datetime]],
) -> list[tuple[date, str, int]]:
    """How many slots of each day are in both these ranges and the gaps, by the present schedule."""
    found = []
    for each in ranges:
        cause = "paused" if each.cause == "paused" else "missed"
        for begin, end in gaps:
            at, last = max(each.first_slot, begin), min(each.last_slot, end - SECOND)
            while at <= last:
                day = at.astimezone(zone).date()
                following = _midnight(day + ON_DAY, zone)
                number = (
                    count(schedule, at - SECOND, min(last, following - SECOND))
                    if schedule is not None
                    else 1
                )
                found.append((day, cause, min(number, each.count)))
                at = following
    return found


def _next(schedule: Schedule, now: datetime) -> list[FireTime]:
    """The next slots. It computes with the schedule and its zone."""
    zone, before, found = schedule.zone, now.astimezone(schedule.zone).utcoffset(), []
    for slot in schedule.following(now, NEXT):
        local = slot.astimezone(zone)
        midnight = _midnight(local.date(), zone)
        changes = clock_changes(
            [str(zone)], midnight - SECOND, _midnight(local.date() + ON_DAY, zone) - SECOND
        )
        change = (
            (str(changes[0].before), str(changes[0].after))
            if changes and changes[0].at > now
            else None
        )
        found.append(
            FireTime(slot=slot, local=local, is_new=local.utcoffset() != before, change=change)
        )
        before = local.utcoffset()
    return found


async def _took(connection: AsyncConnection, name: str) -> list[Took]:
    """The last runs, the oldest first."""
    names = (
        "id",
        "state",
        "slot",
        "created_at",
        "gate",
        "started_at",
        "attempt_started_at",
        "finished_at",
    )
    query = run_rows(names, runs.c.task == name, NO_PART_SQL)
    rows = (await connection.execute(query.order_by(*NEWEST_FIRST).limit(LAST_RUNS))).all()
    return [
        Took(
            run=row.id,
            state=row.state,
            at=row.slot or row.created_at,
            seconds=parts.seconds_taken(row),
        )
        for row in reversed(rows)
    ]
