"""News: all that an idle node asks the ledger, in one statement.

What may start, which nodes there are, what this one is asked to cancel, whether schedules or tasks have changed. The
heartbeat's thread reads it, so that nothing of it waits for a blocked event loop but what has to be done there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
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

from service.batch import slots
from service.batch.cancel import Asked
from service.batch.claims import is_any_due
from service.batch.nodes import Seen
from service.batch.states import RunState
from service.batch.tables import ACTIVE_SQL, nodes, runs, schedules, tasks

LOOK_SECONDS = 1.0
"""How often a node looks, at least: so much later than it could it sees a death, or hears of a cancel."""

State = tuple[str, frozenset[str]]


@dataclass
class News:
    """What one look has found. `now` is the ledger's time."""

    now: datetime
    is_claimable: bool
    catalog: str
    """Differs once a schedule was opened or closed, or a task paused, resumed, removed or restored."""
    others: list[Seen] = field(default_factory=list)
    """The other nodes that are not marked as stopped, and those that are but hold runs all the same."""
    requests: list[Asked] = field(default_factory=list)
    """What this node is asked to cancel or to pause, and runs yet."""

    @property
    def state(self) -> State:
        """What it depends on which tasks are fired, and when: the catalog, and who else lives."""
        return self.catalog, frozenset(node.id for node in self.others if not node.is_stopped)


async def read(connection: AsyncConnection, node: str) -> News:
    """What there is for this node. One statement, which locks nothing."""
    now = slots.told_now(connection)
    parameters = {"node": node} | ({"now": now} if now is not None else {})
    first, *found = (await connection.execute(_statement(now is not None), parameters)).all()
    news = News(first.at, bool(first.number), first.words)
    for row in found:
        if row.kind == "node":
            news.others.append(Seen(row.id, row.number, row.at is not None))
        else:
            news.requests.append(Asked(row.id, row.number, row.words, row.kind == "pause"))
    return news


@cache
def _statement(is_told_the_time: bool) -> CompoundSelect[Any]:
    """Rows of one shape, the first of which is about the whole ledger. Putting it together takes as long as asking."""
    instant = nodes.c.stopped_at.type
    now = bindparam("now", type_=instant) if is_told_the_time else func.statement_timestamp(type_=instant)
    node = bindparam("node", type_=nodes.c.id.type)
    ledger = select(
        literal("ledger").label("kind"),
        _none(nodes.c.id).label("id"),
        case((is_any_due(now), 1), else_=0).label("number"),
        _catalog().label("words"),
        now.label("at"),
    )
    holders = select(runs.c.node).where(runs.c.state == RunState.RUNNING)
    others = select(literal("node"), nodes.c.id, nodes.c.beats, _none(tasks.c.name), nodes.c.stopped_at).where(
        or_(nodes.c.stopped_at.is_(None), nodes.c.id.in_(holders)), nodes.c.id != node
    )
    is_asked = text("cancel_reason IS NOT NULL AND state = 'running'")  # to the letter as in the index
    requests = select(
        literal("request"), runs.c.id, runs.c.fence, runs.c.cancel_reason, _none(nodes.c.stopped_at)
    ).where(is_asked, runs.c.node == node)
    held = (
        select(literal("pause"), runs.c.id, runs.c.fence, "paused by " + tasks.c.paused_by, _none(nodes.c.stopped_at))
        .select_from(tasks.join(runs, runs.c.task == tasks.c.name))
        .where(tasks.c.paused_at >= runs.c.created_at, text(ACTIVE_SQL))
        .where(runs.c.state == RunState.RUNNING, runs.c.node == node)
    )
    return ledger.union_all(others, requests, held)


def _catalog() -> ColumnElement[str]:
    opened = _listed(schedules.c.id, schedules.c.valid_until.is_(None))
    paused = _listed(tasks.c.name, tasks.c.paused_at.is_not(None))
    removed = _listed(tasks.c.name, tasks.c.removed_at.is_not(None))
    return opened + " paused: " + paused + " removed: " + removed


def _listed(column: ColumnElement[Any], condition: ColumnElement[bool]) -> ColumnElement[str]:
    listed = select(func.aggregate_strings(cast(column, String), " ")).where(condition)
    return func.coalesce(listed.scalar_subquery(), "")


def _none(like: ColumnElement[Any]) -> ColumnElement[Any]:
    return cast(null(), like.type)
