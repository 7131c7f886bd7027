"""Asks a database whether it answers."""

from __future__ import annotations

import asyncio

from sqlalchemy.exc import DBAPIError

from service.database import troubles
from service.database.engine import Database
from service.errors import DatabaseError

ANSWER_SECONDS = 3.0


async def trouble_with(database: Database) -> str | None:
    """Why a database does not answer; None if it does."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            await database.answer()
    except (DBAPIError, DatabaseError, OSError) as error:
        return f"the database does not answer ({troubles.advice_on(error) or type(error).__name__})"
    return None
