"""The failed runs that are neither made good nor acknowledged, by task and error: the one place
that counts them.

Night, the status and the incidents therefore show the same numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, case, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import problem as one_error
from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.incidents import incidents
from batch_system.batch.ledger.incidents.incidents import MORE
from batch_system.batch.ledger.states import ACTIVE, OF_RUNS, IncidentKind
from batch_system.batch.ledger.tables import OPEN_FAILURE_SQL, is_one_of, runs

ByKey = Mapping[tuple[str, str], Row[Any]]
"""The open incidents of runs, by task and fingerprint."""


@dataclass
class Group:
    """Open failures of a task with one error: how many, how many of them are retried, the first and
    the last end.
    """

    task: str
    fingerprint: str
    number: int
    retrying: int
    first: datetime | None
    last: datetime | None


async def incidents_by_key(connection: AsyncConnection) -> ByKey:
    """The open incidents of runs."""
    return by_key(await incidents.are_open(connection, OF_RUNS))


def by_key(opened: Iterable[Row[Any]]) -> ByKey:
    """Those of these open incidents that are about runs. Others may be among them."""
    return {
        (row.task, row.fingerprint): row
        for row in opened
        if row.kind in OF_RUNS and not row.subject
    }


async def groups(
    connection: AsyncConnection, known: ByKey, of: Collection[str] | None = None
) -> list[Group]:
    """The open failures by task and error. `of`: only those of these tasks. `known`: the open
    incidents.
    """
    opened = _by_error()
    if of is not None:
        opened = opened.where(json_rows.is_among(runs.c.task, sorted(of), connection.dialect.name))
    rows = (await connection.execute(opened)).all()
    return _folded([Group(*row) for row in rows], known)


@cache
def _by_error() -> Select[Any]:
    is_active = text(is_one_of(ACTIVE))
    return (
        select(
            runs.c.task,
            runs.c.fingerprint,
            func.count().label("number"),
            func.sum(case((is_active, 1), else_=0)).label("retrying"),
            func.min(runs.c.finished_at).label("first"),
            func.max(runs.c.finished_at).label("last"),
        )
        .where(text(OPEN_FAILURE_SQL))
        .group_by(runs.c.task, runs.c.fingerprint)
    )


async def one_problem(connection: AsyncConnection, row: Row[Any]) -> Sequence[Row[Any]]:
    """This incident, and the open ones that form one problem with it."""
    problems = one_error.of_rows(await incidents.are_open(connection, [IncidentKind.FAILED]))
    return next((problem for problem in problems if row.id in incidents.ids_of(problem)), [row])


def _folded(groups: Sequence[Group], by_key: ByKey) -> list[Group]:
    """Merge the errors of a task that have no incident of their own into one group, if the task has
    an incident for further errors (MORE).
    """
    folded: dict[tuple[str, str], Group] = {}
    for each in groups:
        is_further = (each.task, each.fingerprint) not in by_key and (each.task, MORE) in by_key
        key = each.task, MORE if is_further else each.fingerprint
        if (known := folded.get(key)) is None:
            folded[key] = replace(each, fingerprint=key[1])
            continue
        known.number += each.number
        known.retrying += each.retrying
        known.first = min((at for at in (known.first, each.first) if at is not None), default=None)
        known.last = max((at for at in (known.last, each.last) if at is not None), default=None)
    return list(folded.values())
