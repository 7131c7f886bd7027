"""`operations.night_page()`: the night, with what its page draws, read in the same transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.buckets import LENGTH
from batch_system.batch.night import tally
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.context import Context
from batch_system.operations.night import night
from batch_system.operations.night.ahead import Coming, coming, planned_slots
from batch_system.operations.night.attention import DETAILED
from batch_system.operations.night.lanes import Lanes, lanes_of
from batch_system.operations.night.night import AHEAD, EVENING
from batch_system.operations.night.results import Night
from batch_system.operations.night.sparks import Spark, sparks_of

MOST_COLUMNS = 150
"""The chart has this many columns at most: in a longer window, a column is a multiple of ten
minutes.
"""
NIGHTS = 14
MORNING = 8
WORST_FIRST = (
    "unaccounted",
    "failed",
    "missed",
    "active",
    "skipped",
    "cancelled",
    "paused",
    "succeeded",
)


@dataclass(frozen=True)
class Column:
    """The slots of some minutes by class, from `at` on. `planned`: they are still to come."""

    at: datetime
    counts: dict[str, int]
    planned: int = 0


@dataclass(frozen=True)
class PastNight:
    """One of the last nights, from 18:00 to 08:00. `worst`: the worst that happened to a slot;
    None: none was due.
    """

    begin: datetime
    end: datetime
    worst: str | None


@dataclass(frozen=True)
class NightPage:
    """The night, and what its page draws. `column`: how many seconds a column of the chart
    holds.
    """

    night: Night
    column: int
    columns: list[Column]
    nights: list[PastNight]
    lanes: Lanes
    coming: list[Coming]
    sparks: dict[str, list[Spark]]


async def night_page(
    context: Context, since: datetime | None, until: datetime | None, zone: str
) -> NightPage:
    """The same, with what the page of the night draws."""
    local = zone_of(zone)
    async with night.snapshot(context) as connection:
        now = await database_time.now_of(connection)
        begin, end = night.window_of(since, until, now, local)
        found, window, used = await night.read(connection, context, begin, end, now, local)
        planned = {} if end is not None else await offload(planned_slots, used, now)
        length = _length(begin, (end or now + AHEAD))
        return NightPage(
            night=found,
            column=int(length.total_seconds()),
            columns=_columns(window.by_bucket, planned, begin, end or now + AHEAD, length),
            nights=await _nights(connection, now, local),
            lanes=await lanes_of(
                connection, found, window, used, end or now, None if end is not None else AHEAD
            ),
            coming=[] if end is not None else await offload(coming, used, found),
            sparks=await sparks_of(
                connection, (need.task for need in found.needs[:DETAILED] if need.task)
            ),
        )


def _length(begin: datetime, end: datetime) -> timedelta:
    """How long a column is: a multiple of ten minutes."""
    return LENGTH * max(1, -(-((end - begin) // LENGTH) // MOST_COLUMNS))


def _columns(
    by_bucket: Mapping[datetime, Mapping[str, int]],
    planned: Mapping[datetime, int],
    begin: datetime,
    end: datetime,
    length: timedelta,
) -> list[Column]:
    columns: list[Column] = []
    at = begin
    while at < end:
        counts: Counter[str] = Counter()
        ahead = 0
        bucket = at
        while bucket < min(at + length, end):
            counts.update(by_bucket.get(bucket, {}))
            ahead += planned.get(bucket, 0)
            bucket += LENGTH
        columns.append(Column(at=at, counts=dict(+counts), planned=ahead))
        at += length
    return columns


async def _nights(connection: AsyncConnection, now: datetime, zone: ZoneInfo) -> list[PastNight]:
    """The last nights, the oldest first; the last one may go on. Buckets without a tally are not
    counted.
    """
    windows = _windows(now, zone)
    by_bucket = await tally.not_all_good(connection, windows[0][0], windows[-1][1])
    worst: dict[tuple[datetime, datetime], str | None] = {}
    for begin, end in windows:
        counts: Counter[str] = Counter()
        for bucket, classes in by_bucket.items():
            if begin <= bucket < end:
                counts.update(classes)
        worst[begin, end] = _worst(counts)
    good = [window for window in windows if worst[window] is None]
    for window, has_any in zip(good, await tally.have_slots(connection, good), strict=True):
        worst[window] = "succeeded" if has_any else None
    return [PastNight(begin=begin, end=end, worst=worst[begin, end]) for begin, end in windows]


def _windows(now: datetime, zone: ZoneInfo) -> Sequence[tuple[datetime, datetime]]:
    """From 18:00 to 08:00 of the next day in the zone, for the last fourteen nights that have
    begun.
    """
    today = now.astimezone(zone).replace(hour=EVENING, minute=0, second=0, microsecond=0)
    last = today if today <= now.astimezone(zone) else today - timedelta(days=1)
    return [
        (
            begin.astimezone(now.tzinfo),
            (begin + timedelta(days=1)).replace(hour=MORNING).astimezone(now.tzinfo),
        )
        for begin in (last - timedelta(days=number) for number in reversed(range(NIGHTS)))
    ]


def _worst(counts: Mapping[str, int]) -> str | None:
    return next((name for name in WORST_FIRST if counts.get(name)), None)
