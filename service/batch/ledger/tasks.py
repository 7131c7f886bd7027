"""Queries on the rows of tasks: what the ledger knows of a task that some node has loaded."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.tables import tasks


async def get(connection: AsyncConnection, name: str) -> dict[str, Any] | None:
    row = (await connection.execute(select(tasks).where(tasks.c.name == name))).mappings().first()
    return dict(row) if row is not None else None
