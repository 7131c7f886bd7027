"""Claiming: which runs may start now, and taking them for a node."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Integer, bindparam, literal, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch import lanes, rows, slots
from service.batch.firing import Room
from service.batch.lanes import CANDIDATE_COLUMNS, Candidate, Rule
from service.batch.registry import Task
from service.batch.runs import Claimed
from service.batch.states import CLAIMABLE, RunState
from service.batch.tables import CLAIMABLE_SQL, DUE_SQL, not_held, runs

CLAIMED_COLUMNS = [runs.c[name] for name in Claimed.__dataclass_fields__]


async def now_if_due(connection: AsyncConnection) -> datetime | None:
    """The database's time if some run may be claimed at it, else None."""
    now = slots.moment(connection)
    return (await connection.execute(select(now).where(is_any_due(now)))).scalar()


def is_any_due(now: ColumnElement[datetime]) -> ColumnElement[bool]:
    """Whether some run may be claimed at `now`; one look into an index for each of the two ways (see DUE_SQL)."""
    is_free = text(not_held("batch_runs"))
    due = select(literal(1)).select_from(runs).where(text(CLAIMABLE_SQL), runs.c.due_at <= now, is_free)
    waiting = (
        select(literal(1)).select_from(runs).where(runs.c.state.in_(set(CLAIMABLE) - {RunState.RETRYING}), is_free)
    )
    return or_(due.exists(), waiting.exists())


async def take(
    connection: AsyncConnection, tasks: Mapping[str, Task], node: str, room: Room
) -> tuple[list[Claimed], bool]:
    """Claim for a node, which has loaded these tasks, what it has room for. True: there may be more at once."""
    now, found = await startable(connection, tasks, room, locks=True)
    if now is None or not found:
        return [], False
    chosen = [head for head in found if room.take(tasks[head.task].on_loop)]
    others = {head.id: head.lane for head in chosen if head.lane > 1}
    return await claim(connection, [head.id for head in chosen], node, now, others), len(chosen) == len(found)


async def startable(
    connection: AsyncConnection, tasks: Mapping[str, Task], room: Room, locks: bool = False
) -> tuple[datetime | None, list[Candidate]]:
    """The database's time, if something is due at it, and what of these tasks may start then.

    `locks`: what is in no queue is locked, and what others have locked is left out. So nodes that claim at the same
    moment find different runs; they would find the same ones, and all but one of them nothing.
    """
    now = await now_if_due(connection) if room.runs > 0 else None
    if now is None:
        return None, []
    names = [task.name for task in tasks.values() if task.on_loop or room.threads > 0]
    return now, await heads(connection, names, now, room.runs, lanes.rules(tasks.values()), locks)


async def heads(
    connection: AsyncConnection,
    names: Collection[str],
    now: datetime,
    limit: int,
    rules: Mapping[str, Rule] | None = None,
    locks: bool = False,
) -> list[Candidate]:
    """The first `limit` runs of these tasks that may start now: one of each `exclusive` that is free.

    One probe of the queue's index for each task, so that a backlog of one costs nothing and hides nobody. A run keeps
    the `exclusive` that it was made with, whatever the task's overlap policy is now. Of the tasks in `rules` there may
    be several, or none.
    """
    ruled = {name: rules[name] for name in names if name in rules} if rules else {}
    found = await _plain_heads(connection, names, ruled.keys(), now, limit, locks)
    if not ruled:
        return found
    found += await lanes.candidates(connection, ruled, now, limit)
    return sorted(found, key=lambda one: one.place)[:limit]


