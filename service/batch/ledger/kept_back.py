"""What failed runs keep back: runs that wait for their success, or that their failure has closed,
in whichever depth.

A retry with success lets them go on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from sqlalchemy import Column, Integer, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from service.batch.ledger import chains
from service.batch.ledger.tables import OPEN_FAILURE_SQL, runs

MOST_FAILED = 200
"""This many failed runs of one error are looked at, the newest ones."""
MOST = 1_000
"""So many runs are counted at each step of the chains."""
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


async def by_errors(
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


async def by_run(connection: AsyncConnection, run: str) -> list[KeptBack]:
    """What this run keeps back as long as it has not succeeded."""
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
    """What is kept back by runs, step by step. `roots`: by the id of a run, what it belongs to.
    `cut`: may be more.
    """
    belong: dict[str, set[K]] = {run: set(keys) for run, keys in roots.items()}
    numbers: dict[tuple[K, str, bool], int] = defaultdict(int)
    asked = list(belong)
    for _ in range(chains.DEEPEST):
        rows = await chains.after(connection, asked, MOST, only_held=True)
        if len(rows) == MOST:
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
