"""Pruning: what was over long ago leaves the ledger, in small batches that hold nobody up.

Two nodes that do it at once do no harm: each row is deleted once. `batch account` stays true: before a slot's run goes,
the account of its task begins later (`batch_tasks.accounted_from`).

No transaction spans the ledger and the application's database. So a run goes first, in one statement that says that it
is over, and what belongs to it afterwards: whoever retries it meanwhile finds a run with its place, or none. Until all
of it has gone the run's id stands in `batch_pruned`, where a later pruning takes it up after a crash.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Table,
    and_,
    delete,
    func,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.firing.misfires import INSTANT
from service.batch.ledger import database_time, json_rows
from service.batch.ledger.schedules import lock_tasks
from service.batch.ledger.states import Origin
from service.batch.ledger.tables import (
    attempts,
    log,
    missed,
    nodes,
    pruned,
    runs,
    schedules,
    tasks,
)
from service.batch.retention import conditions
from service.database.companions import checkpoints, once, quarantine
from service.database.engine import Database

BATCH = 100
"""Runs deleted in one transaction, at most: some milliseconds."""
BLOCKS = 1_000
"""Blocks of log lines deleted in one transaction, at most."""

LONG_SECONDS = 0.025
"""A transaction that takes longer is followed by one of half its size: rows may be large, and disks slow."""

PAUSE_SECONDS = 0.05
"""Between two transactions, so that whoever waits for SQLite's one writer has its turn."""


@dataclass(frozen=True)
class Keep:
    """What stays: runs that ended at most `days` ago, and in any case the newest `per_task` of each task."""

    days: float
    per_task: int


