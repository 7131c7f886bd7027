"""Unserved runs: runs that wait for a task that no service has any more, and parts of a task that
is no longer partitioned.

They fail, because no node would run them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import datetime, timedelta
from itertools import product
from typing import Any

from sqlalchemy import Select, or_, select, text

from batch_system.batch.ledger import database_time, json_rows, transitions
from batch_system.batch.ledger.tables import READY_SQL, RETRYING_SQL, runs, tasks
from batch_system.batch.queue import concurrency
from batch_system.batch.tasks.registry import OF_PARTS, Task
from batch_system.database.engine import Database

GRACE = timedelta(hours=24)
REASON = "no service has had this task for 24 h"
GRACE_OF_PARTS = timedelta(hours=1)
"""During a deployment, newer code than that of this process may have made parts, which must not
fail.
"""
REASON_OF_PARTS = "its task is not partitioned any more"

CONDITIONS = (READY_SQL, RETRYING_SQL)
"""The conditions for waiting runs. Each has an index that begins with the task."""
BATCH = 100
"""The most runs that fail in one transaction."""
PAUSE_SECONDS = 0.05
"""The pause between two transactions, in which others may write to SQLite, which has one writer at
a time.
"""


async def fail_unserved(ledger: Database) -> Counter[str]:
    """Fail the runs that have waited for more than GRACE for a task that was removed more than
    GRACE ago.

    Returns their number by task.
    """
    async with ledger.reader.connect() as connection:
        before = await database_time.now_of(connection) - GRACE
        has_unserved = or_(
            *(
                _unserved(tasks.c.name, condition, before).limit(1).scalar_subquery().is_not(None)
                for condition in CONDITIONS
            )
        )
        removed = await connection.execute(
            select(tasks.c.name).where(tasks.c.removed_at < before, has_unserved)
        )
        names = sorted(removed.scalars())
    return await _fail_all(
        names, lambda task, condition: _fail_some(ledger, task, condition, before)
    )


async def fail_left_parts(ledger: Database, loaded: Mapping[str, Task]) -> Counter[str]:
    """Fail the parts that have waited for more than GRACE_OF_PARTS for a task in `loaded` that is
    not partitioned.

    If one of them is running, the task's parts are left alone, because a node with other code
    executes them. Returns their number by task.
    """
    plain = [name for name, task in loaded.items() if task.partition is None]
    async with ledger.reader.connect() as connection:
        before = await database_time.now_of(connection) - GRACE_OF_PARTS
        parts = (
            _left_parts(tasks.c.name, tasks.c.name + OF_PARTS, condition, before)
            for condition in CONDITIONS
        )
        has_parts = or_(*(ids.limit(1).scalar_subquery().is_not(None) for ids in parts))
        is_plain = json_rows.is_among(tasks.c.name, plain, ledger.kind)
        names = sorted(
            (await connection.execute(select(tasks.c.name).where(is_plain, has_parts))).scalars()
        )
    return await _fail_all(
        names, lambda task, condition: _fail_some_parts(ledger, loaded[task], condition, before)
    )


async def _fail_all(
    names: Iterable[str], fail_some: Callable[[str, str], Awaitable[int]]
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, condition in product(names, CONDITIONS):
        failed = BATCH
        while failed == BATCH:
            failed = await fail_some(name, condition)
            counts[name] += failed
            await asyncio.sleep(PAUSE_SECONDS)
    return +counts


async def _fail_some(ledger: Database, task: str, condition: str, before: datetime) -> int:
    """Fail up to BATCH unserved runs of a task in one transaction. Returns their number.

    The row of the task is locked. A node that loads the task either commits first, and then no run
    fails, or it waits until these runs have failed.
    """
    removed = select(tasks.c.name).where(tasks.c.name == task, tasks.c.removed_at < before)
    ids = _unserved(task, condition, before).order_by(runs.c.id).limit(BATCH)
    async with ledger.engine.begin() as connection:
        if (await connection.execute(removed.with_for_update())).first() is None:
            return 0
        now = await database_time.now_of(connection)
        return await transitions.fail_waiting(connection, ids, condition, REASON, now)


def _unserved(task: Any, condition: str, before: datetime) -> Select[Any]:
    """The ids of the runs of a task that have waited since `before`.

    The wait of each run counts, because a person may have retried a run after the task was removed.
    """
    return select(runs.c.id).where(runs.c.task == task, text(condition), runs.c.due_at < before)


async def _fail_some_parts(ledger: Database, task: Task, condition: str, before: datetime) -> int:
    """Fail up to BATCH parts of a task in one transaction. Returns their number."""
    queue = task.queue_of_parts
    ids = _left_parts(task.name, queue, condition, before).order_by(runs.c.id).limit(BATCH)
    async with ledger.engine.begin() as connection:
        if not (await concurrency.free(connection, {queue: 1}))[queue]:
            return 0
        now = await database_time.now_of(connection)
        return await transitions.fail_waiting(connection, ids, condition, REASON_OF_PARTS, now)


def _left_parts(task: Any, queue: Any, condition: str, before: datetime) -> Select[Any]:
    """The ids of the parts in the queue of a task's parts that have waited since `before`."""
    return _unserved(task, condition, before).where(runs.c.exclusive == queue)
