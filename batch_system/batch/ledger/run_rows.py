"""Rows of runs: some columns of those that fulfil some conditions, and the newest runs of each of
several tasks, in one query that reads only these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, select, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.selectable import TextualSelect

from batch_system.batch.ledger.tables import BY_HAND_SQL, NO_PART_SQL, runs
from batch_system.database import sql

NEWEST_FIRST = (runs.c.created_at.desc(), runs.c.id.desc())


def run_rows(columns: Iterable[str], *where: ColumnElement[bool] | str) -> Select[*tuple[Any, ...]]:
    """A query of these columns of the runs that fulfil all conditions. A condition that is text is
    SQL, such as OF_SLOT_SQL.
    """
    conditions = (text(each) if isinstance(each, str) else each for each in where)
    return select(*(runs.c[name] for name in columns)).where(*conditions)


async def newest_of_each(
    connection: AsyncConnection, tasks: Sequence[str], columns: tuple[str, ...], last: int
) -> Sequence[Row[Any]]:
    """At most `last` runs of each of these tasks, the oldest first. There should be few tasks.
    `columns`: of the runs.
    """
    return await _read(connection, tasks, columns, {"last": last})


async def newest_by_hand_of_each(
    connection: AsyncConnection,
    tasks: Sequence[str],
    columns: tuple[str, ...],
    last: int,
    since: datetime,
    until: datetime,
) -> Sequence[Row[Any]]:
    """The same for the runs that were started by hand or by code, and made in an interval (both
    ends included).
    """
    return await _read(connection, tasks, columns, {"last": last, "since": since, "until": until})


async def _read(
    connection: AsyncConnection,
    tasks: Sequence[str],
    columns: tuple[str, ...],
    values: dict[str, Any],
) -> Sequence[Row[Any]]:
    if not tasks:
        return []
    statement = _statement(len(tasks), columns, "since" in values)
    named = {f"task_{number}": task for number, task in enumerate(tasks)}
    return (await connection.execute(statement, {**values, **named})).all()


@lru_cache(maxsize=200)
def _statement(number: int, columns: tuple[str, ...], is_by_hand: bool) -> TextualSelect:
    """A part for each task, because neither database would otherwise stop after the newest runs of
    one.

    It is text that is made once, because building the construct of this many parts takes longer
    than the query.
    """
    names = ", ".join(f'"{name}"' for name in columns)
    inner = ", ".join(f'"{name}"' for name in dict.fromkeys((*columns, "created_at", "id")))
    made = (
        f" AND created_at >= :since AND created_at <= :until AND {BY_HAND_SQL}"
        if is_by_hand
        else ""
    )
    parts = (
        f"SELECT * FROM (SELECT {inner} FROM batch_runs WHERE task = :task_{each}{made} "
        f"AND {NO_PART_SQL} "
        f"ORDER BY created_at DESC, id DESC LIMIT :last) AS part_{each}"
        for each in range(number)
    )
    times = dict.fromkeys(("since", "until") if is_by_hand else (), runs.c.created_at)
    newest = f"SELECT {names} FROM ({' UNION ALL '.join(parts)}) AS newest ORDER BY created_at, id"
    statement = sql.statement(newest, **times)
    return statement.columns(*(runs.c[name] for name in columns))
