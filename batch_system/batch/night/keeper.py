"""Keeps the tally: counts each ten minutes once they have passed, and earlier ones of the last
month, the newest first.

It also keeps how long the runs of each task usually take.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import durations
from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.ledger import buckets, database_time, duties
from batch_system.batch.ledger.duties import WATCH
from batch_system.batch.ledger.incidents import incidents
from batch_system.batch.ledger.incidents.incidents import Opening
from batch_system.batch.ledger.states import Closed, IncidentKind
from batch_system.batch.ledger.tables import schedules
from batch_system.batch.night import tally
from batch_system.batch.nodes.outage import Outage
from batch_system.concurrency.background import Background
from batch_system.database.engine import Database
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

AT_ONCE = 6
"""How many buckets are counted in one transaction: an hour."""
MEASURED_AT_ONCE = 20
"""The durations of this many tasks are computed before they are written."""
MOST_CHANGED = 5_000
"""The most buckets that are counted again in one turn: more than there are in a month."""
PAUSE_SECONDS = 0.1
LONGEST_SECONDS = buckets.LENGTH.total_seconds()
"""The interval at which another bucket has passed. The tally is also kept when the watch has
noticed something.
"""
AGAIN_SECONDS = 1.0
"""The wait between two tries while the ledger can't be reached. The outage lasts until this part
works again.
"""
FILLED = timedelta(days=31)
"""How far back the tally is filled."""


class TallyKeeper(Background):
    """Works on the node that has the duty of the watch. `holds`: whether this node has it."""

    def __init__(
        self, ledger: Database, node: str, holds: Callable[[], bool], outage: Outage
    ) -> None:
        self._ledger = ledger
        self._node = node
        self._holds = holds
        self._outage = outage
        self._woken = asyncio.Event()
        self._filled_until: datetime | None = None
        self._pending: set[datetime] = set()

    def wake(self) -> None:
        """Slots of earlier buckets may have changed."""
        self._woken.set()

    async def _loop(self) -> None:
        wait = LONGEST_SECONDS
        while True:
            try:
                async with asyncio.timeout(wait):
                    await self._woken.wait()
            except TimeoutError:
                pass
            self._woken.clear()
            try:
                wait = await self.keep_up()
                self._outage.over_for("tally")
            except Exception as error:  # the background loop's boundary
                cause = self._outage.cause_for("tally", self._ledger, error)
                if cause is None:
                    logger.exception("keeping the tally of slots failed; it is repeated")
                wait = LONGEST_SECONDS if cause is None else AGAIN_SECONDS

    async def keep_up(self) -> float:
        """Count every bucket that can be counted and is not yet, six in a transaction. Then compute
        durations.

        Returns the seconds until one more bucket can be counted. A node without the duty does
        nothing.
        """
        if not self._holds():
            return LONGEST_SECONDS
        async with self.limited_turn():
            wanted, now = await self._wanted()
        left: set[datetime] = set()
        for first in range(0, len(wanted), AT_ONCE):
            if not self._holds():
                return LONGEST_SECONDS
            async with self.limited_turn():
                left |= await self._keep(wanted[first : first + AT_ONCE])
            await asyncio.sleep(PAUSE_SECONDS)
        self._pending = left
        self._filled_until = tally.may_be_over(now)
        await self._measure()
        return tally.until_next(now).total_seconds()

    async def _measure(self) -> None:
        """Compute the usual durations again for tasks that have had a run since the last
        computation.
        """
        async with self.limited_turn(), self._ledger.reader.connect() as connection:
            names = await durations.outdated(connection, await database_time.now_of(connection))
        for first in range(0, len(names), MEASURED_AT_ONCE):
            async with self.limited_turn():
                if not await self._measure_some(names[first : first + MEASURED_AT_ONCE]):
                    return
            await asyncio.sleep(PAUSE_SECONDS)

    async def _measure_some(self, names: Sequence[str]) -> bool:
        """Returns whether this node still has the duty."""
        async with self._ledger.reader.connect() as connection:
            usual = UsualDurations(connection, await database_time.now_of(connection))
            for name in names:
                await usual.of_task(name)
        async with self._ledger.engine.begin() as connection:
            if not await duties.hold(connection, WATCH, self._node):
                return False
            await durations.keep(connection, usual.computed)
        return True

    async def _wanted(self) -> tuple[list[datetime], datetime]:
        """The buckets to count, first those that have changed, then the newest first; and the
        database time.
        """
        async with self._ledger.reader.connect() as connection:
            now = await database_time.now_of(connection)
            end, begin = tally.may_be_over(now), await _begin(connection, now)
            if begin is None:
                return [], now
            changed = [
                bucket
                for bucket in await buckets.dirty(connection, MOST_CHANGED)
                if begin <= bucket < end
            ]
            since = max(begin, self._filled_until) if self._filled_until is not None else begin
            counted = await buckets.counted(connection, since, end)
        new = {bucket for bucket in buckets.between(since, end) if bucket not in counted}
        rest = sorted((new | self._pending) - set(changed), reverse=True)
        return [*changed, *rest], now

    async def _keep(self, wanted: Sequence[datetime]) -> set[datetime]:
        """Count these buckets. Returns those that can't be counted yet, because slots in them are
        still active.
        """
        async with self._ledger.engine.begin() as connection:
            if not await duties.hold(connection, WATCH, self._node):
                return set(wanted)
            now = await database_time.now_of(connection)
            kept = await tally.keep(connection, wanted, now)
            await _report(connection, kept.unaccounted, now)
        return set(kept.left)


async def _begin(connection: AsyncConnection, now: datetime) -> datetime | None:
    """The first bucket that may have slots, at most FILLED ago; None if no task has ever had a
    schedule.
    """
    first = (await connection.execute(select(func.min(schedules.c.valid_from)))).scalar()
    return buckets.bucket_of(max(first, now - FILLED)) if first is not None else None


async def _report(connection: AsyncConnection, unaccounted: Counter[str], now: datetime) -> None:
    """Open an incident for each task with unaccounted slots in these buckets, and close those of
    tasks without any left.
    """
    opened = {
        row.task: row for row in await incidents.are_open(connection, [IncidentKind.UNACCOUNTED])
    }
    openings = [
        Opening(
            IncidentKind.UNACCOUNTED,
            "slots are neither a run nor recorded as missed; `batch account` says which",
            now,
            task=task,
            count=number,
        )
        for task, number in sorted(unaccounted.items())
        if task not in opened
    ]
    await incidents.open_or_continue(connection, openings, now)
    still = await tally.unaccounted(connection, opened) if opened else set()
    over = [row.id for task, row in opened.items() if task not in still and task not in unaccounted]
    await incidents.close(connection, over, Closed.OVER, now)
