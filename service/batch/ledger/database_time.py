"""The time of the ledger's database, which decides what is due."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.ledger.tables import schedules


async def now_of(connection: AsyncConnection) -> datetime:
    """The database's own time; a test's moved clock where there is one. SQLite's is this machine's."""
    if (told := told_now(connection)) is not None:
        return told
    at: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    return at


def told_now(connection: AsyncConnection) -> datetime | None:
    """The time where the database has to be told it. None: it is PostgreSQL, which knows."""
    return clock.now() if connection.dialect.name != "postgresql" or clock.is_moved() else None


def moment(connection: AsyncConnection) -> ColumnElement[datetime]:
    """The database's time as a part of a statement: when that began."""
    told, kind = told_now(connection), schedules.c.fired_until.type
    return literal(told, kind) if told is not None else func.statement_timestamp(type_=kind)
