"""Chains of runs that wait for each other: what comes before some runs, what comes after them, what
is in the way, and what failed runs keep back.

A chain may be of any length and width. Each query here is about one step of it, and is limited.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import Column, Integer, Row, String, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger import json_rows, waits
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import NO_PART_SQL, OF_SLOT_SQL, OPEN_FAILURE_SQL, runs
from batch_system.batch.ledger.waits import AwaitedSlot, Gate
from batch_system.database import sql
from batch_system.database.types import Id

DEEPEST = 10
"""At most this many steps of a chain are followed."""
MAY_HAVE_CAUSE = (RunState.WAITING, RunState.SKIPPED)
"""A run in one of these states is in the way because of what is in its own way."""
MOST_BEFORE = 500
"""The causes of at most this many runs are searched for."""

_HELD = (
    "((coalesce(b.state, '') = 'waiting' AND b.gate = 'success') OR (coalesce(b.state, '') = "
    "'skipped' AND b.gate "
)
_HELD += "IS NOT NULL))"
"""Whether a run `b` is held back by what it waits for: it waits for a success, or was closed and
may wait again.
"""
# With the bare column, PostgreSQL might read all members of all groups by their index.
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

    `only_held`: only those that it holds back until it has succeeded.
    """
    if not ids:
        return []
    kind = connection.dialect.name
    meant = json_rows.is_of_ids("a.id", kind)
    held = f" AND {_HELD}" if only_held else ""
    selected = "SELECT a.id AS before, b.id, b.task, b.slot, b.state FROM batch_runs a CROSS JOIN"
    statement = text(
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
    meant = json_rows.is_of_ids("w.run", kind)
    statement = text(
        "SELECT DISTINCT u.id, w.task, w.slot, u.state FROM batch_waits w LEFT JOIN batch_runs u "
        f"ON u.task = w.task AND u.slot = w.slot AND u.{OF_SLOT_SQL} WHERE {meant} LIMIT {most}"
    ).columns(*_COLUMNS[1:])
    return (await connection.execute(statement, json_rows.of_ids(ids, kind))).all()


async def members_by_state(connection: AsyncConnection, run: str, most: int) -> Sequence[Row[Any]]:
    """The members of a run's group, counted by task and state, at most this many. Parts are not
    members.
    """
    hint = sql.hint("ix_batch_runs_members", connection.dialect.name)
    statement = sql.statement(
        "SELECT task, state, count(*) AS number, min(CAST(id AS text)) AS id "
        "FROM (SELECT id, task, state "
        f"FROM batch_runs{hint} WHERE awaited_by = :run AND {NO_PART_SQL} LIMIT {most}) AS found "
        "GROUP BY task, state ORDER BY task, state",
        run=runs.c.id,
    ).columns(runs.c.task, runs.c.state, Column("number", Integer), Column("id", String))
    return (await connection.execute(statement, {"run": run})).all()


async def in_the_way(connection: AsyncConnection, ids: Iterable[str]) -> dict[str, AwaitedSlot]:
    """For each of the runs `ids` that waits or was closed, and for the runs in their way: what is
    in its way.

    If several slots are, it is the one that needs the most work: one that has failed comes before
    one that runs.
    """
    found: dict[str, AwaitedSlot] = {}
    asked = list(ids)[:MOST_BEFORE]
    for _ in range(DEEPEST):
        if not asked:
            break
        following = []
        ends = await _opened_by_any_end(connection, asked)
        for run, slots in (await waits.slots(connection, asked)).items():
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
    """Those of the runs `ids` that open when what they wait for has ended, whether it has succeeded
    or not.
    """
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    query = select(runs.c.id, runs.c.gate).where(theirs)
    return {row.id for row in await connection.execute(query) if row.gate == Gate.END}


def root(found: Mapping[str, AwaitedSlot], run: str) -> AwaitedSlot | None:
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


def _badness(slot: AwaitedSlot) -> int:
    state = slot.state
    return _WORST_FIRST.index(state) if state in _WORST_FIRST else len(_WORST_FIRST)


# What failed runs keep back: runs that wait for their success, or that their failure has closed, at
# any depth. A retry that succeeds lets them go on.

MOST_FAILED = 200
"""At most this many failed runs of one error are read: the newest ones."""
MOST_KEPT = 1_000
"""At most this many runs are counted at each step of the chains."""
MOST_ERRORS = 20

K = TypeVar("K")
Error = tuple[str, str]
"""A task, and the fingerprint of its failed runs."""


@dataclass(frozen=True)
class KeptBack:
    """Runs of a task that are kept back: how many `slots`, and how many `runs` without a slot.

    `at_least`: there may be more, because only this many are counted.
    """

    task: str
    slots: int
    runs: int
    at_least: bool = False


async def kept_back_by_errors(
    connection: AsyncConnection, errors: Iterable[Error]
) -> dict[Error, list[KeptBack]]:
    """What the open failed runs of each of these errors keep back, of the first 20 errors."""
    wanted = list(dict.fromkeys(errors))[:MOST_ERRORS]
    if not wanted:
        return {}
    named = {
        f"{name}_{n}": value
        for n, error in enumerate(wanted)
        for name, value in zip("tf", error, strict=True)
    }
    rows = (await connection.execute(_failed(len(wanted)), named)).all()
    counted: dict[Error, int] = defaultdict(int)
    for row in rows:
        counted[wanted[row.error]] += 1
    cut = {error for error, number in counted.items() if number >= MOST_FAILED}
    return await _kept(connection, {row.id: {wanted[row.error]} for row in rows}, cut)


async def kept_back_by_run(connection: AsyncConnection, run: str) -> list[KeptBack]:
    """What this run keeps back until it has succeeded."""
    return (await _kept(connection, {run: {run}}, set())).get(run, [])


@lru_cache(maxsize=MOST_ERRORS)
def _failed(number: int) -> TextualSelect:
    """A part for each error, because neither database would otherwise stop after the newest runs of
    one.
    """
    parts = (
        f"SELECT * FROM (SELECT {n} AS error, id FROM batch_runs WHERE task = :t_{n} "
        f"AND fingerprint = :f_{n} "
        f"AND {OPEN_FAILURE_SQL} ORDER BY finished_at DESC LIMIT {MOST_FAILED}) AS part_{n}"
        for n in range(number)
    )
    return text(" UNION ALL ".join(parts)).columns(Column("error", Integer), runs.c.id)


async def _kept(
    connection: AsyncConnection, roots: Mapping[str, set[K]], cut: set[K]
) -> dict[K, list[KeptBack]]:
    """What runs keep back, step by step. `roots`: what each run belongs to, by its id. `cut`: may
    be more.
    """
    belong: dict[str, set[K]] = {run: set(keys) for run, keys in roots.items()}
    numbers: dict[tuple[K, str, bool], int] = defaultdict(int)
    asked = list(belong)
    for _ in range(DEEPEST):
        rows = await after(connection, asked, MOST_KEPT, only_held=True)
        if len(rows) == MOST_KEPT:
            cut = cut.union(*belong.values())
        following = []
        for row in rows:
            new = belong[row.before] - belong.get(row.id, set())
            if not new:
                continue
            belong.setdefault(row.id, set()).update(new)
            following.append(row.id)
            for key in new:
                numbers[key, row.task, row.slot is not None] += 1
        asked = list(dict.fromkeys(following))
        if not asked:
            break
    return _by_key(numbers, cut)


def _by_key(numbers: Mapping[tuple[K, str, bool], int], cut: set[K]) -> dict[K, list[KeptBack]]:
    """The tasks in the order in which they were found, which is that of the chain."""
    found: dict[K, list[KeptBack]] = defaultdict(list)
    for key, task in dict.fromkeys((key, task) for key, task, _ in numbers):
        slots, others = numbers.get((key, task, True), 0), numbers.get((key, task, False), 0)
        found[key].append(KeptBack(task, slots, others, key in cut))
    return dict(found)
