"""The fence in the application database: a run may commit there only with its newest fence.

Listeners of the engine check it. Each commit of a run first executes one statement in the same
transaction, which raises an error in an attempt with an older fence, and in one that was given up.
Nothing is checked outside runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from typing import Any

from sqlalchemy import BigInteger, TextClause, bindparam, event, select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from batch_system import clock
from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.context.current_run import current_run_if_any, state_of
from batch_system.batch.ledger import nodes
from batch_system.batch.ledger.tables import attempts
from batch_system.batch.ledger.tables import nodes as nodes_table
from batch_system.database import troubles
from batch_system.database.companions import checkpoints
from batch_system.database.engine import Database
from batch_system.database.session import application_database
from batch_system.errors import DatabaseBusy, LeaseLost
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

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
NEWEST_FENCE = select(checkpoints.c.fence).where(
    checkpoints.c.run == bindparam("run", type_=checkpoints.c.run.type),
    checkpoints.c.name == OWN_ROW,
)
AWAY_SECONDS = 1.0
WAITS = "waits for the application's database"
"""The progress message of a run that waits for the fence."""


def guard(database: Database, idle_seconds: float) -> None:
    """Check the fence at each commit of a run to this application database.

    On PostgreSQL the server ends a transaction of a run that is idle for `idle_seconds`, so that a
    process that was stopped inside it does not keep its row locks any longer.
    """
    if database.kind not in KINDS:
        logger.warning(
            f"runs are not fenced on {database.kind} ({database.setting}): a process that was "
            "taken for dead and goes on may commit there. Only SQLite and PostgreSQL are "
            "supported by the fence"
        )
    database.before_begin(functools.partial(_at_begin, round(idle_seconds * 1000)))
    event.listen(database.engine.sync_engine, "commit", _at_commit)


async def take_over(ledger: Database, state: AttemptState) -> None:
    """Raise the fence at the beginning of any attempt but the first of its run, so that older
    attempts can't commit any more.

    Call it inside the run. On PostgreSQL, the connections of nodes that have lost this run are
    ended first, because they may hold locks. The SQLite lock of a stopped process can't be removed,
    so this waits for it. It also waits while the server can't be reached, which is no reason for a
    resumed run to fail. The run's progress says that it waits. Raises LeaseLost.
    """
    application, away_since, is_waiting = application_database(), None, False
    while application.kind in KINDS:
        try:
            if application.kind == "postgresql":
                await _end_connections_of_lost_nodes(application, ledger, state)
            async with application.engine.begin():
                pass  # its commit raises the fence
            if away_since is not None:
                seconds = max(1, round(clock.boottime() - away_since))
                logger.info(
                    f"{state.task}: the application's database is reachable again after {seconds} s"
                )
            if is_waiting:
                state.meter.report(None, None, "")
            return
        except DatabaseBusy as error:
            is_waiting = _tell_waiting(state)
            logger.warning(f"{state.task} waits to take over run {state.run}: {error}")
        except (DBAPIError, OSError) as error:
            if not troubles.is_unreachable(error):
                raise
            if away_since is None:
                is_waiting = _tell_waiting(state)
                away_since = clock.boottime()
                logger.warning(
                    f"{state.task} waits to take over run {state.run}: {application.why(error)}"
                )
            await asyncio.sleep(AWAY_SECONDS)


def _tell_waiting(state: AttemptState) -> bool:
    state.meter.report(None, None, WAITS)
    return True


def seal(state: AttemptState) -> None:
    """Prevent this attempt from committing anything more in this process, and close the connections
    of its transactions.

    The database then rolls these transactions back; on SQLite the write lock is free after that.
    """
    state.is_sealed = True
    running_loop = asyncio.get_running_loop()
    # A copy, because a thread of the run may begin a transaction meanwhile.
    for reference in state.transactions.keyrefs():
        connection = reference()
        if connection is None:
            continue
        loop = state.transactions[connection]
        if loop is running_loop:
            _cut_off(connection)
        else:  # a thread of the run has an event loop of its own
            with contextlib.suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(_cut_off, connection)


async def _end_connections_of_lost_nodes(
    application: Database, ledger: Database, state: AttemptState
) -> None:
    """End the lost nodes' connections to the application's server, which may not be that of the
    ledger. The rescue has ended the connections to the latter.
    """
    lost = select(attempts.c.node).where(attempts.c.run == state.run, attempts.c.outcome == "lost")
    stopped = select(nodes_table.c.id).where(
        nodes_table.c.id.in_(lost), nodes_table.c.stopped_at.is_not(None)
    )
    async with ledger.reader.connect() as connection:
        node_ids = (await connection.execute(stopped)).scalars().all()
    if node_ids:
        async with application.reader.connect() as connection:
            await nodes.end_connections(connection, node_ids)


def check_with(
    connection: Connection, state: AttemptState, statement: TextClause, values: dict[str, Any]
) -> bool:
    """Check the fence with a statement that also writes another row, so that the commit needs no
    further statement.

    `statement` writes the fence row as CHECK_FENCE does, and one other row. Its parameters are
    `run`, `fence`, `at` and those in `values`. Returns False if the other row was not written; the
    transaction must not be committed then. Raises LeaseLost.
    """
    _refuse_lost(state)
    written = _execute(connection, state, statement, values)
    if written == 2:
        state.checked.add(connection.get_transaction())
    elif written == 0 or _has_newer_holder(connection, state):
        raise _newer_holder(state)
    return written == 2


def _at_begin(idle_ms: int, connection: Connection) -> None:
    run = current_run_if_any()
    first_statement = None
    if run is not None and not _is_autocommit(connection):
        state = state_of(run)
        state.transactions[connection] = asyncio.get_running_loop()
        if not _is_read_only(connection):
            _refuse_lost(state)
            if state.is_fenced:
                first_statement = f"SET LOCAL idle_in_transaction_session_timeout = {idle_ms}"
    # Also set if it is None, because a run may have used the connection before.
    if connection.dialect.driver == "asyncpg":
        driver: Any = connection.connection.driver_connection
        driver.first_statement = first_statement
    elif first_statement is not None and connection.dialect.name == "postgresql":
        connection.exec_driver_sql(first_statement)


def _at_commit(connection: Connection) -> None:
    run = current_run_if_any()
    if run is None or _is_autocommit(connection) or _is_read_only(connection):
        return
    state = state_of(run)
    try:
        _refuse_lost(state)
        if (
            state.is_fenced
            and connection.dialect.name in KINDS
            and connection.get_transaction() not in state.checked
        ):
            if _execute(connection, state, CHECK_FENCE, {}) != 1:
                raise _newer_holder(state)
            # Check again: the statement may have waited, or the process may have been stopped
            # meanwhile.
            _refuse_lost(state)
    except BaseException:
        _roll_back(connection)
        raise


def _is_read_only(connection: Connection) -> bool:
    """Whether the transaction only reads. Its commit needs no fence.

    Its connection is kept in `transactions` nevertheless, because PostgreSQL can't remove old rows
    while it is open.
    """
    return bool(connection.get_execution_options().get("postgresql_readonly"))


def _is_autocommit(connection: Connection) -> bool:
    """Whether each statement commits by itself. A fence at the commit would come too late then."""
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def _refuse_lost(state: AttemptState) -> None:
    """Raises LeaseLost if the attempt is sealed, or the node's lease has ended by the clock.

    The heartbeat may not have noticed the end of the lease yet.
    """
    if state.is_sealed:
        state.on_refused()
        raise LeaseLost(
            f"{state.task}: this attempt of run {state.run} has ended or was given up, and can't "
            "write any more"
        )
    state.is_lost = state.is_lost or (state.is_fenced and not state.holds_lease())
    if state.is_lost:
        state.on_refused()
        raise LeaseLost(
            f"{state.task}: the lease of this node has ended, so another one may hold run "
            f"{state.run} by now, and this attempt can't write any more; nothing of this "
            "transaction is committed"
        )


def _execute(
    connection: Connection, state: AttemptState, statement: TextClause, values: dict[str, Any]
) -> int:
    """Execute a fence statement. Returns how many rows it has written, 0 if there is a newer
    holder.

    It uses no RETURNING, which would take half as long again on SQLite.
    """
    values = {"run": state.run, "fence": state.fence, "at": clock.now(), **values}
    try:
        return connection.execute(statement, values).rowcount
    except DBAPIError as error:
        if troubles.sqlstate_of(error) != troubles.SERIALIZATION_FAILURE or not _has_newer_holder(
            connection, state
        ):
            raise
        return 0


def _newer_holder(state: AttemptState) -> LeaseLost:
    state.on_refused()
    return LeaseLost(
        f"{state.task}: another node holds run {state.run} now, so this older attempt (fence "
        f"{state.fence}) can't write any more; nothing of this transaction is committed"
    )


def _has_newer_holder(connection: Connection, state: AttemptState) -> bool:
    """Whether the run has a newer fence. Rolls back first, because the old snapshot may not show
    the newer fence.
    """
    _roll_back(connection)
    newest = connection.execute(NEWEST_FENCE, {"run": state.run}).scalar()
    return newest is not None and newest > state.fence


def _roll_back(connection: Connection) -> None:
    """Roll back on the connection of the driver.

    SQLAlchemy considers a commit that has raised as done. Without this, the transaction would stay
    open in the pool, and the next commit on that connection would commit it, too.
    """
    if connection.invalidated:
        return
    try:
        connection.dialect.do_rollback(connection.connection)
    except BaseException:
        connection.invalidate()
        raise


def _cut_off(connection: Connection) -> None:
    """Close a connection, even if its transaction is only about to begin: it may be waiting for the
    write lock.
    """
    if not connection.closed and not connection.invalidated:
        connection.invalidate()
