"""Lists runs, a page at a time."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time, run_query
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.run_query import Counts, RunQuery
from batch_system.batch.ledger.states import RunState
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.cursors import cursor_of, parse_cursor
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.asking.results import RunSummary
from batch_system.operations.people.redacting import (
    hidden_tasks,
    refuse_secret_filter,
    without_texts,
)
from batch_system.operations.runs.awaited import awaited
from batch_system.operations.runs.quarantine import with_quarantined
from batch_system.operations.runs.read import refuse_unknown_task
from batch_system.operations.runs.results import MOST_RUNS, RunPage


def query_of(
    wanted: RunFilter, tasks: frozenset[str] | None = None, by_slot: bool = False
) -> RunQuery:
    """The query of the ledger. `tasks`: those of the tag and the pool. `by_slot`: needs a task; see
    RunQuery.
    """
    return RunQuery(
        ids=frozenset(wanted.run),
        task=wanted.task,
        tasks=tasks,
        without=frozenset(wanted.exclude),
        states=wanted.states,
        origins=frozenset(wanted.origin),
        node=wanted.node,
        params=wanted.params,
        text=wanted.text,
        fingerprint=wanted.fingerprint,
        parent=wanted.parent,
        created_since=wanted.created_since,
        created_until=wanted.created_until,
        slot_since=wanted.slot_since,
        slot_until=wanted.slot_until,
        ended_since=wanted.ended_since,
        ended_until=wanted.ended_until,
        by_slot=by_slot,
    )


async def page(
    connection: AsyncConnection,
    wanted: RunFilter,
    limit: int,
    after: str | None,
    by_slot: bool = False,
    hidden: frozenset[str] = frozenset(),
) -> RunPage:
    """A page of the runs that are wanted. `by_slot`: ordered by slot, which needs a task.

    `hidden`: tasks whose runs are not found by parameters, texts and errors, because these are
    hidden from the caller. Raises InvalidParameters for a cursor that no page has given.
    """
    tasks = await tasks_of(connection, wanted)
    before = parse_cursor(after) if after is not None else None
    query = query_of(wanted, tasks, by_slot)
    if query.reads_texts:
        query = replace(query, without=query.without | hidden)
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


async def list_runs(
    context: Context,
    wanted: RunFilter,
    limit: int = 50,
    after: str | None = None,
    *,
    by_slot: bool = False,
) -> RunPage:
    """A page of at most `limit` runs (1 to MOST_RUNS), newest first. `after`: the cursor of the
    page before.

    `by_slot`: ordered by slot instead of the time of making, without manual runs; the filter
    has to name a task. Raises InvalidParameters for a cursor that no page has given, and
    UnknownTask for a task that is not in the ledger.
    """
    refuse_secret_filter(context, wanted)
    async with context.databases.reading() as connection:
        if wanted.task is not None:
            await refuse_unknown_task(connection, wanted.task)
        if connection is None:
            return RunPage(runs=[], after=None)
        hidden = await hidden_tasks(connection, context)
        found = await page(connection, wanted, min(limit, MOST_RUNS), after, by_slot, hidden)
        shown = found.model_copy(update={"runs": without_texts(found.runs, hidden)})
    return await with_quarantined(context.databases, shown)


async def count_states(context: Context, wanted: RunFilter) -> Counts | None:
    """How many runs there are in each state, under the other conditions of the filter; None where
    no index serves them.
    """
    if wanted.tag is not None or wanted.pool is not None:
        return None
    async with context.databases.reading() as connection:
        if connection is None:
            return None
        query = query_of(wanted)
        if query.reads_texts and wanted.task in await hidden_tasks(connection, context):
            return None
        return await run_query.counts(connection, query)
