"""Starts within a session of the application: the runs exist if, and only if, its transaction
commits.

If the session uses the PostgreSQL database that is also the ledger, the runs are inserted in its
transaction. Otherwise a row of `batch_starts` is, beside the application's data, and a service
hands it over to the ledger after the commit (firing/handover.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.util.concurrency import await_only, in_greenlet

from batch_system import clock
from batch_system.batch.context.current_run import current_run_if_any
from batch_system.batch.ledger import database_time
from batch_system.batch.queue import enqueue
from batch_system.batch.queue.requests import StartedRun, Starts
from batch_system.batch.queue.start_rows import stored
from batch_system.database import companions
from batch_system.database.sync import call_async, home_loop
from batch_system.errors import BatchError, InvalidParameters

T = TypeVar("T")

_LOOK = {
    "postgresql": text(
        "SELECT current_setting('transaction_read_only') = 'on' AS only_reads, "
        "to_regclass('batch_starts') IS NOT NULL AS has_starts, "
        "to_regclass('batch_runs')::oid::bigint AS runs, current_database() AS name, "
        "extract(epoch FROM pg_postmaster_start_time())::text AS server"
    ),
    "sqlite": text(
        "SELECT (SELECT query_only FROM pragma_query_only) AS only_reads, EXISTS (SELECT 1 FROM "
        "sqlite_master WHERE name = 'batch_starts') AS has_starts, NULL AS runs, NULL AS name, "
        "NULL AS server"
    ),
}
_INSERT = companions.starts.insert().inline()  # whose number a row gets is of no interest
KEY = "batch_starts"
"""The key of what is known about a transaction in the `info` of its session."""
MOST_PLACES = 100


class _Place(NamedTuple):
    """Where a table of runs is: the start of its server, its database, and the table's number.

    No two servers start in the same microsecond, so equal places are one table.
    """

    server: str
    database: str
    table: int


@dataclass
class _Transaction:
    """What is known about a transaction of a session. `known`: the tasks that a service has
    loaded.
    """

    root: SessionTransaction
    connection: AsyncConnection
    is_ledger: bool
    began_at: datetime
    """The time of the ledger, or without it that of this machine."""
    loop: asyncio.AbstractEventLoop | None
    """That of the service which is woken at its end."""
    measured_at: float = field(default_factory=clock.monotonic)
    known: set[str] = field(default_factory=set)

    @property
    def now(self) -> datetime:
        return self.began_at + timedelta(seconds=clock.monotonic() - self.measured_at)


_is_ledger: dict[tuple[str, _Place], bool] = {}
"""Whether a place is that of the ledger with this URL."""

_handover_wakes: WeakKeyDictionary[asyncio.AbstractEventLoop, Callable[[], None]] = (
    WeakKeyDictionary()
)


def use_handover(wake: Callable[[], None]) -> None:
    """Call `wake` when code on this event loop has committed starts that have to be handed over."""
    _handover_wakes[asyncio.get_running_loop()] = wake


def use_no_handover() -> None:
    """On this event loop nobody hands starts over any more."""
    _handover_wakes.pop(asyncio.get_running_loop(), None)


async def write(session: AsyncSession, starts: Starts) -> StartedRun:
    """Write the requested runs in the transaction of this session, which is begun if there is none.

    Raises InvalidParameters, UnknownTask, and what the session's database raises.
    """
    if not isinstance(session, AsyncSession):
        raise InvalidParameters(
            f"start(): session is of the type {type(session).__name__}; allowed: an AsyncSession "
            "of SQLAlchemy (for a synchronous one there is start_sync())"
        )
    known = _known(session.sync_session)
    connection = known.connection if known is not None else await session.connection()
    return await _write(session.sync_session, connection, starts, _place_of_ledger)


def write_sync(session: Session, starts: Starts) -> StartedRun:
    """The same for a synchronous session."""
    if not isinstance(session, Session):
        raise InvalidParameters(
            f"start_sync(): session is of the type {type(session).__name__}; allowed: a Session of "
            "SQLAlchemy (for an AsyncSession there is start())"
        )

    async def place() -> _Place | None:
        return _wait_for(_place_of_ledger)

    connection = cast(AsyncConnection, _AtOnce(session.connection()))
    return _run(_write(session, connection, starts, place))


async def _write(
    session: Session,
    connection: AsyncConnection,
    starts: Starts,
    place_of_ledger: Callable[[], Awaitable[_Place | None]],
) -> StartedRun:
    if starts.in_group:
        raise InvalidParameters(
            "start(): in_group=True and session were both given; allowed: one of them, because a "
            "group may have ended before the session commits"
        )
    transaction = await _transaction_of(session, connection, place_of_ledger)
    parent = current_run_if_any()
    by, parent_id = (f"task {parent.task}", parent.id) if parent else (None, None)
    new, follow_up = enqueue.planned(starts, transaction.now, by, parent_id)
    merging = starts.runs[0].merging if starts.runs else None
    # The caller would hold the row of the key until the commit, and keep other starts waiting.
    if transaction.is_ledger and merging is None:
        unknown = [task for task in starts.tasks if task.name not in transaction.known]
        if unknown:
            await enqueue.refuse_unknown(connection, unknown)
            transaction.known.update(task.name for task in unknown)
        await enqueue.refuse_too_many(connection, starts)
        return await enqueue.insert(connection, new, follow_up)
    rows = [stored(run, follow_up, merging) for run in (*([follow_up] if follow_up else []), *new)]
    await connection.execute(_INSERT, rows)
    return StartedRun(rows[0]["id"], "pending")


async def _transaction_of(
    session: Session,
    connection: AsyncConnection,
    place_of_ledger: Callable[[], Awaitable[_Place | None]],
) -> _Transaction:
    """What is known about the session's transaction. Its first start looks at the database."""
    if (known := _known(session)) is not None:
        return known
    root = session.get_transaction()
    assert root is not None
    kind = connection.dialect.name
    if kind not in _LOOK:
        raise InvalidParameters(
            f"start(): the session is on a database of the kind {kind}; allowed: SQLite and "
            "PostgreSQL"
        )
    if _is_autocommit(connection):
        raise InvalidParameters(
            "start(): the session commits each statement by itself (AUTOCOMMIT), so the run could "
            "not depend on its commit; leave session= out, or give a session with transactions"
        )
    row = (await connection.execute(_LOOK[kind])).one()
    if row.only_reads:
        raise InvalidParameters(
            "start(): the session only reads, as one of get_db(readonly=True) does; give a session "
            "that may write"
        )
    is_ledger = row.runs is not None and await _is_of_ledger(
        _Place(row.server, row.name, row.runs), place_of_ledger
    )
    if not is_ledger and not row.has_starts:
        raise InvalidParameters(
            "start(): the session's database has no table batch_starts. A service makes it in the "
            "database that its DATABASE_URL names: give a session on that database, or leave "
            "session= out"
        )
    now = await database_time.now_of(connection) if is_ledger else clock.now()
    if KEY not in session.info:
        event.listen(session, "after_transaction_end", _at_end)
    session.info[KEY] = transaction = _Transaction(root, connection, is_ledger, now, _loop())
    return transaction


