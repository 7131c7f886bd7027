"""One logical database: sets up its connections, and opens sessions. Knows no tables."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

from sqlalchemy import Row, Select, event, text
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool
from sqlalchemy.util.concurrency import await_only, in_greenlet

from batch_system import clock
from batch_system.concurrency import limits
from batch_system.database import forks, lock_holder, sqlite_connections, troubles
from batch_system.database.changes import TrackedSession
from batch_system.database.pooler import PROOF, Pooler, refusal
from batch_system.database.urls import split_options
from batch_system.database.writers import WriterGuard
from batch_system.errors import DatabaseBusy, DatabaseDamaged, DatabaseUnreachable

BUSY_MS = 100
BUSY_GIVE_UP_SECONDS = 60.0
LONG_WAIT_SECONDS = 2.0

CACHE = "PRAGMA cache_size = -{}"
CACHE_KILOBYTES, WHOLE_TABLES_KILOBYTES = 16_000, 500
"""How much of a file each connection caches: normally, and while it reads whole tables."""

PAGE_ROWS = 500
"""How many rows of a large result are in memory at a time."""

SEVERED_SECONDS = 5.0
"""A statement that fails within this time after the connections were cut off may have failed
because of that.
"""
LOCK_SECONDS, IDLE_SECONDS = 2, 30
START_LOCK_SECONDS = 20
"""How long a starting process waits for a lock of PostgreSQL, beside busy processes, before it
ends.
"""
BRIEF_WAITS = {
    "lock_timeout": f"{LOCK_SECONDS}s",
    "idle_in_transaction_session_timeout": f"{IDLE_SECONDS}s",
}
"""Settings of PostgreSQL that limit waits for locks, and end the transaction of a silent
client.
"""
KEEPALIVES = {
    # The same as postgresql_connections.TCP_OPTIONS, at the other end of the connection.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "25000",
}
"""Settings of PostgreSQL that end the connection of a client whose machine is gone."""

PLAN_ONCE = "SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_seqscan = off"
"""With these, PostgreSQL plans a statement once for a connection, and only by indexes, whatever the
size of the tables.
"""
PLAN_ANEW = (
    "SELECT set_config('plan_cache_mode', 'force_custom_plan', true), "
    "set_config('enable_seqscan', 'on', true)"
)


class Database:
    """One database on one event loop: `engine` for writing, `reader` for reading only.

    On SQLite a writing transaction takes the write lock at its start (BEGIN IMMEDIATE). The writers
    of this process queue for a pool of one connection, and readers have another pool.

    `setting`: the name of the setting with the URL, for messages. `client`: names the connections
    to PostgreSQL. `pooled`: without it, no connection is kept between uses, for code outside a
    service. `shows_values`: its errors show the parameters of statements, which may be secret.
    `plans_once`: PostgreSQL plans each statement once for a connection, and only by indexes; this
    is for a few statements that are sent often, and take longer to plan than to execute.
    `waits_briefly`: PostgreSQL ends a wait for a lock after two seconds, and the transaction of a
    client that is silent for half a minute or whose machine is gone; this is for the ledger, where
    nothing takes longer. `pooler`: the mode of the pooler before PostgreSQL, if there is one.
    Raises DatabaseUnreachable if the driver is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        setting: str,
        pool_size: int = 20,
        pooled: bool = True,
        client: str = "batch",
        shows_values: bool = False,
        plans_once: bool = False,
        waits_briefly: bool = False,
        pooler: Pooler | None = None,
    ) -> None:
        self.url: URL = make_url(url)
        self.setting = setting
        self.kind = self.url.get_backend_name()
        self.pooler = pooler if self.kind == "postgresql" else None
        self.guard = WriterGuard()
        self.on_damage: Callable[[str], None] = lambda _: None
        """Called with the cause whenever SQLite finds that the file is damaged."""
        self.on_locked: Callable[[str], None] = lambda _: None
        """Called once in each wait for SQLite's write lock that takes LONG_WAIT_SECONDS, with the
        holder in words.
        """
        try:
            self._make_engines(pool_size, pooled, client, shows_values, plans_once, waits_briefly)
        except ModuleNotFoundError as error:
            raise DatabaseUnreachable(
                f"the driver of {self.url.drivername}:// is not installed ({error.name}). Look at "
                f"{setting}."
            ) from None

    def _make_engines(
        self,
        pool_size: int,
        pooled: bool,
        client: str,
        shows_values: bool,
        plans_once: bool,
        waits_briefly: bool,
    ) -> None:
        self._is_disposed = False
        self._open: WeakSet[Any] = WeakSet()
        self._severed_at = -math.inf
        self._before_begin: list[Callable[[Connection], None]] = []
        options = {"hide_parameters": not shows_values}
        if self.kind == "sqlite":
            self.engine = _sqlite_engine(self.url, 1, pooled, options)
            self.reader = _sqlite_engine(self.url, 5, pooled, options)
            event.listen(self.engine.sync_engine, "begin", self._begin_immediate)
            event.listen(
                self.reader.sync_engine,
                "connect",
                lambda c, _: execute_once(c, "PRAGMA query_only = ON"),
            )
            event.listen(self.reader.sync_engine, "begin", lambda c: c.exec_driver_sql("BEGIN"))
        else:
            self.engine = _server_engine(
                self.url, pool_size, pooled, client, plans_once, waits_briefly, self.pooler, options
            )
            self.reader = self.engine.execution_options(postgresql_readonly=True)
        where = f"{self.safe_url} ({self.setting})"
        for engine in (self.engine, self.reader) if self.kind == "sqlite" else (self.engine,):
            if not shows_values:
                event.listen(engine.sync_engine, "handle_error", troubles.hide_values)
            event.listen(
                engine.sync_engine, "handle_error", partial(troubles.on_error, where=where)
            )
            event.listen(
                engine.sync_engine,
                "handle_error",
                lambda context: self._look(context.original_exception),
            )
            event.listen(engine.sync_engine, "do_connect", self._refuse_if_disposed)
            if self.url.drivername == "postgresql+asyncpg":
                event.listen(engine.sync_engine, "do_connect", _connect)
            event.listen(engine.sync_engine, "checkout", self._on_checkout)
            event.listen(
                engine.sync_engine, "checkin", lambda connection, _: limits.release(connection)
            )

    def before_begin(self, listener: Callable[[Connection], None]) -> None:
        """Call `listener` before each transaction of `engine` begins. On SQLite, that is before the
        wait for the lock.

        SQLAlchemy ignores `insert=True` for its event `begin`, so its listeners would be called
        after the wait.
        """
        if self.kind == "sqlite":
            self._before_begin.append(listener)
        else:
            event.listen(self.engine.sync_engine, "begin", listener)

    def _begin_immediate(self, connection: Connection) -> None:
        for listener in self._before_begin:
            listener(connection)
        try:
            _until_unlocked(connection.connection, "BEGIN IMMEDIATE", self._tell_locked)
            # Otherwise SQLAlchemy would open another connection, and execute the next statements
            # without a transaction.
            if connection.invalidated:
                raise sqlite3.OperationalError(
                    "connection closed while it waited for the write lock"
                )
        except (
            sqlite3.Error
        ) as error:  # SQLAlchemy does not wrap the errors of drivers in its events
            self._look(error)
            raise OperationalError("BEGIN IMMEDIATE", None, error) from error

    def _tell_locked(self) -> None:
        holder = lock_holder.of_write_lock(self.url.database or "")
        self.on_locked("another process" if holder is None else f"pid {holder}")

    def _look(self, error: BaseException) -> None:
        if troubles.is_damage(error):
            self.on_damage(self.why(error))

    def session(self, readonly: bool = False) -> AsyncSession:
        """A session whose objects stay usable after a commit. On SQLite, a writing session may
        raise SecondWriter.
        """
        if readonly:
            return AsyncSession(self.reader, expire_on_commit=False)
        if self.kind != "sqlite":
            return AsyncSession(
                self.engine, sync_session_class=TrackedSession, expire_on_commit=False
            )
        return self.guard.session(self.engine)

    async def check(self) -> None:
        """Connect once. Raises DatabaseUnreachable with the cause and the name of the setting,
        without a password; also if a pooler drops settings without which polls take seconds.
        """
        is_server = self.url.drivername == "postgresql+asyncpg"
        try:
            async with self.reader.connect() as connection:
                row = (await connection.execute(text(PROOF if is_server else "SELECT 1"))).one()
                driver: Any = (await connection.get_raw_connection()).driver_connection
        except (
            DBAPIError,
            OSError,
            sqlite3.Error,
            TypeError,
        ) as error:  # TypeError: the driver lacks an option of the URL
            raise self.unreachable(error) from None
        if is_server and (reason := refusal(row, self.pooler, driver.get_server_pid())):
            raise DatabaseUnreachable(
                f"the database {self.safe_url} ({self.setting}) can't be used: {reason}."
            )

    async def answer(self) -> None:
        """Execute a query, and on SQLite also take the write lock, unless a session of this process
        holds it.

        Raises the driver's errors. It may wait for a lock, so call it with a timeout.
        """
        async with self.reader.connect() as connection:
            await connection.execute(text("SELECT 1"))
        if self.kind == "sqlite" and not self.guard.is_held:
            async with self.engine.begin():
                pass

    def unreachable(self, error: BaseException) -> DatabaseUnreachable:
        """The error to raise if this database can't be used because of `error`."""
        cause = troubles.cause_of(error, self.kind)
        if "no such table" in cause or troubles.sqlstate_of(error) == troubles.NO_SUCH_TABLE:
            cause += " (a service makes the tables when it first starts)"
        message = f"the database {self.safe_url} can't be used: {cause}. Look at {self.setting}."
        if troubles.is_damage(error):
            return DatabaseDamaged(message, self.url.database or "")
        return DatabaseUnreachable(message)

    def why(self, error: BaseException) -> str:
        """One line for a log: the database, its setting, and the cause of the error."""
        return f"{self.safe_url} ({self.setting}): {troubles.cause_of(error, self.kind)}"

    @property
    def safe_url(self) -> str:
        """The URL as text for people, without its password and its query."""
        return self.url.set(query={}).render_as_string(hide_password=True)

    def sever(self) -> None:
        """Cut off all connections to a server at once, without notifying it. Code that uses one
        gets an error.

        If a proxy or a firewall has forgotten a connection, nothing else would show that. SQLite
        has no server.
        """
        self._severed_at = clock.monotonic()
        for connection in list(self._open):
            connection.terminate()

    def has_severed(self, error: BaseException) -> bool:
        """Whether a connection in use has failed because of `sever`, and not because of the
        server.
        """
        is_lost = isinstance(error, DBAPIError) and error.connection_invalidated
        return is_lost and clock.monotonic() < self._severed_at + SEVERED_SECONDS

    def _on_checkout(self, connection: Any, *_: Any) -> None:
        """A connection is used from now on. Have it cut off when the time of a limited block has
        passed.
        """
        driver = connection.driver_connection
        if self.kind == "sqlite":
            limits.hold(connection, partial(sqlite_connections.interrupt, driver))
        else:
            self._open.add(driver)
            limits.hold(connection, driver.terminate)

    async def dispose(self) -> None:
        """Close all connections. If the caller is cancelled, they are closed before CancelledError
        is raised.
        """
        disposing = asyncio.create_task(self._dispose())
        try:
            await asyncio.shield(disposing)
        finally:
            await asyncio.wait([disposing])

    def _refuse_if_disposed(self, *_: Any) -> None:
        """A connection that is opened after the others were closed would never be closed."""
        if self._is_disposed:
            raise DatabaseUnreachable(
                f"the database {self.safe_url} was closed, because the service has stopped"
            )

    async def _dispose(self) -> None:
        self._is_disposed = True
        await self.engine.dispose()
        if self.kind == "sqlite":
            await self.reader.dispose()


