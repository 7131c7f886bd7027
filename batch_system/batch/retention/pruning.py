"""Pruning: deletes old runs, and the rows that belong to them, in batches small enough not to block
other writers.

Two nodes may prune at the same time: each row is deleted once. `batch account` stays correct,
because the transaction that deletes a slot's run also moves the beginning of its task's account
past the slot (`batch_tasks.accounted_from`).

No transaction spans the ledger and the application's database. A run is therefore deleted first, by
one statement that checks that it is final, and its checkpoints and other rows afterwards: a person
who retries the run meanwhile finds either the run with its checkpoints, or no run. The run's id
stays in `batch_pruned` until all of its rows are deleted, so that a later pruning continues after a
crash.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
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
    text,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.firing.misfires import INSTANT
from batch_system.batch.ledger import (
    buckets,
    database_time,
    json_rows,
    limit_numbers,
    maintenance,
    merges,
    rates,
)
from batch_system.batch.ledger.incidents import incidents, outbox
from batch_system.batch.ledger.people import access, audit, previews
from batch_system.batch.ledger.schedules import lock_tasks
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import (
    NO_PART_SQL,
    attempts,
    log,
    missed,
    nodes,
    pruned,
    runs,
    schedules,
    tasks,
)
from batch_system.batch.ledger.waits import waits
from batch_system.batch.retention import conditions
from batch_system.batch.retention.retention import Keep
from batch_system.database.companions import checkpoints, once, quarantine
from batch_system.database.engine import Database

RUNS = 100
"""The most runs that are deleted in one transaction, which takes some milliseconds."""
BLOCKS = 1_000
"""The most blocks of log lines that are deleted in one transaction."""

EVENTS = 1_000
"""The most events that are deleted in one transaction."""

LONG_SECONDS = 0.025
"""After a transaction that took longer, the next one has half its size, because rows may be large
and disks slow.
"""

PAUSE_SECONDS = 0.05
"""The pause between two transactions, in which others can take SQLite's write lock."""