async def _plain_heads(
    connection: AsyncConnection, names: Collection[str], ruled: Collection[str], now: datetime, limit: int, locks: bool
) -> list[Candidate]:
    """One of each queue but those in `ruled`, and those of all these tasks that are in no queue."""
    kind = connection.dialect.name
    wanted = rows.source([runs.c.task, runs.c.exclusive], kind)
    due = f"{CLAIMABLE_SQL} AND {DUE_SQL}"
    first = (
        f"SELECT id FROM batch_runs q WHERE q.exclusive = v.exclusive AND {due} AND {not_held('q')} "
        "ORDER BY q.rank, q.due_at, q.id LIMIT 1"
    )
    lock = " FOR UPDATE SKIP LOCKED" if locks and kind == "postgresql" else ""
    taken = "SELECT 1 FROM batch_runs x WHERE x.exclusive = v.exclusive AND x.state = 'running'"
    unbound = (
        f"SELECT id FROM batch_runs f WHERE f.exclusive IS NULL AND {due} AND {not_held('f')} "
        f"AND {_filter('f.task', f'SELECT v.task FROM {wanted}', kind)} "
        f"ORDER BY f.exclusive, f.rank, f.due_at, f.id LIMIT :most{lock}"
    )
    candidates = (
        f"SELECT ({first}) FROM {wanted} WHERE NOT EXISTS ({taken}) UNION ALL SELECT id FROM ({unbound}) AS unbound"
    )
    chosen = f"r.id = ANY(ARRAY({candidates}))" if kind == "postgresql" else f"r.id IN ({candidates})"
    statement = text(
        f"SELECT {', '.join(f'r.{c.name}' for c in CANDIDATE_COLUMNS)} FROM batch_runs r WHERE {chosen} "
        "ORDER BY r.priority DESC, r.rank, r.due_at, r.id LIMIT :most"
    ).bindparams(bindparam("now", type_=runs.c.due_at.type), bindparam("most", type_=Integer()))
    queues = [{"task": name, "exclusive": None if name in ruled else name} for name in names]
    parameters = {"rows": rows.encode(queues, kind), "now": now, "most": limit}
    found = await connection.execute(statement.columns(*CANDIDATE_COLUMNS), parameters)
    return [Candidate(*row) for row in found]


def _filter(column: str, values: str, kind: str) -> str:
    """`column IN (values)`, but not for a plan to begin with: the index has the order, and the LIMIT ends it."""
    return f"({column} || '') = ANY(ARRAY({values}))" if kind == "postgresql" else f"+{column} IN ({values})"


async def claim(
    connection: AsyncConnection, ids: Sequence[str], node: str, now: datetime, lanes: Mapping[str, int] | None = None
) -> list[Claimed]:
    """Take those of `ids` that are still to be had. An interrupted run goes on with the attempt it was in.

    `lanes`: the lane of each that takes another than the first. Raises IntegrityError when another node has taken it.
    """
    if not ids:
        return []
    kind = connection.dialect.name
    statement = text(
        "UPDATE batch_runs SET state = 'running', node = :node, fence = fence + 1, "
        "attempt = attempt + CASE WHEN state = 'interrupted' THEN 0 ELSE 1 END, "
        "started_at = coalesce(started_at, :now), attempt_started_at = :now, reason = NULL, "
        f"lane = {_claimed(kind, bool(lanes))} RETURNING {', '.join(f'batch_runs.{c.name}' for c in CLAIMED_COLUMNS)}"
    ).bindparams(bindparam("now", type_=runs.c.due_at.type), bindparam("node", type_=runs.c.node.type))
    listed = [{"id": i, "lane": lanes.get(i, 1)} for i in ids] if lanes else [{"id": i} for i in ids]
    parameters = {"rows": rows.encode(listed, kind), "node": node, "now": now}
    return [Claimed(*row) for row in await connection.execute(statement.columns(*CLAIMED_COLUMNS), parameters)]


def _claimed(kind: str, several: bool) -> str:
    """The end of claim's SET, and its WHERE. No join where all take the first lane: SQLite would be quadratic."""
    wanted = f"id IN (SELECT v.id FROM {rows.source([runs.c.id], kind)}) AND {CLAIMABLE_SQL}"
    if kind == "postgresql":
        locked = f"SELECT id FROM batch_runs WHERE {wanted} ORDER BY id FOR UPDATE SKIP LOCKED"
        wanted = f"batch_runs.id = ANY(ARRAY({locked}))"
    if not several:
        return f"1 WHERE {wanted}"
    source = rows.source([runs.c.id, runs.c.lane], kind)
    # The + keeps SQLite from driving the join by the index on state, which is quadratic.
    still = wanted if kind == "postgresql" else f"+batch_runs.{CLAIMABLE_SQL}"
    return f"v.lane FROM {source} WHERE batch_runs.id = v.id AND {still}"


async def held_by(connection: AsyncConnection, node: str) -> list[Claimed]:
    """What the ledger says this node is running: after a COMMIT whose reply was lost, more than the node knows of."""
    statement = select(*CLAIMED_COLUMNS).where(runs.c.node == node, runs.c.state == "running")
    return [Claimed(*row) for row in await connection.execute(statement)]
