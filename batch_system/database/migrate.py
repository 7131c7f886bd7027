"""Brings a database up to its histories of migrations, and says which code may work with it.

Several processes may start at once; a lock lets one of them migrate. Processes of older code may go
on meanwhile, if they know the revision that the *window* of the history names as the oldest one.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sqlalchemy import (
    Connection,
    String,
    TableClause,
    column,
    insert,
    inspect,
    select,
    table,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.database import troubles
from batch_system.database.engine import Database
from batch_system.errors import DatabaseTooNew, DatabaseTooOld
from batch_system.logs import get_logger
from batch_system.versions import package_version

logger = get_logger("batch_system.batch")

LAST_BEFORE_RELEASE = "6255c2400067"
"""The last commit with the migrations from before version 0.1.0. Its tables are those of the first
migration here.
"""

ALEMBIC_VERSION = "alembic_version"
"""Alembic's default version table: that of this clone's application, or of another application."""

LOCK_MILLISECONDS = 500
"""How long a migration waits on PostgreSQL for the lock on a table that it changes.

Whoever wants to use the table meanwhile waits behind it. It is less than the `deadlock_timeout` of
the server, so the migration gives way, and not a process that is working.
"""
AGAIN_SECONDS = 1.0
"""The seconds until a migration that could not have a lock begins again."""
SAID_TIMES = 60
"""It is logged at the first of so many beginnings that a migration waits for a lock."""

Before = Callable[[AsyncConnection, str], Awaitable[None]]


@dataclass(frozen=True)
class History:
    """Alembic's migrations in one folder, and the tables that say which of them a database has.

    `version_table`: that of Alembic. `window_table`: which code may work with the database.
    """

    folder: Path
    version_table: str
    window_table: str

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


class Window(NamedTuple):
    """Which code may work with the tables of a history beside the code that has migrated them.

    `oldest`: the revision that it has to know. `version`: of the package that has set it.
    """

    oldest: str
    version: str


async def migrate(
    database: Database, *histories: History, to: str = "head", before: Before | None = None
) -> None:
    """Bring `database` up to the newest revision of each of `histories`, or to the revision `to`.

    A database at a newer revision with which this code may work is left as it is.

    `before` is awaited in the transaction of the migration, if the database already has an older
    revision of the tables; it prevents the migration by raising. It gets the revision that code
    must know to work with the tables afterwards. Raises DatabaseTooNew, DatabaseTooOld (see
    `refuse_unknown`) and DatabaseUnreachable.
    """
    try:
        for history in histories:
            await _migrate(database, history, to, before)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


async def _migrate(database: Database, history: History, to: str, before: Before | None) -> None:
    async with database.reader.connect() as connection:
        if await connection.run_sync(_needs_nothing, history, database, to):
            return
    times = 0
    while True:
        try:
            async with database.engine.begin() as connection:
                await _migrate_in(connection, database, history, to, before)
            return
        except DBAPIError as error:
            if troubles.sqlstate_of(error) not in (troubles.LOCKED, troubles.DEADLOCK):
                raise
        if times % SAID_TIMES == 0:
            logger.warning(
                f"the migration of {database.safe_url} ({database.setting}) waits: another "
                "connection, such as that of a backup, uses a table that it changes. It is tried "
                "again each second"
            )
        times += 1
        await asyncio.sleep(AGAIN_SECONDS)


async def _migrate_in(
    connection: AsyncConnection,
    database: Database,
    history: History,
    to: str,
    before: Before | None,
) -> None:
    if database.kind == "postgresql":
        # The second process waits for the first.
        await connection.execute(text("SET LOCAL lock_timeout = 0"))
        await connection.execute(
            text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": history.lock}
        )
        await connection.execute(text(f"SET LOCAL lock_timeout = {LOCK_MILLISECONDS}"))
    if await connection.run_sync(_needs_nothing, history, database, to):
        return
    current = await connection.run_sync(_current, history)
    if before is not None and current:
        # Nodes read the window when they register, so from here on no older one comes.
        await connection.run_sync(window_of, history, "UPDATE")
        if (oldest := oldest_after(history, current[0], to)) is not None:
            await before(connection, oldest)
    await connection.run_sync(_upgrade, history, to)


async def make_tables(
    connection: AsyncConnection, history: History, revision: str, schema: str | None = None
) -> None:
    """Make the tables of this revision if there are none, in the transaction of this connection.

    `schema`: the first schema of PostgreSQL's search path. Existing tables are looked for only
    there.
    """
    await connection.run_sync(_upgrade, history, revision, schema)


_OF_ANOTHER = (
    ". If `alembic_version` is that of an application that migrates its database itself, leave "
    "the setting BATCH_MIGRATIONS empty"
)


def refuse_unknown(connection: Connection, history: History, database: Database) -> None:
    """Refuse a database at a revision that this code does not know, unless its window says that
    this code may work with it. Changes nothing.

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
        window = window_of(connection, history)
        if window is None or window.oldest not in known:
            hint = _OF_ANOTHER if history.version_table == ALEMBIC_VERSION else ""
            raise DatabaseTooNew(
                f"{at}, but this code knows migrations up to {known[-1]}: "
                f"{_what_to_start(history, window)}, or point the setting at another database{hint}"
            )


