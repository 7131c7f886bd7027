"""All that an idle node asks the ledger, in one statement.

It asks whether runs may start, which nodes there are, which runs it is asked to stop, and whether schedules or tasks
have changed. The heartbeat's thread executes the statement, so that a blocked event loop delays only what has to be
done on that loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Select,
    String,
    bindparam,
    case,
    cast,
    func,
    literal,
    null,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time, queues
from service.batch.ledger.nodes import NodeStatus
from service.batch.ledger.tables import HELD_SQL, catalog, nodes, runs, tasks
from service.batch.queue.cancel import StopRequest
from service.batch.queue.claiming import is_any_due

LOOK_SECONDS = 1.0
"""How often a node reads the ledger, at least. So it notices a dead node or a cancel request at most so much later."""

State = tuple[int, frozenset[str]]

_NEXT_HOLDER = f"SELECT r.node FROM batch_runs r WHERE {HELD_SQL} AND r.node {{}} ORDER BY r.node LIMIT 1"
HOLDERS = (
    f"WITH RECURSIVE h(node) AS (SELECT * FROM ({_NEXT_HOLDER.format('IS NOT NULL')}) AS least UNION ALL "
    f"SELECT ({_NEXT_HOLDER.format('> h.node')}) FROM h WHERE h.node IS NOT NULL) "
    "SELECT h.node FROM h WHERE h.node IS NOT NULL"
)
"""The nodes that hold runs, however many these are: from one to the next, in the index."""


@dataclass
class LedgerChanges:
    """What a node has read. `now` is the ledger's time. A node that does not fire reads only the requests."""

    now: datetime
    is_claimable: bool
    catalog: int
    """Rises once a schedule was opened or closed, or a task paused, resumed, removed or restored."""
    others: list[NodeStatus] = field(default_factory=list)
    """The other nodes that are not marked as stopped, and the stopped ones that still hold runs."""
    requests: list[StopRequest] = field(default_factory=list)
    """About runs that this node is running."""

    @property
    def state(self) -> State:
        """What it depends on which tasks are fired, and when: the catalog, and who else fires."""
        return self.catalog, frozenset(node.id for node in self.others if node.fires and not node.is_stopped)


async def read(connection: AsyncConnection, node: str, fires: bool = True) -> LedgerChanges:
    """Read what concerns this node, by one statement, which locks nothing."""
    now = database_time.told_now(connection)
    parameters = {"node": node} | ({"now": now} if now is not None else {})
    statement = _statement(connection.dialect.name, now is not None, fires)
    first, *found = (await connection.execute(statement, parameters)).all()
    changes = LedgerChanges(first.at, first.words is not None, first.number)
    for row in found:
        if row.kind == "living":
            changes.others += _status_of_each(row.words or "")
        elif row.kind == "stopped":
            changes.others.append(NodeStatus(row.id, row.number, True))
        else:
            changes.requests.append(StopRequest(row.id, row.number, row.words, row.kind == "pause"))
    return changes


@cache
def _statement(kind: str, is_told_the_time: bool, fires: bool) -> CompoundSelect[Any]:
    """Rows of one shape, the first of which is about the whole ledger. Putting it together takes as long as asking."""
    instant = nodes.c.stopped_at.type
    now = bindparam("now", type_=instant) if is_told_the_time else func.statement_timestamp(type_=instant)
    node = bindparam("node", type_=nodes.c.id.type)
    version = func.coalesce(select(catalog.c.version).where(catalog.c.id == 1).scalar_subquery(), 0)
    ledger = select(
        literal("ledger").label("kind"),
        _none(nodes.c.id).label("id"),
        version.label("number"),
        case((is_any_due(now), "claimable")).label("words") if fires else _none(tasks.c.name).label("words"),
        now.label("at"),
    )
    requests = select(
        literal("request"), runs.c.id, runs.c.fence, runs.c.cancel_reason, _none(nodes.c.stopped_at)
    ).where(runs.c.cancel_reason.is_not(None), text(HELD_SQL), runs.c.node == node)
    held = (
        select(literal("pause"), runs.c.id, runs.c.fence, "paused by " + tasks.c.paused_by, _none(nodes.c.stopped_at))
        .select_from(runs.join(tasks, tasks.c.name == runs.c.task))
        .where(tasks.c.paused_at >= runs.c.created_at, text(HELD_SQL), runs.c.node == node)
    )
    others = [_living(node), _holding(node, kind)] if fires else []
    return ledger.union_all(requests, held, *others)


def _living(node: ColumnElement[str]) -> Select[Any]:
    """All in one row: one for each would take longer than all else, where there are a hundred."""
    fires = case((nodes.c.fires, ":1"), else_=":0")
    listed = func.aggregate_strings(cast(nodes.c.id, String) + ":" + cast(nodes.c.beats, String) + fires, " ")
    alive = (nodes.c.stopped_at.is_(None), nodes.c.id != node)
    return select(literal("living"), _none(nodes.c.id), literal(0), listed, _none(nodes.c.stopped_at)).where(*alive)


def _status_of_each(listed: str) -> Iterator[NodeStatus]:
    for one in listed.split():
        node, beats, fires = one.split(":")
        yield NodeStatus(node, int(beats), False, fires == "1")


def _holding(node: ColumnElement[str], kind: str) -> Select[Any]:
    """Those that are marked as stopped, and hold runs. Of all that hold some there is one look for each node."""
    holds = text(queues.among("batch_nodes.id", HOLDERS, kind))
    stopped = (nodes.c.stopped_at.is_not(None), nodes.c.id != node)
    return select(literal("stopped"), nodes.c.id, nodes.c.beats, _none(tasks.c.name), nodes.c.stopped_at).where(
        holds, *stopped
    )


def _none(like: ColumnElement[Any]) -> ColumnElement[Any]:
    return cast(null(), like.type)
