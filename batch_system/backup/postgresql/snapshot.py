"""One consistent view of a PostgreSQL database, over one or two connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import asyncpg

from batch_system.backup.file.selection import Selection
from batch_system.backup.postgresql import relations
from batch_system.backup.postgresql.relations import Contents, SourceRelation
from batch_system.database.postgresql_connections import Connection
from batch_system.errors import WITHOUT_POOLER, BackupError

TRIES = 5
LOCK_SECONDS = 60
CONNECT_SECONDS = 10
CLOSE_SECONDS = 5
AT_ONCE = 100

# The settings of pg_dump. Values are written so that they mean the same on every server, and row
# security raises an error instead of silently hiding rows.
SETTINGS = {
    "row_security": "off",
    "search_path": "",
    "timezone": "UTC",
    "datestyle": "ISO",
    "intervalstyle": "postgres",
    "extra_float_digits": "3",
    "bytea_output": "hex",
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "enable_tidscan": "on",
    "lock_timeout": f"{LOCK_SECONDS}s",
    "application_name": "batch/backup",
}

# Servers before PostgreSQL 17 do not know this setting, so it can't be among the settings of a new
# connection.
NO_TIME_LIMIT = (
    "SELECT set_config(name, '0', false) FROM pg_catalog.pg_settings "
    "WHERE name = 'transaction_timeout'"
)


@asynccontextmanager
async def connected(
    arguments: dict[str, Any], settings: dict[str, str] = SETTINGS, setting: str = "DATABASE_URL"
) -> AsyncIterator[Any]:
    """A connection with these server settings, which override those of the role and of the
    database.

    `setting`: the name of the setting that holds the database's URL, for messages. Raises
    BackupError for a connection argument that the driver does not accept, and the errors of
    asyncpg.
    """
    settings = {**arguments.get("server_settings", {}), **settings}
    arguments = {
        "timeout": CONNECT_SECONDS,
        "statement_cache_size": 0,
        **arguments,
        "server_settings": settings,
    }
    try:
        connection = await asyncpg.connect(**arguments, connection_class=Connection)
    except (TypeError, ValueError) as error:
        raise BackupError(
            f"{setting} has an option that the driver does not accept: {error}"
        ) from error
    except asyncpg.ProtocolViolationError as error:
        if "unsupported startup parameter" in str(error):
            raise BackupError(f"{WITHOUT_POOLER} ({setting}: {error})") from error
        raise
    try:
        await _refuse_pooler(connection)
        await connection.fetch(NO_TIME_LIMIT)
        yield connection
        # All work has been done.
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            await connection.close(timeout=CLOSE_SECONDS)
    finally:
        connection.terminate()


async def _refuse_pooler(connection: Any) -> None:
    """Raises BackupError if another program answers for the server, because settings of the session
    would then be those of other clients. A pooler makes up the process id that it tells a client.
    """
    async with connection.transaction():  # so that the statement is not divided among sessions
        process = await connection.fetchval("SELECT pg_catalog.pg_backend_pid()")
    if process != connection.get_server_pid():
        raise BackupError(WITHOUT_POOLER)


async def take(connection: Any, selection: Selection) -> Contents:
    """Begin a transaction that sees one instant of the database, and lock every table against
    TRUNCATE and ALTER.

    A snapshot does not hide TRUNCATE and ALTER, so the locks are taken before it: LOCK TABLE takes
    no snapshot, but the query after it does. If that query returns other relations than before the
    locks, everything is tried again. Raises BackupError after TRIES attempts.
    """
    for _ in range(TRIES):
        before = await relations.contents(connection, selection)
        transaction = await _begin(connection)
        if (
            await _lock(connection, before.tables)
            and await relations.contents(connection, selection) == before
        ):
            return before
        await transaction.rollback()
    raise BackupError(
        "tables are created or altered all the time: back up when the migration is over"
    )


@asynccontextmanager
async def shared(
    first: Any, arguments: dict[str, Any], tables: list[SourceRelation]
) -> AsyncIterator[Any]:
    """A second connection with the snapshot of the first one; None if the server has no connection
    or lock left.

    It does not wait for locks: behind an ALTER that waits for the first connection, it would wait
    for ever.
    """
    try:
        async with connected(arguments) as connection:
            yield connection if await _join(first, connection, tables) else None
    except asyncpg.TooManyConnectionsError:
        yield None


async def _join(first: Any, connection: Any, tables: list[SourceRelation]) -> bool:
    snapshot = await first.fetchval("SELECT pg_catalog.pg_export_snapshot()")
    await _begin(connection)
    await connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
    try:
        await _lock(connection, tables, "NOWAIT")
    except (asyncpg.LockNotAvailableError, asyncpg.OutOfMemoryError):
        # The server's table of locks is full.
        return False
    return True


async def _begin(connection: Any) -> Any:
    transaction = connection.transaction(isolation="repeatable_read", readonly=True)
    await transaction.start()
    return transaction


async def _lock(connection: Any, tables: list[SourceRelation], option: str = "") -> bool:
    """Lock the tables for reading. Returns False if one of them was dropped meanwhile."""
    if not tables:
        return True
    names = ", ".join(f"ONLY {table}" for table in tables)
    try:
        await connection.execute(f"LOCK TABLE {names} IN ACCESS SHARE MODE {option}")
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return False
    return True


async def facts(connection: Any, contents: Contents) -> dict[str, Any]:
    """Fields of the backup's header: version of the server, snapshot, and the revisions in
    Alembic's version tables.
    """
    row = await connection.fetchrow(
        "SELECT pg_catalog.current_setting('server_version') AS server_version,"
        " pg_catalog.pg_current_snapshot()::text AS snapshot"
    )
    revisions = {table.path: await _revision(connection, table) for table in contents.versions}
    default_table = [
        revision for path, revision in revisions.items() if path.endswith(".alembic_version")
    ]
    return {**row, "revisions": revisions, "revision": default_table[0] if default_table else None}


async def _revision(connection: Any, table: SourceRelation) -> str:
    rows = await connection.fetch(f"SELECT version_num FROM {table} ORDER BY 1")
    return ", ".join(row["version_num"] for row in rows)


@dataclass(frozen=True)
class Size:
    """Size of a table. `pages`: those of the table itself. `bytes`: with what is stored beside it
    (large values).
    """

    pages: int
    bytes: int


async def sizes(connection: Any, tables: list[SourceRelation]) -> dict[str, Size]:
    """The sizes by the table's oid. The query needs locks of the tables, so it is made when they
    are held.
    """
    rows = await connection.fetch(
        "SELECT oid::text, pg_catalog.pg_relation_size(oid) / "
        "pg_catalog.current_setting('block_size')::int AS pages,"
        " pg_catalog.pg_table_size(oid) AS bytes FROM unnest($1::oid[]) AS t(oid)",
        [int(table.oid) for table in tables],
    )
    return {row["oid"]: Size(row["pages"], row["bytes"]) for row in rows}


async def values(connection: Any, sequences: list[SourceRelation]) -> list[dict[str, Any]]:
    """The state of each sequence: schema, name, last_value, is_called.

    A snapshot does not cover sequences. Read after the snapshot, a sequence is at or past the
    values in the rows.
    """
    states: list[dict[str, Any]] = []
    for start in range(0, len(sequences), AT_ONCE):
        group = sequences[start : start + AT_ONCE]
        selects = (
            f"SELECT {n} AS n, last_value, is_called FROM {each}" for n, each in enumerate(group)
        )
        for row in await connection.fetch(f"{' UNION ALL '.join(selects)} ORDER BY n"):
            names = {"schema": group[row["n"]].schema, "name": group[row["n"]].name}
            states.append({**names, "last_value": row["last_value"], "is_called": row["is_called"]})
    return states
