"""Brings one database up to one history of migrations. Several processes may start at once: a lock lets one do it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.database.engine import Database
from service.errors import DatabaseTooNew


@dataclass(frozen=True)
class History:
    """Alembic's migrations in one folder, and the table that says which of them a database has."""

    folder: Path
    version_table: str

    @property
    def revisions(self) -> list[str]:
        """Oldest first, by their whole names: Alembic itself also takes `head`, `+1` and the beginning of a name.

        The name of a migration's file begins with its revision: app_0002_checkpoints.py has `app_0002`.
        """
        files = sorted((self.folder / "versions").glob("*_[0-9]*_*.py"))
        return ["_".join(file.stem.split("_")[:2]) for file in files]

    @property
    def lock(self) -> int:
        """The number of PostgreSQL's advisory lock of whoever migrates."""
        return zlib.crc32(self.version_table.encode())


async def migrate(database: Database, history: History, to: str = "head") -> None:
    """Bring `database` up to the newest revision of `history`, or to this one.

    Raises DatabaseTooNew, naming both revisions, when the database knows a revision that this code doesn't,
    and DatabaseUnreachable.
    """
    try:
        async with database.reader.connect() as connection:
            if to == "head" and await connection.run_sync(_is_at_head, history):
                return
        async with database.engine.begin() as connection:
            if database.kind == "postgresql":
                await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": history.lock})
            await connection.run_sync(_upgrade, history, database, to)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


async def make_tables(connection: AsyncConnection, history: History, revision: str, schema: str | None = None) -> None:
    """Make the tables of this revision where there are none, in the transaction of this connection.

    `schema`: of PostgreSQL, the first of the search path; only there it is looked whether they are there already.
    """
    from service.database.alembic_history import upgrade

    await connection.run_sync(upgrade, history.folder, history.version_table, revision, schema)


def refuse_newer(connection: Connection, history: History, database: Database) -> None:
    """Raises DatabaseTooNew, as `migrate` does, but changes nothing."""
    known = history.revisions
    for revision in _current(connection, history):
        if revision not in known:
            raise DatabaseTooNew(
                f"the database {database.safe_url} ({database.setting}) is at migration {revision}, but this code "
                f"knows migrations up to {known[-1]}: start the newer version of the code, "
                "or point the setting at another database"
            )


def _is_at_head(connection: Connection, history: History) -> bool:
    return _current(connection, history) == history.revisions[-1:]


def _upgrade(connection: Connection, history: History, database: Database, to: str) -> None:
    from service.database.alembic_history import upgrade

    refuse_newer(connection, history, database)
    upgrade(connection, history.folder, history.version_table, to)


def _current(connection: Connection, history: History) -> list[str]:
    """What the version table says; nothing where it is missing."""
    if not inspect(connection).has_table(history.version_table):
        return []
    return list(connection.execute(text(f"SELECT version_num FROM {history.version_table}")).scalars())  # noqa: S608
