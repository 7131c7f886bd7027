"""`operations.unaccounted()`: the slots behind the number "unaccounted" of Night."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, timedelta

from service.batch.cron.zones import zone_of
from service.batch.ledger import database_time, schedules
from service.batch.ledger.schedules import OpenSchedule
from service.batch.night import unaccounted
from service.batch.night.unaccounted import Unaccounted
from service.concurrency.offload import offload
from service.operations.asking.context import Context
from service.operations.asking.results import Result
from service.operations.night.night import snapshot, window_of
from service.operations.night.results import MOST
from service.operations.slots.account import TEXTS

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

    The window is that of `night`. Raises NoLedger, InvalidParameters and InvalidSchedule as that
    does.
    """
    local = zone_of(zone)
    async with snapshot(context) as connection:
        now = await database_time.now_of(connection)
        begin, end = window_of(since, until, now, local)
        found = await unaccounted.of_window(
            connection, begin, end or now, now, context.lease_seconds, MOST
        )
        opened = await schedules.still_open(connection, {each.task for each in found.slots})
    return UnaccountedSlots(
        as_of=now,
        since=begin,
        until=end,
        slots=await offload(_slots, found, opened),
        more=found.number - len(found.slots),
        accounted_from=found.accounted_from,
    )


def _slots(found: Unaccounted, opened: Mapping[str, OpenSchedule]) -> list[UnaccountedSlot]:
    return [
        UnaccountedSlot(
            task=each.task,
            slot=each.slot,
            kind=each.kind,
            text=TEXTS[each.kind],
            day=_day(opened.get(each.task), each.slot),
        )
        for each in found.slots
    ]


def _day(row: OpenSchedule | None, slot: datetime) -> date | None:
    """The day of the slot, if it is a slot of the schedule that the task has now: a backfill goes
    by that one.
    """
    if row is None or not row.is_usable or slot not in row.schedule.between(slot - SECOND, slot):
        return None
    return slot.astimezone(row.schedule.zone).date()
