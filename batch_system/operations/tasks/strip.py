"""The strip of a task: what became of its slots of the last day, and which come next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import islice

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.firing.misfires import INSTANT
from batch_system.batch.ledger import buckets
from batch_system.batch.ledger.buckets import bucket_of
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.night import counting, tally
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.results import Result
from batch_system.operations.night.clock_changes import clock_changes

BACK, AHEAD = timedelta(hours=24), timedelta(hours=12)
MOST_SLOTS = 300
"""At most this many slots are listed one by one. Of more, only the number in each ten minutes is
known.
"""
NEXT = 6
_SECOND, _DAY = timedelta(seconds=1), timedelta(days=1)


class FireTime(Result):
    """A slot to come. `change`: if the clocks of the schedule's zone change on its day, their times
    before and after, such as 03:00 and 02:00.
    """

    slot: datetime
    change: tuple[str, str] | None


class StripCell(Result):
    """The slots of ten minutes by class. `at`: the slot itself if it is the only one, else when the
    ten minutes begin.
    """

    at: datetime
    is_slot: bool
    counts: dict[str, int]


class Strip(Result):
    """From `begin` to `end`, with `now` between. `counts`: the slots up to now by class.

    `planned`: the slots to come; empty if there are too many of them (`ahead`) to be listed.
    """

    begin: datetime
    now: datetime
    end: datetime
    counts: dict[str, int]
    cells: list[StripCell]
    planned: list[datetime]
    ahead: int
    next: list[FireTime]


async def strip(
    connection: AsyncConnection, name: str, row: OpenSchedule | None, now: datetime
) -> Strip:
    """The strip of a task. `row`: its open schedule, if it has one. The slots are those of Night's
    tally; where that has none yet, they are counted now.
    """
    begin, end = bucket_of(now - BACK), now + AHEAD
    counted = await buckets.counted(connection, begin, now)
    by_bucket = (await tally.of_tasks(connection, [name], counted))[name]
    rest = [bucket for bucket in buckets.between(begin, now + INSTANT) if bucket not in counted]
    for since, until in tally.intervals(rest):
        found = await counting.count(connection, since, min(until, now + INSTANT), now, task=name)
        by_bucket |= {bucket: dict(counts) for (bucket, _), counts in found.counts.items()}
    schedule = row.schedule if row is not None and row.is_usable else None
    is_paused = row is not None and row.paused_by is not None
    return await offload(_strip, schedule, is_paused, by_bucket, begin, now, end)


def _strip(
    schedule: Schedule | None,
    is_paused: bool,
    by_bucket: Mapping[datetime, Mapping[str, int]],
    begin: datetime,
    now: datetime,
    end: datetime,
) -> Strip:
    """It computes with the schedule: call it in a thread."""
    by_bucket = {at: counts for at, counts in by_bucket.items() if any(counts.values())}
    slots: dict[datetime, list[datetime]] = defaultdict(list)
    ahead, planned, following = 0, [], []
    if schedule is not None:
        for slot in _listed(schedule, begin - INSTANT, now):
            slots[bucket_of(slot)].append(slot)
        if not is_paused:
            planned = _listed(schedule, now, end)
            ahead = len(planned) or count(schedule, now, end)
            following = _next(schedule, now)
    cells = []
    for bucket, counts in sorted(by_bucket.items()):
        its = slots.get(bucket, [])
        is_slot = len(its) == 1 == sum(counts.values())
        at = its[0] if is_slot else bucket
        cells.append(
            StripCell(at=at, is_slot=is_slot, counts={k: v for k, v in counts.items() if v})
        )
    return Strip(
        begin=begin,
        now=now,
        end=end,
        counts=tally.summed(by_bucket.values()),
        cells=cells,
        planned=planned,
        ahead=ahead,
        next=following,
    )


def _listed(schedule: Schedule, after: datetime, until: datetime) -> list[datetime]:
    """The slots in (after, until]; none if there are too many."""
    found = list(islice(schedule.between(after, until), MOST_SLOTS + 1))
    return found if len(found) <= MOST_SLOTS else []


def _next(schedule: Schedule, now: datetime) -> list[FireTime]:
    found = []
    for slot in schedule.following(now, NEXT):
        local = slot.astimezone(schedule.zone)
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        changes = clock_changes([str(schedule.zone)], midnight - _SECOND, midnight + _DAY - _SECOND)
        is_ahead = bool(changes) and changes[0].at > now
        change = (str(changes[0].before), str(changes[0].after)) if is_ahead else None
        found.append(FireTime(slot=slot, change=change))
    return found
