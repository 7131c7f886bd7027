"""Upkeep: prunes the ledger once an hour, while the service runs."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import DBAPIError

from service.batch.background import Background
from service.batch.pruning import Pruner
from service.errors import DatabaseError
from service.logs import get_logger

logger = get_logger("service.batch")

FIRST_SECONDS = 600.0
"""After the start, when there is enough else to do."""

EVERY_SECONDS = 3600.0


class Upkeep(Background):
    def __init__(self, pruner: Pruner, first: float = FIRST_SECONDS) -> None:
        self._pruner = pruner
        self._first = first

    async def _loop(self) -> None:
        await asyncio.sleep(self._first)
        while True:
            try:
                went = +await self._pruner.prune()
                if went:
                    logger.info("pruned " + ", ".join(f"{number:,} {what}" for what, number in went.items()))
            except (DBAPIError, DatabaseError, OSError) as error:
                logger.warning(f"pruning stopped, and goes on in an hour: {str(error).splitlines()[0]}")
            except Exception:  # the background loop's boundary
                logger.exception("pruning failed")
            await asyncio.sleep(EVERY_SECONDS)
