"""The rows of PostgreSQL's tables by COPY, over the connections that there are, into the archive.

A large table is copied in ranges of its pages, so that the connections share it. A snapshot's rows stay where they are:
what would move them (VACUUM FULL, CLUSTER) waits for the locks that are held.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from service.backup.file.format import PIECE_BYTES
from service.backup.file.progress import Meter
from service.backup.file.selection import quoted
from service.backup.file.writer import Archive
from service.backup.postgresql.relations import Relation
from service.backup.postgresql.snapshot import Size
from service.errors import BackupError

RANGE_BYTES = 32 * 1024 * 1024
PARTS_OF_A_RANGE = 100_000
"""More than there ever are: a part's number says where its rows stand in the table, whoever copies them when."""
RANGES_SINCE = 14
"""The first PostgreSQL that reads a range of pages without reading the whole table."""
AHEAD = 2
"""So many parts of a connection wait to be packed: memory is bounded."""


@dataclass
class _Table:
    """What has come of a table so far."""

    table: Relation
    number: int
    rows: int = 0
    bytes: int = 0
    parts: int = 0

    @property
    def folder(self) -> str:
        """At most 73 characters, so that a tar header holds the path, and different also where case is not seen."""
        name = ".".join(quote(part, safe="").replace(".", "%2E") for part in (self.table.schema, self.table.name))
        return f"data/{self.number:04}-{name[:60]}"

    def facts(self) -> dict[str, Any]:
        return {
            "schema": self.table.schema,
            "name": self.table.name,
            "folder": self.folder,
            "columns": self.table.names,
            "types": self.table.types,
            "key": self.table.key,
            "rows": self.rows,
            "bytes": self.bytes,
            "parts": self.parts,
        }


@dataclass(frozen=True)
class _Job:
    """A table, or its pages from `start` to before `end` (None: to its end), and how many ranges are before it."""

    table: _Table
    number: int = 0
    start: int | None = None
    end: int | None = None

    @property
    def rows(self) -> str:
        """As SQL."""
        before = "" if self.end is None else f" AND ctid < '({self.end},0)'"
        columns = ", ".join(map(quoted, self.table.table.names))
        return f"SELECT {columns} FROM ONLY {self.table.table} WHERE ctid >= '({self.start},0)'{before}"  # noqa: S608 (quoted)


def described(relations: list[Relation]) -> list[dict[str, Any]]:
    """What the manifest says of each before any row was copied."""
    return [_Table(relation, number).facts() for number, relation in enumerate(relations, 1)]


async def unload(
    connections: list[Any], relations: list[Relation], sizes: Mapping[str, Size], archive: Archive, meter: Meter
) -> list[dict[str, Any]]:
    """Each connection takes the largest table that is left. Returns what the manifest says of each, in their order.

    `sizes`: by the tables' oids.
    """
    meter.begin("copying", sum(size.bytes for size in sizes.values()))
    tables = [_Table(relation, number) for number, relation in enumerate(relations, 1)]
    can_split = len(connections) > 1 and connections[0].get_server_version().major >= RANGES_SINCE
    waiting = deque(
        job
        for table in sorted(tables, key=lambda table: -sizes[table.table.oid].bytes)
        for job in (_ranges(table, sizes[table.table.oid]) if can_split else [_Job(table)])
    )

    async def copy_those_left(connection: Any) -> None:
        while waiting:
            await _copy(connection, waiting.popleft(), archive, meter)

    copying = [asyncio.ensure_future(copy_those_left(connection)) for connection in connections]
    try:
        await asyncio.gather(*copying)
    finally:
        for copier in copying:
            copier.cancel()
        await asyncio.wait(copying)
    return [table.facts() for table in tables]


def _ranges(table: _Table, size: Size) -> Iterator[_Job]:
    """Of as many pages as have, with what is stored beside them, about RANGE_BYTES. The last one has no end."""
    count = min(size.bytes // RANGE_BYTES, size.pages)
    if count < 2 or not table.table.names:
        yield _Job(table)
        return
    starts = [size.pages * n // count for n in range(count)]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
        yield _Job(table, number, start, end)


async def _copy(connection: Any, job: _Job, archive: Archive, meter: Meter) -> None:
    rows, table = _Rows(archive, meter, job.table, job.number * PARTS_OF_A_RANGE), job.table.table
    if job.start is None:
        status = await connection.copy_from_table(
            table.name, schema_name=table.schema, columns=table.names or None, output=rows.receive
        )
    else:
        status = await connection.copy_from_query(job.rows, output=rows.receive)
    await rows.finish()
    if status != f"COPY {rows.count}":
        raise BackupError(f"the server says {status} about {table}, but {rows.count} rows arrived: try again")


@dataclass
class _Rows:
    """Gathers the rows of one job into parts. PostgreSQL sends each row as one message, so a part's are whole."""

    archive: Archive
    meter: Meter
    table: _Table
    part: int
    count: int = 0
    _chunks: list[bytearray] = field(default_factory=list)
    _gathered: int = 0
    _waiting: deque[Future[int]] = field(default_factory=deque)

    async def receive(self, data: bytearray) -> None:
        self._chunks.append(data)
        self._gathered += len(data)
        if self._gathered > 2 * PIECE_BYTES:
            await self._flush_large()
        elif self._gathered >= PIECE_BYTES:
            self._flush()
            while len(self._waiting) > AHEAD:
                await self._settle()

    async def _flush_large(self) -> None:
        """A row of many megabytes: the driver would keep it until it has the next one."""
        chunks = self._chunks
        self._flush()
        await self.finish()
        for chunk in chunks:
            chunk.clear()

    async def finish(self) -> None:
        if self._chunks:
            self._flush()
        while self._waiting:
            await self._settle()

    def _flush(self) -> None:
        self.part += 1
        self.table.parts += 1
        self._waiting += self.archive.add_rows(f"{self.table.folder}/{self.part:04}.copy", self._chunks)
        self.table.bytes += self._gathered
        self.meter.add(self._gathered)
        self._chunks, self._gathered = [], 0

    async def _settle(self) -> None:
        rows = await asyncio.wrap_future(self._waiting.popleft())
        self.count += rows
        self.table.rows += rows
        self.meter.add(0, rows)
