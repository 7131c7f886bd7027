"""Runs whose rows somebody else's transaction has locked, so that their ends can't be written yet, and who that is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from sqlalchemy import select

from service import clock
from service.batch.ledger.blocking import blocker_in_words
from service.batch.ledger.tables import runs
from service.database.engine import Database
from service.logs import get_logger

logger = get_logger("service.batch")

TOLD_SECONDS = 10.0
"""After this time a line of the log and `/readyz` say which connection holds the lock."""


class LockedRuns:
    """Those of one engine. `trouble`: what is wrong, in one line; None while nothing is locked for long."""

    trouble: str | None = None

    def __init__(self, database: Database) -> None:
        self._database = database
        self._since: float | None = None
        self._ids: Sequence[str] = ()
        self._asking: asyncio.Task[None] | None = None

    @property
    def is_any(self) -> bool:
        """Whether some runs were locked at the last write, so that the next one leaves out what is."""
        return self._since is not None

    @property
    def number(self) -> int:
        """How many outcomes were left at the last write."""
        return len(self._ids)

    def begin(self) -> None:
        """A write had to wait for a lock for too long."""
        self._since = clock.monotonic()

    def are(self, ids: Sequence[str]) -> None:
        """These runs were locked at the write that has just been committed."""
        self._ids = ids
        if not ids:
            if self.trouble is not None:
                logger.info("the runs that were locked are free again; their ends are written")
            self._since = self.trouble = None
        elif self._is_to_be_told and (self._asking is None or self._asking.done()):
            self._asking = asyncio.create_task(self._ask(), name="batch-locked-runs")

    @property
    def _is_to_be_told(self) -> bool:
        return self.trouble is None and clock.monotonic() > (self._since or 0.0) + TOLD_SECONDS

    async def stop(self) -> None:
        """End the question who holds the lock, if it is being asked."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _ask(self) -> None:
        """Find out who holds the lock, and say it once."""
        locking = select(runs.c.id).where(runs.c.id == self._ids[0]).with_for_update()
        holder = await blocker_in_words(self._database, locking)
        if holder is None or not self._ids:
            return
        number = len(self._ids)
        what = f"{number:,} runs have" if number > 1 else "a run has"
        self.trouble = f"{what} ended, which can't be written: their rows are locked by {holder}"
        logger.warning(f"{self.trouble}; it is tried again until they are free")
