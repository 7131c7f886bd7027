"""Asks a database whether it answers, and writes to one that may not answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.concurrency.limits import limited
from service.database import troubles
from service.database.engine import Database
from service.errors import DatabaseError
from service.logs import get_logger

logger = get_logger("service.batch")

ANSWER_SECONDS = 3.0


async def trouble_with(database: Database) -> str | None:
    """Why a database does not answer; None if it does."""
    try:
        async with limited(ANSWER_SECONDS):
            await database.answer()
    except (DBAPIError, DatabaseError, OSError) as error:
        return f"the database does not answer ({troubles.advice_on(error) or type(error).__name__})"
    return None


async def write_if_reachable(
    ledger: Database, write: Callable[[AsyncConnection], Awaitable[None]]
) -> bool:
    """Call `write` in a transaction of the ledger. Returns False if the ledger can't be reached,
    which is logged.
    """
    try:
        async with limited(ANSWER_SECONDS), ledger.engine.begin() as connection:
            await write(connection)
    except (DBAPIError, DatabaseError, OSError) as error:
        logger.warning(f"the ledger can't be reached: {ledger.why(error)}")
        return False
    return True
