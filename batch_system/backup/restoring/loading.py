"""Loads rows of a backup into tables of PostgreSQL by COPY. While one part is sent, the next is
read and checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.reader import Backup, SavedTable
from batch_system.backup.postgresql.server import cause_of
from batch_system.errors import BackupError, DamagedBackup
from batch_system.escaping import brief

LARGEST_ECHO = 32 * 1024 * 1024
"""The largest value, in bytes, that the server may repeat in an error, because the driver reads
errors into memory.
"""
NOT_ECHOED = ("text", "bytea", "character varying", "character")
"""Types that accept any text, or whose errors are short. Values of other types are rarely so large.
"""


async def load(
    connection: Any, backup: Backup, table: SavedTable, to: tuple[str, str], meter: BackupMeter
) -> int:
    """Copy a table's rows into the table `to` (schema, name), and return how many rows the server
    has received.

    Raises DamagedBackup if the rows are damaged or the server refuses one, and BackupError if a
    value is too large.
    """
    try:
        status = await connection.copy_to_table(
            to[1],
            schema_name=to[0],
            columns=table.columns or None,
            source=_parts(backup, table, meter),
        )
    except (
        asyncpg.DataError,
        asyncpg.IntegrityConstraintViolationError,
        asyncpg.BadCopyFileFormatError,
    ) as error:
        raise DamagedBackup(
            f"the rows of {table} in the backup {backup.source.name} can't be loaded, and nothing "
            f"was changed: {cause_of(error)}"
        ) from error
    return int(status.removeprefix("COPY "))


class _ValueSizes:
    """Measures values that may span several parts. Values within one part are small, so they are
    not measured.
    """

    def __init__(self, table: SavedTable) -> None:
        self._table = table
        self._column = self._size = 0

    def add(self, part: bytes) -> None:
        """Raises BackupError if the value at the beginning of the part is too large for its
        type.
        """
        ends = [index for index in (part.find(b"\t"), part.find(b"\n")) if index >= 0]
        self._size += min(ends, default=len(part))
        if self._size > LARGEST_ECHO:
            self._refuse_echoed()
        if ends:
            row_start = part.rfind(b"\n") + 1
            self._column = part.count(b"\t", row_start) + (0 if row_start else self._column)
            self._size = len(part) - max(row_start, part.rfind(b"\t") + 1)

    def _refuse_echoed(self) -> None:
        type_name = self._table.types[self._column] if self._column < len(self._table.types) else ""
        if type_name.partition("(")[0] not in NOT_ECHOED:
            raise BackupError(
                f"a value of {brief(str(self._table))} is larger than {LARGEST_ECHO // 1024**2} "
                "MiB, which a restore "
                f"refuses in a column of the type {brief(type_name) or '(unknown)'}, so nothing "
                "was changed. Load that "
                "table by hand, with \\copy"
            )


async def _parts(backup: Backup, table: SavedTable, meter: BackupMeter) -> AsyncIterator[bytes]:
    parts, sizes = backup.parts(table), _ValueSizes(table)
    next_part = asyncio.ensure_future(asyncio.to_thread(next, parts, None))
    try:
        while (part := await asyncio.shield(next_part)) is not None:
            next_part = asyncio.ensure_future(asyncio.to_thread(next, parts, None))
            sizes.add(part)
            yield part
            meter.add(len(part), part.count(b"\n"))
    finally:
        await asyncio.wait([next_part])
