"""The ledger poll: one statement by which an idle node reads everything that may concern it.

It reads whether runs can start, which nodes exist, which of its own runs it should stop, and
whether schedules or tasks have changed. The thread of the heartbeat executes the statement, so a
blocked event loop does not delay it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache, reduce
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Interval,
    Select,
    String,
    bindparam,
    case,
    cast,
    func,
    literal,
    null,
    or_,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.duties import WATCH, duties
from batch_system.batch.ledger.incidents import notices
from batch_system.batch.ledger.incidents.tables import UNSENT_SQL
from batch_system.batch.ledger.nodes import NodeStatus
from batch_system.batch.ledger.tables import HELD_SQL, WAITING_SQL, catalog, nodes, runs, tasks
from batch_system.batch.nodes.roles import SERVICE, Roles
from batch_system.batch.queue.cancel import StopRequest
from batch_system.batch.queue.claiming import is_any_due
from batch_system.database import sql

LOOK_SECONDS = 1.0
"""The most seconds between two polls, and so the longest time until a dead node or a cancel request
is noticed.
"""

SOON = timedelta(seconds=2 * LOOK_SECONDS)
"""Waiting runs that open within this time are known, so that they open on time."""

CLAIMABLE, UNNOTICED, ACTIVE, UNSENT, WAITING = "c", "u", "a", "s", "w"

FiringState = tuple[int, frozenset[str]]
"""The version of the catalog, and the ids of the other nodes that fire."""

_NEXT_HOLDER = (
    f"SELECT r.node FROM batch_runs r WHERE {HELD_SQL} AND r.node {{}} ORDER BY r.node LIMIT 1"
)
HOLDERS = (
    f"WITH RECURSIVE h(node) AS (SELECT * FROM ({_NEXT_HOLDER.format('IS NOT NULL')}) AS least "
    "UNION ALL "
    f"SELECT ({_NEXT_HOLDER.format('> h.node')}) FROM h WHERE h.node IS NOT NULL) "
    "SELECT h.node FROM h WHERE h.node IS NOT NULL"
)
"""The ids of the nodes that hold runs. Reads one index entry for each node, not one for each
run.
"""

_IS_ANY_HELD_SQL = f"EXISTS (SELECT 1 FROM batch_runs r WHERE {HELD_SQL} AND r.node IS NOT NULL)"


@dataclass
class LedgerChanges:
    """The result of one poll. `now`: the database time. A node that does not fire reads only the
    requests.

    `is_unnoticed`: there is something that the watch has to notice. `is_active`: a run is running,
    or due in any pool. `is_unsent`: a message has to be sent. `is_waiting`: the instant of a
    waiting run has passed, or does within SOON. `watcher`: the id of the node with the duty of the
    watch. `asked_at`, `read_at`: the boot times before and after the poll.
    """

    now: datetime
    is_claimable: bool
    catalog: int
    """The version of the catalog. It rises when a schedule or a task changes, and with a pause or a
    resume.
    """
    others: list[NodeStatus] = field(default_factory=list)
    """The other nodes that are not marked as stopped, and the stopped ones that still hold runs."""
    requests: list[StopRequest] = field(default_factory=list)
    """Requests to stop runs that this node is running."""
    is_unnoticed: bool = False
    is_active: bool = False
    is_waiting: bool = False
    is_unsent: bool = False
    watcher: str | None = None
    asked_at: float = field(default_factory=clock.boottime)
    read_at: float = field(default_factory=clock.boottime)

    @property
    def firing_state(self) -> FiringState:
        """When this has changed since the last poll, the node reads tasks and schedules again."""
        return self.catalog, frozenset(
            node.id for node in self.others if node.fires and not node.is_stopped
        )


async def read(connection: AsyncConnection, node: str, roles: Roles = SERVICE) -> LedgerChanges:
    """Poll the ledger for this node, by one statement that locks nothing."""
    asked_at, now = clock.boottime(), database_time.process_now(connection)
    parameters: dict[str, Any] = {"node": node}
    if now is not None:
        parameters |= {"now": now, "soon": now + SOON}
    statement = _statement(connection.dialect.name, now is not None, roles)
    ledger_row, *other_rows = (await connection.execute(statement, parameters)).all()
    flags = ledger_row.words or ""
    changes = LedgerChanges(
        ledger_row.at,
        CLAIMABLE in flags,
        ledger_row.number,
        is_unnoticed=UNNOTICED in flags,
        is_active=ACTIVE in flags,
        is_waiting=WAITING in flags,
        is_unsent=UNSENT in flags,
        watcher=ledger_row.id,
        asked_at=asked_at,
    )
    for row in other_rows:
        if row.kind == "living":
            changes.others += _status_of_each(row.words or "")
        elif row.kind == "stopped":
            changes.others.append(NodeStatus(row.id, row.number, True))
        else:
            changes.requests.append(StopRequest(row.id, row.number, row.words, row.kind == "pause"))
    return changes


@cache
def _statement(kind: str, has_now: bool, roles: Roles) -> CompoundSelect[Any]:
    """The statement. All its rows have the same columns; the first row is about the whole ledger.

    It is cached, because building it takes as long as executing it. `has_now`: the time is passed
    as a parameter.
    """
    instant = nodes.c.stopped_at.type
    now = bindparam("now", type_=instant) if has_now else func.statement_timestamp(type_=instant)
    soon = bindparam("soon", type_=instant) if has_now else now + literal(SOON, Interval())
    node = bindparam("node", type_=nodes.c.id.type)
    version = func.coalesce(select(catalog.c.version).where(catalog.c.id == 1).scalar_subquery(), 0)
    flags: list[tuple[str, Any]] = (
        [(CLAIMABLE, is_any_due(now, roles.pools))] if roles.pools else []
    )
    if roles.fires:
        flags += [
            (UNNOTICED, text(notices.IS_ANY_SQL)),
            (UNSENT, text(f"EXISTS (SELECT 1 FROM batch_outbox WHERE {UNSENT_SQL})")),
            (WAITING, select(runs.c.id).where(text(WAITING_SQL), runs.c.due_at <= soon).exists()),
            (ACTIVE, or_(is_any_due(now), text(_IS_ANY_HELD_SQL))),
        ]
    words = [case((condition, flag), else_="") for flag, condition in flags]
    watcher = select(duties.c.node).where(duties.c.name == WATCH).scalar_subquery()
    ledger = select(
        literal("ledger").label("kind"),
        (watcher if roles.fires else _null(nodes.c.id)).label("id"),
        version.label("number"),
        (reduce(operator.add, words) if words else _null(tasks.c.name)).label("words"),
        now.label("at"),
    )
    requests = select(
        literal("request"), runs.c.id, runs.c.fence, runs.c.cancel_reason, _null(nodes.c.stopped_at)
    ).where(runs.c.cancel_reason.is_not(None), text(HELD_SQL), runs.c.node == node)
    held = (
        select(
            literal("pause"),
            runs.c.id,
            runs.c.fence,
            "paused by " + tasks.c.paused_by,
            _null(nodes.c.stopped_at),
        )
        .select_from(runs.join(tasks, tasks.c.name == runs.c.task))
        .where(tasks.c.paused_at >= runs.c.created_at, text(HELD_SQL), runs.c.node == node)
    )
    others = [_living(node), _stopped_holders(node, kind)] if roles.fires else []
    return ledger.union_all(requests, held, *others)


def _living(node: ColumnElement[str]) -> Select[Any]:
    """The other nodes that are not marked as stopped, all in one row, because a hundred rows would
    take longer to read.
    """
    fires = case((nodes.c.fires, ":1:"), else_=":0:")
    lag = cast(nodes.c.loop_lag, String)
    statuses = func.aggregate_strings(
        cast(nodes.c.id, String) + ":" + cast(nodes.c.beats, String) + fires + lag, " "
    )
    is_living = (nodes.c.stopped_at.is_(None), nodes.c.id != node)
    return select(
        literal("living"), _null(nodes.c.id), literal(0), statuses, _null(nodes.c.stopped_at)
    ).where(*is_living)


def _status_of_each(listed: str) -> Iterator[NodeStatus]:
    """`listed`: "id:beats:fires:loop_lag" of each node, separated by spaces."""
    for fields in listed.split():
        node, beats, fires, lag = fields.split(":")
        yield NodeStatus(node, int(beats), False, fires == "1", float(lag))


def _stopped_holders(node: ColumnElement[str], kind: str) -> Select[Any]:
    """The other nodes that are marked as stopped and still hold runs."""
    holds = text(sql.among("batch_nodes.id", HOLDERS, kind))
    is_stopped = (nodes.c.stopped_at.is_not(None), nodes.c.id != node)
    return select(
        literal("stopped"), nodes.c.id, nodes.c.beats, _null(tasks.c.name), nodes.c.stopped_at
    ).where(holds, *is_stopped)


def _null(like: ColumnElement[Any]) -> ColumnElement[Any]:
    """NULL with the type of the column `like`."""
    return cast(null(), like.type)
