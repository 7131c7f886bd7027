"""Opens, migrates and checks the ledger and the application's database, for services and for
operations.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from pathlib import Path

from sqlalchemy import inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import tables
from batch_system.batch.ledger.migration import LEDGER_HISTORY
from batch_system.batch.nodes import living, process_lock
from batch_system.concurrency.limits import LimitReached, limited
from batch_system.database.engine import Database
from batch_system.database.histories import application_histories
from batch_system.database.migrate import History, migrate, refuse_unknown, revision_of
from batch_system.errors import DatabaseError, DatabaseUnreachable, InvalidSetting
from batch_system.settings.settings import Settings


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turn errors of database drivers into DatabaseError, if no inner code has done so."""
    try:
        yield
    except DBAPIError as error:
        cause = str(error.orig).splitlines()[0]
        raise DatabaseError(
            f"a statement in the database (DATABASE_URL or LEDGER_URL) failed: {cause}"
        ) from error


OPERATION_SECONDS = 60.0
"""How long an operation in a service may use a connection. A command has no limit: its user can end
it.
"""


@asynccontextmanager
async def _opened(
    database: Database, opening: AbstractAsyncContextManager[AsyncConnection], seconds: float | None
) -> AsyncIterator[AsyncConnection]:
    """A connection. Raises DatabaseUnreachable if it can't be opened, or if a statement fails.

    `seconds`: how long it may be used; None: as long as it takes.

    An OSError of the caller's code is not converted: it may come from a closed pipe.
    """
    try:
        async with AsyncExitStack() as stack:
            if seconds is not None:
                await stack.enter_async_context(limited(seconds))
            try:
                connection = await stack.enter_async_context(opening)
            except OSError as error:
                raise database.unreachable(error) from error
            yield connection
    except (DBAPIError, LimitReached) as error:
        raise database.unreachable(error) from error


async def open_databases(
    settings: Settings, client: str = "batch", migrates: bool = True
) -> tuple[Database, Database]:
    """Open and migrate both databases. Returns the application's database and the ledger.

    `client`: the name by which PostgreSQL lists the connections. `migrates=False`: a database that
    does not exist, or is of an older version, is an error. Raises DatabaseError and InvalidSetting.
    """
    shows, pool_size = settings.BATCH_SHOW_SQL_PARAMETERS, settings.DATABASE_POOL_SIZE
    application = Database(
        settings.DATABASE_URL,
        setting="DATABASE_URL",
        pool_size=pool_size,
        client=client,
        shows_values=shows,
        pooler=settings.BATCH_DATABASE_POOLER,
    )
    ledger = Database(
        settings.ledger_url,
        setting=settings.ledger_setting,
        pool_size=5,
        client=client,
        shows_values=shows,
        waits_briefly=True,
        pooler=settings.BATCH_DATABASE_POOLER,
    )
    async with AsyncExitStack() as stack:
        for database in (application, ledger):
            stack.push_async_callback(database.dispose)
        if migrates:
            await _prepare(application, ledger, settings)
        else:
            await _refuse_unprepared(application, ledger, settings)
        stack.pop_all()
    return application, ledger


async def _prepare(application: Database, ledger: Database, settings: Settings) -> None:
    """Check that both can be reached, and migrate them. Raises DatabaseError, InvalidSetting."""
    _refuse_memory(application, ledger)
    _refuse_one_file(application, ledger)
    for database in (application, ledger):
        await database.check()
    # First, because it may be refused while processes of an older version live.
    await migrate_ledger(ledger, settings.LEASE_SECONDS)
    await migrate(application, *application_histories(settings.BATCH_MIGRATIONS))


async def _refuse_unprepared(application: Database, ledger: Database, settings: Settings) -> None:
    """Raises DatabaseError if no service of this version, or of a newer one beside which this code
    may work, has made both databases. Changes nothing.
    """
    _refuse_memory(application, ledger)
    _refuse_one_file(application, ledger)
    await _refuse_unmigrated(ledger, "ledger", LEDGER_HISTORY)
    histories = application_histories(settings.BATCH_MIGRATIONS)
    await _refuse_unmigrated(application, "application database", *histories)


async def _refuse_unmigrated(database: Database, what: str, *histories: History) -> None:
    is_here = database.kind != "sqlite" or _file_of(database).exists()
    if is_here:
        await database.check()
    for history in histories:
        try:
            revision = await revision_of(database, history) if is_here else None
        except (DBAPIError, OSError) as error:
            raise database.unreachable(error) from error
        if revision is None:
            of_sqlite = ". A file of SQLite can only be used on the machine of the service"
            raise DatabaseUnreachable(
                f"there is no {what} yet at {database.safe_url} ({database.setting}), and a "
                "worker makes none: start "
                f"the service first, or let the setting name the {what} that the service uses"
                f"{of_sqlite if database.kind == 'sqlite' else ''}"
            )
        if revision in history.revisions[:-1]:
            raise DatabaseError(
                f"the {what} {database.safe_url} ({database.setting}) is of an older version "
                f"({revision}, and this code has {history.revisions[-1]}), and a worker migrates "
                "nothing: start the service of this version first"
            )


