"""Parts: the runs into which a partitioned run is split, and for which it waits.

A part is a member of its parent: its `awaited_by` is the parent, its `origin` is "part", and it has
no slot. The parent gets its gate in the transaction that stores its split. There is no counter: the
rows of the parts say which of them have ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, Integer, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.states import ACTIVE, FINAL, Origin, RunState
from batch_system.batch.ledger.tables import (
    ACTIVE_SQL,
    NO_PART_SQL,
    RUNNING_SQL,
    attempts,
    pruned,
    runs,
)
from batch_system.database import sql
from batch_system.database.types import new_id

MOST_NAMED = 10
"""How many parts are named in the reason of their parent."""


class PartsGate(StrEnum):
    """The gate of a run that was split. FAIL_FAST: the first part that does not succeed cancels the
    others.
    """

    PARTS = "parts"
    FAIL_FAST = "fail_fast"


@dataclass(frozen=True)
class Split:
    """What a run was split into.

    Attributes:
        exclusive: The queue of the parts, whose lanes bound how many of them run at once.
        params: The parameters of each part, in their order, as JSON values. None: the run was split
            before, and its parts that did not succeed are run again.
    """

    gate: PartsGate
    exclusive: str
    params: Sequence[Mapping[str, Any]] | None = None

    def rows(self, kind: str) -> str:
        """The value of :rows for `insert`. Call it in a thread, because encoding 10,000 parts takes
        a while.
        """
        ids = sorted(new_id() for _ in self.params or ())
        parts = enumerate(zip(ids, self.params or (), strict=True), start=1)
        return json_rows.encode(
            ({"id": run, "part": number, "params": given} for number, (run, given) in parts), kind
        )


@dataclass(frozen=True)
class Tally:
    """How many parts a run has by their state, and the sums of their progress.

    `count` is None if none has reported any, and `total` unless all have reported one: with the sum
    of only some totals, the run would seem further than it is.
    """

    states: Mapping[str, int]
    count: int | None = None
    total: int | None = None

    @property
    def number(self) -> int:
        return sum(self.states.values())

    @property
    def active(self) -> int:
        return sum(self.states.get(state, 0) for state in ACTIVE)

    @property
    def bad(self) -> int:
        return self.number - self.active - self.states.get(RunState.SUCCEEDED, 0)


def began_at(run: Any) -> datetime | None:
    """When the last attempt of a run began. For a run that was split, the first attempt counts,
    because the last one is its join.

    `run`: with its `gate`, `started_at` and `attempt_started_at`.
    """
    began: datetime | None = run.started_at if run.gate in _GATES else run.attempt_started_at
    return began


def seconds_taken(run: Any) -> float | None:
    """How long the last attempt of a run took; for a run that was split, the time from its split to
    its end. None: it goes on, or never began.

    `run`: as `began_at` needs it, with its `finished_at`.
    """
    began = began_at(run)
    if run.finished_at is None or began is None:
        return None
    seconds: float = (run.finished_at - began).total_seconds()
    return seconds


_GATES = frozenset(map(str, PartsGate))
_GATES_SQL = ", ".join(repr(gate) for gate in sorted(_GATES))
BAD = tuple(state for state in FINAL if state != RunState.SUCCEEDED)
_IS_BAD = f"IN ({', '.join(repr(str(state)) for state in BAD)})"


def is_split(run: str = "batch_runs") -> str:
    """The condition that a run was split, so that it has, or had, parts. `run`: the alias of
    batch_runs.
    """
    return f"coalesce({run}.gate, '') IN ({_GATES_SQL})"


def _of(run: str) -> str:
    return f"m.awaited_by = {run}.id AND m.origin = '{Origin.PART}'"


def active_one(run: str = "batch_runs", also: str = "true") -> str:
    """SQL for the id of an active part of a run; NULL without one."""
    return f"(SELECT m.id FROM batch_runs m WHERE {_of(run)} AND m.{ACTIVE_SQL} AND {also} LIMIT 1)"


def fails_fast(run: str) -> str:
    """The condition that a part of a run did not succeed, and that others still have to be
    cancelled because of it.
    """
    bad = f"(SELECT m.id FROM batch_runs m WHERE {_of(run)} AND m.state {_IS_BAD} LIMIT 1)"
    unasked = active_one(run, "m.cancel_at IS NULL")
    return f"{run}.gate = '{PartsGate.FAIL_FAST}' AND {bad} IS NOT NULL AND {unasked} IS NOT NULL"


_HAS_RUNNING = f"{is_split()} AND {active_one(also=f'm.{RUNNING_SQL}')} IS NOT NULL"
GOES_ON = f"({RUNNING_SQL} OR (state = '{RunState.WAITING}' AND {_HAS_RUNNING}))"
"""The condition that a cancel of a run has to wait: until its attempt ends, or until none of its
parts is running.
"""
HAS_NO_ACTIVE = f"(NOT ({is_split()}) OR {active_one()} IS NULL)"
"""The condition that no part of a run is active, if it was split."""
_PARENT_STATE = (
    "(SELECT p.state FROM batch_runs p WHERE p.id = batch_runs.awaited_by AND p.cancel_at IS NULL)"
)
MAY_REOPEN = f"{HAS_NO_ACTIVE} AND ({NO_PART_SQL} OR {_PARENT_STATE} = '{RunState.WAITING}')"
"""The condition that a run may be queued again: a part only while its parent waits for it, and is
not cancelled.
"""


_MOST, _MILLION = 2**63 - 1, 10**6


def _sum(name: str) -> str:
    """SQL for the sum of a column of parts, or for the largest number that a column holds if that
    is less.

    On both databases, a plain sum fails if it does not fit into the column, such as with two totals
    that stand for "not known". Then no run could be opened in the same transaction.
    """
    millions, rest = f"sum(m.{name} / {_MILLION})", f"sum(m.{name} % {_MILLION})"
    fits = f"{millions} < {_MOST // _MILLION - _MILLION}"
    return (
        f"CASE WHEN NOT ({fits}) THEN {_MOST} ELSE CAST({millions} * {_MILLION} + {rest} AS "
        "bigint) END"
    )


def _set(name: str, value: str) -> str:
    return (
        f"{name} = coalesce((SELECT {value} FROM batch_runs m "
        f"WHERE {_of('batch_runs')}), batch_runs.{name})"
    )


_TOTAL = f"CASE WHEN count(m.total) = count(*) THEN {_sum('total')} END"
PROGRESS = f"{_set('count', _sum('count'))}, {_set('total', _TOTAL)}"
"""The SET clause for the progress of a run whose parts are over: the sums of theirs, as in a Tally.
"""


async def insert(
    connection: AsyncConnection, parent: str, split: Split, rows: str, now: datetime
) -> None:
    """Insert the parts of a run, whose row the caller has locked. `rows`: as `Split.rows` returns
    them.

    They have the creation time of their parent, so a pause that holds their parent holds them, too.
    """
    source = json_rows.source([runs.c.id, runs.c.params, runs.c.part], connection.dialect.name)
    new = {
        "state": f"'{RunState.QUEUED}'",
        "origin": f"'{Origin.PART}'",
        "parent": "p.id",
        "awaited_by": "p.id",
        "id": "v.id",
        "params": "v.params",
        "part": "v.part",
        "exclusive": ":exclusive",
        "due_at": ":now",
        "task": "p.task",
        "priority": "p.priority",
        "rank": "p.rank",
        "catch_up": "p.catch_up",
        "requested_by": "p.requested_by",
        "traceparent": "p.traceparent",
        "created_at": "p.created_at",
    }
    statement = sql.statement(
        f"INSERT INTO batch_runs ({', '.join(new)}) SELECT {', '.join(new.values())} "
        f"FROM batch_runs p CROSS JOIN {source} WHERE p.id = :parent",
        parent=runs.c.id,
        now=runs.c.due_at,
        exclusive=runs.c.exclusive,
    )
    given = {"rows": rows, "parent": parent, "exclusive": split.exclusive, "now": now}
    await connection.execute(statement, given)


_MEMBERS = "ix_batch_runs_members"


def _of_parent(kind: str, columns: str, also: str, **types: Column[Any]) -> TextClause:
    """The query of these columns of the parts `m` of the run :parent. `also`: what follows that
    condition. `types`: of further parameters.
    """
    return sql.statement(
        f"SELECT {columns} FROM batch_runs m{sql.hint(_MEMBERS, kind)} "
        f"WHERE m.awaited_by = :parent AND m.origin = '{Origin.PART}' {also}",
        parent=runs.c.id,
        **types,
    )


def _of_parents(kind: str) -> str:
    """The FROM clause and the condition for the parts `m` of the runs in :rows."""
    return (
        f"FROM batch_runs m{sql.hint(_MEMBERS, kind)} "
        f"WHERE {json_rows.is_of_ids('m.awaited_by', kind)} AND m.origin = '{Origin.PART}'"
    )


async def tallies(connection: AsyncConnection, ids: Iterable[str]) -> dict[str, Tally]:
    """The parts of each of the runs `ids`, without those that have none."""
    kind = connection.dialect.name
    counted = [Column(name, Integer) for name in ("number", "done", "of", "totals")]
    statement = text(
        f"SELECT m.awaited_by, m.state, count(*) AS number, {_sum('count')} AS done, "
        f'{_sum("total")} AS "of", count(m.total) AS totals {_of_parents(kind)} '
        "GROUP BY m.awaited_by, m.state"
    ).columns(runs.c.awaited_by, runs.c.state, *counted)
    rows = (await connection.execute(statement, json_rows.of_ids(ids, kind))).all()
    by_run: dict[str, list[Any]] = {}
    for row in rows:
        by_run.setdefault(row.awaited_by, []).append(row)
    return {run: _tally(theirs) for run, theirs in by_run.items()}


def _tally(rows: Sequence[Any]) -> Tally:
    counts = [row.done for row in rows if row.done is not None]
    states = {row.state: row.number for row in rows}
    have_totals = sum(row.totals for row in rows) == sum(states.values())
    return Tally(
        states,
        sum(counts) if counts else None,
        sum(row.of for row in rows) if have_totals else None,
    )


SEVERE = (
    RunState.SUCCEEDED,
    RunState.QUEUED,
    RunState.INTERRUPTED,
    RunState.RETRYING,
    RunState.RUNNING,
    RunState.CANCELLED,
    RunState.FAILED,
)
"""The states of parts. When several parts are shown as one, the last of these states is shown."""


async def states_in_order(
    connection: AsyncConnection, parent: str, number: int, most: int
) -> list[RunState]:
    """The states of the parts of a run, which has `number` of them, in their order: at most `most`
    groups of parts.
    """
    severity = " ".join(f"WHEN '{state}' THEN {at}" for at, state in enumerate(SEVERE))
    query = _of_parent(
        connection.dialect.name,
        f"(m.part - 1) * {min(number, most)} / {max(1, number)} AS cell, "
        f"max(CASE m.state {severity} ELSE 0 END) AS severity",
        "GROUP BY 1 ORDER BY 1",
    )
    rows = (await connection.execute(query, {"parent": parent})).all()
    return [SEVERE[row.severity] for row in rows]


SHOWN = ("id", "part", "state", "reason", "attempt", "started_at", "finished_at", "count", "total")


async def of_run(connection: AsyncConnection, parent: str, most: int) -> Sequence[Any]:
    """Up to `most` parts of a run: those that did not succeed first, then running ones, then the
    slowest ones.

    This reads all parts of the run, which are at most 10,000.
    """
    columns = [runs.c[name] for name in SHOWN]
    took = "m.finished_at - m.started_at"
    if connection.dialect.name == "sqlite":
        took = "julianday(m.finished_at) - julianday(m.started_at)"
    query = _of_parent(
        connection.dialect.name,
        ", ".join(f"m.{column.name}" for column in columns),
        f"ORDER BY CASE WHEN m.state {_IS_BAD} THEN 0 WHEN m.state = '{RunState.SUCCEEDED}' THEN "
        "2 ELSE 1 END, "
        f"m.state <> '{RunState.FAILED}', m.started_at IS NULL, {took} DESC, m.started_at, "
        f"m.part LIMIT {most}",
    )
    return (await connection.execute(query.columns(*columns), {"parent": parent})).all()


async def not_succeeded(
    connection: AsyncConnection, parent: str, most: int | None = None
) -> Sequence[Any]:
    """`id`, `part` and `state` of the parts of a run that have ended without success, in the order
    of their numbers.

    Failed ones are the first.
    """
    limit = f" LIMIT {most}" if most is not None else ""
    query = _of_parent(
        connection.dialect.name,
        "m.id, m.part, m.state",
        f"AND m.state {_IS_BAD} ORDER BY m.state <> '{RunState.FAILED}', m.part{limit}",
    ).columns(runs.c.id, runs.c.part, runs.c.state)
    return (await connection.execute(query, {"parent": parent})).all()


async def active_ids(connection: AsyncConnection, parent: str) -> list[str]:
    """The active parts of a run, by id, without a request to stop."""
    query = _of_parent(
        connection.dialect.name,
        "m.id",
        f"AND m.{ACTIVE_SQL} AND m.cancel_at IS NULL ORDER BY CAST(m.id AS text)",
    ).columns(runs.c.id)
    return list((await connection.execute(query, {"parent": parent})).scalars())


async def startable_ids(
    connection: AsyncConnection, parent: str, now: datetime, most: int
) -> list[str]:
    """Up to `most` parts of a run that may start at `now`, the first ones first."""
    query = _of_parent(
        connection.dialect.name,
        "m.id",
        "AND (m.state IN ('queued', 'interrupted') OR (m.state = 'retrying' AND m.due_at <= "
        f":now)) ORDER BY m.part LIMIT {most}",
        now=runs.c.due_at,
    ).columns(runs.c.id)
    return list((await connection.execute(query, {"parent": parent, "now": now})).scalars())


async def fingerprint(connection: AsyncConnection, part: str) -> str | None:
    """What is wrong with a part that has failed, as a class of errors, by which the watch notices
    its parent.
    """
    own = attempts.select().where(attempts.c.run == part).order_by(attempts.c.fence.desc()).limit(1)
    row = (await connection.execute(own)).first()
    return row.error.get("fingerprint") if row is not None and row.error else None


async def remove(connection: AsyncConnection, parents: Iterable[str]) -> None:
    """Delete the parts of runs that are split anew. The next pruning deletes what belongs to them
    elsewhere.
    """
    kind = connection.dialect.name
    theirs = f"SELECT m.id {_of_parents(kind)}"
    parameter = json_rows.of_ids(parents, kind)
    for statement in (
        f"INSERT INTO {pruned.name} (run) {theirs}",
        f"DELETE FROM batch_attempts WHERE {sql.among('run', theirs, kind)}",
        f"DELETE FROM batch_runs WHERE {sql.among('id', theirs, kind)}",
    ):
        await connection.execute(text(statement), parameter)
