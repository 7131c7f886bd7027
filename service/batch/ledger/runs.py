"""Every query on runs and their attempts. Each change of state is one statement that says from which state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, queues, tables
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import IN_THE_WAY_SQL, runs


@dataclass
class NewRun:
    """A row to be inserted. With state `running` the node starts it at once."""

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


@dataclass(slots=True)
class Outcome:
    """How one attempt ended, and the state that follows for its run."""

    id: str
    fence: int
    state: RunState
    outcome: str
    number: int
    node: str
    task: str
    started_at: datetime
    ended_at: datetime
    reason: str | None = None
    result: Any = None
    error: dict[str, Any] | None = None
    due_at: datetime | None = None
    rank: int | None = None
    count: int | None = None
    total: int | None = None
    count_before: int | None = None
    message: str | None = None
    progress_at: datetime | None = None


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
FINISH_COLUMNS = ("id", "fence", "state", "reason", "result", "due_at", "rank", "finished_at", *PROGRESS_COLUMNS)
PROGRESS = (
    "total = CASE WHEN v.count IS NULL THEN batch_runs.total ELSE v.total END, "
    "count = coalesce(v.count, batch_runs.count), "
    "count_before = coalesce(v.count_before, batch_runs.count_before), "
    "message = CASE WHEN v.count_before IS NULL THEN batch_runs.message ELSE v.message END, "
    "progress_at = coalesce(v.progress_at, batch_runs.progress_at)"
)
"""What was never said leaves the row as it is; `count_before` is there as soon as something was."""
ATTEMPT_COLUMNS = ("run", "fence", "number", "node", "started_at", "ended_at", "outcome", "error")


async def finish(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Write how attempts ended. Returns those that bounced: another node holds their run now.

    A run that somebody asked to cancel does not go on: what would be retried or resumed is cancelled.
    """
    if not outcomes:
        return []
    kind = connection.dialect.name
    is_dropped = "batch_runs.cancel_reason IS NOT NULL AND v.state IN ('retrying', 'interrupted')"
    statement = text(
        f"UPDATE batch_runs SET state = CASE WHEN {is_dropped} THEN 'cancelled' ELSE v.state END, "
        f"reason = CASE WHEN {is_dropped} THEN batch_runs.cancel_reason ELSE v.reason END, result = v.result, "
        f"finished_at = CASE WHEN {is_dropped} THEN v.ended_at ELSE v.finished_at END, "
        "due_at = coalesce(v.due_at, batch_runs.due_at), rank = coalesce(v.rank, batch_runs.rank), "
        f"{PROGRESS}, rate = NULL "
        f"FROM {json_rows.source([*(runs.c[n] for n in FINISH_COLUMNS), tables.attempts.c.ended_at], kind)} "
        f"WHERE batch_runs.id = v.id AND batch_runs.fence = v.fence AND {_running(kind)} RETURNING batch_runs.id"
    )
    by_id = sorted(outcomes, key=lambda outcome: outcome.id)  # as who cancels several, so that two seldom deadlock
    encoded = json_rows.encode(map(_finish_row, by_id), kind)
    written = set((await connection.execute(statement.columns(runs.c.id), {"rows": encoded})).scalars())
    ended = [_attempt_row(outcome) for outcome in outcomes if outcome.id in written]
    await json_rows.insert(connection, tables.attempts, ended, "(run, fence)")
    if len(written) == len(outcomes):
        return []
    return await _bounced(connection, [outcome for outcome in outcomes if outcome.id not in written])


def _running(kind: str) -> str:
    # The + keeps SQLite from driving the join by the index on state, which is quadratic.
    return "+batch_runs.state = 'running'" if kind == "sqlite" else "batch_runs.state = 'running'"


def _finish_row(outcome: Outcome) -> dict[str, Any]:
    row = {name: getattr(outcome, name, None) for name in FINISH_COLUMNS}
    row["ended_at"] = outcome.ended_at
    row["finished_at"] = None if outcome.due_at is not None else outcome.ended_at
    return row


def _attempt_row(outcome: Outcome) -> dict[str, Any]:
    return {**{name: getattr(outcome, name, None) for name in ATTEMPT_COLUMNS}, "run": outcome.id}


async def _bounced(connection: AsyncConnection, outcomes: list[Outcome]) -> list[Outcome]:
    """Without those that are in the ledger already: the reply to their COMMIT was lost, not their lease."""
    known = select(*(tables.attempts.c[name] for name in ("run", "fence", "outcome"))).where(
        tables.attempts.c.run.in_([outcome.id for outcome in outcomes])
    )
    there = {tuple(row) for row in await connection.execute(known)}
    return [outcome for outcome in outcomes if (outcome.id, outcome.fence, outcome.outcome) not in there]


async def mirror_progress(connection: AsyncConnection, progress: list[dict[str, Any]]) -> None:
    """Write how far running runs are: `id`, `fence`, PROGRESS_COLUMNS and `rate` of each."""
    if not progress:
        return
    kind = connection.dialect.name
    columns = [runs.c[name] for name in ("id", "fence", "rate", *PROGRESS_COLUMNS)]
    statement = text(
        f"UPDATE batch_runs SET {PROGRESS}, rate = v.rate FROM {json_rows.source(columns, kind)} "
        f"WHERE batch_runs.id = v.id AND batch_runs.fence = v.fence AND {_running(kind)}"
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
