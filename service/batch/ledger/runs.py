"""Runs: new ones, and queries on those that are there. What changes the state of a run is in transitions.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, queues
from service.batch.ledger.states import Origin, Rank, RunState
from service.batch.ledger.tables import IN_THE_WAY_SQL, new_id, runs


@dataclass
class NewRun:
    """A row to be inserted. It is made by `scheduled`, `queued` or `running`; what it is then may change until it is
    inserted: a node starts it at once, or a policy skips or cancels it. Instants are of the database's time.
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
    started_at: datetime | None = None
    attempt_started_at: datetime | None = None
    finished_at: datetime | None = None

    @classmethod
    def scheduled(
        cls, task: str, slot: datetime, now: datetime, *, catch_up: bool, exclusive: str | None, priority: int
    ) -> NewRun:
        """The run of a slot that is due. `catch_up`: the slot was missed first."""
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
        """A run that somebody asked for, and that any node with the task takes. `key`: of which the task has one run.

        `is_backfill`: it fills a slot of the past, behind all other runs. `parent`: the run whose code asked for it.
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
        )

    @classmethod
    def running(cls, node: str, task: str, slot: datetime | None, now: datetime, **asked: Any) -> NewRun:
        """A run that a node starts at once. `asked`: as for `queued`."""
        new = cls.queued(task, slot, now, **asked)
        new.start(node, now)
        return new

    def start(self, node: str, now: datetime) -> None:
        """Let this node start it at once, instead of any node later."""
        self.state, self.node, self.fence, self.attempt = RunState.RUNNING, node, 1, 1
        self.started_at = self.attempt_started_at = now

    def skip(self, reason: str, now: datetime) -> None:
        """It does not run, since others of its task are in its way."""
        self.state, self.reason, self.finished_at = RunState.SKIPPED, reason, now

    def cancel(self, reason: str, now: datetime) -> None:
        self.state, self.reason, self.finished_at = RunState.CANCELLED, reason, now


@dataclass(slots=True)
class Claimed:
    """A run that this node works on now, under `fence`."""

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
    """Attempts up to a person's last retry: those that its task allows count from there."""


def claimed_from(new: NewRun) -> Claimed:
    """The claim that goes with a row that was inserted as running."""
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
    )


@dataclass(frozen=True)
class Active:
    id: str
    task: str
    slot: datetime | None
    state: str
    origin: str
    catch_up: bool
    lane: int


def locked_by_id(wanted: str, kind: str) -> str:
    """A condition on batch_runs, for an UPDATE or a DELETE of several: locks them by id, so that two never deadlock."""
    if kind != "postgresql":
        return wanted
    return f"batch_runs.id = ANY(ARRAY(SELECT id FROM batch_runs WHERE {wanted} ORDER BY id FOR UPDATE))"


async def insert(connection: AsyncConnection, new: Sequence[NewRun]) -> set[str]:
    """Insert runs; a slot that has its run already is left alone. Returns the ids that went in."""
    conflict = "(task, slot) WHERE origin <> 'manual'"
    return set(await json_rows.insert(connection, runs, [vars(run) for run in new], conflict, runs.c.id))


async def insert_once(connection: AsyncConnection, new: NewRun) -> str:
    """Insert a run, and return its id; where its task has a run with its key already, that one's."""
    inserted = await json_rows.insert(connection, runs, [vars(new)], "(task, key) WHERE key IS NOT NULL", runs.c.id)
    if inserted:
        return new.id
    known = select(runs.c.id).where(runs.c.task == new.task, runs.c.key == new.key)
    return str((await connection.execute(known)).scalar_one())


async def active(connection: AsyncConnection, names: Iterable[str]) -> dict[str, list[Active]]:
    """The runs of these tasks that are running, and the on-time ones that are active, by task.

    Not what waits behind them: that may be a long catch-up.
    """
    kind = connection.dialect.name
    columns = [runs.c[name] for name in Active.__dataclass_fields__]
    listed = ", ".join(c.name for c in columns)
    named = queues.among("task", f"SELECT v.task FROM {json_rows.source([runs.c.task], kind)}", kind)
    statement = text(f"SELECT {listed} FROM batch_runs WHERE {named} AND {IN_THE_WAY_SQL}")
    parameter = {"rows": json_rows.encode([{"task": name} for name in names], kind)}
    found: dict[str, list[Active]] = {}
    for row in await connection.execute(statement.columns(*columns), parameter):
        found.setdefault(row.task, []).append(Active(*row))
    return found


