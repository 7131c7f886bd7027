"""`operations.look()`: the live state of runs, tasks and nodes, read with one connection for all
viewers.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import NamedTuple

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time, json_rows, run_query
from batch_system.batch.ledger import tasks as task_rows
from batch_system.batch.ledger.people import access
from batch_system.batch.ledger.run_query import RunQuery
from batch_system.batch.ledger.run_rows import run_rows
from batch_system.batch.ledger.runs import LISTED
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import nodes, runs, tasks
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Node, Result, RunSummary
from batch_system.operations.people.redacting import SECRET_TAG, without_texts

NEWEST = 200
MOST_RUNNING = 500
STOPPED_LATELY = timedelta(minutes=1)


class TaskState(Result):
    """What of a task may change while it is watched."""

    name: str
    paused: bool
    removed: bool
    source: str
    description: str


class Look(NamedTuple):
    """What was read: runs, all tasks, and the nodes that are alive or have stopped lately.
    `newest`: ids of the newest runs.

    `runs` has the newest and the running ones, and those that were asked for. `revoked`: changes
    when a token or a session is revoked.
    """

    runs: dict[str, RunSummary]
    newest: list[str]
    tasks: dict[str, TaskState]
    nodes: dict[str, Node]
    revoked: object = None


async def look(context: Context, topics: Collection[str], run_ids: Collection[str]) -> Look:
    """Read what these topics need. `topics`: of runs, tasks and nodes. `run_ids`: further runs, by
    their whole ids.
    """
    found = Look({}, [], {}, {})
    async with context.databases.reading() as connection:
        if connection is None:
            return found
        if "runs" in topics or run_ids:
            await _read_runs(connection, found, "runs" in topics, run_ids)
        if "tasks" in topics:
            columns = (
                tasks.c.name,
                tasks.c.paused_at,
                tasks.c.removed_at,
                tasks.c.source,
                tasks.c.description,
            )
            for row in await connection.execute(select(*columns)):
                found.tasks[row.name] = TaskState(
                    name=row.name,
                    paused=row.paused_at is not None,
                    removed=row.removed_at is not None,
                    source=row.source,
                    description=row.description,
                )
        if "nodes" in topics:
            since = await database_time.now_of(connection) - STOPPED_LATELY
            shown = or_(nodes.c.stopped_at.is_(None), nodes.c.stopped_at > since)
            rows_of_nodes = await connection.execute(select(nodes).where(shown))
            found.nodes.update({row["id"]: Node.of(row) for row in rows_of_nodes.mappings()})
        return found._replace(revoked=await access.last_revoked(connection))


async def _read_runs(
    connection: AsyncConnection, found: Look, with_list: bool, run_ids: Collection[str]
) -> None:
    now = await database_time.now_of(connection)
    if with_list:
        running = RunQuery(states=frozenset({RunState.RUNNING}))
        newest = (await run_query.page(connection, RunQuery(), NEWEST)).rows
        found.newest.extend(row["id"] for row in newest)
        for rows in (newest, (await run_query.page(connection, running, MOST_RUNNING)).rows):
            found.runs.update({row["id"]: RunSummary.at(row, now) for row in rows})
    if others := [run for run in run_ids if run not in found.runs]:
        is_asked = runs.c.id.in_(json_rows.among(runs.c.id, others, connection.dialect.name))
        listed = await connection.execute(run_rows(LISTED, is_asked))
        found.runs.update({row["id"]: RunSummary.at(row, now) for row in listed.mappings()})
    # All viewers share what is read, so it never has the texts of a secret task.
    hidden = await task_rows.tagged(connection, SECRET_TAG)
    found.runs.update({run.id: run for run in without_texts(list(found.runs.values()), hidden)})
