"""Orphans: runs that wait for a task which no service has any more. They fail, for nobody would ever take them."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime, timedelta
from itertools import product
from typing import Any

from sqlalchemy import Select, or_, select, text

from service.batch.ledger import database_time, transitions
from service.batch.ledger.tables import RETRYING_SQL, WAITING_SQL, runs, tasks
from service.database.engine import Database

GRACE = timedelta(hours=24)
REASON = "no service has had this task for 24 h"

WAITS = (WAITING_SQL, RETRYING_SQL)
"""Each has an index that begins with the task."""
BATCH = 100
"""Runs that fail in one transaction, at most."""
PAUSE_SECONDS = 0.05
"""Between two transactions, so that whoever waits for SQLite's one writer has its turn."""


async def fail_orphans(ledger: Database) -> Counter[str]:
    """Fail what has waited for so long, for a task that was removed as long ago. Returns how many runs, by task."""
    counts: Counter[str] = Counter()
    async with ledger.reader.connect() as connection:
        before = await database_time.now_of(connection) - GRACE
        has_some = or_(*(_some(tasks.c.name, waits, before).limit(1).scalar_subquery().is_not(None) for waits in WAITS))
        removed = await connection.execute(select(tasks.c.name).where(tasks.c.removed_at < before, has_some))
        names = sorted(removed.scalars())
    for name, waits in product(names, WAITS):
        failed = BATCH
        while failed == BATCH:
            failed = await _fail_some(ledger, name, waits, before)
            counts[name] += failed
            await asyncio.sleep(PAUSE_SECONDS)
    return +counts


async def _fail_some(ledger: Database, task: str, waits: str, before: datetime) -> int:
    """The task's row is locked: a node that loads the task comes before this, or its runs have failed by then."""
    removed = select(tasks.c.name).where(tasks.c.name == task, tasks.c.removed_at < before)
    some = _some(task, waits, before).order_by(runs.c.id).limit(BATCH)
    async with ledger.engine.begin() as connection:
        if (await connection.execute(removed.with_for_update())).first() is None:
            return 0
        now = await database_time.now_of(connection)
        return await transitions.fail_waiting(connection, some, waits, REASON, now)


def _some(task: Any, waits: str, before: datetime) -> Select[Any]:
    """Runs of a task that have waited since before then: a person may have retried one after the task was removed."""
    return select(runs.c.id).where(runs.c.task == task, text(waits), runs.c.due_at < before)
