"""Left queues: waiting runs in a queue that their task does not have any more, because its limit
was taken away; and runs in no queue from before the task had a limit.

The nodes that have loaded the task look for its own queues only. A node with older code may go on
to make such runs for as long as it lives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.tables import HOLDS_LANE_SQL, READY_SQL, RETRYING_SQL, runs
from batch_system.batch.queue import key_queues
from batch_system.batch.tasks.registry import Task
from batch_system.database import sql
from batch_system.database.engine import Database

BATCH = 1_000
"""The most runs that change their queue in one transaction."""
FIRST = 3
"""A task without a limit has two queues, so its first three show whether there is a left one."""


async def rejoin(ledger: Database, loaded: Mapping[str, Task]) -> Counter[str]:
    """Put up to BATCH runs of each such queue into that of their task. Returns their number by
    task. It costs a few index lookups for each task.
    """
    moved: Counter[str] = Counter()
    limited = [task for task in loaded.values() if task.policies.limit is not None]
    for task in limited:
        moved[task.name] += await _join(ledger, task)
    return +moved + await _leave(ledger, loaded)


async def _leave(ledger: Database, loaded: Mapping[str, Task]) -> Counter[str]:
    tasks = {name: task for name, task in loaded.items() if task.policies.limit is None}
    if not tasks:
        return Counter()
    async with ledger.reader.connect() as connection:
        first = await key_queues.behind(connection, dict.fromkeys(tasks, ""), FIRST, retries=True)
    left = {
        (name, queue)
        for name, queues in first.items()
        for queue in queues
        if queue not in (name, tasks[name].queue_of_parts)
    }
    moved: Counter[str] = Counter()
    for name, queue in sorted(left):
        async with ledger.engine.begin() as connection:
            moved[name] += await _move(connection, tasks[name], queue)
    return +moved


async def _move(connection: AsyncConnection, task: Task, queue: str) -> int:
    values = {"task": task.name, "queue": queue, "own": task.exclusive}
    number = 0
    for condition in (READY_SQL, RETRYING_SQL):
        statement = text(_statement(connection.dialect.name, condition))
        number += (await connection.execute(statement, values)).rowcount
    return number


@cache
def _statement(kind: str, condition: str) -> str:
    """A run that goes on after its parts has a lane of the old queue, and needs none of the new."""
    found = f"SELECT id FROM batch_runs WHERE task = :task AND exclusive = :queue AND {condition}"
    found = f"{found} ORDER BY id LIMIT {BATCH}"
    among = f"IN ({found})" if kind == "sqlite" else f"= ANY(ARRAY({found} FOR UPDATE SKIP LOCKED))"
    own = f"CASE WHEN {HOLDS_LANE_SQL} THEN NULL ELSE :own END"
    return f"UPDATE batch_runs SET exclusive = {own} WHERE id {among} AND exclusive = :queue"


async def _join(ledger: Database, task: Task) -> int:
    """Put runs that are in no queue into that of their key."""
    async with ledger.reader.connect() as connection:
        found = (await connection.execute(_IN_NO_QUEUE, {"task": task.name})).all()
    if not found:
        return 0
    rows = [{"id": row.id, "exclusive": task.queueing.of(row.params)} for row in found]
    kind = ledger.kind
    source = json_rows.source([runs.c.id, runs.c.exclusive], kind)
    statement = text(
        f"UPDATE batch_runs SET exclusive = v.exclusive FROM {source} WHERE batch_runs.id = v.id "
        "AND batch_runs.exclusive IS NULL "
        f"AND ({READY_SQL} OR {RETRYING_SQL})"
    )
    async with ledger.engine.begin() as connection:
        result = await connection.execute(statement, {"rows": json_rows.encode(rows, kind)})
    return int(result.rowcount)


_IN_NO_QUEUE = sql.statement(
    " UNION ALL ".join(
        f"SELECT * FROM (SELECT id, params FROM batch_runs WHERE task = :task "
        f"AND exclusive IS NULL AND {condition} LIMIT {BATCH}) AS {name}"
        for name, condition in (("ready", READY_SQL), ("retrying", RETRYING_SQL))
    )
).columns(runs.c.id, runs.c.params)