def refuse_closed(connection: Connection, history: History, what: str) -> None:
    """Raises DatabaseTooNew if this code may not work with these tables any more. The window stays
    as it is until the end of the transaction.

    `what`: the database, in words.
    """
    window = window_of(connection, history, "SHARE")
    known = history.revisions
    if window is not None and window.oldest not in known:
        raise DatabaseTooNew(
            f"the {what} has changed so that code has to know migration {window.oldest}, but this "
            f"code knows migrations up to {known[-1]}: {_what_to_start(history, window)}"
        )


def _what_to_start(history: History, window: Window | None) -> str:
    if window is None or history.version_table == ALEMBIC_VERSION:
        return "start the newer version of the code"
    return f"start version {window.version} of batch-system, or a newer one"


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


def _needs_nothing(connection: Connection, history: History, database: Database, to: str) -> bool:
    """Whether the database has all migrations of this code, or newer ones. Raises DatabaseTooNew,
    DatabaseTooOld.
    """
    current = _current(connection, history)
    refuse_unknown(connection, history, database)
    is_newer = bool(current) and not set(current) & set(history.revisions)
    return is_newer or (to == "head" and current == history.revisions[-1:])


def oldest_after(history: History, current: str, to: str = "head") -> str | None:
    """The revision that code must know to work with the tables, once they have been migrated from
    `current` to `to`; None if no migration is due.
    """
    if current not in history.revisions[:-1]:
        return None
    from batch_system.database import alembic_history

    due = alembic_history.due(history.folder, current, to)
    return max(map(oldest_of, due), default=None)


def oldest_of(migration: Any) -> str:
    """The revision that code must know to work with the tables after this migration, which is a
    module.

    One that does not say it is only for code that knows the migration itself. The names of
    revisions rise.
    """
    return str(getattr(migration, "oldest", migration.revision))


def _upgrade(connection: Connection, history: History, to: str, schema: str | None = None) -> None:
    """Execute the migrations that are due, and move the window with each."""
    from batch_system.database.alembic_history import upgrade

    def move_window(migration: Any) -> None:
        if inspect(connection).has_table(history.window_table, schema=schema):
            raise_oldest(connection, history, oldest_of(migration))

    upgrade(connection, history.folder, history.version_table, to, move_window, schema)


def window_of(
    connection: Connection, history: History, lock: Literal["SHARE", "UPDATE"] | None = None
) -> Window | None:
    """The window of a history; None if the tables are from before there were any, or are none.

    `lock`: how its row is locked on PostgreSQL. On SQLite a transaction that writes has the lock.
    """
    if not inspect(connection).has_table(history.window_table):
        return None
    windows = _windows(history)
    query = select(windows.c.oldest, windows.c.version).where(
        windows.c.history == history.version_table
    )
    if lock is not None:
        query = query.with_for_update(read=lock == "SHARE")
    row = connection.execute(query).first()
    return None if row is None else Window(row.oldest, row.version)


def raise_oldest(connection: Connection, history: History, oldest: str) -> None:
    """From now on, only code that knows the revision `oldest` may begin to work with the tables of
    this history. It never goes back.
    """
    windows = _windows(history)
    values = {"oldest": oldest, "version": package_version()}
    present = window_of(connection, history, "UPDATE")
    if present is None:
        new = {"history": history.version_table, **values}
        connection.execute(insert(windows).values(new))
    elif present.oldest < oldest:
        its = windows.c.history == history.version_table
        connection.execute(update(windows).where(its).values(values))


def _windows(history: History) -> TableClause:
    names = ("history", "oldest", "version")
    return table(history.window_table, *(column(name, String) for name in names))


def _current(connection: Connection, history: History) -> list[str]:
    """The revisions in the version table; none if it is missing."""
    if not inspect(connection).has_table(history.version_table):
        return []
    statement = text(f"SELECT version_num FROM {history.version_table}")  # noqa: S608
    return list(connection.execute(statement).scalars())
