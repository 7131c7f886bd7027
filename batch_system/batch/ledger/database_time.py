"""The time of the ledger's database, which decides what is due."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, func, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.ledger.tables import schedules


async def now_of(connection: AsyncConnection) -> datetime:
    """The database time, in UTC. On SQLite it is the clock of this machine, in tests a clock that
    may be moved.
    """
    if (now := process_now(connection)) is not None:
        return now
    database_now: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
    return database_now


def process_now(connection: AsyncConnection) -> datetime | None:
    """The time by the clock of this process, if that is the database time. None: PostgreSQL uses
    its own clock.
    """
    return clock.now() if connection.dialect.name != "postgresql" or clock.is_moved() else None


def moment(connection: AsyncConnection) -> ColumnElement[datetime]:
    """The database time as an expression in a statement: the instant at which the statement
    began.
    """
    now = process_now(connection)
    return literal(now, schedules.c.fired_until.type) if now is not None else statement_start()


def statement_start() -> ColumnElement[datetime]:
    """On PostgreSQL: the instant at which the statement began, in UTC."""
    return func.statement_timestamp(type_=schedules.c.fired_until.type)