def _server_engine(
    url: URL,
    pool_size: int,
    pooled: bool,
    client: str,
    plans_once: bool,
    waits_briefly: bool,
    pooler: Pooler | None,
    given: dict[str, Any],
) -> AsyncEngine:
    options: dict[str, Any] = {"poolclass": NullPool}
    if pooled:
        options = {"pool_size": pool_size, "max_overflow": 0, "pool_timeout": 60}
    if url.drivername == "postgresql+asyncpg":
        # Generic plans live long, and became quadratic on tables that had just been emptied. Custom
        # plans did not.
        url, given_settings = split_options(url)
        # Compiling took a hundred times as long as the query for waiting runs, which it should
        # speed up.
        of_transactions = {"plan_cache_mode": "force_custom_plan", "jit": "off"}
        if waits_briefly:
            of_transactions |= BRIEF_WAITS
        settings = {"application_name": client[:63], "timezone": "UTC"}
        if pooler is None:
            settings |= of_transactions | given_settings | (KEEPALIVES if waits_briefly else {})
        # asyncpg need not be installed where only SQLite is used.
        from batch_system.database import postgresql_connections

        connecting = {"connection_class": postgresql_connections.Connection, "timeout": 10}
        options["connect_args"] = {"server_settings": settings, **connecting}
        options["execution_options"] = {"behind_pooler": pooler is not None}
    engine = create_async_engine(url, **options, **given)
    if url.drivername == "postgresql+asyncpg":
        if pooler is not None:
            event.listen(
                engine.sync_engine,
                "connect",
                lambda c, _: c.driver_connection.use_pooler(of_transactions),
            )
        event.listen(engine.sync_engine, "checkout", _refuse_closed)
        event.listen(engine.sync_engine, "connect", forks.remember)
        if plans_once:
            event.listen(engine.sync_engine, "connect", _plan_once)
    return engine


