"""Runs that wait: what they wait for, how far that is, which of them are locked before something
changes, and the results of what they have waited for.

A waiting run has not begun, or has been split. It waits for an instant (`due_at`), for slots of
other tasks (rows of `batch_waits`), for the members of its group, or for its parts (runs whose
`awaited_by` is its id). These rows say which of them are over, so there is no counter, and no event
that could be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Integer,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    and_,
    cast,
    func,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import Index

from batch_system.batch.ledger import json_rows, parts
from batch_system.batch.ledger.parts import PartsGate
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.tables import (
    ACTIVE_SQL,
    NO_PART_SQL,
    OF_SLOT_SQL,
    PLAIN_STATE,
    WAITING_SQL,
    is_one_of,
    ledger,
    runs,
)
from batch_system.database import sql
from batch_system.database.types import Id, UtcDateTime

waits = Table(
    "batch_waits",
    ledger,
    Column("run", Id, nullable=False),
    Column("task", String(100), nullable=False),
    Column("slot", UtcDateTime),  # NULL: the task had no slot yet when the run was made
    PrimaryKeyConstraint("run", "task"),
    Index("ix_batch_waits_slot", "task", "slot"),
)


class Gate(StrEnum):
    """Which end of what a run waits for opens it: only if all succeed, or whatever their end."""

    SUCCESS = "success"
    END = "end"


@dataclass(frozen=True)
class WaitingRun:
    """A waiting run that is locked."""

    id: str
    task: str
    slot: datetime | None
    origin: str
    catch_up: bool
    priority: int
    exclusive: str | None
    created_at: datetime
    due_at: datetime
    gate: str | None
    wait_until: datetime | None
    cancel_reason: str | None

    @property
    def is_on_time(self) -> bool:
        """Whether it is the run of a slot that was fired on time, about which the overlap policy
        decides.
        """
        return self.origin == "schedule" and not self.catch_up and not self.is_split

    @property
    def is_split(self) -> bool:
        """Whether it waits for its parts. It has begun, so no overlap policy decides about it."""
        return self.gate in tuple(PartsGate)


@dataclass(frozen=True)
class Members:
    """The members of a group. `first_bad`: the id of the first one that did not succeed."""

    number: int
    active: int
    bad: int
    first_bad: str | None


@dataclass(frozen=True)
class AwaitedSlot:
    """What has become of a slot that a run waits for.

    Attributes:
        run, state: Of the run of that slot; None if there is none.
        is_pending: Whether the slot may still be fired, or its run is active.
        why_none: Why it has no run, if the ledger knows.
        is_known: Whether somebody knows about that already: the slot was missed, or a person has
            paused the task.
    """

    task: str
    slot: datetime | None
    run: str | None
    state: str | None
    is_pending: bool
    why_none: str | None
    is_known: bool = True


NO_TASK = "there is no task "
"""How a reason begins if no process has the task that a run comes after."""

_ITS_RUN = f"FROM batch_runs u WHERE u.task = w.task AND u.slot = w.slot AND u.{OF_SLOT_SQL}"
_PENDING_SLOT = (
    "(SELECT true FROM batch_schedules s WHERE s.task = w.task AND s.valid_until IS NULL "
    "AND s.fired_until < w.slot "
    "AND (SELECT t.paused_at FROM batch_tasks t WHERE t.name = w.task) IS NULL)"
)
_IS_PENDING = f"coalesce((SELECT u.{ACTIVE_SQL} {_ITS_RUN}), {_PENDING_SLOT}, false)"
"""Whether a row `w` of batch_waits is not over: the run of the slot is active, or the slot was not
handled yet.
"""

_COLUMNS = [runs.c[name] for name in WaitingRun.__dataclass_fields__]


def ready_ids(
    kind: str, most: int = 1, locks: bool = False, only: bool = False, first: str | None = None
) -> str:
    """SQL for the ids of up to `most` waiting runs that may be opened or closed at :now. `only`: of
    :only.

    `first`: SQL for the names of tasks; slots on time of other tasks come last, because this node
    must not open them. `locks`: lock them, and leave out those that another transaction has locked.
    A second statement makes the decision, because it sees what was committed before the lock was
    taken.
    """
    # Without INDEXED BY, SQLite would read all runs that wait by the index on states. Scalar
    # subqueries check the conditions for each run; with NOT EXISTS, PostgreSQL would join whole
    # tables. If ordered by the bare ids, PostgreSQL might read the primary key of all runs to find
    # the first one that is ready.
    hint = sql.hint("ix_batch_runs_waits", kind)
    member = (
        f"SELECT m.id FROM batch_runs m WHERE m.awaited_by = r.id AND m.{ACTIVE_SQL} "
        f"AND m.{NO_PART_SQL} LIMIT 1"
    )
    pending = f"SELECT w.task FROM batch_waits w WHERE w.run = r.id AND {_IS_PENDING} LIMIT 1"
    paused = "SELECT t.paused_at FROM batch_tasks t WHERE t.name = r.task"
    are_over = (
        f"CASE WHEN {parts.is_split('r')} THEN {parts.active_one('r')} IS NULL OR "
        f"({parts.fails_fast('r')}) "
    )
    are_over += f"ELSE ({member}) IS NULL AND ({pending}) IS NULL END"
    is_over = f"r.gate IS NULL OR ({are_over})"
    lock = " FOR UPDATE OF r SKIP LOCKED" if locks and kind == "postgresql" else ""
    is_others = (
        f"r.origin = 'schedule' AND NOT r.catch_up AND NOT {parts.is_split('r')} AND r.task NOT "
        f"IN ({first})"
    )
    order = f"CASE WHEN {is_others} THEN 1 ELSE 0 END, " if first is not None else ""
    return (
        f"SELECT r.id FROM batch_runs r{hint} WHERE {WAITING_SQL.replace('state', 'r.state')} "
        "AND r.due_at <= :now "
        f"AND (({is_over}) OR (r.wait_until <= :now AND ({paused}) IS "
        f"NULL)){' AND r.id = :only' if only else ''} "
        f"ORDER BY {order}CAST(r.id AS text) LIMIT {most}{lock}"
    )


async def ready(
    connection: AsyncConnection,
    now: datetime,
    most: int,
    only: str | None = None,
    tasks: Iterable[str] | None = None,
) -> list[WaitingRun]:
    """Lock up to `most` waiting runs that may be opened or closed at `now` (database time), and
    return them.

    `only`: the id of the only run to check. `tasks`: those that this node has loaded, whose slots
    come first. It must not open those of others, and if there are many of these, they must not keep
    it from its own.
    """
    kind = connection.dialect.name
    types = {"now": runs.c.due_at}
    given: dict[str, Any] = {"now": now}
    if only is not None:
        types["only"] = runs.c.id
        given["only"] = only
    first = None
    if tasks is not None:
        given["rows"] = json_rows.encode([{"task": name} for name in tasks], kind)
        first = f"SELECT v.task FROM {json_rows.source([runs.c.task], kind)}"
    locking = sql.statement(
        ready_ids(kind, most, locks=True, only=only is not None, first=first), **types
    ).columns(runs.c.id)
    ids = (await connection.execute(locking, given)).scalars().all()
    return await read(connection, ids)


async def is_any_ready(connection: AsyncConnection, now: datetime) -> bool:
    """Whether some waiting run may be opened or closed at `now`. Locks nothing."""
    looking = sql.statement(ready_ids(connection.dialect.name), now=runs.c.due_at)
    return (await connection.execute(looking, {"now": now})).first() is not None


async def next_due(connection: AsyncConnection, now: datetime, until: datetime) -> datetime | None:
    """The first instant after `now`, and until `until`, at which a waiting run may open."""
    hint = sql.hint("ix_batch_runs_waits", connection.dialect.name)
    first = sql.statement(
        f"SELECT min(due_at) AS due_at FROM batch_runs{hint} WHERE {WAITING_SQL} "
        "AND due_at > :now AND due_at <= :until",
        now=runs.c.due_at,
        until=runs.c.due_at,
    ).columns(runs.c.due_at)
    return (await connection.execute(first, {"now": now, "until": until})).scalar()


async def read(connection: AsyncConnection, ids: Sequence[str]) -> list[WaitingRun]:
    """Those of the runs `ids` that are waiting, by id."""
    if not ids:
        return []
    kind = connection.dialect.name
    columns = ", ".join(column.name for column in _COLUMNS)
    is_waiting = is_one_of([RunState.WAITING], PLAIN_STATE)
    meant = json_rows.is_of_ids("id", kind)
    statement = text(
        f"SELECT {columns} FROM batch_runs WHERE {meant} AND {is_waiting} ORDER BY id"
    ).columns(*_COLUMNS)
    rows = (await connection.execute(statement, json_rows.of_ids(ids, kind))).all()
    return [WaitingRun(*row) for row in rows]


async def members(connection: AsyncConnection, ids: Sequence[str]) -> dict[str, Members]:
    """The members of each of the runs `ids` that has any."""
    kind = connection.dialect.name
    counted = [Column(name, Integer) for name in ("number", "active", "bad")]
    hint = sql.hint("ix_batch_runs_members", kind)
    its = f"FROM batch_runs m{hint} WHERE m.awaited_by = v.id AND m.{NO_PART_SQL}"
    has_ended = f"NOT (m.{ACTIVE_SQL})"
    statement = text(
        f"SELECT v.id, (SELECT count(*) {its}) AS number, (SELECT count(*) {its} "
        f"AND m.{ACTIVE_SQL}) AS active, "
        f"(SELECT count(*) {its} AND m.state <> 'succeeded') AS bad, "
        # If ordered by the bare ids, PostgreSQL would read the primary key of all runs.
        f"(SELECT m.id {its} AND m.state <> 'succeeded' AND {has_ended} "
        "ORDER BY CAST(m.id AS text) LIMIT 1) AS first "
        f"FROM {json_rows.source([runs.c.id], kind)}"
    ).columns(runs.c.id, *counted, Column("first", Id))
    rows = (await connection.execute(statement, json_rows.of_ids(ids, kind))).all()
    return {
        row.id: Members(row.number, row.active, row.bad, row.first) for row in rows if row.number
    }


async def slots(connection: AsyncConnection, ids: Iterable[str]) -> dict[str, list[AwaitedSlot]]:
    """What has become of the slots that the runs `ids` wait for, by run and in the order of the
    tasks' names.
    """
    kind = connection.dialect.name
    missed = (
        "SELECT m.reason FROM batch_missed m WHERE m.task = w.task AND m.last_slot >= w.slot "
        "AND m.first_slot <= w.slot ORDER BY m.last_slot LIMIT 1"
    )
    paused = (
        "SELECT t.paused_by FROM batch_tasks t WHERE t.name = w.task AND t.paused_at IS NOT NULL"
    )
    known = "SELECT t.name FROM batch_tasks t WHERE t.name = w.task AND t.removed_at IS NULL"
    its: list[Column[Any]] = [
        Column("its", Id),
        Column("its_state", String),
        Column("pending", Integer),
    ]
    words = [Column(name, String) for name in ("missed", "paused", "known")]
    meant = json_rows.is_of_ids("w.run", kind)
    statement = text(
        f"SELECT w.run, w.task, w.slot, (SELECT u.id {_ITS_RUN}) AS its, (SELECT u.state "
        f"{_ITS_RUN}) AS its_state, "
        f"{_IS_PENDING} AS pending, ({missed}) AS missed, ({paused}) AS paused, ({known}) AS known "
        f"FROM batch_waits w WHERE {meant} ORDER BY w.run, w.task"
    ).columns(waits.c.run, waits.c.task, waits.c.slot, *its, *words)
    found: dict[str, list[AwaitedSlot]] = {}
    for row in await connection.execute(statement, json_rows.of_ids(ids, kind)):
        why = _why_none(row) if row.its is None else None
        found.setdefault(row.run, []).append(
            AwaitedSlot(
                row.task,
                row.slot,
                row.its,
                row.its_state,
                bool(row.pending),
                why,
                is_known=row.its is not None or (row.missed or row.paused) is not None,
            )
        )
    return found


def _why_none(row: Any) -> str:
    if row.known is None:
        return f"{NO_TASK}{row.task}"
    if row.slot is None:
        return f"{row.task} had no slot before this one"
    if row.missed is not None:
        return f"{row.task} was missed: {row.missed}"
    if row.paused is not None:
        return f"{row.task} is paused by {row.paused}"
    return f"{row.task} has no run of {row.slot:%Y-%m-%d %H:%M} UTC"


async def extend(
    connection: AsyncConnection, task: str, duration: timedelta, now: datetime
) -> None:
    """Let the runs of a task that wait at `now` wait longer by `duration`, the time for which the
    task was paused.
    """
    kind = connection.dialect.name
    # This index reads only the waiting runs whose time has come: neither those of tomorrow nor all
    # runs of the task.
    hint = sql.hint("ix_batch_runs_waits", kind)
    lock = " FOR UPDATE" if kind == "postgresql" else ""
    waiting = sql.statement(
        f"SELECT id, wait_until FROM batch_runs{hint} WHERE {WAITING_SQL} AND due_at <= :now "
        "AND task || '' = :task "
        f"AND wait_until IS NOT NULL ORDER BY CAST(id AS text){lock}",
        now=runs.c.due_at,
    ).columns(runs.c.id, runs.c.wait_until)
    theirs = (await connection.execute(waiting, {"now": now, "task": task})).all()
    rows = [{"id": row.id, "wait_until": row.wait_until + duration} for row in theirs]
    if not rows:
        return
    source = json_rows.source([runs.c.id, runs.c.wait_until], kind)
    statement = (
        f"UPDATE batch_runs SET wait_until = v.wait_until FROM {source} WHERE batch_runs.id = v.id"
    )
    await connection.execute(text(statement), {"rows": json_rows.encode(rows, kind)})


# Locks: runs that wait are found and locked before something that they wait for changes.


async def lock_awaiting(connection: AsyncConnection, ids: Sequence[str]) -> list[str]:
    """Lock the runs that wait, or waited, for the runs `ids`, and these too. Returns the ids of the
    former.

    Call this before an ended run is made active again: then no other transaction can open or close
    what waits for it by its earlier state. A closed run that waits again is also active again, so
    the runs that wait for such a run are included, at any depth.
    """
    found = set(await _awaiting(connection, ids))
    deeper = found
    while deeper:
        deeper = set(await _awaiting(connection, sorted(deeper), _MAY_WAIT_AGAIN)) - found
        found |= deeper
    if found:
        await _lock(connection, found.union(ids))
    return sorted(found)


async def lock_with_members(connection: AsyncConnection, ids: Sequence[str]) -> None:
    """Lock the runs `ids` and the active members of their groups, if there are any, all of them by
    their ids.

    Call this before groups are cancelled. If two transactions locked in two steps, first the
    follow-ups and then their members, they could deadlock.
    """
    if (kind := connection.dialect.name) != "postgresql":
        return
    meant = json_rows.is_of_ids("m.awaited_by", kind)
    members = text(f"SELECT m.id FROM batch_runs m WHERE {meant} AND m.{ACTIVE_SQL}").columns(
        runs.c.id
    )
    found: set[str] = set()
    deeper = set(ids)
    while deeper:
        deeper = (
            set((await connection.execute(members, json_rows.of_ids(deeper, kind))).scalars())
            - found
        )
        found |= deeper
    if found:
        await _lock(connection, found.union(ids))


async def _lock(connection: AsyncConnection, ids: Iterable[str]) -> None:
    if (kind := connection.dialect.name) == "postgresql":
        locked = json_rows.is_of_ids("id", kind)
        statement = text(f"SELECT id FROM batch_runs WHERE {locked} ORDER BY id FOR UPDATE")
        await connection.execute(statement, json_rows.of_ids(ids, kind))


_MAY_WAIT_AGAIN = " AND coalesce(a.state, '') IN ('waiting', 'skipped') AND a.gate IS NOT NULL"
"""Runs `a` that were closed by what they waited for, or may be closed at this moment."""


async def _awaiting(
    connection: AsyncConnection, ids: Sequence[str], are: str = ""
) -> Sequence[str]:
    """The runs that wait, or waited, for those of the runs `ids` that fulfil the condition
    `are`.
    """
    kind = connection.dialect.name
    meant = json_rows.is_of_ids("a.id", kind)
    statement = text(
        f"SELECT a.awaited_by AS id FROM batch_runs a WHERE {meant}{are} "
        f"UNION SELECT w.run FROM batch_runs a CROSS JOIN batch_waits w "
        f"WHERE {meant}{are} AND a.{OF_SLOT_SQL} AND w.task = a.task AND w.slot = a.slot"
    ).columns(runs.c.id)
    found = (await connection.execute(statement, json_rows.of_ids(ids, kind))).scalars()
    return [run for run in found if run is not None]


async def coming_after(connection: AsyncConnection, ids: Sequence[str]) -> list[str]:
    """The runs that wait, or have waited, for the runs `ids`, and those that wait for these, at any
    depth.
    """
    found: set[str] = set(ids)
    asked = list(ids)
    while asked:
        asked = sorted(set(await _awaiting(connection, asked)) - found)
        found |= set(asked)
    return sorted(found - set(ids))


# What a run has waited for, with the results.

PAGE = 200
"""At most this many members are read at once."""
PAGE_SIZE = 2_000_000
"""A page ends with the member that makes its parameters and results as JSON longer than this many
characters.
"""


async def slots_with_results(connection: AsyncConnection, run: str) -> Sequence[Any]:
    """The slots that a run waits for, or has waited for: task, slot, and the id, state, params and
    result of its run.
    """
    is_its = and_(runs.c.task == waits.c.task, runs.c.slot == waits.c.slot, text(OF_SLOT_SQL))
    query = (
        select(waits.c.task, waits.c.slot, runs.c.id, runs.c.state, runs.c.params, runs.c.result)
        .select_from(waits.outerjoin(runs, is_its))
        .where(waits.c.run == run)
        .order_by(waits.c.task)
    )
    return (await connection.execute(query)).all()


async def members_with_results(
    connection: AsyncConnection, run: str, after: str | None, parts: bool = False
) -> Sequence[Any]:
    """The next members of the group of a run, by id, with the same columns and `part`.

    `after`: the id of the last one before. `parts`: the parts of the run instead.
    """
    columns = [runs.c[name] for name in ("task", "slot", "id", "state", "params", "result", "part")]
    of_page = select(*columns, _size_of(runs.c.params, runs.c.result).label("size")).where(
        runs.c.awaited_by == run
    )
    of_page = of_page.where(text(f"origin = '{Origin.PART}'" if parts else NO_PART_SQL))
    if after is not None:
        of_page = of_page.where(runs.c.id > after)
    page = (
        of_page.with_hint(runs, "INDEXED BY ix_batch_runs_members", "sqlite")
        .order_by(runs.c.id)
        .limit(PAGE)
    )
    sized = page.subquery()
    before = func.sum(sized.c.size).over(order_by=sized.c.id) - sized.c.size
    bounded = select(sized, before.label("before")).subquery()
    query = select(*(bounded.c[column.name] for column in columns)).where(
        bounded.c.before < PAGE_SIZE
    )
    return (await connection.execute(query.order_by(bounded.c.id))).all()


def _size_of(*columns: ColumnElement[Any]) -> ColumnElement[int]:
    sizes = [func.coalesce(func.length(cast(column, Text)), 0) for column in columns]
    return sizes[0] + sizes[1]
