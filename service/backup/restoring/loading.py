"""Rows from a backup into PostgreSQL's tables, by COPY. The next part is read and checked while one is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg

from service.backup.file.progress import BackupMeter
from service.backup.file.reader import Backup, SavedTable
from service.backup.postgresql.server import cause_of
from service.errors import BackupError, DamagedBackup
from service.escaping import brief

LARGEST_ECHO = 32 * 1024 * 1024
"""Bytes of a value that the server may repeat in an error, all of which the driver would take into memory."""
NOT_ECHOED = ("text", "bytea", "character varying", "character")
"""Types that take any text, or whose errors are short. The others have no values of that size but in rare cases."""


async def load(connection: Any, backup: Backup, table: SavedTable, to: tuple[str, str], meter: BackupMeter) -> int:
    """Copy a table's rows into the table `to` (schema, name); returns how many the server has taken.

    Raises DamagedBackup where the rows are damaged, or the server refuses one, and BackupError for a value too large.
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


class _Bounded:
    """Follows the values through parts that may end amidst one. Those inside of a part are small."""

    def __init__(self, table: SavedTable) -> None:
        self._table = table
        self._column = self._size = 0

    def see(self, part: bytes) -> None:
        ends = [place for place in (part.find(b"\t"), part.find(b"\n")) if place >= 0]
        self._size += min(ends, default=len(part))
        if self._size > LARGEST_ECHO:
            self._refuse_echoed()
        if ends:
            row = part.rfind(b"\n") + 1
            self._column = part.count(b"\t", row) + (0 if row else self._column)
            self._size = len(part) - max(row, part.rfind(b"\t") + 1)

    def _refuse_echoed(self) -> None:
        kind = self._table.types[self._column] if self._column < len(self._table.types) else ""
        if kind.partition("(")[0] not in NOT_ECHOED:
            raise BackupError(
                f"a value of {brief(str(self._table))} is larger than {LARGEST_ECHO // 1024**2} MiB, which in a column "
                f"of the type {brief(kind) or 'that it would have'} may not come from outside, and nothing was "
                "changed. Load that table by hand, with \\copy"
            )


async def _parts(backup: Backup, table: SavedTable, meter: BackupMeter) -> AsyncIterator[bytes]:
    parts, bounded = backup.parts(table), _Bounded(table)
    ahead = asyncio.ensure_future(asyncio.to_thread(next, parts, None))
    try:
        while (part := await asyncio.shield(ahead)) is not None:
            ahead = asyncio.ensure_future(asyncio.to_thread(next, parts, None))
            bounded.see(part)
            yield part
            meter.add(len(part), part.count(b"\n"))
    finally:
        await asyncio.wait([ahead])
