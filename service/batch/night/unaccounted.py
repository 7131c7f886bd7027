"""The unaccounted slots of a window, one by one. Finding them costs no more than counting the
window.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.account import accounting
from service.batch.account.account import Kind
from service.batch.ledger.buckets import LENGTH
from service.batch.night import tally
from service.batch.night.counting import count
from service.batch.night.tally import MOST_COUNTED_AT_ONCE
from service.batch.tasks.declaration import ON_TIME


class UnaccountedSlot(NamedTuple):
    """A slot (aware, UTC). `kind`: due, late or gap, as in the account."""

    task: str
    slot: datetime
    kind: Kind


@dataclass(frozen=True)
class Unaccounted:
    """`slots`: the newest ones, the newest first. `number`: their number in all. `accounted_from`:
    see Window.
    """

    slots: list[UnaccountedSlot]
    number: int
    accounted_from: datetime | None


class _Newest:
    """Keeps the newest of the slots passed to `note`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[datetime, str, bool]] = []

    @property
    def is_full(self) -> bool:
        return len(self._heap) >= self._most

    def note(self, task: str, slot: datetime, is_handled: bool) -> None:
        if self.is_full:
            heapq.heappushpop(self._heap, (slot, task, is_handled))
        else:
            heapq.heappush(self._heap, (slot, task, is_handled))

    def newest_first(self) -> Iterator[tuple[datetime, str, bool]]:
        return iter(sorted(self._heap, reverse=True))


async def of_window(
    connection: AsyncConnection,
    since: datetime,
    until: datetime,
    now: datetime,
    lease: float,
    most: int,
) -> Unaccounted:
    """The unaccounted slots from `since` up to `until` (excluded; both aware, UTC), at most `most`.

    Buckets without a tally are counted, as for Night. Of the others, only those with unaccounted
    slots are counted again, until there are enough slots. `lease`: see `accounting.accounts`. Call
    it in one read transaction.
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
    running = await accounting.tasks_of_running_nodes(connection, now - timedelta(seconds=lease))
    slots = [
        UnaccountedSlot(task, slot, _kind(is_handled, task in running and slot < now - ON_TIME))
        for slot, task, is_handled in newest.newest_first()
    ]
    return Unaccounted(slots, number, accounted_from)


def _kind(is_handled: bool, is_late: bool) -> Kind:
    if is_handled:
        return Kind.GAP
    return Kind.LATE if is_late else Kind.DUE
