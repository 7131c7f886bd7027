"""One consistent view of a PostgreSQL database, and what there is in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import asyncpg

from service.errors import BackupError

TRIES = 5
LOCK_SECONDS = 60
LEDGERS_MARK = "batch_alembic_version"
BESIDE_THE_DATA = ("batch_checkpoints", "batch_once", "batch_quarantine")

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
    "lock_timeout": f"{LOCK_SECONDS}s",
    "application_name": "batch/backup",
}

# Unknown before PostgreSQL 17, and so not to be set at the start of a connection.
NO_TIME_LIMIT = "SELECT set_config(name, '0', false) FROM pg_catalog.pg_settings WHERE name = 'transaction_timeout'"

RELATIONS = """
SELECT n.nspname AS schema, c.relname AS name, c.relkind::text AS kind, ARRAY(
    SELECT a.attname::text FROM pg_catalog.pg_attribute a
    WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum
) AS columns
FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'S', 'f', 'm') AND c.relpersistence <> 't'
  AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
ORDER BY 1, 2
"""


@dataclass(frozen=True)
class Relation:
    schema: str
    name: str
    kind: str
    columns: tuple[str, ...]

    def __str__(self) -> str:
        """As SQL."""
        return ".".join('"' + part.replace('"', '""') + '"' for part in (self.schema, self.name))


@dataclass(frozen=True)
class Contents:
    """`tables` are those that hold rows: of a partitioned table its partitions."""

    tables: list[Relation]
    sequences: list[Relation]
    left_out: list[Relation]


async def connect(arguments: dict[str, Any]) -> Any:
    """A connection with these settings from its start, whatever the role's and the database's are."""
    return await asyncpg.connect(**arguments, server_settings=SETTINGS)


async def take(connection: Any) -> Contents:
    """Begin the transaction that sees one instant, with every table locked against TRUNCATE and ALTER.

    Those two are not hidden by a snapshot, so the locks come before it: LOCK TABLE takes none, the query after it
    does. What was made, dropped or altered between the first look and the locks shows as a difference.
    """
    await connection.fetch(NO_TIME_LIMIT)
    for _ in range(TRIES):
        before = await _contents(connection)
        transaction = connection.transaction(isolation="repeatable_read", readonly=True)
        await transaction.start()
        if await _lock(connection, before.tables) and await _contents(connection) == before:
            await _refuse_large_objects(connection)
            return before
        await transaction.rollback()
    raise BackupError("tables are being made or altered all the time: back up when the migration is over")


async def _contents(connection: Any) -> Contents:
    found = [
        Relation(r["schema"], r["name"], r["kind"], tuple(r["columns"])) for r in await connection.fetch(RELATIONS)
    ]
    ledgers = {relation.schema for relation in found if relation.name == LEDGERS_MARK}
    ours = [relation for relation in found if relation.schema in ledgers and _is_ledgers(relation.name)]
    rest = [relation for relation in found if relation not in ours]
    return Contents(
        tables=[relation for relation in rest if relation.kind == "r"],
        sequences=[relation for relation in rest if relation.kind == "S"],
        left_out=ours + [relation for relation in rest if relation.kind in "fm"],
    )


def _is_ledgers(name: str) -> bool:
    return name.startswith("batch_") and not name.startswith(BESIDE_THE_DATA)


async def _lock(connection: Any, tables: list[Relation]) -> bool:
    """False when one of the tables has just gone."""
    if not tables:
        return True
    try:
        await connection.execute(f"LOCK TABLE {', '.join(f'ONLY {table}' for table in tables)} IN ACCESS SHARE MODE")
    except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
        return False
    return True


async def _refuse_large_objects(connection: Any) -> None:
    if await connection.fetchval("SELECT EXISTS (SELECT FROM pg_catalog.pg_largeobject_metadata)"):
        raise BackupError("the database holds large objects, which these backups can't contain: use pg_dump")


async def facts(connection: Any) -> dict[str, Any]:
    """For the header: which server it was, and what its transactions saw."""
    row = await connection.fetchrow(
        "SELECT pg_catalog.current_setting('server_version') AS server_version,"
        " pg_catalog.pg_current_snapshot()::text AS snapshot"
    )
    return dict(row)


async def value(connection: Any, sequence: Relation) -> dict[str, Any]:
    """Sequences know no snapshots: read after it was taken, a value is at or past those in the rows."""
    last, called = await connection.fetchrow(f"SELECT last_value, is_called FROM {sequence}")  # noqa: S608 (names are quoted)
    return {"schema": sequence.schema, "name": sequence.name, "last_value": last, "is_called": called}
