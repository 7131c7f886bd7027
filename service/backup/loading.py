"""Rows from a backup into PostgreSQL's tables, by COPY. The next part is read and checked while one is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from service.backup.progress import Meter
from service.backup.reader import Backup, SavedTable
from service.backup.server import cause_of
from service.errors import DamagedBackup


async def load(connection: Any, backup: Backup, table: SavedTable, to: tuple[str, str], meter: Meter) -> int:
    """Copy a table's rows into the table `to` (schema, name); returns how many the server has taken.

    Raises DamagedBackup where the rows are damaged, or the server refuses one.
    """
    try:
        status = await connection.copy_to_table(
            to[1], schema_name=to[0], columns=table.columns or None, source=_parts(backup, table, meter)
        )
    except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError, asyncpg.BadCopyFileFormatError) as error:
        raise DamagedBackup(
            f"the rows of {table} in the backup {backup.source.name} can't be loaded, and nothing was changed: "
            f"{cause_of(error)}"
        ) from error
    return int(status.removeprefix("COPY "))


async def _parts(backup: Backup, table: SavedTable, meter: Meter) -> AsyncIterator[bytes]:
    parts = backup.parts(table)
    ahead = asyncio.ensure_future(asyncio.to_thread(next, parts, None))
    try:
        while (part := await asyncio.shield(ahead)) is not None:
            ahead = asyncio.ensure_future(asyncio.to_thread(next, parts, None))
            yield part
            meter.add(len(part), part.count(b"\n"))
    finally:
        await asyncio.wait([ahead])
