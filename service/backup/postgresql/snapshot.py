"""One consistent view of a PostgreSQL database over two connections."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import asyncpg

from service.backup.file.selection import Selection
from service.backup.postgresql import relations
from service.backup.postgresql.relations import Contents, Relation
from service.errors import BackupError

TRIES = 5
LOCK_SECONDS = 60
CONNECT_SECONDS = 10
CLOSE_SECONDS = 5
AT_ONCE = 100

# As pg_dump has them: values are written so that they mean the same wherever they are read, and a part of the rows
# is never taken for all of them, which row security would do silently.
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

# Unknown before PostgreSQL 17, and so not to be set at the start of a connection.
NO_TIME_LIMIT = "SELECT set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout'"


@asynccontextmanager
async def connected(
    arguments: dict[str, Any], settings: dict[str, str] = SETTINGS, setting: str = "DATABASE_URL"
) -> AsyncIterator[Any]:
    """A connection with these settings from its start, whatever the role's and the database's are.

    `setting`: where the database's URL stands, for an error.
    """
    settings = {**arguments.get("server_settings", {}), **settings}
    arguments = {"timeout": CONNECT_SECONDS, "statement_cache_size": 0, **arguments, "server_settings": settings}
    try:
        connection = await asyncpg.connect(**arguments)
    except (TypeError, ValueError) as error:
        raise BackupError(f"{setting} has an option that the driver does not take: {error}") from error
    try:
        await connection.fetch(NO_TIME_LIMIT)
        yield connection
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):  # what was to be done is done
            await connection.close(timeout=CLOSE_SECONDS)
    finally:
        connection.terminate()


async def take(connection: Any, selection: Selection) -> Contents:
    """Begin the transaction that sees one instant, with every table locked against TRUNCATE and ALTER.

    Those two are not hidden by a snapshot, so the locks come before it: LOCK TABLE takes none, the query after it
    does. What was made, dropped or altered between the first look and the locks shows as a difference.
    """
    for _ in range(TRIES):
        before = await relations.contents(connection, selection)
        transaction = await _begin(connection)
        if await _lock(connection, before.tables) and await relations.contents(connection, selection) == before:
            return before
        await transaction.rollback()
    raise BackupError("tables are being made or altered all the time: back up when the migration is over")


@asynccontextmanager
async def shared(first: Any, arguments: dict[str, Any], tables: list[Relation]) -> AsyncIterator[Any]:
    """A second connection that sees what the first sees; None where the server has none to give.

    Its locks don't wait: behind an ALTER that waits for the first connection they would wait for ever.
    """
    try:
        async with connected(arguments) as connection:
            yield connection if await _join(first, connection, tables) else None
    except asyncpg.TooManyConnectionsError:
        yield None


async def _join(first: Any, connection: Any, tables: list[Relation]) -> bool:
    snapshot = await first.fetchval("SELECT pg_catalog.pg_export_snapshot()")
    await _begin(connection)
    await connection.execute(f"SET TRANSACTION SNAPSHOT '{snapshot}'")
    try:
        await _lock(connection, tables, "NOWAIT")
    except (asyncpg.LockNotAvailableError, asyncpg.OutOfMemoryError):  # or no room in the server for so many locks
        return False
    return True


async def _begin(connection: Any) -> Any:
    transaction = connection.transaction(isolation="repeatable_read", readonly=True)
    await transaction.start()
    return transaction


async def _lock(connection: Any, tables: list[Relation], how: str = "") -> bool:
    """False when one of the tables has just gone."""
    if not tables:
        return True
    names = ", ".join(f"ONLY {table}" for table in tables)
    try:
        await connection.execute(f"LOCK TABLE {names} IN ACCESS SHARE MODE {how}")
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return False
    return True


async def facts(connection: Any, contents: Contents) -> dict[str, Any]:
    """For the header: which server it was, what its transactions saw, and what migrations it had."""
    row = await connection.fetchrow(
        "SELECT pg_catalog.current_setting('server_version') AS server_version,"
        " pg_catalog.pg_current_snapshot()::text AS snapshot"
    )
    revisions = {table.path: await _revision(connection, table) for table in contents.versions}
    ours = [revision for path, revision in revisions.items() if path.endswith(".alembic_version")]
    return {**row, "revisions": revisions, "revision": ours[0] if ours else None}


async def _revision(connection: Any, table: Relation) -> str:
    rows = await connection.fetch(f"SELECT version_num FROM {table} ORDER BY 1")  # noqa: S608 (names are quoted)
    return ", ".join(row["version_num"] for row in rows)


@dataclass(frozen=True)
class Size:
    """`pages` of the table itself; `bytes` with what is stored beside it."""

    pages: int
    bytes: int


async def sizes(connection: Any, tables: list[Relation]) -> dict[str, Size]:
    """By the table's oid. It would wait for locks, so call it when they are held."""
    rows = await connection.fetch(
        "SELECT oid::text, pg_catalog.pg_relation_size(oid) / pg_catalog.current_setting('block_size')::int AS pages,"
        " pg_catalog.pg_table_size(oid) AS bytes FROM unnest($1::oid[]) AS t(oid)",
        [int(table.oid) for table in tables],
    )
    return {row["oid"]: Size(row["pages"], row["bytes"]) for row in rows}


async def values(connection: Any, sequences: list[Relation]) -> list[dict[str, Any]]:
    """Sequences know no snapshots: read after it was taken, a value is at or past those in the rows."""
    found: list[dict[str, Any]] = []
    for start in range(0, len(sequences), AT_ONCE):
        some = sequences[start : start + AT_ONCE]
        selects = (f"SELECT {n} AS n, last_value, is_called FROM {one}" for n, one in enumerate(some))  # noqa: S608 (quoted)
        for row in await connection.fetch(f"{' UNION ALL '.join(selects)} ORDER BY n"):
            names = {"schema": some[row["n"]].schema, "name": some[row["n"]].name}
            found.append({**names, "last_value": row["last_value"], "is_called": row["is_called"]})
    return found
