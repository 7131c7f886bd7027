"""Makes the tables of our migrations for a backup, as they were at its revision."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import StaticPool

from service.backup.file.reader import Backup
from service.backup.file.selection import LEDGERS_MARK, quoted
from service.backup.postgresql import target
from service.backup.restoring.plan import has_ledger, is_new
from service.backup.restoring.revisions import of_backup
from service.database import troubles
from service.database.migrate import History, make_tables
from service.errors import BackupError


@dataclass(frozen=True)
class Needed:
    """The revision of a history at which a backup's tables are; `table` is what says so in the backup."""

    history: History
    revision: str
    table: str

    @property
    def schema(self) -> str:
        return self.table.rpartition(".")[0]


def needed(backup: Backup, histories: Iterable[History]) -> list[Needed]:
    """Of these histories those that make tables of the backup. A revision that this code doesn't know makes none."""
    found, revisions = [], of_backup(backup)
    for history in histories:
        if history.version_table == LEDGERS_MARK and not has_ledger(backup):
            continue
        known = history.revisions
        for table, revision in revisions.items():
            if table.rpartition(".")[2] == history.version_table and revision in known:
                found.append(Needed(history, revision, table))
                break
    return found


async def make_missing(connection: Any, backup: Backup, histories: Sequence[History]) -> bool:
    """Make what the backup needs where the application has no table yet, in asyncpg's present transaction.

    A service that starts meanwhile waits for its end. Returns whether there are new tables. Raises BackupError.
    """
    wanted = needed(backup, histories)
    if not wanted or not is_new(await target.look(connection)):
        return False
    for one in wanted:
        await connection.execute("SELECT pg_catalog.pg_advisory_xact_lock($1)", one.history.lock)
    found = await target.look(connection)
    names = {relation.name for relation in found.relations.values()}
    missing = [one for one in wanted if one.history.version_table not in names] if is_new(found) else []
    for one in missing:
        await make(connection, one)
    return bool(missing)


async def make(connection: Any, one: Needed, schema: str | None = None) -> None:
    """`schema`: one to make them in, whatever the tables of the others. Raises BackupError."""
    if schema is not None:
        path = await connection.fetchval("SELECT pg_catalog.current_setting('search_path')")
        path = ", ".join(filter(None, [quoted(schema), path]))
        await connection.execute("SELECT pg_catalog.set_config('search_path', $1, true)", path)
    try:
        async with _as_sqlalchemys(connection) as same:
            await make_tables(same, one.history, one.revision, schema)
    except DBAPIError as error:
        raise BackupError(
            f"the tables of migration {one.revision} can't be made, and nothing was changed: "
            f"{troubles.cause_of(error, 'postgresql')}"
        ) from error


@asynccontextmanager
async def _as_sqlalchemys(connection: Any) -> AsyncIterator[AsyncConnection]:
    """The same connection, for migrations: what is committed there is a savepoint of the present transaction.

    StaticPool, as it never closes what it has.
    """

    async def same(**_: Any) -> Any:
        return connection

    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=same, poolclass=StaticPool, hide_parameters=True
    )
    async with engine.begin() as begun:
        yield begun
