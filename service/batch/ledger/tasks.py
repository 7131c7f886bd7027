"""Queries on the rows of tasks. Each task that some node has loaded has a row."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.tables import tasks


async def get(connection: AsyncConnection, name: str) -> dict[str, Any] | None:
    """The row of a task by column name; None if there is no such task."""
    row = (await connection.execute(select(tasks).where(tasks.c.name == name))).mappings().first()
    return dict(row) if row is not None else None
