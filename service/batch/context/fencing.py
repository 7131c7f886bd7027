"""The fence in the application's own database: what a run commits there needs the run's newest fence.

It hangs on the engine's events. Each root commit of a run first executes one statement in its own transaction; a run's
older holder, and an attempt that was given up, are refused there. Outside of runs nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import Any

from sqlalchemy import BigInteger, TextClause, bindparam, event, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from service import clock
from service.batch.context.attempt_state import AttemptState
from service.batch.context.current_run import current_run_if_any, state_of
from service.batch.ledger import nodes
from service.batch.ledger.tables import attempts
from service.batch.ledger.tables import nodes as nodes_table
from service.database import troubles
from service.database.companions import checkpoints
from service.database.engine import Database
from service.database.session import application_database
from service.errors import DatabaseBusy, LeaseLost
from service.logs import get_logger

logger = get_logger("service.batch")

KINDS = ("sqlite", "postgresql")
OWN_ROW = ""
"""The `name` of a run's fence row in batch_checkpoints."""

CHECK_FENCE = text(
    "INSERT INTO batch_checkpoints (run, name, fence, at) VALUES (:run, :name, :fence, :at) "
    "ON CONFLICT (run, name) DO UPDATE SET fence = excluded.fence, at = excluded.at "
    "WHERE batch_checkpoints.fence <= excluded.fence"
).bindparams(
    bindparam("run", type_=checkpoints.c.run.type),
    bindparam("name", OWN_ROW, type_=checkpoints.c.name.type),
    bindparam("fence", type_=BigInteger()),
    bindparam("at", type_=checkpoints.c.at.type),
)
NEWEST = select(checkpoints.c.fence).where(
    checkpoints.c.run == bindparam("run", type_=checkpoints.c.run.type), checkpoints.c.name == OWN_ROW
)
AWAY_SECONDS = 1.0


def guard(database: Database, idle_seconds: float) -> None:
    """Fence what runs commit to this database: the application's.

    On PostgreSQL a run's transaction that is idle for `idle_seconds` is ended by the server: a process that was
    stopped within one keeps its row locks for no longer.
    """
    if database.kind not in KINDS:
        logger.warning(
            f"runs are not fenced on {database.kind} ({database.setting}): a process that was taken for lost "
            "and goes on may commit there. SQLite and PostgreSQL have the fence"
        )
    engine = database.engine.sync_engine
    event.listen(engine, "begin", functools.partial(_at_begin, round(idle_seconds * 1000)), insert=True)
    event.listen(engine, "commit", _at_commit)


async def take_over(ledger: Database, state: AttemptState) -> None:
    """Raise the fence, before an attempt that is not the first of its run: from here on no older one can commit.

    Call it inside the run. On PostgreSQL the connections of the nodes that lost this run are ended first: they may hold
    locks. SQLite's lock can't be taken from a process that is only stopped, so this waits for it; and for a server that
    is away, since a run that is only resumed has not failed by that. Raises LeaseLost.
    """
    application, is_told = application_database(), False
    while application.kind in KINDS:
        try:
            if application.kind == "postgresql":
                await _evict_lost(application, ledger, state)
            async with application.engine.begin():
                return  # its commit raises the fence
        except DatabaseBusy as error:
            logger.warning(f"{state.task} waits to take over run {state.run}: {error}")
        except (DBAPIError, OSError) as error:
            if not troubles.is_unreachable(error):
                raise
            if not is_told:
                logger.warning(f"{state.task} waits to take over run {state.run}: {application.why(error)}")
            is_told = True
            await asyncio.sleep(AWAY_SECONDS)


def seal(state: AttemptState) -> None:
    """From now on nothing of this attempt commits in this process, and what it has open is cut off.

    Its connections are closed under it, so the database rolls back; on SQLite the write lock is free then.
    """
    state.is_sealed = True
    here = asyncio.get_running_loop()
    for reference in state.transactions.keyrefs():  # in one step: a thread of the run may begin one meanwhile
        connection = reference()
        if connection is None:
            continue
        loop = state.transactions[connection]
        if loop is here:
            _cut(connection)
        else:  # a thread of the run has a loop of its own
            with contextlib.suppress(RuntimeError):  # that one is closed
                loop.call_soon_threadsafe(_cut, connection)


