"""What a run has waited for, with the results: the runs of the slots of other tasks, and the
members of its group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Text, and_, cast, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger.states import Origin
from service.batch.ledger.tables import NO_PART_SQL, OF_SLOT_SQL, runs
from service.batch.ledger.waits import waits

PAGE = 200
"""How many members are read at once, at most."""
PAGE_SIZE = 2_000_000
"""A page ends with the member by which its parameters and results as JSON have more characters than
this.
"""


async def awaited(connection: AsyncConnection, run: str) -> Sequence[Any]:
    """The slots that a run waits for, or has waited for: task, slot, and of its run id, state,
    params and result.
    """
    is_its = and_(runs.c.task == waits.c.task, runs.c.slot == waits.c.slot, text(OF_SLOT_SQL))
    query = (
        select(waits.c.task, waits.c.slot, runs.c.id, runs.c.state, runs.c.params, runs.c.result)
        .select_from(waits.outerjoin(runs, is_its))
        .where(waits.c.run == run)
        .order_by(waits.c.task)
    )
    return (await connection.execute(query)).all()


async def members(
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
