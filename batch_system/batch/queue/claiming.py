"""Claiming: finds the runs that may start now, and gives as many to a node as it has capacity
for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import (
    Boolean,
    ColumnElement,
    Integer,
    Select,
    and_,
    bindparam,
    false,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import database_time, json_rows, queue_rows, transitions
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import HELD_SQL, HIGH_SQL, HOLDS_LANE_SQL, not_held, runs
from batch_system.batch.ledger.transitions import CLAIMED_COLUMNS
from batch_system.batch.queue import concurrency
from batch_system.batch.queue.concurrency import HEAD_COLUMNS, Head, Rule
from batch_system.batch.queue.turns import Look, Turns, take_places
from batch_system.batch.tasks.registry import Task
from batch_system.database import sql
from batch_system.settings.pools import DEFAULT_POOL

OWN_POOLS: Mapping[str, int | None] = {DEFAULT_POOL: None}


@dataclass
class Capacity:
    """How many more runs this node could start right now.

    Attributes:
      runs: The number in all.
      threads: How many of them in threads.
      pools: The pools whose runs the node claims, each with the number of further child
          processes; None if its runs execute on the event loop and in threads.
    """

    runs: int
    threads: int
    pools: dict[str, int | None] = field(default_factory=lambda: dict(OWN_POOLS))

    def has_room(self, task: Task) -> bool:
        """Whether a run of the task could start."""
        if self.runs < 1 or task.pool not in self.pools:
            return False
        children = self.pools[task.pool]
        return task.on_loop or self.threads > 0 if children is None else children > 0

    def holds(self, tasks: Mapping[str, Task], numbers: Mapping[str, int]) -> bool:
        """Whether this many runs of each task could start. `tasks`: those that the node has loaded,
        by name.
        """
        if sum(numbers.values()) > self.runs or not numbers.keys() <= tasks.keys():
            return False
        left = replace(self, pools=dict(self.pools))
        return all(
            left.take(tasks[name]) for name, number in numbers.items() for _ in range(number)
        )

    def take(self, task: Task) -> bool:
        """Reserve capacity for a run of the task. Returns False if none is left."""
        if not self.has_room(task):
            return False
        self.runs -= 1
        children = self.pools[task.pool]
        if children is not None:
            self.pools[task.pool] = children - 1
        elif not task.on_loop:
            self.threads -= 1
        return True


def is_any_due(
    now: ColumnElement[datetime], pools: Collection[str] | None = None
) -> ColumnElement[bool]:
    """Whether a run of a task of these pools may be claimable at `now`. Without `pools`, all pools
    count.

    It can be true although nothing is claimable, if all due retries belong to paused tasks or other
    pools, while retries of these tasks are due later. Ruling that out would mean reading each
    retry.
    """
    are_waiting, are_retrying = (
        queue_rows.is_any(condition, pools) for condition in (queue_rows.READY, queue_rows.RETRIES)
    )
    return or_(are_waiting, and_(_is_retry_due(now), are_retrying))


def _is_retry_due(now: ColumnElement[datetime]) -> ColumnElement[bool]:
    """Whether a retry is due at `now`. With EXISTS instead of min(), PostgreSQL may read all
    retries.
    """
    first_due_at = select(func.min(runs.c.due_at)).where(text(queue_rows.RETRIES)).scalar_subquery()
    return func.coalesce(first_due_at <= now, false())


@dataclass(frozen=True)
class Due:
    """The names of the tasks that have runs to start at `now`, the database time. `retries`:
    whether a retry is due. `urgent`: whether a run waits that goes before the others of its queue.
    """

    now: datetime
    names: frozenset[str]
    retries: bool
    urgent: bool = False


async def due(connection: AsyncConnection, pools: Collection[str] = OWN_POOLS) -> Due:
    """Read which tasks of these pools have runs to start now. It costs one index lookup for each
    task with such runs.

    The ledger decides the pool of a task. A node whose own code names another pool does not claim
    the task's runs either (Capacity), so while a deployment moves a task, only processes with the
    newer code claim them.
    """
    now = database_time.process_now(connection)
    parameters = {} if now is None else {"process_now": now}
    statement = _due_query(tuple(sorted(pools)), now is None, connection.dialect.name)
    rows = (await connection.execute(statement, parameters)).all()
    names = {row.task for row in rows if row.task is not None}
    if rows[0].retries:
        names |= set(
            (
                await connection.execute(queue_rows.names_of_pools(queue_rows.RETRIES, pools))
            ).scalars()
        )
    return Due(rows[0].at, frozenset(names), rows[0].retries, rows[0].urgent)


@cache
def _due_query(pools: tuple[str, ...], is_database_time: bool, kind: str) -> Select[Any]:
    """The query of `due`, cached because building it takes longer than executing it."""
    now = (
        database_time.statement_start()
        if is_database_time
        else bindparam("process_now", type_=runs.c.due_at.type)
    )
    high = f"SELECT 1 FROM batch_runs{sql.hint('ix_batch_runs_high', kind)} WHERE {HIGH_SQL}"
    is_urgent = literal_column(f"EXISTS ({high})", Boolean)
    once = select(
        now.label("at"), _is_retry_due(now).label("retries"), is_urgent.label("urgent")
    ).subquery("once")
    waiting = (
        queue_rows.names_of_pools(queue_rows.READY, pools).columns(runs.c.task).subquery("waiting")
    )
    return select(once.c.at, once.c.retries, once.c.urgent, waiting.c.task).select_from(
        once.join(waiting, true(), isouter=True)
    )


async def take(
    connection: AsyncConnection,
    tasks: Mapping[str, Task],
    node: str,
    capacity: Capacity,
    apart: bool = False,
    turns: Turns | None = None,
) -> tuple[list[Claimed], bool]:
    """Claim as many runs of `tasks`, which the node has loaded, as `capacity` allows.

    Runs for which threads or children are missing may hide others that have room. In that case it
    looks again, without the former. `apart`: each run is claimed separately, and those that the
    database refuses are left. `turns`: which keys of limits were served last. Returns the
    claimed runs, and whether more runs may be claimable at once.
    """
    claimed: list[Claimed] = []
    turns = turns if turns is not None else Turns()
    claim = _claim_apart if apart else _claim
    while True:
        most = capacity.runs
        now, first_runs = await startable(connection, tasks, capacity, locks=True, turns=turns)
        if now is None or not first_runs:
            return claimed, turns.are_locked
        chosen = [head for head in first_runs if capacity.take(tasks[head.task])]
        got = await claim(connection, chosen, node, now)
        limited = [head for head in chosen if tasks[head.task].policies.limit is not None]
        turns.serve(limited)
        ids = {run.id for run in got}
        begun = [(head, tasks[head.task].queueing) for head in limited if head.id in ids]
        await take_places(connection, begun, turns, now)
        claimed += got
        if len(chosen) == len(first_runs) or len(first_runs) < most:
            return claimed, len(chosen) == len(first_runs) and (
                not apart or len(got) == len(chosen)
            )


async def _claim(
    connection: AsyncConnection, heads: Sequence[Head], node: str, now: datetime
) -> list[Claimed]:
    other_lanes = {head.id: head.lane for head in heads if head.lane > 1}
    return await transitions.claim(connection, [head.id for head in heads], node, now, other_lanes)


async def _claim_apart(
    connection: AsyncConnection, heads: Sequence[Head], node: str, now: datetime
) -> list[Claimed]:
    """Claim these runs separately, except those that the database refuses because another run has
    their lane.
    """
    claimed = []
    for head in sorted(heads, key=lambda head: head.id):  # the usual order of locks
        with suppress(IntegrityError):
            async with connection.begin_nested():
                claimed += await _claim(connection, [head], node, now)
    return claimed


async def startable(
    connection: AsyncConnection,
    tasks: Mapping[str, Task],
    capacity: Capacity,
    locks: bool = False,
    turns: Turns | None = None,
) -> tuple[datetime | None, list[Head]]:
    """The database time, and the runs of `tasks` that may start at that time; (None, []) if there
    are none.

    `locks`: on PostgreSQL, runs without a queue are locked, and those that another node has locked
    are left out, so that nodes that claim at the same moment find different runs. Otherwise they
    would find the same runs, and only one of the nodes would get any.
    """
    if capacity.runs < 1:
        return None, []
    due_now = await due(connection, capacity.pools)
    due_tasks = [tasks[name] for name in sorted(due_now.names & tasks.keys())]
    names = [task.name for task in due_tasks if capacity.has_room(task)]
    if not names:
        return None, []
    limited = [
        task.queueing
        for task in due_tasks
        if task.name in names and task.policies.limit is not None
    ]
    rules = concurrency.rules(due_tasks)
    have_keys = {each.task for each in limited} - {rule.task for rule in rules.values()}
    if others_names := [name for name in names if name not in have_keys]:
        others = await heads(
            connection, others_names, due_now.now, capacity.runs, rules, locks, due_now.retries
        )
    else:
        others = []
    if not limited:
        return due_now.now, others
    turns = turns or Turns()
    look = Look(connection, limited, due_now.now, due_now.retries, capacity.runs, turns, locks)
    in_turn = await look.heads(due_now.urgent)
    return due_now.now, _together(others, in_turn, capacity.runs)


def _together(others: Sequence[Head], limited: Sequence[Head], most: int) -> list[Head]:
    """The first `most` of both. Larger priorities go first; with equal ones, the runs of tasks with
    a limit get half of the room, or what the others leave.
    """
    chosen: list[Head] = []
    for priority in sorted({head.priority for head in (*others, *limited)}, reverse=True):
        room = most - len(chosen)
        theirs = [head for head in others if head.priority == priority]
        own = [head for head in limited if head.priority == priority]
        own = own[: max(room // 2, room - len(theirs))]
        chosen += theirs[: room - len(own)] + own
    return chosen


async def heads(
    connection: AsyncConnection,
    names: Collection[str],
    now: datetime,
    limit: int,
    rules: Mapping[str, Rule] | None = None,
    locks: bool = False,
    retries: bool = True,
) -> list[Head]:
    """The first `limit` runs of the tasks `names` that may start now, in order: one for each free
    `exclusive`.

    It reads one entry of the queue's index for each task, so a long queue of one task costs no time
    and delays no other task. A run keeps the `exclusive` with which it was made, even if the
    overlap policy of its task has changed. A queue in `rules` may have several such runs, or none.
    `retries`: whether retries are due.
    """
    ruled = {queue: rule for queue, rule in rules.items() if rule.task in names} if rules else {}
    kind = connection.dialect.name
    statement = _plain_heads(kind, locks, retries)
    rows = [{"task": name, "exclusive": None if name in ruled else name} for name in names]
    parameters = {
        "rows": json_rows.encode(rows, kind),
        "most": limit,
        "each": _share(limit, len(names)),
    }
    result = await connection.execute(statement, parameters | ({"now": now} if retries else {}))
    plain = [Head(*row) for row in result]
    if not ruled:
        return plain
    plain += await concurrency.heads_by_rules(connection, ruled, now, limit, retries)
    return sorted(plain, key=lambda head: head.sort_key)[:limit]


@cache
def _plain_heads(kind: str, locks: bool, retries: bool) -> TextualSelect:
    """The query for the first run of each queue, except those of tasks with rules, and for runs
    without `exclusive`.
    """
    source = json_rows.source([runs.c.task, runs.c.exclusive], kind)
    # A run that goes on after its parts is the first of its queue, and keeps its lane.
    is_first = f"x.rank = {Rank.JOINING} AND x.state = '{RunState.QUEUED}' AND {not_held('x')}"
    taken = (
        f"SELECT 1 FROM batch_runs x WHERE x.exclusive = v.exclusive AND {HOLDS_LANE_SQL} "
        f"AND NOT ({is_first})"
    )
    lock = " FOR UPDATE SKIP LOCKED" if locks and kind == "postgresql" else ""
    head = queue_rows.first("exclusive = v.task", "1", retries)
    not_exclusive = queue_rows.first("exclusive IS NULL", ":each", retries, lock=lock)
    ids = (
        f"SELECT ({head}) FROM {source} WHERE v.exclusive IS NOT NULL AND NOT EXISTS ({taken}) "
        f"UNION ALL SELECT u.id FROM {source} "
        f"JOIN batch_runs u ON {sql.among('u.id', not_exclusive, kind)}"
    )
    statement = sql.statement(
        f"SELECT {', '.join(f'r.{c.name}' for c in HEAD_COLUMNS)} FROM batch_runs r "
        f"WHERE {sql.among('r.id', ids, kind)} "
        "ORDER BY r.priority DESC, r.rank, r.due_at, r.id LIMIT :most",
        most=Integer(),
        each=Integer(),
        **queue_rows.types(retries),
    )
    return statement.columns(*HEAD_COLUMNS)


def _share(limit: int, tasks: int) -> int:
    """How many runs of one task are read: `limit`, or twice the equal share of one of `tasks` if
    that is less.
    """
    return max(1, min(limit, -(-2 * limit // max(1, tasks))))


async def held_by(
    connection: AsyncConnection, node: str, known: Iterable[Claimed]
) -> list[Claimed]:
    """The runs that a node is running according to the ledger, except those that it knows of.

    Such runs exist if the reply to a COMMIT was lost.
    """
    statement = select(*CLAIMED_COLUMNS).where(runs.c.node == node, text(HELD_SQL))
    claims = {(run.id, run.fence) for run in known}
    held = [Claimed(*row) for row in await connection.execute(statement)]
    return [run for run in held if (run.id, run.fence) not in claims]
