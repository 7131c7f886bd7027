"""`operations.look()`: what of runs, tasks and nodes is shown live, read with one connection for all who watch."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from sqlalchemy import select

from service.batch.ledger import database_time, json_rows, run_query
from service.batch.ledger import tasks as task_rows
from service.batch.ledger.run_query import RunQuery
from service.batch.ledger.runs import LISTED
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import nodes, runs, tasks
from service.operations.context import Context
from service.operations.redacting import SECRET_TAG, without_texts
from service.operations.results import Node, Result, RunSummary

NEWEST = 200
MOST_RUNNING = 500


class TaskState(Result):
    """What of a task may change while it is watched."""

    name: str
    paused: bool
    removed: bool
    source: str
    description: str


class Look(NamedTuple):
    """The newest and the running runs, the runs that were asked for, all tasks, and the nodes that have not stopped."""

    runs: dict[str, RunSummary]
    tasks: dict[str, TaskState]
    nodes: dict[str, Node]


async def look(context: Context, topics: Collection[str], run_ids: Collection[str]) -> Look:
    """Read what these topics need. `topics`: of runs, tasks and nodes. `run_ids`: further runs, by their whole ids."""
    found = Look({}, {}, {})
    async with context.databases.reading() as connection:
        if connection is None:
            return found
        now = await database_time.now_of(connection)
        if "runs" in topics:
            running = RunQuery(states=frozenset({RunState.RUNNING}))
            for query, number in ((RunQuery(), NEWEST), (running, MOST_RUNNING)):
                rows = (await run_query.page(connection, query, number)).rows
                found.runs.update({row["id"]: RunSummary.at(row, now) for row in rows})
        if run_ids:
            is_asked = runs.c.id.in_(json_rows.among(runs.c.id, run_ids, connection.dialect.name))
            listed = await connection.execute(select(*(runs.c[name] for name in LISTED)).where(is_asked))
            found.runs.update({row["id"]: RunSummary.at(row, now) for row in listed.mappings()})
        if found.runs:  # all who watch share what is read, so nobody sees the texts of a secret task
            hidden = await task_rows.tagged(connection, SECRET_TAG)
            shown = without_texts(list(found.runs.values()), hidden)
            found.runs.update({run.id: run for run in shown})
        if "tasks" in topics:
            columns = (tasks.c.name, tasks.c.paused_at, tasks.c.removed_at, tasks.c.source, tasks.c.description)
            for row in await connection.execute(select(*columns)):
                found.tasks[row.name] = TaskState(
                    name=row.name,
                    paused=row.paused_at is not None,
                    removed=row.removed_at is not None,
                    source=row.source,
                    description=row.description,
                )
        if "nodes" in topics:
            rows_of_nodes = await connection.execute(select(nodes).where(nodes.c.stopped_at.is_(None)))
            found.nodes.update({row["id"]: Node.of(row) for row in rows_of_nodes.mappings()})
    return found
