"""Databases with many starts that are handed over or were merged, and the statements about them,
whose plans tests/batch/test_plans.py reads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import datetime, timedelta

from sqlalchemy import text

from batch_system.batch.firing import handover
from batch_system.batch.ledger import merges, waits
from batch_system.batch.ledger.merges import MergeKind
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue.start_rows import stored
from batch_system.database import companions
from batch_system.database.engine import Database
from tests.batch.test_runs import new

Of = Callable[[str], AbstractContextManager[None]]

SECOND = timedelta(seconds=1)


async def fill(ledger: Database, application: Database, number: int, now: datetime) -> None:
    """So many keys and merged starts of some time, and as many starts in groups of ten."""
    ago = [now - n * SECOND for n in range(number)]
    of_key = {"task": "over-1", "kind": MergeKind.DEBOUNCE}
    async with ledger.engine.begin() as connection:
        await connection.execute(
            merges.merges.insert(),
            [
                {**of_key, "key": f"key {n}", "run": new_id(), "until": now + at * SECOND}
                for n, at in enumerate(range(-number // 100, number - number // 100))
            ],
        )
        await connection.execute(merges.merged.insert(), [{"id": new_id(), "at": at} for at in ago])
        if ledger.kind == "postgresql":
            await connection.execute(text("ANALYZE"))
    async with application.engine.begin() as connection:
        rows = [
            stored(new("over-1"), follow_up)
            for follow_up in [new("over-1") for _ in range(number // 10)]
            for _ in range(10)
        ]
        await connection.execute(companions.starts.insert(), rows)
        if application.kind == "postgresql":
            await connection.execute(text("ANALYZE"))


async def send(ledger: Database, application: Database, of: Of, now: datetime) -> None:
    with of("hand over"):
        rows = await handover._read(application, handover.PAGES, after=100)
        group = rows[-1].follow_up
        assert await handover._read(application, handover.GROUPS, group=group, after=0)
        await handover._delete(application, [(row.number, row.id) for row in rows])
    async with ledger.engine.begin() as connection:
        with of("merge"):
            assert await merges.is_first(connection, new_id(), now)
            for _ in range(2):
                again = new("over-1", exclusive=None)
                again.wait(now + SECOND)
                await merges.debounce(connection, again, "again", now + SECOND)
                once = new("over-1", exclusive=None, created_at=now)
                await merges.once_in(connection, once, "once", now + SECOND)
            assert await waits.next_due(connection, now, now + SECOND)
        with of("prune merges"):
            long_ago = now - timedelta(days=40)
            await merges.prune(connection, now - timedelta(seconds=20), long_ago)
