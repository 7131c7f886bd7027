"""Claiming: which runs may start now, and giving them to a node."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache

from sqlalchemy import ColumnElement, Integer, and_, bindparam, false, func, or_, select, text, true
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from service.batch.ledger import database_time, json_rows, queues, transitions
from service.batch.ledger.runs import Claimed
from service.batch.ledger.tables import HELD_SQL, RUNNING_SQL, runs
from service.batch.ledger.transitions import CLAIMED_COLUMNS
from service.batch.queue import concurrency
from service.batch.queue.capacity import Capacity
from service.batch.queue.concurrency import CANDIDATE_COLUMNS, Candidate, Rule
from service.batch.tasks.registry import Task


def is_any_due(now: ColumnElement[datetime]) -> ColumnElement[bool]:
    """Whether some run may be claimed at `now`. True also where a pause holds all retries that are due, but not others:
    telling these apart would cost a look at each.
    """
    waits, retries = (
        text(f"EXISTS ({queues.names(those, until_found=True)})") for those in (queues.WAITS, queues.RETRIES)
    )
    return or_(waits, and_(_is_retry_due(now), retries))


def _is_retry_due(now: ColumnElement[datetime]) -> ColumnElement[bool]:
    """Whether some retry may begin at `now`. With EXISTS instead of min() PostgreSQL may read all retries."""
    first = select(func.min(runs.c.due_at)).where(text(queues.RETRIES)).scalar_subquery()
    return func.coalesce(first <= now, false())


@dataclass(frozen=True)
class Due:
    """What may start at `now`, the database's time: of which tasks. `retries`: retries are among it."""

    now: datetime
    names: frozenset[str]
    retries: bool


async def due(connection: AsyncConnection) -> Due:
    """One look at the indexes for each task that has something to start."""
    now = database_time.moment(connection)
    once = select(now.label("at"), _is_retry_due(now).label("retries")).subquery("once")
    waits = text(queues.names(queues.WAITS)).columns(runs.c.task).subquery("waiting")
    statement = select(once.c.at, once.c.retries, waits.c.task).select_from(once.join(waits, true(), isouter=True))
    found = (await connection.execute(statement)).all()
    names = {row.task for row in found if row.task is not None}
    if found[0].retries:
        names |= set((await connection.execute(text(queues.names(queues.RETRIES)))).scalars())
    return Due(found[0].at, frozenset(names), found[0].retries)


async def take(
    connection: AsyncConnection, tasks: Mapping[str, Task], node: str, capacity: Capacity
) -> tuple[list[Claimed], bool]:
    """Claim for a node, which has loaded these tasks, what it has room for. True: there may be more at once."""
    now, found = await startable(connection, tasks, capacity, locks=True)
    if now is None or not found:
        return [], False
    chosen = [head for head in found if capacity.take(tasks[head.task].on_loop)]
    others = {head.id: head.lane for head in chosen if head.lane > 1}
    claimed = await transitions.claim(connection, [head.id for head in chosen], node, now, others)
    return claimed, len(chosen) == len(found)


async def startable(
    connection: AsyncConnection, tasks: Mapping[str, Task], capacity: Capacity, locks: bool = False
) -> tuple[datetime | None, list[Candidate]]:
    """The database's time, if something of these tasks is due at it, and what of them may start then.

    `locks`: what is in no queue is locked, and what others have locked is left out. So nodes that claim at the same
    moment find different runs; they would find the same ones, and all but one of them nothing.
    """
    if capacity.runs < 1:
        return None, []
    found = await due(connection)
    wanted = [tasks[name] for name in sorted(found.names & tasks.keys())]
    names = [task.name for task in wanted if task.on_loop or capacity.threads > 0]
    if not names:
        return None, []
    rules = concurrency.rules(wanted)
    return found.now, await heads(connection, names, found.now, capacity.runs, rules, locks, found.retries)


async def heads(
    connection: AsyncConnection,
    names: Collection[str],
    now: datetime,
    limit: int,
    rules: Mapping[str, Rule] | None = None,
    locks: bool = False,
    retries: bool = True,
) -> list[Candidate]:
    """The first `limit` runs of these tasks that may start now: one of each `exclusive` that is free.

    One probe of the queue's index for each task, so that a backlog of one costs nothing and hides nobody. A run keeps
    the `exclusive` that it was made with, whatever the task's overlap policy is now. Of the tasks in `rules` there may
    be several, or none. `retries`: whether some are due.
    """
    ruled = {name: rules[name] for name in names if name in rules} if rules else {}
    kind = connection.dialect.name
    statement = _plain_heads(kind, locks, retries)
    listed = [{"task": name, "exclusive": None if name in ruled else name} for name in names]
    parameters = {"rows": json_rows.encode(listed, kind), "most": limit, "each": _share(limit, len(names))}
    found = await connection.execute(statement, parameters | ({"now": now} if retries else {}))
    plain = [Candidate(*row) for row in found]
    if not ruled:
        return plain
    plain += await concurrency.candidates(connection, ruled, now, limit, retries)
    return sorted(plain, key=lambda one: one.place)[:limit]


@cache
def _plain_heads(kind: str, locks: bool, retries: bool) -> TextualSelect:
    """One of each queue, but of those of tasks with rules, and those of all these tasks that are in no queue."""
    wanted = json_rows.source([runs.c.task, runs.c.exclusive], kind)
    taken = f"SELECT 1 FROM batch_runs x WHERE x.exclusive = v.exclusive AND x.{RUNNING_SQL}"
    lock = " FOR UPDATE SKIP LOCKED" if locks and kind == "postgresql" else ""
    head = queues.first("exclusive = v.task", "1", retries)
    unbound = queues.first("exclusive IS NULL", ":each", retries, lock=lock)
    candidates = (
        f"SELECT ({head}) FROM {wanted} WHERE v.exclusive IS NOT NULL AND NOT EXISTS ({taken}) "
        f"UNION ALL SELECT u.id FROM {wanted} JOIN batch_runs u ON {queues.among('u.id', unbound, kind)}"
    )
    statement = text(
        f"SELECT {', '.join(f'r.{c.name}' for c in CANDIDATE_COLUMNS)} FROM batch_runs r "
        f"WHERE {queues.among('r.id', candidates, kind)} ORDER BY r.priority DESC, r.rank, r.due_at, r.id LIMIT :most"
    ).bindparams(*queues.parameters(retries), bindparam("most", type_=Integer()), bindparam("each", type_=Integer()))
    return statement.columns(*CANDIDATE_COLUMNS)


def _share(limit: int, tasks: int) -> int:
    """How many runs of one task are looked at: all that there is room for, or twice its part of that."""
    return max(1, min(limit, -(-2 * limit // max(1, tasks))))


async def held_by(connection: AsyncConnection, node: str) -> list[Claimed]:
    """What the ledger says this node is running: after a COMMIT whose reply was lost, more than the node knows of."""
    statement = select(*CLAIMED_COLUMNS).where(runs.c.node == node, text(HELD_SQL))
    return [Claimed(*row) for row in await connection.execute(statement)]
