"""Copies the rows of PostgreSQL's tables by COPY into the archive, over one or two connections.

A large table is copied in ranges of its pages, so that both connections can work on it. The rows of
a snapshot keep their pages, because VACUUM FULL and CLUSTER, which would move them, wait for the
locks that are held.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from batch_system.backup.file.format import PIECE_BYTES
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.selection import quoted
from batch_system.backup.file.writer import Archive
from batch_system.backup.postgresql.relations import SourceRelation
from batch_system.backup.postgresql.snapshot import Size
from batch_system.errors import BackupError

RANGE_BYTES = 32 * 1024 * 1024
PARTS_OF_A_RANGE = 100_000
"""More parts than a range can have. Part numbers follow the order of the rows, whichever connection
copies them.
"""
RANGES_SINCE = 14
"""The first version of PostgreSQL that reads a range of pages without reading the whole table."""
AHEAD = 2
"""How many parts of a connection may wait to be packed, so that memory is bounded."""


@dataclass
class _Table:
    """A table, and how much of it has been copied."""

    table: SourceRelation
    number: int
    rows: int = 0
    bytes: int = 0
    parts: int = 0

    @property
    def folder(self) -> str:
        """The table's folder in the archive.

        It has at most 73 characters, so that the path fits into a tar header, and its number makes
        it unique also on file systems that ignore case.
        """
        name = ".".join(
            quote(part, safe="").replace(".", "%2E")
            for part in (self.table.schema, self.table.name)
        )
        return f"data/{self.number:04}-{name[:60]}"

    def facts(self) -> dict[str, Any]:
        """The table's entry in the manifest."""
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
    """A table or a range of its pages. `number`: the number of ranges before it.

    `start`: its first page; None for the whole table. `end`: the page after its last one; None for
    the table's end.
    """

    table: _Table
    number: int = 0
    start: int | None = None
    end: int | None = None

    @property
    def rows(self) -> str:
        """The query for the rows of the range, in SQL."""
        before = "" if self.end is None else f" AND ctid < '({self.end},0)'"
        columns = ", ".join(map(quoted, self.table.table.names))
        return (
            f"SELECT {columns} FROM ONLY {self.table.table} "
            f"WHERE ctid >= '({self.start},0)'{before}"
        )


def described(relations: list[SourceRelation]) -> list[dict[str, Any]]:
    """The entries of these tables in the manifest, before any row has been copied."""
    return [_Table(relation, number).facts() for number, relation in enumerate(relations, 1)]


async def unload(
    connections: list[Any],
    relations: list[SourceRelation],
    sizes: Mapping[str, Size],
    archive: Archive,
    meter: BackupMeter,
) -> list[dict[str, Any]]:
    """Copy all rows, the largest tables first. Returns the tables' entries in the manifest, in
    their given order.

    `sizes`: by the tables' oids. Each connection takes the next table or range when it has finished
    one.
    """
    meter.begin("copying", sum(size.bytes for size in sizes.values()))
    tables = [_Table(relation, number) for number, relation in enumerate(relations, 1)]
    can_split = len(connections) > 1 and connections[0].get_server_version().major >= RANGES_SINCE
    jobs = deque(
        job
        for table in sorted(tables, key=lambda table: -sizes[table.table.oid].bytes)
        for job in (_ranges(table, sizes[table.table.oid]) if can_split else [_Job(table)])
    )

    async def work(connection: Any) -> None:
        while jobs:
            await _copy(connection, jobs.popleft(), archive, meter)

    workers = [asyncio.ensure_future(work(connection)) for connection in connections]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.wait(workers)
    return [table.facts() for table in tables]


def _ranges(table: _Table, size: Size) -> Iterator[_Job]:
    """Divide a table into ranges of about RANGE_BYTES, with what is stored beside their pages. The
    last has no end.
    """
    count = min(size.bytes // RANGE_BYTES, size.pages)
    if count < 2 or not table.table.names:
        yield _Job(table)
        return
    starts = [size.pages * n // count for n in range(count)]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
        yield _Job(table, number, start, end)


async def _copy(connection: Any, job: _Job, archive: Archive, meter: BackupMeter) -> None:
    rows, table = _Rows(archive, meter, job.table, job.number * PARTS_OF_A_RANGE), job.table.table
    if job.start is None:
        status = await connection.copy_from_table(
            table.name, schema_name=table.schema, columns=table.names or None, output=rows.receive
        )
    else:
        status = await connection.copy_from_query(job.rows, output=rows.receive)
    await rows.finish()
    if status != f"COPY {rows.count}":
        raise BackupError(
            f"the server reports {status} for {table}, but sent {rows.count} rows: try again"
        )


@dataclass
class _Rows:
    """Gathers the rows of one job into parts. PostgreSQL sends each row in one message, so parts
    hold whole rows.
    """

    archive: Archive
    meter: BackupMeter
    table: _Table
    part: int
    count: int = 0
    _chunks: list[bytearray] = field(default_factory=list)
    _gathered: int = 0
    _futures: deque[Future[int]] = field(default_factory=deque)

    async def receive(self, data: bytearray) -> None:
        self._chunks.append(data)
        self._gathered += len(data)
        if self._gathered > 2 * PIECE_BYTES:
            await self._flush_large()
        elif self._gathered >= PIECE_BYTES:
            self._flush()
            while len(self._futures) > AHEAD:
                await self._settle()

    async def _flush_large(self) -> None:
        """Write a row of many megabytes at once, and free it: the driver refers to it until it has
        the next row.
        """
        chunks = self._chunks
        self._flush()
        await self.finish()
        for chunk in chunks:
            chunk.clear()

    async def finish(self) -> None:
        if self._chunks:
            self._flush()
        while self._futures:
            await self._settle()

    def _flush(self) -> None:
        self.part += 1
        self.table.parts += 1
        self._futures += self.archive.add_rows(
            f"{self.table.folder}/{self.part:04}.copy", self._chunks
        )
        self.table.bytes += self._gathered
        self.meter.add(self._gathered)
        self._chunks = []
        self._gathered = 0

    async def _settle(self) -> None:
        rows = await asyncio.wrap_future(self._futures.popleft())
        self.count += rows
        self.table.rows += rows
        self.meter.add(0, rows)
