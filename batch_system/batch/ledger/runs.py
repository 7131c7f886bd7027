"""Runs: the making of new runs, and queries on runs. Only transitions.py changes the state of a
run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import tracing
from batch_system.batch.ledger import json_rows, wakes
from batch_system.batch.ledger.states import Origin, Rank, RunState
from batch_system.batch.ledger.tables import (
    HOLDS_LANE_SQL,
    IN_THE_WAY_SQL,
    NO_PART_SQL,
    OF_SLOT_SQL,
    runs,
)
from batch_system.database import sql
from batch_system.database.types import new_id


@dataclass
class NewRun:
    """A run that is to be inserted, made by `scheduled`, `queued` or `running`. All instants are
    database time.

    Its state can change before it is inserted: a node can start it at once, and a policy can skip
    or cancel it.
    """

    id: str
    task: str
    slot: datetime | None
    origin: str
    state: str
    rank: int
    catch_up: bool
    due_at: datetime
    created_at: datetime
    exclusive: str | None = None
    lane: int = 1
    reason: str | None = None
    params: dict[str, Any] | None = None
    priority: int = 0
    attempt: int = 0
    node: str | None = None
    fence: int = 0
    requested_by: str | None = None
    key: str | None = None
    parent: str | None = None
    awaited_by: str | None = None
    gate: str | None = None
    wait_until: datetime | None = None
    traceparent: str | None = None
    started_at: datetime | None = None
    attempt_started_at: datetime | None = None
    finished_at: datetime | None = None

    @classmethod
    def scheduled(
        cls,
        task: str,
        slot: datetime,
        now: datetime,
        *,
        catch_up: bool,
        exclusive: str | None,
        priority: int,
    ) -> NewRun:
        """The run of a due slot. `catch_up`: the slot was missed, and is caught up now."""
        return cls(
            id=new_id(),
            task=task,
            slot=slot,
            origin=Origin.SCHEDULE,
            state=RunState.QUEUED,
            rank=Rank.CATCH_UP if catch_up else Rank.ON_TIME,
            catch_up=catch_up,
            due_at=now,
            created_at=now,
            exclusive=exclusive,
            priority=priority,
        )

    @classmethod
    def queued(
        cls,
        task: str,
        slot: datetime | None,
        now: datetime,
        *,
        is_backfill: bool = False,
        exclusive: str | None,
        priority: int,
        params: dict[str, Any] | None = None,
        requested_by: str | None = None,
        key: str | None = None,
        parent: str | None = None,
    ) -> NewRun:
        """A run that a person or code has asked for. Any node that has loaded the task may claim
        it.

        `is_backfill`: the run is for a slot of the past, and starts after all other runs of the
        task. `key`: the task has at most one run with this key. `parent`: the id of the run whose
        code asked for this one.
        """
        return cls(
            id=new_id(),
            task=task,
            slot=slot,
            origin=Origin.BACKFILL if is_backfill else Origin.MANUAL,
            state=RunState.QUEUED,
            rank=Rank.CATCH_UP if is_backfill else Rank.MANUAL,
            catch_up=is_backfill,
            due_at=now,
            created_at=now,
            exclusive=exclusive,
            priority=priority,
            params=params,
            requested_by=requested_by,
            key=key,
            parent=parent,
            traceparent=tracing.traceparent(),
        )

    @classmethod
    def running(
        cls, node: str, task: str, slot: datetime | None, now: datetime, **queued: Any
    ) -> NewRun:
        """A run that a node starts at once. `queued`: the keyword arguments of `queued`."""
        run = cls.queued(task, slot, now, **queued)
        run.start(node, now)
        return run

    def wait(self, due_at: datetime, gate: str | None = None) -> None:
        """Make it a waiting run, which is opened at `due_at` at the earliest.

        `gate`: which end of what it waits for opens it (see waits.Gate); None: it waits for nothing
        but the instant.
        """
        self.state = RunState.WAITING
        self.due_at = due_at
        self.gate = gate

    def start(self, node: str, now: datetime) -> None:
        """Make it a running run of this node, instead of a queued one that any node may claim."""
        self.state = RunState.RUNNING
        self.node = node
        self.fence = 1
        self.attempt = 1
        self.started_at = self.attempt_started_at = now

    def skip(self, reason: str, now: datetime) -> None:
        """Make it a skipped run: other runs of its task are in its way."""
        self.state = RunState.SKIPPED
        self.reason = reason
        self.finished_at = now

    def cancel(self, reason: str, now: datetime) -> None:
        """Make it a cancelled run: another slot replaces it."""
        self.state = RunState.CANCELLED
        self.reason = reason
        self.finished_at = now


@dataclass(slots=True)
class Claimed:
    """A run that a node has claimed, with the `fence` of the claim. Instants are aware."""

    id: str
    task: str
    slot: datetime | None
    origin: str
    params: dict[str, Any] | None
    attempt: int
    fence: int
    created_at: datetime
    attempt_started_at: datetime
    attempts_before: int = 0
    """How many attempts there were when a person last retried the run. The attempts of the policy
    count from there.
    """
    awaited_by: str | None = None
    """The run that waits for this one."""
    traceparent: str | None = None
    part: int | None = None  # the number of a part, from 1
    gate: str | None = None  # what has opened the run; for one that was split, a PartsGate


def claimed_from(new: NewRun) -> Claimed:
    """The claimed run for a new run that was inserted as running."""
    assert new.attempt_started_at is not None
    return Claimed(
        new.id,
        new.task,
        new.slot,
        new.origin,
        new.params,
        new.attempt,
        new.fence,
        new.created_at,
        new.attempt_started_at,
        awaited_by=new.awaited_by,
        traceparent=new.traceparent,
    )


@dataclass(frozen=True)
class Active:
    """A run that an overlap policy may have to consider; see `active`."""

    id: str
    task: str
    slot: datetime | None
    state: str
    origin: str
    catch_up: bool
    rank: int
    lane: int

    @property
    def has_lane(self) -> bool:
        """True also while it waits for its parts, and then until its attempt goes on."""
        is_joining = (self.state, self.rank) == (RunState.QUEUED, Rank.JOINING)
        return is_joining or self.state in (RunState.RUNNING, RunState.WAITING)


def locked_by_id(condition: str, kind: str) -> str:
    """The condition for an UPDATE or DELETE of several runs. PostgreSQL locks them by id, so that
    no two deadlock.
    """
    if kind != "postgresql":
        return condition
    return (
        f"batch_runs.id = ANY(ARRAY(SELECT id FROM batch_runs WHERE {condition} "
        "ORDER BY id FOR UPDATE))"
    )


async def lock_at_once(connection: AsyncConnection, ids: Sequence[str]) -> bool:
    """Lock those of these runs that no other transaction has locked. Returns whether these are all.
    SQLite has no such locks.
    """
    if not ids or connection.dialect.name != "postgresql":
        return True
    query = (
        select(runs.c.id)
        .where(json_rows.is_among(runs.c.id, ids, "postgresql"))
        .order_by(runs.c.id)
    )
    locked = (await connection.execute(query.with_for_update(skip_locked=True))).all()
    return len(locked) == len(ids)


async def without_locked(connection: AsyncConnection, ids: Sequence[str]) -> set[str]:
    """Lock those of these runs that no other transaction has locked, and return their ids. SQLite
    locks no rows.
    """
    wanted = (
        select(runs.c.id)
        .where(runs.c.id.in_(ids))
        .order_by(runs.c.id)
        .with_for_update(skip_locked=True)
    )
    return set((await connection.execute(wanted)).scalars())


async def insert(connection: AsyncConnection, new: Sequence[NewRun]) -> set[str]:
    """Insert runs, except for slots that have a run already. Returns the ids of the inserted
    runs.
    """
    conflict = f"(task, slot) WHERE {OF_SLOT_SQL}"
    inserted = set(
        await json_rows.insert(connection, runs, [vars(run) for run in new], conflict, runs.c.id)
    )
    _tell_others(connection, [run for run in new if run.id in inserted])
    return inserted


async def insert_once(connection: AsyncConnection, new: NewRun) -> str:
    """Insert a run, unless its task has a run with the same key. Returns the id of the run with
    this key.
    """
    inserted = await json_rows.insert(
        connection, runs, [vars(new)], "(task, key) WHERE key IS NOT NULL", runs.c.id
    )
    if inserted:
        _tell_others(connection, [new])
        return new.id
    same_key = select(runs.c.id).where(runs.c.task == new.task, runs.c.key == new.key)
    return str((await connection.execute(same_key)).scalar_one())


async def insert_new(connection: AsyncConnection, new: Sequence[NewRun]) -> int:
    """Insert runs, except those whose id, or whose key for their task, is known. Returns their
    number.
    """
    if not new:
        return 0
    number = await json_rows.insert_all(connection, runs, [vars(run) for run in new], json_rows.ANY)
    _tell_others(connection, new)
    return number


async def insert_group(connection: AsyncConnection, new: Sequence[NewRun]) -> None:
    """Insert runs that belong together. Raises IntegrityError if the task of one of them has a run
    with its key.
    """
    if len(new) == 1:  # twice as fast, and most groups are one run that code has started
        row = {name: json_rows.storable(value) for name, value in vars(new[0]).items()}
        await connection.execute(runs.insert().inline(), row)
    else:
        await json_rows.insert(connection, runs, [vars(run) for run in new])
    _tell_others(connection, new)


def _tell_others(connection: AsyncConnection, new: Sequence[NewRun]) -> None:
    queued, started = (
        [run.task for run in new if run.state == s] for s in (RunState.QUEUED, RunState.RUNNING)
    )
    wakes.queued(connection, queued, started)


async def active(connection: AsyncConnection, names: Iterable[str]) -> dict[str, list[Active]]:
    """The runs of these tasks that are running or have a lane for another reason, and their active
    on-time runs.

    Other waiting runs are not read, because there may be very many, such as those of a catch-up.
    """
    kind = connection.dialect.name
    columns = [runs.c[name] for name in Active.__dataclass_fields__]
    selected = ", ".join(c.name for c in columns)
    is_meant = sql.among(
        "task", f"SELECT v.task FROM {json_rows.source([runs.c.task], kind)}", kind
    )
    of_lanes = ", ".join(f"r.{c.name}" for c in columns)
    # With NO_PART_SQL, SQLite would use another index
    is_no_part = f"coalesce(origin, '') <> '{Origin.PART}'"
    statement = text(
        f"SELECT {selected} FROM batch_runs WHERE {is_meant} AND {IN_THE_WAY_SQL} "
        f"AND {is_no_part} UNION ALL "
        f"SELECT {of_lanes} FROM {json_rows.source([runs.c.task], kind)} CROSS JOIN batch_runs r "
        f"WHERE r.exclusive = v.task AND {HOLDS_LANE_SQL} AND NOT ({IN_THE_WAY_SQL})"
    )
    parameter = {"rows": json_rows.encode([{"task": name} for name in names], kind)}
    by_task: dict[str, list[Active]] = {}
    for row in await connection.execute(statement.columns(*columns), parameter):
        by_task.setdefault(row.task, []).append(Active(*row))
    return by_task


LISTED = (
    "id",
    "task",
    "slot",
    "origin",
    "state",
    "reason",
    "fingerprint",
    "attempt",
    "node",
    "gate",
    "created_at",
    "started_at",
    "finished_at",
    "attempt_started_at",
    "count",
    "total",
    "message",
    "rate",
    "progress_at",
)


async def get(connection: AsyncConnection, run_id: str) -> dict[str, Any] | None:
    """The row of a run by column name; None if there is no such run."""
    row = (await connection.execute(select(runs).where(runs.c.id == run_id))).mappings().first()
    return dict(row) if row is not None else None


async def latest(connection: AsyncConnection, task: str) -> str | None:
    """The id of the newest run of a task that is not a part; None if it has none."""
    theirs = select(runs.c.id).where(runs.c.task == task, text(NO_PART_SQL))
    newest = theirs.order_by(runs.c.created_at.desc(), runs.c.id.desc()).limit(1)
    run: str | None = (await connection.execute(newest)).scalar()
    return run
