"""`operations.unaccounted()`: the slots behind the number "unaccounted" of Night, one by one.

Finding them costs no more than counting the window.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.account.account import tasks_of_running_nodes
from batch_system.batch.account.slots import Kind
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.ledger import database_time, schedules
from batch_system.batch.ledger.buckets import LENGTH
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.night import tally
from batch_system.batch.night.counting import count
from batch_system.batch.night.tally import MOST_COUNTED_AT_ONCE
from batch_system.concurrency.offload import offload
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.night.night import snapshot, window_of
from batch_system.operations.night.results import MOST
from batch_system.operations.slots.account import TEXTS

SECOND = timedelta(seconds=1)


class UnaccountedSlot(Result):
    """`kind`: due, late or gap, as in the account. `text`: what that means.

    `day`: in the zone of the schedule, if a backfill of this day would make a run for the slot;
    else None.
    """

    task: str
    slot: datetime
    kind: str
    text: str
    day: date | None


class UnaccountedSlots(Result):
    """`until`: None if the window goes on until now (`as_of`). `slots`: the newest first. `more`:
    how many others.

    `accounted_from`: earlier slots of the window are not counted yet; None: all are.
    """

    as_of: datetime
    since: datetime
    until: datetime | None
    slots: list[UnaccountedSlot]
    more: int
    accounted_from: datetime | None


async def slots(
    context: Context, since: datetime | None, until: datetime | None, zone: str
) -> UnaccountedSlots:
    """The slots of a window of Night that are unaccounted for: the newest 200, at no more cost than
    Night counts.

    The window is that of `night`. Raises NoLedger, InvalidParameters and InvalidSchedule, as
    `night` does.
    """
    local = zone_of(zone)
    async with snapshot(context) as connection:
        now = await database_time.now_of(connection)
        begin, end = window_of(since, until, now, local)
        found = await of_window(connection, begin, end or now, now, context.lease_seconds, MOST)
        opened = await schedules.still_open(connection, {task for task, _, _ in found.slots})
    return UnaccountedSlots(
        as_of=now,
        since=begin,
        until=end,
        slots=await offload(_slots, found, opened),
        more=found.number - len(found.slots),
        accounted_from=found.accounted_from,
    )


def _slots(found: Found, opened: Mapping[str, OpenSchedule]) -> list[UnaccountedSlot]:
    return [
        UnaccountedSlot(
            task=task, slot=slot, kind=kind, text=TEXTS[kind], day=_day(opened.get(task), slot)
        )
        for task, slot, kind in found.slots
    ]


def _day(row: OpenSchedule | None, slot: datetime) -> date | None:
    """The day of the slot, if it is a slot of the task's present schedule, which a backfill
    uses.
    """
    if row is None or not row.is_usable or slot not in row.schedule.between(slot - SECOND, slot):
        return None
    return slot.astimezone(row.schedule.zone).date()


class KindOfSlot(NamedTuple):
    """A slot (aware, UTC). `kind`: due, late or gap, as in the account."""

    task: str
    slot: datetime
    kind: Kind


@dataclass(frozen=True)
class Found:
    """`slots`: the newest ones, the newest first. `number`: their number in all. `accounted_from`:
    see Window.
    """

    slots: list[KindOfSlot]
    number: int
    accounted_from: datetime | None


class _Newest:
    """Keeps the newest of the slots passed to `note`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[datetime, str, Kind]] = []

    @property
    def is_full(self) -> bool:
        return len(self._heap) >= self._most

    def note(self, task: str, slot: datetime, kind: Kind) -> None:
        if self.is_full:
            heapq.heappushpop(self._heap, (slot, task, kind))
        else:
            heapq.heappush(self._heap, (slot, task, kind))

    def newest_first(self) -> Iterator[tuple[datetime, str, Kind]]:
        return iter(sorted(self._heap, reverse=True))


async def of_window(
    connection: AsyncConnection,
    since: datetime,
    until: datetime,
    now: datetime,
    lease: float,
    most: int,
) -> Found:
    """The unaccounted slots from `since` up to `until` (excluded; both aware, UTC), at most `most`.

    Buckets without a tally are counted, as for Night. Of those with one, only the buckets with an
    unaccounted slot are counted again, until there are enough slots. `lease`: see
    `account.accounts`. Call it in one read transaction.
    """
    tallied, rest, accounted_from = await tally.divided(connection, since, until)
    sums = await tally.not_all_good(connection, accounted_from or since, until)
    known = {bucket: counts["unaccounted"] for bucket, counts in sums.items() if bucket in tallied}
    known = {bucket: number for bucket, number in known.items() if number}
    newest, number, left = _Newest(most), sum(known.values()), MOST_COUNTED_AT_ONCE - len(rest)
    intervals = [*tally.intervals(rest), *((bucket, bucket + LENGTH) for bucket in known)]
    for begin, end in sorted(intervals, reverse=True):
        if begin in known:
            left -= 1
            if newest.is_full or left < 0:
                continue
        found = await count(connection, max(begin, since), min(end, until), now, newest.note)
        if begin not in known:
            number += sum(counts["unaccounted"] for counts in found.counts.values())
    running = await tasks_of_running_nodes(connection, now - timedelta(seconds=lease))
    slots = [
        KindOfSlot(task, slot, kind if kind == Kind.GAP or task in running else Kind.DUE)
        for slot, task, kind in newest.newest_first()
    ]
    return Found(slots, number, accounted_from)