class DeleteSize:
    """How many rows one transaction deletes: fewer while transactions take long, then more again,
    up to `limit`.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self.size = limit

    @asynccontextmanager
    async def transaction(self, database: Database) -> AsyncIterator[AsyncConnection]:
        """A transaction that deletes `size` rows. Its duration, without the wait for the lock,
        adapts the size.
        """
        async with database.engine.begin() as connection:
            began_at = clock.monotonic()
            yield connection
        is_long = clock.monotonic() - began_at > LONG_SECONDS
        self.size = max(1, self.size // 2) if is_long else min(self._limit, self.size * 2)


class Pruner:
    """Prunes one ledger, and the rows of its runs in the application's database."""

    def __init__(
        self, ledger: Database, application: Database, keep: Keep, pause: float = PAUSE_SECONDS
    ) -> None:
        self._ledger = ledger
        self._application = application
        self._keep = keep
        self._pause = pause
        self._runs = DeleteSize(RUNS)
        self._blocks = DeleteSize(BLOCKS)

    async def prune(self) -> Counter[str]:
        """Delete old rows. Returns the number of deleted `runs`, `missed ranges`, `schedules`,
        `nodes`, `events`.
        """
        counts: Counter[str] = Counter()
        now, before = await self._instants()
        while unfinished := await self._unfinished():
            await self._clear(unfinished)
        async for task, ids in self._old_runs(before):
            deleted = await self._delete_runs(task, ids, before)
            await self._clear(deleted)
            counts["runs"] += len(deleted)
            await asyncio.sleep(self._pause)
        counts += await self._delete_rest(before, now)
        counts += Counter({"events": await self._delete_requests(now)})
        return counts

    async def count(self) -> Counter[str]:
        """The number of runs that `prune` would delete, by task, for tasks with such runs."""
        counts: Counter[str] = Counter()
        _, before = await self._instants()
        async with self._ledger.reader.connect() as connection:
            for task, kept in (await self._oldest_kept(connection, before)).items():
                old = (
                    select(func.count())
                    .select_from(runs)
                    .where(conditions.is_old(task, kept, before))
                )
                counts[task] += (await connection.execute(old)).scalar_one()
        return +counts

    async def _instants(self) -> tuple[datetime, datetime]:
        """The database's current time, and the instant before which a run is old."""
        async with self._ledger.reader.connect() as connection:
            now = await database_time.now_of(connection)
        return now, now - timedelta(days=self._keep.days)

    async def _unfinished(self) -> Sequence[str]:
        """The ids of some deleted runs that may still have rows elsewhere."""
        async with self._ledger.reader.connect() as connection:
            return (
                (await connection.execute(select(pruned.c.run).limit(self._runs.size)))
                .scalars()
                .all()
            )

    async def _old_runs(self, before: datetime) -> AsyncIterator[tuple[str, list[str]]]:
        """Yield pages of old runs: the name of a task, and the ids of its runs."""
        async with self._ledger.reader.connect() as connection:
            oldest = await self._oldest_kept(connection, before)
        for task, kept in oldest.items():
            old = select(runs.c.id, runs.c.created_at).where(conditions.is_old(task, kept, before))
            ordered = old.order_by(runs.c.created_at, runs.c.id)
            rest = ordered
            while True:
                async with self._ledger.reader.connect() as connection:
                    page = (await connection.execute(rest.limit(self._runs.size))).all()
                if not page:
                    break
                yield task, [row.id for row in page]
                rest = ordered.where(conditions.is_after(page[-1].created_at, page[-1].id))

    async def _oldest_kept(
        self, connection: AsyncConnection, before: datetime
    ) -> dict[str, Row[Any]]:
        """Of each task with enough runs, the oldest run that `per_task` keeps; empty if no run at
        all is old.
        """
        first = select(func.min(runs.c.created_at)).where(text(NO_PART_SQL))
        oldest = (await connection.execute(first)).scalar()
        if oldest is None or oldest >= before:
            return {}
        names = (
            (await connection.execute(select(tasks.c.name).order_by(tasks.c.name))).scalars().all()
        )
        oldest_kept = {name: (await connection.execute(self._kept(name))).first() for name in names}
        return {name: row for name, row in oldest_kept.items() if row is not None}

    def _kept(self, task: str) -> Select[Any]:
        newest = select(runs.c.created_at, runs.c.id).where(runs.c.task == task, text(NO_PART_SQL))
        ordered = newest.order_by(runs.c.created_at.desc(), runs.c.id.desc())
        return ordered.offset(max(0, self._keep.per_task - 1)).limit(1)

    async def _clear(self, ids: Sequence[str]) -> None:
        """Delete the rows of these deleted runs and of their parts, and then their ids in
        `batch_pruned`.
        """
        if not ids:
            return
        while parts := await self._delete_parts(ids):
            await self._clear(parts)
        await self._clear_beside(ids)
        await self._delete_logs(ids)
        theirs = pruned.c.run.in_(json_rows.among(pruned.c.run, ids, self._ledger.kind))
        async with self._ledger.engine.begin() as connection:
            await connection.execute(delete(pruned).where(theirs))

    async def _delete_parts(self, ids: Sequence[str]) -> Sequence[str]:
        """Delete some parts of these deleted runs, and return their ids."""
        theirs = json_rows.is_among(runs.c.awaited_by, ids, self._ledger.kind)
        some = select(runs.c.id).where(theirs, runs.c.origin == Origin.PART).limit(self._runs.size)
        async with self._ledger.reader.connect() as connection:
            parts = (await connection.execute(some)).scalars().all()
        if parts:
            async with self._runs.transaction(self._ledger) as connection:
                for column in (runs.c.id, attempts.c.run):
                    theirs = column.in_(json_rows.among(column, parts, self._ledger.kind))
                    await connection.execute(delete(column.table).where(theirs))
                await json_rows.insert(
                    connection, pruned, [{"run": part} for part in parts], "(run)"
                )
            await asyncio.sleep(self._pause)
        return parts

    async def _clear_beside(self, ids: Sequence[str]) -> None:
        """Delete the rows in the application's database, which is written to only if there are
        any.
        """
        for table in (checkpoints, once, quarantine):
            theirs = table.c.run.in_(json_rows.among(table.c.run, ids, self._application.kind))
            async with self._application.reader.connect() as reader:
                row = (await reader.execute(select(table.c.run).where(theirs).limit(1))).first()
            if row is not None:
                async with self._application.engine.begin() as connection:
                    await connection.execute(delete(table).where(theirs))

    async def _delete_logs(self, ids: Sequence[str]) -> None:
        """Delete the log blocks of these runs. A run may have any number of blocks."""
        key = tuple_(log.c.run, log.c.fence, log.c.first_line)
        theirs = log.c.run.in_(json_rows.among(log.c.run, ids, self._ledger.kind))
        blocks = select(log.c.run, log.c.fence, log.c.first_line).where(theirs)
        deleted = size = -1
        while deleted == size:
            size = self._blocks.size
            async with self._blocks.transaction(self._ledger) as connection:
                deleted = (
                    await connection.execute(delete(log).where(key.in_(blocks.limit(size))))
                ).rowcount
            await asyncio.sleep(self._pause)

    async def _delete_runs(self, task: str, ids: Sequence[str], before: datetime) -> list[str]:
        """Delete those runs of `task` that are still final, because a person may have retried one.
        Returns their ids.
        """
        kind = self._ledger.kind
        values = json_rows.of_ids(ids, kind) | {"before": before}
        async with self._runs.transaction(self._ledger) as connection:
            await lock_tasks(connection, [task])
            rows = (await connection.execute(conditions.delete_over(kind), values)).all()
            deleted = [row.id for row in rows]
            for table in (attempts, waits):
                theirs = table.c.run.in_(json_rows.among(table.c.run, deleted, kind))
                await connection.execute(delete(table).where(theirs))
            await json_rows.insert(connection, pruned, [{"run": i} for i in deleted])
            if newest := max(
                (row.slot for row in rows if row.origin != Origin.MANUAL), default=None
            ):
                later = update(tasks).where(tasks.c.name == task, tasks.c.accounted_from <= newest)
                await connection.execute(later.values(accounted_from=newest + INSTANT))
                now = before + timedelta(days=self._keep.days)
                await buckets.account_begins(connection, task, newest + INSTANT, now)
        return deleted

    async def _delete_rest(self, before: datetime, now: datetime) -> Counter[str]:
        """Delete the missed ranges and schedules that no account needs, and the nodes that stopped
        long ago.
        """
        counts = Counter({"nodes": await self._delete(nodes, conditions.is_gone(now))})
        ends = {"missed ranges": missed.c.last_slot, "schedules": schedules.c.valid_until}
        if not any([await self._has_rows(at.table, at < before) for at in ends.values()]):
            return counts
        async with self._ledger.engine.begin() as connection:
            await lock_tasks(connection)
            await connection.execute(conditions.accounts_begin_later(before))
            await buckets.account_begins(connection, None, before, now)
        for name, at in ends.items():
            counts[name] = await self._delete(
                at.table, and_(at < before, conditions.is_before_the_account(at))
            )
        return counts

    async def _delete_requests(self, now: datetime) -> int:
        """Delete expired sessions, links and previews, and old events. Returns the number of
        events.
        """
        before, deleted, total = now - timedelta(days=self._keep.events_days), EVENTS, 0
        async with self._ledger.reader.connect() as connection:
            if not (await connection.execute(conditions.has_old_requests(now, before))).scalar():
                return 0
        async with self._ledger.engine.begin() as connection:
            await access.prune(connection, now)
            await maintenance.prune(connection, before)
            await previews.prune(connection, now)
            await merges.prune(connection, now - merges.KEPT, now - timedelta(days=self._keep.days))
            await rates.prune(connection, now)
            await limit_numbers.prune(connection, now)
            await buckets.prune(connection, now)
            await incidents.prune(connection, before)
            await outbox.prune(connection, now - conditions.KEEP_MESSAGES)
        while deleted == EVENTS:
            async with self._ledger.engine.begin() as connection:
                deleted = await audit.prune(connection, before, EVENTS)
            total += deleted
            await asyncio.sleep(self._pause)
        return total

    async def _delete(self, table: Table, is_old: ColumnElement[bool]) -> int:
        total = 0
        while await self._has_rows(table, is_old):
            delete_some = delete(table).where(
                table.c.id.in_(select(table.c.id).where(is_old).limit(RUNS))
            )
            async with self._ledger.engine.begin() as connection:
                total += (
                    await connection.execute(delete_some.where(is_old))
                ).rowcount  # a row may have changed meanwhile
            await asyncio.sleep(self._pause)
        return total

    async def _has_rows(self, table: Table, is_old: ColumnElement[bool]) -> bool:
        async with self._ledger.reader.connect() as connection:
            return (
                await connection.execute(select(table.c.id).where(is_old).limit(1))
            ).first() is not None