PROGRESS_COLUMNS = ("count", "total", "count_before", "message", "progress_at")
PROGRESS = (
    "total = CASE WHEN v.count IS NULL THEN batch_runs.total ELSE v.total END, "
    "count = coalesce(v.count, batch_runs.count), "
    "count_before = coalesce(v.count_before, batch_runs.count_before), "
    "message = CASE WHEN v.count_before IS NULL THEN batch_runs.message ELSE v.message END, "
    "progress_at = coalesce(v.progress_at, batch_runs.progress_at)"
)
"""What was never said leaves the row as it is; `count_before` is there as soon as something was."""


def is_running(kind: str) -> str:
    """The condition that a run, which is found by its id, is running."""
    # The + keeps SQLite from driving the join by the index on state, which is quadratic.
    return "+batch_runs.state = 'running'" if kind == "sqlite" else "batch_runs.state = 'running'"


async def mirror_progress(connection: AsyncConnection, progress: list[dict[str, Any]]) -> None:
    """Write how far running runs are: `id`, `fence`, PROGRESS_COLUMNS and `rate` of each."""
    if not progress:
        return
    kind = connection.dialect.name
    columns = [runs.c[name] for name in ("id", "fence", "rate", *PROGRESS_COLUMNS)]
    statement = text(
        f"UPDATE batch_runs SET {PROGRESS}, rate = v.rate FROM {json_rows.source(columns, kind)} "
        f"WHERE batch_runs.id = v.id AND batch_runs.fence = v.fence AND {is_running(kind)}"
    )
    await connection.execute(statement, {"rows": json_rows.encode(progress, kind)})


LISTED = (
    *("id", "task", "slot", "origin", "state", "reason", "attempt", "node"),
    *("created_at", "started_at", "finished_at"),
    *("attempt_started_at", "count", "total", "message", "rate", "progress_at"),
)


def listing(
    task: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    limit: int = 50,
    before: tuple[datetime, str] | None = None,
) -> Select[Any]:
    """Runs, newest first. `before` is the (created_at, id) of the last row of the page before."""
    statement = select(*(runs.c[name] for name in LISTED)).order_by(runs.c.created_at.desc(), runs.c.id.desc())
    if task is not None:
        statement = statement.where(runs.c.task == task)
    if state is not None:
        statement = statement.where(runs.c.state == state)
    if since is not None:
        statement = statement.where(runs.c.created_at >= since)
    if before is not None:
        at, last = before
        statement = statement.where((runs.c.created_at < at) | ((runs.c.created_at == at) & (runs.c.id < last)))
    return statement.limit(limit)


async def get(connection: AsyncConnection, run_id: str) -> dict[str, Any] | None:
    row = (await connection.execute(select(runs).where(runs.c.id == run_id))).mappings().first()
    return dict(row) if row is not None else None


async def begin_with(connection: AsyncConnection, prefix: str, limit: int) -> list[dict[str, Any]]:
    """Runs whose id begins with these hex digits (at most 32, without dashes), newest first; at most `limit`."""
    low, high = (_as_id(prefix.ljust(32, filler)) for filler in "0f")
    columns = (runs.c.id, runs.c.task, runs.c.state, runs.c.created_at)
    statement = select(*columns).where(runs.c.id.between(low, high)).order_by(runs.c.id.desc()).limit(limit)
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


def _as_id(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


async def latest(connection: AsyncConnection, task: str) -> str | None:
    """The id of the newest run of a task."""
    newest = select(runs.c.id).where(runs.c.task == task).order_by(runs.c.created_at.desc(), runs.c.id.desc())
    run: str | None = (await connection.execute(newest.limit(1))).scalar()
    return run