async def migrate_ledger(ledger: Database, lease_seconds: float, to: str = "head") -> None:
    """Migrate the ledger to the newest revision of this code, or to the revision `to`.

    Raises DatabaseError; DatabaseInUse if a process still lives whose code can't work with the
    ledger afterwards.
    """
    folder = process_lock.folder_of(ledger.url)
    refuse = partial(living.refuse_older, folder=folder, lease_seconds=lease_seconds)
    await migrate(ledger, LEDGER_HISTORY, to=to, before=refuse)


def _refuse_memory(*databases: Database) -> None:
    for database in databases:
        if database.kind == "sqlite" and database.url.database in (None, "", ":memory:"):
            raise InvalidSetting(
                f"setting {database.setting}: a database in memory is lost with its connection; "
                "name a file"
            )


def _refuse_one_file(application: Database, ledger: Database) -> None:
    if (
        application.kind == ledger.kind == "sqlite"
        and _file_of(application).resolve() == _file_of(ledger).resolve()
    ):
        raise InvalidSetting(
            "setting LEDGER_URL: it names the same SQLite file as DATABASE_URL. A file allows one "
            "writer, so a task with an open session would stop the service: name another file, or "
            "leave the setting empty"
        )


def _file_of(database: Database) -> Path:
    return Path(database.url.database or "")


def is_missing_file(database: Database) -> bool:
    """Whether the database is an SQLite file that does not exist yet, in a folder that exists."""
    return (
        database.kind == "sqlite"
        and _file_of(database).parent.is_dir()
        and not _file_of(database).exists()
    )


class Databases:
    """Gives operations access to the two databases.

    Reading creates no file and migrates nothing. The first change checks that the databases can be
    reached, and migrates them, unless a service has done so already (`are_ready`).
    """

    def __init__(
        self,
        ledger: Database,
        application: Database,
        settings: Settings,
        *,
        are_ready: bool = False,
    ) -> None:
        """`settings`: how long after its last sign of life a process counts as alive
        (LEASE_SECONDS), and where migrations of the application are (BATCH_MIGRATIONS).

        `is_migrated` says whether this process knows that the ledger has the migrations of this
        code.
        """
        self._settings = settings
        self.ledger = ledger
        self.application = application
        self._is_readable = are_ready
        self._limit = OPERATION_SECONDS if are_ready else None
        self.is_migrated = are_ready
        self._are_both_migrated = are_ready

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection | None]:
        """A connection that reads the ledger; None if there is no ledger yet.

        Raises DatabaseUnreachable, and DatabaseTooNew if a newer version of the code has migrated
        the ledger.
        """
        if not self._is_readable:
            self._is_readable = await self._can_read()
        if not self._is_readable:
            yield None
            return
        async with _opened(self.ledger, self.ledger.reader.connect(), self._limit) as connection:
            yield connection

    async def _can_read(self) -> bool:
        """Whether there is a ledger that this code can read. Raises DatabaseUnreachable,
        DatabaseTooNew.
        """
        if not await self.has_ledger():
            return False
        try:
            async with self.ledger.reader.connect() as connection:
                await connection.run_sync(refuse_unknown, LEDGER_HISTORY, self.ledger)
        except (DBAPIError, OSError) as error:
            raise self.ledger.unreachable(error) from error
        return True

    async def has_ledger(self) -> bool:
        """Whether there is a ledger, of any version. Raises DatabaseUnreachable."""
        if self.is_migrated:
            return True
        if is_missing_file(self.ledger):
            return False
        await self.ledger.check()
        try:
            async with self.ledger.reader.connect() as connection:
                return await connection.run_sync(
                    lambda sync: inspect(sync).has_table(tables.runs.name)
                )
        except (DBAPIError, OSError) as error:
            raise self.ledger.unreachable(error) from error

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that changes the ledger. Raises DatabaseUnreachable, also if there is no
        ledger yet.
        """
        await self.migrate_ledger()
        async with _opened(self.ledger, self.ledger.engine.begin(), self._limit) as connection:
            yield connection

    async def migrate_ledger(self) -> None:
        """Migrate the ledger, once. Raises DatabaseUnreachable if there is no ledger that could be
        changed.
        """
        if self.is_migrated:
            return
        if self.ledger.kind == "sqlite" and not _file_of(self.ledger).exists():
            raise DatabaseUnreachable(
                f"there is no ledger yet at {self.ledger.safe_url} ({self.ledger.setting}): "
                "`batch serve` or `batch run` makes it"
            )
        await self.ledger.check()
        await migrate_ledger(self.ledger, self._settings.LEASE_SECONDS)
        self.is_migrated = self._is_readable = True

    async def migrate_both(self) -> None:
        """Migrate both databases, once. Raises DatabaseError, InvalidSetting."""
        await self.migrate_ledger()
        if not self._are_both_migrated:
            await self.make_both()

    async def make_both(self) -> None:
        """Make both databases, if they are missing, and migrate them. Raises DatabaseError,
        InvalidSetting.
        """
        await _prepare(self.application, self.ledger, self._settings)
        self.is_migrated = self._is_readable = self._are_both_migrated = True