def _connect(dialect: Any, _: Any, arguments: Any, options: Any) -> Any:
    """Connect to PostgreSQL. SQLAlchemy 2.0 does not wrap the error of a server that refuses."""
    import asyncpg

    try:
        return dialect.connect(*arguments, **options)
    except asyncpg.PostgresError as error:
        wrapped = dialect.dbapi.Error(str(error))
        wrapped.sqlstate = error.sqlstate
        raise wrapped from error


def _plan_once(connection: Any, *_: Any) -> None:
    connection.driver_connection.first_statement = PLAN_ONCE


async def plan_anew(connection: AsyncConnection) -> None:
    """Within its transaction, let a connection of a database with `plans_once` plan each statement
    for its values.
    """
    if connection.dialect.name == "postgresql":
        await connection.exec_driver_sql(PLAN_ANEW)


def _refuse_closed(connection: Any, *_: Any) -> None:
    """Discard a lost connection, which asyncpg knows of. A pre-ping would take a transaction for
    each checkout.
    """
    if connection.driver_connection.is_closed():
        raise DisconnectionError


def _sqlite_engine(url: URL, pool_size: int, pooled: bool, given: dict[str, Any]) -> AsyncEngine:
    options: dict[str, Any] = {"poolclass": NullPool}
    if pooled:
        options = {
            "poolclass": AsyncAdaptedQueuePool,
            "pool_size": pool_size,
            "max_overflow": 0,
            "pool_timeout": None,
        }
    driver = {"isolation_level": None, "timeout": BUSY_MS / 1000}
    connect = {**driver, "async_creator_fn": sqlite_connections.open_file}
    engine = create_async_engine(url, connect_args=connect, **options, **given)
    event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    dialect: Any = engine.dialect
    if not dialect.has_terminate:  # older SQLAlchemy 2.0 leaves the file locked instead
        dialect.has_terminate = True
        dialect.do_terminate = _stop
    return engine


