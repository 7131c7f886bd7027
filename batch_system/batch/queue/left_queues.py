"""Left queues: waiting runs in a queue that their task does not have any more, because its limit
was taken away.

The nodes that have loaded the task look for its own queue only. A node with older code may go on to
make such runs for as long as it lives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cache

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger.tables import HOLDS_LANE_SQL, READY_SQL, RETRYING_SQL
from batch_system.batch.queue import turns
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database

BATCH = 1_000
"""The most runs that change their queue in one transaction."""
FIRST = 3
"""A task without a limit has two queues, so its first three show whether there is a left one."""


async def rejoin(ledger: Database, loaded: Mapping[str, Task]) -> Counter[str]:
    """Put up to BATCH runs of each such queue into that of their task. Returns their number by
    task. It costs a few index lookups for each task.
    """
    tasks = {name: task for name, task in loaded.items() if task.policies.limit is None}
    if not tasks:
        return Counter()
    async with ledger.reader.connect() as connection:
        first = await turns.following(connection, dict.fromkeys(tasks, ""), FIRST, retries=True)
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
