"""Runs whose rows somebody else's transaction has locked, so that their ends can't be written yet,
and who that is.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select

from service import clock
from service.batch.ledger.blocking import Blocker
from service.batch.ledger.tables import runs
from service.database.engine import Database
from service.logs import get_logger

logger = get_logger("service.batch")

TOLD_SECONDS = 10.0
"""After this time a line of the log and `/readyz` say which connection holds the lock."""


class LockedRuns:
    """Those of one engine. `trouble`: what is wrong, in one line; None while nothing is locked for
    long.
    """

    trouble: str | None = None

    def __init__(self, database: Database) -> None:
        self._since: float | None = None
        self._ids: Sequence[str] = ()
        self._blocker = Blocker(database, on_found=self._say)

    @property
    def is_any(self) -> bool:
        """Whether some runs were locked at the last write, so that the next one leaves out what
        is.
        """
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
            self._blocker.forget()
        elif self.trouble is None and clock.monotonic() > (self._since or 0.0) + TOLD_SECONDS:
            self._blocker.ask(select(runs.c.id).where(runs.c.id == ids[0]).with_for_update())

    async def stop(self) -> None:
        await self._blocker.stop()

    def _say(self, holder: str) -> None:
        number = len(self._ids)
        what = f"{number:,} runs have" if number > 1 else "a run has"
        self.trouble = f"{what} ended, which can't be written: their rows are locked by {holder}"
        logger.warning(f"{self.trouble}; it is tried again until they are free")
