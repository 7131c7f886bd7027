"""Chains of runs that wait for each other: what comes before some runs, what comes after them, and
what is in the way.

A chain may be of any length and width. Each query here is about one step of it, and is limited.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Integer, Row, String, bindparam, select
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, queues, waits
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import NO_PART_SQL, OF_SLOT_SQL, runs
from service.batch.ledger.waits import Gate, Upstream
from service.database.types import Id

DEEPEST = 10
"""So many steps of a chain are followed at most."""
MAY_HAVE_CAUSE = (RunState.WAITING, RunState.SKIPPED)
"""A run in one of these states is in the way because of what is in its own way."""
MOST_BEFORE = 500
"""The causes of at most this many runs are looked for."""

_HELD = (
    "((coalesce(b.state, '') = 'waiting' AND b.gate = 'success') OR (coalesce(b.state, '') = "
    "'skipped' AND b.gate "
)
_HELD += "IS NOT NULL))"
"""Whether a run `b` is held back by what it waits for: it waits for a success, or was closed and
may wait again.
"""
# With the bare column PostgreSQL might read all members of all groups, by their index.
_AWAITED_BY = "nullif(a.awaited_by, a.id)"
_COLUMNS: list[Column[Any]] = [
    Column("before", Id),
    *(runs.c[name] for name in ("id", "task", "slot", "state")),
]


async def after(
    connection: AsyncConnection, ids: Collection[str], most: int, *, only_held: bool = False
) -> Sequence[Row[Any]]:
    """The runs that wait, or have waited, for the runs `ids`: at most `most`, each with the id of
    the run `before` it.

    `only_held`: only those that it holds back as long as it has not succeeded.
    """
    if not ids:
        return []
    kind = connection.dialect.name
    meant = queues.among("a.id", f"SELECT v.id FROM {json_rows.source([runs.c.id], kind)}", kind)
    held = f" AND {_HELD}" if only_held else ""
    selected = "SELECT a.id AS before, b.id, b.task, b.slot, b.state FROM batch_runs a CROSS JOIN"
    statement = sql(
        f"SELECT * FROM ({selected} batch_waits w CROSS JOIN batch_runs b WHERE {meant} "
        f"AND a.{OF_SLOT_SQL} "
        f"AND w.task = a.task AND w.slot = a.slot AND b.id = w.run{held} "
        f"UNION ALL {selected} batch_runs b WHERE {meant} AND a.{NO_PART_SQL} "
        f"AND b.id = {_AWAITED_BY}{held}) "
        f"AS found LIMIT {most}"
    ).columns(*_COLUMNS)
    return (await connection.execute(statement, json_rows.of_ids(ids, kind))).all()


async def before(
    connection: AsyncConnection, ids: Collection[str], most: int
) -> Sequence[Row[Any]]:
    """The slots that the runs `ids` wait for, or have waited for, each with its run if it has one.
    At most `most`.
    """
    if not ids:
        return []
    kind = connection.dialect.name
    meant = queues.among("w.run", f"SELECT v.id FROM {json_rows.source([runs.c.id], kind)}", kind)
    statement = sql(
        "SELECT DISTINCT u.id, w.task, w.slot, u.state FROM batch_waits w LEFT JOIN batch_runs u "
        f"ON u.task = w.task AND u.slot = w.slot AND u.{OF_SLOT_SQL} WHERE {meant} LIMIT {most}"
    ).columns(*_COLUMNS[1:])
    return (await connection.execute(statement, json_rows.of_ids(ids, kind))).all()


async def members(connection: AsyncConnection, run: str, most: int) -> Sequence[Row[Any]]:
    """The members of the group of a run by task and state, with their number; of this many at most.
    Parts are none.
    """
    hint = "INDEXED BY ix_batch_runs_members " if connection.dialect.name == "sqlite" else ""
    statement = sql(
        "SELECT task, state, count(*) AS number, min(CAST(id AS text)) AS id "
        "FROM (SELECT id, task, state "
        f"FROM batch_runs {hint}WHERE awaited_by = :run AND {NO_PART_SQL} LIMIT {most}) AS found "
        "GROUP BY task, state ORDER BY task, state"
    ).columns(runs.c.task, runs.c.state, Column("number", Integer), Column("id", String))
    typed = statement.bindparams(bindparam("run", type_=runs.c.id.type))
    return (await connection.execute(typed, {"run": run})).all()


async def in_the_way(connection: AsyncConnection, ids: Iterable[str]) -> dict[str, Upstream]:
    """For each of the runs `ids` that waits or was closed, and for those that are in their way:
    what is in its way.

    Of several slots it is the one for which most has to be done: one that has failed comes before
    one that runs.
    """
    found: dict[str, Upstream] = {}
    asked = list(ids)[:MOST_BEFORE]
    for _ in range(DEEPEST):
        if not asked:
            break
        following = []
        ends = await _opened_by_any_end(connection, asked)
        for run, slots in (await waits.upstreams(connection, asked)).items():
            wrong = [
                each
                for each in slots
                if (each.is_pending if run in ends else each.state != RunState.SUCCEEDED)
            ]
            if wrong:
                found[run] = min(wrong, key=_badness)
                following.append(found[run])
        asked = [
            each.run
            for each in following
            if each.run not in found and each.run and each.state in MAY_HAVE_CAUSE
        ]
        asked = list(dict.fromkeys(asked))[:MOST_BEFORE]
    return found


async def _opened_by_any_end(connection: AsyncConnection, ids: Sequence[str]) -> set[str]:
    """Those of the runs `ids` that are opened by any end of what they wait for, whether it succeeds
    or not.
    """
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    query = select(runs.c.id, runs.c.gate).where(theirs)
    return {row.id for row in await connection.execute(query) if row.gate == Gate.END}


def root(found: Mapping[str, Upstream], run: str) -> Upstream | None:
    """What is in the way of a run at the beginning of its chain. `found`: what `in_the_way` has
    returned.
    """
    blocker, seen = found.get(run), {run}
    while (
        blocker is not None
        and blocker.run is not None
        and blocker.run in found
        and blocker.run not in seen
    ):
        seen.add(blocker.run)
        blocker = found[blocker.run]
    return blocker


_WORST_FIRST: tuple[str | None, ...] = (
    RunState.FAILED,
    RunState.CANCELLED,
    RunState.SKIPPED,
    None,
    RunState.RETRYING,
    RunState.INTERRUPTED,
)


def _badness(upstream: Upstream) -> int:
    state = upstream.state
    return _WORST_FIRST.index(state) if state in _WORST_FIRST else len(_WORST_FIRST)
