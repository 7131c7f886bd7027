"""Orphans: runs that wait for a task which no service has any more. They fail, for nobody would ever take them."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, select, text, update

from service.batch import slots
from service.batch.states import RunState
from service.batch.tables import ACTIVE_SQL, CLAIMABLE_SQL, runs, tasks
from service.database.engine import Database

GRACE = timedelta(hours=24)
REASON = "no service has had this task for 24 h"

BATCH = 100
"""Runs that fail in one transaction, at most."""
PAUSE_SECONDS = 0.05
"""Between two transactions, so that whoever waits for SQLite's one writer has its turn."""


async def fail_orphans(ledger: Database) -> Counter[str]:
    """Fail what has waited for so long, for a task that was removed as long ago. Returns how many runs, by task."""
    counts: Counter[str] = Counter()
    async with ledger.reader.connect() as connection:
        before = await slots.now_of(connection) - GRACE
        # Not by EXISTS: PostgreSQL would make a join of that, and may read what waits for all other tasks.
        one = select(runs.c.id).where(runs.c.task == tasks.c.name, _waits(before)).limit(1).scalar_subquery()
        found = await connection.execute(select(tasks.c.name).where(tasks.c.removed_at < before, one.is_not(None)))
        names = sorted(found.scalars())
    for name in names:
        went = BATCH
        while went == BATCH:
            went = await _fail_some(ledger, name, before)
            counts[name] += went
            await asyncio.sleep(PAUSE_SECONDS)
    return +counts


async def _fail_some(ledger: Database, task: str, before: datetime) -> int:
    """The task's row is locked: a node that loads the task comes before this, or its runs have failed by then."""
    removed = select(tasks.c.name).where(tasks.c.name == task, tasks.c.removed_at < before)
    some = select(runs.c.id).where(runs.c.task == task, _waits(before)).order_by(runs.c.id).limit(BATCH)
    failing = update(runs).where(runs.c.id.in_(some), text(CLAIMABLE_SQL))
    async with ledger.engine.begin() as connection:
        if (await connection.execute(removed.with_for_update())).first() is None:
            return 0
        values = {"state": RunState.FAILED, "reason": REASON, "finished_at": await slots.now_of(connection)}
        return (await connection.execute(failing.values(values))).rowcount


def _waits(before: datetime) -> ColumnElement[bool]:
    """Since before then; a person may have retried it after the task was removed. By the index on active runs."""
    return and_(text(ACTIVE_SQL), text(CLAIMABLE_SQL), runs.c.due_at < before)
