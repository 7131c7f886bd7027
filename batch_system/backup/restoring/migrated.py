"""Makes the tables of the service's own migrations for a backup, as they were at the revision of
the backup.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import StaticPool

from batch_system.backup.file.reader import Backup
from batch_system.backup.file.selection import LEDGERS_MARK, quoted
from batch_system.backup.postgresql import target
from batch_system.backup.restoring.plan import has_ledger, is_new
from batch_system.database import troubles
from batch_system.database.migrate import History, make_tables
from batch_system.errors import BackupError


@dataclass(frozen=True)
class NeededRevision:
    """The revision of a history that a backup needs. `table`: the name of the version table in the
    backup.
    """

    history: History
    revision: str
    table: str

    @property
    def schema(self) -> str:
        """The schema of the version table; empty on SQLite."""
        return self.table.rpartition(".")[0]


def needed_revisions(backup: Backup, histories: Iterable[History]) -> list[NeededRevision]:
    """The revisions of these histories that make tables of the backup. Revisions that this code
    lacks are left out.
    """
    needed, revisions = [], backup.header.revisions
    for history in histories:
        if history.version_table == LEDGERS_MARK and not has_ledger(backup):
            continue
        for table, revision in revisions.items():
            if table.rpartition(".")[2] == history.version_table and revision in history.revisions:
                needed.append(NeededRevision(history, revision, table))
                break
    return needed


async def make_missing(connection: Any, backup: Backup, histories: Sequence[History]) -> bool:
    """Make the tables that the backup needs, in the current transaction, if the application has no
    table yet.

    A service that starts meanwhile waits for the end of the transaction. `connection`: of asyncpg.
    Returns whether tables were made. Raises BackupError.
    """
    needed = needed_revisions(backup, histories)
    if not needed or not is_new(await target.read_target(connection)):
        return False
    for revision in needed:
        await connection.execute(
            "SELECT pg_catalog.pg_advisory_xact_lock($1)", revision.history.lock
        )
    locked = await target.read_target(connection)
    names = {relation.name for relation in locked.relations.values()}
    missing = (
        [revision for revision in needed if revision.history.version_table not in names]
        if is_new(locked)
        else []
    )
    for revision in missing:
        await make(connection, revision)
    return bool(missing)


async def make(connection: Any, needed: NeededRevision, schema: str | None = None) -> None:
    """Make the tables of one history; `schema`: the schema to make them in; None: the first of the
    search path.

    Raises BackupError.
    """
    if schema is not None:
        path = await connection.fetchval("SELECT pg_catalog.current_setting('search_path')")
        path = ", ".join(filter(None, [quoted(schema), path]))
        await connection.execute("SELECT pg_catalog.set_config('search_path', $1, true)", path)
    try:
        async with _sqlalchemy_connection(connection) as migrating:
            await make_tables(migrating, needed.history, needed.revision, schema)
    except DBAPIError as error:
        raise BackupError(
            f"the tables of migration {needed.revision} can't be made, and nothing was changed: "
            f"{troubles.cause_of(error, 'postgresql')}"
        ) from error


@asynccontextmanager
async def _sqlalchemy_connection(connection: Any) -> AsyncIterator[AsyncConnection]:
    """Wrap a connection of asyncpg for migrations. Their transactions are savepoints of its current
    transaction.

    The pool is a StaticPool because that never closes its connection.
    """

    async def give_connection(**_: Any) -> Any:
        return connection

    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=give_connection,
        poolclass=StaticPool,
        hide_parameters=True,
    )
    async with engine.begin() as wrapped:
        yield wrapped
