"""PostgreSQL: every table's rows by COPY, all from one snapshot, over one connection of its own.

The connection has an event loop of its own too, in the backup's thread, so that the service's loop sees none of this.
Left out, and named in the manifest: the ledger's tables, foreign tables, and materialized views (refresh them).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import asyncpg
from sqlalchemy.engine import URL

from service.backup import snapshot
from service.backup.archive import COPY_SUFFIX, PART_BYTES, Archive
from service.backup.snapshot import Relation
from service.backup.threads import Stop, Stopped
from service.errors import BackupError

CONNECT_SECONDS = 10
CLOSE_SECONDS = 5
LISTEN_SECONDS = 0.1
ONLY_SQLALCHEMYS = ("async_creator_fn", "prepared_statement_cache_size", "prepared_statement_name_func")

_ADVICE = {
    asyncpg.InsufficientPrivilegeError: (
        "A backup needs a role that may read every row: the owner, or one with pg_read_all_data and BYPASSRLS."
    ),
    asyncpg.LockNotAvailableError: "Something holds a table, a migration perhaps: back up when it is over.",
}


def write(url: URL, archive: Archive, stop: Stop) -> None:
    with _explained(url):
        asyncio.run(_until_stopped(_write(url, archive), stop))


async def _until_stopped(work: Coroutine[Any, Any, None], stop: Stop) -> None:
    """Runs `work`, also while it waits for the server, only until the other thread asks to stop."""
    task = asyncio.ensure_future(work)
    while not task.done():
        if stop.asked():
            task.cancel()
        await asyncio.wait([task], timeout=LISTEN_SECONDS)
    if task.cancelled():
        raise Stopped
    task.result()


async def _write(url: URL, archive: Archive) -> None:
    connection = await _connect(url)
    try:
        contents = await snapshot.take(connection)
        if not contents.tables:
            raise BackupError(f"there is no table in the database {_shown(url)}: look at DATABASE_URL")
        archive.add_header("postgresql", database=url.database, **await snapshot.facts(connection))
        tables = [await _copy(connection, table, number, archive) for number, table in enumerate(contents.tables, 1)]
        sequences = [await snapshot.value(connection, sequence) for sequence in contents.sequences]
        left_out = [f"{relation.schema}.{relation.name}" for relation in contents.left_out]
        archive.finish(tables=tables, sequences=sequences, left_out=left_out)
        await connection.close(timeout=CLOSE_SECONDS)
    finally:
        connection.terminate()


async def _connect(url: URL) -> Any:
    """A connection with exactly the arguments that get_db()'s have: hosts, sockets, ssl and the rest of the query."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    arguments = {"timeout": CONNECT_SECONDS, "statement_cache_size": 0, **arguments}
    for name in ONLY_SQLALCHEMYS:
        arguments.pop(name, None)
    return await snapshot.connect(arguments)


async def _copy(connection: Any, table: Relation, number: int, archive: Archive) -> dict[str, Any]:
    rows = _Rows(archive, _folder(table, number))
    status = await connection.copy_from_table(
        table.name, schema_name=table.schema, columns=table.columns or None, output=rows.receive
    )
    rows.flush()
    if status != f"COPY {rows.count}":
        raise BackupError(f"the server says {status} about {table}, but {rows.count} rows arrived: try again")
    return {
        "schema": table.schema,
        "name": table.name,
        "folder": rows.folder,
        "columns": table.columns,
        "rows": rows.count,
        "bytes": rows.size,
        "parts": rows.parts,
    }


def _folder(table: Relation, number: int) -> str:
    """At most 73 characters, so that a tar header holds the path, and different also where case is not seen."""
    name = ".".join(quote(part, safe="").replace(".", "%2E") for part in (table.schema, table.name))
    return f"data/{number:04}-{name[:60]}"


class _Rows:
    """Gathers the rows of one table into parts. PostgreSQL sends each row as one message, so a part's are whole."""

    def __init__(self, archive: Archive, folder: str) -> None:
        self.archive = archive
        self.folder = folder
        self.count = self.size = self.parts = 0
        self._buffer = bytearray()

    async def receive(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._buffer:
            self.parts += 1
            self.size += len(self._buffer)
            self.count += self.archive.add_rows(f"{self.folder}/{self.parts:04}{COPY_SUFFIX}", bytes(self._buffer))
            self._buffer.clear()


@contextmanager
def _explained(url: URL) -> Iterator[None]:
    """The one place where an error of the server or of the network becomes ours. (Files' errors are ours by then.)"""
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        advice = _ADVICE.get(type(error), "Look at DATABASE_URL and the server.")
        raise BackupError(f"the database {_shown(url)} could not be backed up: {cause}. {advice}") from error


def _shown(url: URL) -> str:
    return url.set(query={}).render_as_string(hide_password=True)