def _known(session: Session) -> _Transaction | None:
    """What is known about the transaction of a session, if it can still be used."""
    found: _Transaction | None = session.info.get(KEY)
    is_its = found is not None and found.root is session.get_transaction() and session.is_active
    return found if is_its else None


def _is_autocommit(connection: AsyncConnection) -> bool:
    levels = (
        connection.sync_connection.get_execution_options().get("isolation_level")
        if connection.sync_connection is not None
        else None,
        getattr(connection.dialect, "_on_connect_isolation_level", None),
    )
    return "AUTOCOMMIT" in levels


async def _is_of_ledger(
    place: _Place, place_of_ledger: Callable[[], Awaitable[_Place | None]]
) -> bool:
    """Whether this table of runs is that of the ledger, which is asked once for each place.

    A database may have another one: it was a ledger before, or was restored from one.
    """
    known = (enqueue.ledger_url(_loop()), place)
    if known not in _is_ledger:
        if len(_is_ledger) >= MOST_PLACES:
            _is_ledger.clear()
        _is_ledger[known] = await place_of_ledger() == place
    return _is_ledger[known]


async def _place_of_ledger() -> _Place | None:
    database = enqueue.ledger()
    if database.kind != "postgresql":
        return None
    try:
        async with database.reader.connect() as connection:
            row = (await connection.execute(_LOOK["postgresql"])).one()
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    return _Place(row.server, row.name, row.runs) if row.runs is not None else None


def _at_end(session: Session, ended: SessionTransaction) -> None:
    """Wake this process's service when the transaction has ended. After a rollback it finds
    nothing.
    """
    transaction: _Transaction | None = session.info.get(KEY)
    if transaction is None or transaction.root is not ended:
        return
    session.info[KEY] = None
    if (loop := transaction.loop) is not None and not loop.is_closed():
        wake = enqueue.wake_of(loop) if transaction.is_ledger else _handover_wakes.get(loop)
        if wake is not None:
            loop.call_soon_threadsafe(wake)


def _loop() -> asyncio.AbstractEventLoop | None:
    """The event loop of the service, if this code runs on it, or in a thread of one of its runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return home_loop.get()


class _AtOnce:
    """A synchronous connection with the methods of an AsyncConnection that inserts use. None of
    them ever suspends its caller.
    """

    def __init__(self, connection: Connection) -> None:
        self.sync_connection = connection
        self.dialect = connection.dialect

    async def execute(self, *statement: Any) -> Any:
        return self.sync_connection.execute(*statement)


def _run(work: Awaitable[T]) -> T:
    """The result of a coroutine that never suspends."""
    try:
        work.__await__().send(None)
    except StopIteration as ended:
        return cast(T, ended.value)
    raise AssertionError("it has suspended")


def _wait_for(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Wait for a coroutine in synchronous code, which may be that of `call_db()`."""
    if in_greenlet():
        return await_only(work())
    try:
        return call_async(work())
    except BatchError:
        asyncio.get_running_loop()  # raises RuntimeError if the error is not about this
        raise InvalidParameters(
            "start_sync() would block the event loop here: use await start(…, session=…)"
        ) from None
