"""Brings a database up to its histories of migrations. Several processes may start at once: a lock lets one do it."""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.database.engine import Database
from service.database.our_tables import DATA_TABLES
from service.errors import DatabaseTooNew

ALEMBIC_VERSION = "alembic_version"
"""The version table that Alembic takes by default: of this clone's application, or of somebody else's."""

Before = Callable[[AsyncConnection], Awaitable[None]]


@dataclass(frozen=True)
class History:
    """Alembic's migrations in one folder, and the table that says which of them a database has.

    `earlier`: says at which revision tables are that stand there without the version table. It gets the names of those
    that are there, of the tables beside the authors' data, and what `alembic_version` says.
    """

    folder: Path
    version_table: str
    earlier: Callable[[Collection[str], str | None], str | None] | None = None

    @property
    def revisions(self) -> list[str]:
        """Oldest first, by their whole names: Alembic itself also takes `head`, `+1` and the beginning of a name.

        The name of a migration's file begins with its revision: data_0003_quarantine.py has `data_0003`.
        """
        files = sorted((self.folder / "versions").glob("*_[0-9]*_*.py"))
        return ["_".join(file.stem.split("_")[:2]) for file in files]

    @property
    def lock(self) -> int:
        """The number of PostgreSQL's advisory lock of whoever migrates."""
        return zlib.crc32(self.version_table.encode())


async def migrate(database: Database, *histories: History, to: str = "head", before: Before | None = None) -> None:
    """Bring `database` up to the newest revision of each of `histories`, or to the revision `to`.

    `before` is awaited in the transaction of the migration, where an older revision of the tables is there already; by
    raising it prevents the migration. Raises DatabaseTooNew, naming both revisions, when the database knows a revision
    that this code doesn't, and DatabaseUnreachable.
    """
    try:
        for history in histories:
            await _migrate(database, history, to, before)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


async def _migrate(database: Database, history: History, to: str, before: Before | None) -> None:
    async with database.reader.connect() as connection:
        if to == "head" and await connection.run_sync(_is_at_head, history):
            return
    async with database.engine.begin() as connection:
        if database.kind == "postgresql":
            await connection.execute(text("SET LOCAL lock_timeout = 0"))  # the second process waits for the first
            await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": history.lock})
        await connection.run_sync(refuse_newer, history, database)
        current = await connection.run_sync(_current, history)
        if before is not None and current and current != history.revisions[-1:]:
            await before(connection)
        await connection.run_sync(_upgrade, history, to)


async def make_tables(connection: AsyncConnection, history: History, revision: str, schema: str | None = None) -> None:
    """Make the tables of this revision where there are none, in the transaction of this connection.

    `schema`: of PostgreSQL, the first of the search path; only there it is looked whether they are there already.
    """
    from service.database.alembic_history import upgrade

    await connection.run_sync(upgrade, history.folder, history.version_table, revision, schema)


_OF_ANOTHER = (
    ". If `alembic_version` is that of your own application, install the package without the application of its clone: "
    "`pip install PATH_OF_THE_CLONE`, not `pip install -e`"
)


def refuse_newer(connection: Connection, history: History, database: Database) -> None:
    """Raises DatabaseTooNew, as `migrate` does, but changes nothing."""
    known = history.revisions
    hint = _OF_ANOTHER if history.version_table == ALEMBIC_VERSION else ""
    for revision in _current(connection, history):
        if revision not in known:
            raise DatabaseTooNew(
                f"the database {database.safe_url} ({database.setting}) is at migration {revision}, but this code "
                f"knows migrations up to {known[-1]}: start the newer version of the code, "
                f"or point the setting at another database{hint}"
            )


async def revision_of(database: Database, history: History) -> str | None:
    """The revision that a database has; None if it has no tables of the history. It is only read.

    Raises DatabaseTooNew, as `migrate` does, and the driver's errors.
    """

    def read(connection: Connection) -> str | None:
        refuse_newer(connection, history, database)
        return ", ".join(_current(connection, history)) or _earlier(connection, history)

    async with database.reader.connect() as connection:
        return await connection.run_sync(read)


def _is_at_head(connection: Connection, history: History) -> bool:
    return _current(connection, history) == history.revisions[-1:]


def _upgrade(connection: Connection, history: History, to: str) -> None:
    from service.database.alembic_history import stamp, upgrade

    if (earlier := _earlier(connection, history)) is not None:
        stamp(connection, history.folder, history.version_table, earlier)
    upgrade(connection, history.folder, history.version_table, to)


def _earlier(connection: Connection, history: History) -> str | None:
    """The revision of tables that stand there without the version table."""
    if history.earlier is None or inspect(connection).has_table(history.version_table):
        return None
    tables = [name for name in DATA_TABLES if inspect(connection).has_table(name)]
    return history.earlier(tables, ", ".join(_versions(connection, ALEMBIC_VERSION))) if tables else None


def _current(connection: Connection, history: History) -> list[str]:
    return _versions(connection, history.version_table)


def _versions(connection: Connection, table: str) -> list[str]:
    """What the version table says; nothing where it is missing."""
    if not inspect(connection).has_table(table):
        return []
    return list(connection.execute(text(f"SELECT version_num FROM {table}")).scalars())  # noqa: S608