class Batch:
    """How many rows go in one transaction: fewer while that takes long, and more again when it does not."""

    def __init__(self, most: int) -> None:
        self._most = self.size = most

    @asynccontextmanager
    async def transaction(self, database: Database) -> AsyncIterator[AsyncConnection]:
        """One in which so many are deleted. Waiting for the turn to write does not count."""
        async with database.engine.begin() as connection:
            began_at = clock.monotonic()
            yield connection
        is_long = clock.monotonic() - began_at > LONG_SECONDS
        self.size = max(1, self.size // 2) if is_long else min(self._most, self.size * 2)


class Pruner:
    """Prunes one ledger, and what belongs to its runs in the application's database."""

    def __init__(self, ledger: Database, application: Database, keep: Keep, pause: float = PAUSE_SECONDS) -> None:
        self._ledger = ledger
        self._application = application
        self._keep = keep
        self._pause = pause
        self._runs, self._blocks = Batch(BATCH), Batch(BLOCKS)

    async def prune(self) -> Counter[str]:
        """Delete what is old. Returns how many rows went, by what they are: runs, missed ranges, schedules, nodes."""
        counts: Counter[str] = Counter()
        now, before = await self._instants()
        while left := await self._left():
            await self._clear(left)
        async for task, ids in self._old_runs(before):
            gone = await self._delete_runs(task, ids, before)
            await self._clear(gone)
            counts["runs"] += len(gone)
            await asyncio.sleep(self._pause)
        counts += await self._delete_rest(before, now)
        return counts

    async def count(self) -> Counter[str]:
        """How many runs of each task `prune` would delete."""
        counts: Counter[str] = Counter()
        _, before = await self._instants()
        async with self._ledger.reader.connect() as connection:
            for task, kept in (await self._oldest_kept(connection, before)).items():
                old = select(func.count()).select_from(runs).where(conditions.is_old(task, kept, before))
                counts[task] += (await connection.execute(old)).scalar_one()
        return +counts

    async def _instants(self) -> tuple[datetime, datetime]:
        """Now, and the instant before which things are old."""
        async with self._ledger.reader.connect() as connection:
            now = await database_time.now_of(connection)
        return now, now - timedelta(days=self._keep.days)

    async def _left(self) -> Sequence[str]:
        """Runs that are gone, some of them, but perhaps not all that belongs to them."""
        async with self._ledger.reader.connect() as connection:
            return (await connection.execute(select(pruned.c.run).limit(self._runs.size))).scalars().all()

    async def _old_runs(self, before: datetime) -> AsyncIterator[tuple[str, list[str]]]:
        """Page by page, each of one task: its name, and the ids."""
        async with self._ledger.reader.connect() as connection:
            oldest = await self._oldest_kept(connection, before)
        for task, kept in oldest.items():
            old = select(runs.c.id, runs.c.created_at).where(conditions.is_old(task, kept, before))
            page = old.order_by(runs.c.created_at, runs.c.id)
            following = page
            while True:
                async with self._ledger.reader.connect() as connection:
                    batch = (await connection.execute(following.limit(self._runs.size))).all()
                if not batch:
                    break
                yield task, [row.id for row in batch]
                following = page.where(conditions.is_after(batch[-1].created_at, batch[-1].id))

    async def _oldest_kept(self, connection: AsyncConnection, before: datetime) -> dict[str, Row[Any]]:
        """Of each task that has more runs than are kept in any case: the oldest of those. Nothing if all is young."""
        oldest = (await connection.execute(select(func.min(runs.c.created_at)))).scalar()
        if oldest is None or oldest >= before:
            return {}
        names = (await connection.execute(select(tasks.c.name).order_by(tasks.c.name))).scalars().all()
        oldest_kept = {name: (await connection.execute(self._kept(name))).first() for name in names}
        return {name: row for name, row in oldest_kept.items() if row is not None}

    def _kept(self, task: str) -> Select[Any]:
        newest = select(runs.c.created_at, runs.c.id).where(runs.c.task == task)
        ordered = newest.order_by(runs.c.created_at.desc(), runs.c.id.desc())
        return ordered.offset(max(0, self._keep.per_task - 1)).limit(1)

    async def _clear(self, gone: Sequence[str]) -> None:
        """Delete what belonged to these runs, and then forget them."""
        if not gone:
            return
        await self._clear_beside(gone)
        await self._delete_logs(gone)
        theirs = pruned.c.run.in_(json_rows.among(pruned.c.run, gone, self._ledger.kind))
        async with self._ledger.engine.begin() as connection:
            await connection.execute(delete(pruned).where(theirs))

    async def _clear_beside(self, ids: Sequence[str]) -> None:
        """The authors' database is written only if need be."""
        for table in (checkpoints, once, quarantine):
            theirs = table.c.run.in_(json_rows.among(table.c.run, ids, self._application.kind))
            async with self._application.reader.connect() as reading:
                there = (await reading.execute(select(table.c.run).where(theirs).limit(1))).first()
            if there is not None:
                async with self._application.engine.begin() as connection:
                    await connection.execute(delete(table).where(theirs))

    async def _delete_logs(self, ids: Sequence[str]) -> None:
        """A run may have any number of blocks."""
        key = tuple_(log.c.run, log.c.fence, log.c.first_line)
        theirs = log.c.run.in_(json_rows.among(log.c.run, ids, self._ledger.kind))
        blocks = select(log.c.run, log.c.fence, log.c.first_line).where(theirs)
        went = size = -1
        while went == size:
            size = self._blocks.size
            async with self._blocks.transaction(self._ledger) as connection:
                went = (await connection.execute(delete(log).where(key.in_(blocks.limit(size))))).rowcount
            await asyncio.sleep(self._pause)

    async def _delete_runs(self, task: str, ids: Sequence[str], before: datetime) -> list[str]:
        """Those of these runs of a task that are still over: a person may have given one a new attempt meanwhile."""
        kind = self._ledger.kind
        wanted = {"rows": json_rows.encode([{"id": i} for i in ids], kind), "before": before}
        async with self._runs.transaction(self._ledger) as connection:
            await lock_tasks(connection, [task])
            went = (await connection.execute(conditions.delete_over(kind), wanted)).all()
            gone = [row.id for row in went]
            await connection.execute(
                delete(attempts).where(attempts.c.run.in_(json_rows.among(attempts.c.run, gone, kind)))
            )
            await json_rows.insert(connection, pruned, [{"run": i} for i in gone])
            if newest := max((row.slot for row in went if row.origin != Origin.MANUAL), default=None):
                later = update(tasks).where(tasks.c.name == task, tasks.c.accounted_from <= newest)
                await connection.execute(later.values(accounted_from=newest + INSTANT))
        return gone

    async def _delete_rest(self, before: datetime, now: datetime) -> Counter[str]:
        """Missed ranges and schedules that no account needs any more, and nodes that stopped."""
        counts = Counter({"nodes": await self._delete(nodes, conditions.is_gone(now))})
        ends = {"missed ranges": missed.c.last_slot, "schedules": schedules.c.valid_until}
        if not any([await self._is_there(at.table, at < before) for at in ends.values()]):
            return counts
        async with self._ledger.engine.begin() as connection:
            await lock_tasks(connection)
            await connection.execute(conditions.accounts_begin_later(before))
        for what, at in ends.items():
            counts[what] = await self._delete(at.table, and_(at < before, conditions.is_before_the_account(at)))
        return counts

    async def _delete(self, table: Table, is_old: ColumnElement[bool]) -> int:
        total = 0
        while await self._is_there(table, is_old):
            some = delete(table).where(table.c.id.in_(select(table.c.id).where(is_old).limit(BATCH)))
            async with self._ledger.engine.begin() as connection:
                total += (await connection.execute(some.where(is_old))).rowcount  # it may have changed meanwhile
            await asyncio.sleep(self._pause)
        return total

    async def _is_there(self, table: Table, is_old: ColumnElement[bool]) -> bool:
        async with self._ledger.reader.connect() as connection:
            return (await connection.execute(select(table.c.id).where(is_old).limit(1))).first() is not None