async def _evict_lost(application: Database, ledger: Database, state: AttemptState) -> None:
    """The rescuer has done so on the ledger's server, which may be another one."""
    lost = select(attempts.c.node).where(attempts.c.run == state.run, attempts.c.outcome == "lost")
    still = select(nodes_table.c.id).where(nodes_table.c.id.in_(lost), nodes_table.c.stopped_at.is_not(None))
    async with ledger.reader.connect() as connection:
        gone = (await connection.execute(still)).scalars().all()
    if gone:
        async with application.reader.connect() as connection:
            await nodes.end_connections(connection, gone)


def pass_with(connection: Connection, state: AttemptState, statement: TextClause, values: dict[str, Any]) -> bool:
    """Check the fence by a statement that writes one row more, so that the commit needs no statement of its own.

    The statement writes the row of the fence as CHECK_FENCE does. Its parameters are `run`, `fence`, `at` and `values`.
    False when it did not write the other row: then nothing may be committed. Raises LeaseLost.
    """
    _refuse_lost(state)
    written = _execute(connection, state, statement, values)
    if written == 2:
        state.passed.add(connection.get_transaction())
    elif written == 0 or _has_newer_holder(connection, state):
        raise _newer_holder(state)
    return written == 2


def _at_begin(idle_ms: int, connection: Connection) -> None:
    run = current_run_if_any()
    if run is None or _is_autocommit(connection):
        return
    state = state_of(run)
    state.transactions[connection] = asyncio.get_running_loop()
    if _is_read_only(connection):
        return
    _refuse_lost(state)
    if state.is_fenced and connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {idle_ms}")


def _at_commit(connection: Connection) -> None:
    run = current_run_if_any()
    if run is None or _is_autocommit(connection) or _is_read_only(connection):
        return
    state = state_of(run)
    try:
        _refuse_lost(state)
        if state.is_fenced and connection.dialect.name in KINDS and connection.get_transaction() not in state.passed:
            if _execute(connection, state, CHECK_FENCE, {}) != 1:
                raise _newer_holder(state)
            _refuse_lost(state)  # once more: the statement may have waited, or the process been stopped within it
    except BaseException:
        _roll_back(connection)
        raise


def _is_read_only(connection: Connection) -> bool:
    """Its commit needs no fence, but while it is open it keeps PostgreSQL from removing old rows."""
    return bool(connection.get_execution_options().get("postgresql_readonly"))


def _is_autocommit(connection: Connection) -> bool:
    """Nothing is left to be refused when it comes to the commit."""
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def _refuse_lost(state: AttemptState) -> None:
    """By what this process knows itself. Its lease ends on the clock, so also where nobody has noticed that yet."""
    if state.is_sealed:
        raise LeaseLost(
            f"{state.task}: this attempt of run {state.run} has ended or was given up, and can't write any more"
        )
    state.is_lost = state.is_lost or (state.is_fenced and not state.holds_lease())
    if state.is_lost:
        raise LeaseLost(
            f"{state.task}: the lease of this node is over, so another one may hold run {state.run} by now, and this "
            "attempt can't write any more; nothing of this transaction is committed"
        )


def _execute(connection: Connection, state: AttemptState, statement: TextClause, values: dict[str, Any]) -> int:
    """How many rows a fence statement wrote. (RETURNING would take half as long again on SQLite.)"""
    values = {"run": state.run, "fence": state.fence, "at": clock.now(), **values}
    try:
        return connection.execute(statement, values).rowcount
    except DBAPIError as error:
        if troubles.sqlstate_of(error) != troubles.SERIALIZATION_FAILURE or not _has_newer_holder(connection, state):
            raise
        return 0


def _newer_holder(state: AttemptState) -> LeaseLost:
    return LeaseLost(
        f"{state.task}: another node holds run {state.run} now, so this older attempt (fence {state.fence}) "
        "can't write any more; nothing of this transaction is committed"
    )


def _has_newer_holder(connection: Connection, state: AttemptState) -> bool:
    """As a new transaction sees it: the old one's snapshot may be from before the fence was raised."""
    _roll_back(connection)
    newest = connection.execute(NEWEST, {"run": state.run}).scalar()
    return newest is not None and newest > state.fence


def _roll_back(connection: Connection) -> None:
    """On the driver's connection. SQLAlchemy takes a commit that raised for done: without this the transaction would
    stay open in the pool, and the next user's commit would be its too."""
    if connection.invalidated:
        return
    try:
        connection.dialect.do_rollback(connection.connection)
    except BaseException:
        connection.invalidate()
        raise


def _cut(connection: Connection) -> None:
    if not connection.closed and not connection.invalidated and connection.in_transaction():
        connection.invalidate()
