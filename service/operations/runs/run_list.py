"""Lists of runs, page by page, with a cursor for the next one."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time, run_query
from service.batch.ledger import tasks as task_rows
from service.batch.ledger.states import RunState
from service.operations.asking.cursors import cursor_of, parse_cursor
from service.operations.asking.filter import RunFilter
from service.operations.asking.results import Result, RunSummary
from service.operations.runs.awaited import awaited
from service.operations.runs.waiting import Awaited

MOST_RUNS = 200
"""Longest page of a list."""


class RunPage(Result):
    """A page of runs. `after`: the cursor of the next page; None at the end of the list.

    A page may have fewer runs than the limit although others follow, because the work for one page
    is limited. `awaits`: what each run in the state `waiting` waits for, by its id.
    """

    runs: list[RunSummary]
    after: str | None
    awaits: dict[str, list[Awaited]] = Field(default_factory=dict)


async def page(
    connection: AsyncConnection,
    wanted: RunFilter,
    limit: int,
    after: str | None,
    by_slot: bool = False,
    hidden: frozenset[str] = frozenset(),
) -> RunPage:
    """A page of the runs that are wanted. `by_slot`: ordered by slot, which needs a task.

    `hidden`: tasks whose runs are not found by parameters and texts, because these are hidden from
    the caller. Raises InvalidParameters for a cursor that no page has given.
    """
    tasks = await tasks_of(connection, wanted)
    before = parse_cursor(after) if after is not None else None
    query = wanted.query(tasks, by_slot)
    if query.params or query.text is not None:
        query = replace(query, without=hidden)
    rows, key = await run_query.page(connection, query, limit, before)
    now = await database_time.now_of(connection)
    awaits = await awaited(
        connection, [row["id"] for row in rows if row["state"] == RunState.WAITING], now
    )
    return RunPage(
        runs=[RunSummary.at(row, now) for row in rows],
        after=cursor_of(key) if key else None,
        awaits=awaits,
    )


async def tasks_of(connection: AsyncConnection, wanted: RunFilter) -> frozenset[str] | None:
    """The tasks that have the tag and the pool of the filter; None if it names neither."""
    tagged = await task_rows.tagged(connection, wanted.tag) if wanted.tag is not None else None
    if wanted.pool is None:
        return tagged
    theirs = await task_rows.of_pool(connection, wanted.pool)
    return theirs if tagged is None else theirs & tagged
