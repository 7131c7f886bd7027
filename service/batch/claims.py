"""Claiming: which runs may start now, and taking them for a node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Integer, Select, bindparam, func, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch import rows
from service.batch.runs import Claimed
from service.batch.tables import CLAIMABLE_SQL, runs

CLAIMED_COLUMNS = [runs.c[name] for name in Claimed.__dataclass_fields__]


async def now_if_due(connection: AsyncConnection) -> datetime | None:
    """The database's time if some run may be claimed at it, else None: all that an idle node asks for."""
    due: Select[Any] = select(literal_column("1")).select_from(runs).where(text(CLAIMABLE_SQL))
    if connection.dialect.name == "postgresql" and not clock.is_moved():
        now = func.clock_timestamp()
        statement: Select[Any] = select(now).where(due.where(runs.c.due_at <= now).exists())
        at: datetime | None = (await connection.execute(statement)).scalar()
        return at
    moment = clock.now()
    found = await connection.execute(due.where(runs.c.due_at <= moment).limit(1))
    return moment if found.first() is not None else None


@dataclass(frozen=True)
class Head:
    """A run that could be claimed: the first in the queue of its `exclusive`, or one of those that have none."""

    id: str
    task: str


async def heads(connection: AsyncConnection, names: Iterable[str], now: datetime, limit: int) -> list[Head]:
    """The first `limit` runs of these tasks that may start now: one of each `exclusive` that is free.

    One probe of the queue's index for each task, so that a backlog of one costs nothing and hides nobody. A run keeps
    the `exclusive` that it was made with, whatever the task's overlap policy is now.
    """
    kind = connection.dialect.name
    wanted = rows.source([runs.c.task], kind)
    due = f"{CLAIMABLE_SQL} AND due_at <= :now"
    first = f"SELECT id FROM batch_runs q WHERE q.exclusive = v.task AND {due} ORDER BY q.rank, q.due_at, q.id LIMIT 1"
    taken = "SELECT 1 FROM batch_runs x WHERE x.exclusive = v.task AND x.state = 'running'"
    unbound = (
        f"SELECT id FROM batch_runs f WHERE f.exclusive IS NULL AND {due} "
        f"AND {_filter('f.task', f'SELECT v.task FROM {wanted}', kind)} "
        "ORDER BY f.exclusive, f.rank, f.due_at, f.id LIMIT :most"
    )
    candidates = (
        f"SELECT ({first}) FROM {wanted} WHERE NOT EXISTS ({taken}) UNION ALL SELECT id FROM ({unbound}) AS unbound"
    )
    chosen = f"r.id = ANY(ARRAY({candidates}))" if kind == "postgresql" else f"r.id IN ({candidates})"
    statement = text(
        f"SELECT r.id, r.task FROM batch_runs r WHERE {chosen} "
        "ORDER BY r.priority DESC, r.rank, r.due_at, r.id LIMIT :most"
    ).bindparams(bindparam("now", type_=runs.c.due_at.type), bindparam("most", type_=Integer()))
    parameters = {"rows": rows.encode([{"task": name} for name in names], kind), "now": now, "most": limit}
    found = await connection.execute(statement.columns(runs.c.id, runs.c.task), parameters)
    return [Head(*row) for row in found]


def _filter(column: str, values: str, kind: str) -> str:
    """`column IN (values)`, but not for a plan to begin with: the index has the order, and the LIMIT ends it."""
    return f"({column} || '') = ANY(ARRAY({values}))" if kind == "postgresql" else f"+{column} IN ({values})"


async def claim(connection: AsyncConnection, ids: Sequence[str], node: str, now: datetime) -> list[Claimed]:
    """Take those of `ids` that are still to be had. An interrupted run goes on with the attempt it was in."""
    if not ids:
        return []
    kind = connection.dialect.name
    # Not a join: SQLite drives it by the index on state, and is quadratic.
    chosen = f"id IN (SELECT v.id FROM {rows.source([runs.c.id], kind)}) AND {CLAIMABLE_SQL}"
    if kind == "postgresql":
        chosen = f"id = ANY(ARRAY(SELECT id FROM batch_runs WHERE {chosen} ORDER BY id FOR UPDATE SKIP LOCKED))"
    statement = text(
        "UPDATE batch_runs SET state = 'running', node = :node, fence = fence + 1, "
        "attempt = attempt + CASE WHEN state = 'interrupted' THEN 0 ELSE 1 END, "
        "started_at = coalesce(started_at, :now), attempt_started_at = :now, reason = NULL "
        f"WHERE {chosen} RETURNING {', '.join(c.name for c in CLAIMED_COLUMNS)}"
    ).bindparams(bindparam("now", type_=runs.c.due_at.type), bindparam("node", type_=runs.c.node.type))
    parameters = {"rows": rows.encode([{"id": i} for i in ids], kind), "node": node, "now": now}
    return [Claimed(*row) for row in await connection.execute(statement.columns(*CLAIMED_COLUMNS), parameters)]


async def held_by(connection: AsyncConnection, node: str) -> list[Claimed]:
    """What the ledger says this node is running: after a COMMIT whose reply was lost, more than the node knows of."""
    statement = select(*CLAIMED_COLUMNS).where(runs.c.node == node, runs.c.state == "running")
    return [Claimed(*row) for row in await connection.execute(statement)]