def _stop(connection: Any) -> None:
    """Close a connection to SQLite, and wait for that unless the garbage collector has asked."""
    ended = connection.driver_connection.stop()
    if ended is not None and in_greenlet():
        await_only(asyncio.shield(ended))


def execute_once(connection: Any, statement: str) -> Any:
    """Execute a statement on a connection of the driver, such as a PRAGMA. Returns its first row,
    or None.
    """
    cursor = connection.cursor()
    try:
        cursor.execute(statement)
        return cursor.fetchone()
    finally:
        cursor.close()


async def wait_for_locks(connection: AsyncConnection) -> None:
    """Let this transaction wait START_LOCK_SECONDS for each lock, because it belongs to a start."""
    if connection.dialect.name == "postgresql":
        await connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{START_LOCK_SECONDS}s'")


@asynccontextmanager
async def whole_tables(connection: AsyncConnection) -> AsyncIterator[None]:
    """Within the block, SQLite caches little of the file, because whole tables, possibly large, are
    read or written once.

    The connection would keep its cache for as long as it is open.
    """
    is_file = connection.dialect.name == "sqlite"
    if is_file:
        await connection.exec_driver_sql(CACHE.format(WHOLE_TABLES_KILOBYTES))
    yield
    if is_file:
        await connection.exec_driver_sql(CACHE.format(CACHE_KILOBYTES))


async def in_pages(
    connection: AsyncConnection, query: Select[Any]
) -> AsyncIterator[Sequence[Row[Any]]]:
    """The rows of a query that may have very many, some at a time.

    If all of them were in memory at once, the process would keep that memory, because it returns
    memory only in large pieces.
    """
    async with connection.stream(query, execution_options={"yield_per": PAGE_ROWS}) as rows:
        async for page in rows.partitions():
            yield page


def _prepare_sqlite(connection: Any, _: Any) -> None:
    if execute_once(connection, "PRAGMA journal_mode") != ("wal",):
        _until_unlocked(connection, "PRAGMA journal_mode = WAL")
    execute_once(connection, "PRAGMA synchronous = NORMAL")
    execute_once(connection, CACHE.format(CACHE_KILOBYTES))
    execute_once(connection, "PRAGMA foreign_keys = ON")


def _until_unlocked(
    connection: Any, statement: str, tell: Callable[[], None] = lambda: None
) -> None:
    """Repeat a short wait for the lock, so that a cancel takes effect between two tries. A single
    long wait would delay a drain.

    `tell`: called once if it waits for LONG_WAIT_SECONDS.
    """
    began_at, has_told = clock.monotonic(), False
    give_up_at = began_at + BUSY_GIVE_UP_SECONDS
    while True:
        try:
            execute_once(connection, statement)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) and "busy" not in str(error):
                raise
            if not has_told and clock.monotonic() > began_at + LONG_WAIT_SECONDS:
                has_told = True
                tell()
            if clock.monotonic() > give_up_at:
                _, _, file = execute_once(connection, "PRAGMA database_list")
                raise DatabaseBusy(
                    f"another connection has held the write lock of {file} for "
                    f"{BUSY_GIVE_UP_SECONDS:g} s: "
                    "SQLite has one writer, so that connection has to commit or close first"
                ) from error
