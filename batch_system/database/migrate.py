"""Brings a database up to its histories of migrations. Several processes may start at once; a lock
lets one of them do it.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.database.engine import Database
from batch_system.errors import DatabaseTooNew, DatabaseTooOld

LAST_BEFORE_RELEASE = "6255c2400067"
"""The last commit with the migrations from before version 0.1.0. Its tables are those of the first
migration here.
"""

ALEMBIC_VERSION = "alembic_version"
"""Alembic's default version table: that of this clone's application, or of another application."""

Before = Callable[[AsyncConnection], Awaitable[None]]


@dataclass(frozen=True)
class History:
    """Alembic's migrations in one folder, and the table that says which of them a database has."""

    folder: Path
    version_table: str

    @property
    def revisions(self) -> list[str]:
        """The revisions, oldest first, with their whole names. (Alembic itself also accepts `head`,
        `+1` and the beginning of a name.)

        The name of a migration's file begins with its revision: data_0003_tables.py has
        `data_0003`.
        """
        files = sorted((self.folder / "versions").glob("*_[0-9]*_*.py"))
        return ["_".join(file.stem.split("_")[:2]) for file in files]

    @property
    def lock(self) -> int:
        """The number of the advisory lock of PostgreSQL that a migrating process holds."""
        return zlib.crc32(self.version_table.encode())


async def migrate(
    database: Database, *histories: History, to: str = "head", before: Before | None = None
) -> None:
    """Bring `database` up to the newest revision of each of `histories`, or to the revision `to`.

    `before` is awaited in the transaction of the migration, if the database already has an older
    revision of the tables; it prevents the migration by raising. Raises DatabaseTooNew,
    DatabaseTooOld (see `refuse_unknown`) and DatabaseUnreachable.
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
            # The second process waits for the first.
            await connection.execute(text("SET LOCAL lock_timeout = 0"))
            await connection.execute(
                text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": history.lock}
            )
        await connection.run_sync(refuse_unknown, history, database)
        current = await connection.run_sync(_current, history)
        if before is not None and current and current != history.revisions[-1:]:
            await before(connection)
        await connection.run_sync(_upgrade, history, to)


async def make_tables(
    connection: AsyncConnection, history: History, revision: str, schema: str | None = None
) -> None:
    """Make the tables of this revision if there are none, in the transaction of this connection.

    `schema`: the first schema of PostgreSQL's search path. Existing tables are looked for only
    there.
    """
    from batch_system.database.alembic_history import upgrade

    await connection.run_sync(upgrade, history.folder, history.version_table, revision, schema)


_OF_ANOTHER = (
    ". If `alembic_version` is that of an application that migrates its database itself, leave "
    "the setting BATCH_MIGRATIONS empty"
)


def refuse_unknown(connection: Connection, history: History, database: Database) -> None:
    """Refuse a database at a revision that this code does not know. Changes nothing.

    Raises DatabaseTooOld if the revision is from before the first release, otherwise
    DatabaseTooNew.
    """
    known = history.revisions
    for revision in _current(connection, history):
        if revision in known:
            continue
        at = f"the database {database.safe_url} ({database.setting}) is at migration {revision}"
        if _is_before(revision, known[0]):
            raise DatabaseTooOld(
                f"{at}, which was made before version 0.1.0: start commit {LAST_BEFORE_RELEASE} of "
                "this project once with it, and then this version"
            )
        hint = _OF_ANOTHER if history.version_table == ALEMBIC_VERSION else ""
        raise DatabaseTooNew(
            f"{at}, but this code knows migrations up to {known[-1]}: start the newer version of "
            "the code, "
            f"or point the setting at another database{hint}"
        )


def _is_before(revision: str, first: str) -> bool:
    """Whether the revision's name differs from that of the first one that this code knows only by a
    smaller number.
    """
    prefix = first.rpartition("_")[0] + "_"
    return revision.startswith(prefix) and revision < first


async def revision_of(database: Database, history: History) -> str | None:
    """The revision that a database has; None if it has no tables of the history. The database is
    only read.

    Raises DatabaseTooNew and DatabaseTooOld, as `migrate` does, and the driver's errors.
    """

    def read(connection: Connection) -> str | None:
        refuse_unknown(connection, history, database)
        return ", ".join(_current(connection, history)) or None

    async with database.reader.connect() as connection:
        return await connection.run_sync(read)


def _is_at_head(connection: Connection, history: History) -> bool:
    return _current(connection, history) == history.revisions[-1:]


def _upgrade(connection: Connection, history: History, to: str) -> None:
    from batch_system.database.alembic_history import upgrade

    upgrade(connection, history.folder, history.version_table, to)


def _current(connection: Connection, history: History) -> list[str]:
    """The revisions in the version table; none if it is missing."""
    if not inspect(connection).has_table(history.version_table):
        return []
    statement = text(f"SELECT version_num FROM {history.version_table}")  # noqa: S608
    return list(connection.execute(statement).scalars())
