"""Looks for requests to cancel what this node runs, and cancels it."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import DBAPIError

from service.batch import cancel
from service.batch.background import Background
from service.batch.engines.local import LocalEngine
from service.database.engine import Database
from service.errors import DatabaseError
from service.logs import get_logger

logger = get_logger("service.batch")

LOOK_SECONDS = 1.0


class Cancelling(Background):
    """One look a second, while something runs; an idle node asks the ledger nothing."""

    def __init__(self, database: Database, engine: LocalEngine) -> None:
        self._database = database
        self._engine = engine

    async def look(self) -> None:
        """Cancel the attempts that somebody asked to cancel since the last look."""
        async with self._database.reader.connect() as connection:
            asked = {(one.run, one.fence): one.reason for one in await cancel.requests(connection)}
        for attempt in self._engine.attempts if asked else []:
            reason = asked.get((attempt.claimed.id, attempt.claimed.fence))
            if reason is not None:
                attempt.cancel(reason)

    async def _loop(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if not self._engine.running:
                continue
            try:
                await self.look()
            except (DBAPIError, DatabaseError, OSError) as error:  # the engine says it loudly
                logger.debug(f"requests to cancel can't be read from the ledger: {str(error).splitlines()[0]}")
            except Exception:  # the background loop's boundary: the next look may do better
                logger.exception("looking for requests to cancel failed")
