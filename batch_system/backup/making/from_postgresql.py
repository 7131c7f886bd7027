"""Backs up a PostgreSQL database: the rows of every table, by COPY, over two connections with one
snapshot. Alone, as the counterpart of from_sqlite.py.

The connections have an event loop of their own in the process of the backup. The backup leaves out
the ledger's tables, materialized views (which can be refreshed after a restore), and tables that
the settings exclude. The manifest names what was left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from batch_system.backup.file.format import POSTGRESQL, tool
from batch_system.backup.file.progress import BackupMeter
from batch_system.backup.file.writer import Archive
from batch_system.backup.making.request import BackupRequest
from batch_system.backup.postgresql import snapshot
from batch_system.backup.postgresql.unloading import described, unload
from batch_system.concurrency.stoppable import Stop, in_own_loop
from batch_system.errors import BackupError

_ADVICE = {
    asyncpg.InsufficientPrivilegeError: "A backup needs a role that may read every row: "
    "the owner, or one with pg_read_all_data and BYPASSRLS (BACKUP_DATABASE_URL).",
    asyncpg.OutOfMemoryError: "It has many tables: raise the server's max_locks_per_transaction.",
    asyncpg.LockNotAvailableError: "Another transaction, perhaps a migration, has locked a table: "
    "try after its end.",
}


def write(request: BackupRequest, archive: Archive, meter: BackupMeter, stop: Stop) -> None:
    """Write the requested database into the archive. Raises BackupError; Stopped after a request to
    stop.
    """
    with _explained(request):
        in_own_loop(_write(request, archive, meter), stop)


async def _write(request: BackupRequest, archive: Archive, meter: BackupMeter) -> None:
    async with snapshot.connected(request.arguments, setting=request.setting) as connection:
        contents = await snapshot.take(connection, request.selection)
        if not contents.tables:
            raise BackupError(
                f"there is no table in the database {request.safe_url}: look at {request.setting}"
            )
        facts = await snapshot.facts(connection, contents)
        archive.add_header(POSTGRESQL, database=request.database, tool=tool(), **facts)
        sizes = await snapshot.sizes(connection, contents.tables)
        archive.refuse_too_large(
            sum(size.bytes for size in sizes.values()),
            tables=described(contents.tables),
            sequences=await snapshot.values(connection, contents.sequences),
            left_out=contents.left_out,
        )
        async with snapshot.shared(connection, request.arguments, contents.tables) as second:
            connections = [connection] if second is None else [connection, second]
            tables = await unload(connections, contents.tables, sizes, archive, meter)
        sequences = await snapshot.values(connection, contents.sequences)
        archive.finish(tables=tables, sequences=sequences, left_out=contents.left_out)


@contextmanager
def _explained(request: BackupRequest) -> Iterator[None]:
    """Turn errors of the server and of the network into BackupError. Errors of files are
    BackupErrors already.
    """
    try:
        yield
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        cause = (str(error) or type(error).__name__).splitlines()[0]
        advice = _ADVICE.get(type(error), f"Look at {request.setting} and the server.")
        raise BackupError(
            f"the database {request.safe_url} could not be backed up: {cause}. {advice}"
        ) from error
