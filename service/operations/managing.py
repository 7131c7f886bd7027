"""What `batch pause`, `resume`, `cancel`, `retry`, `redrive`, `backfill`, `prune`, `run --queue` do to the ledger.

Each works beside running services and without one: it writes the ledger, and whoever runs follows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock, logs
from service.batch.chunks import quarantine
from service.batch.chunks.quarantine import SetAside
from service.batch.execution.run_here import checked
from service.batch.firing import backfill, task_sync
from service.batch.firing.backfill import Backfill, Entry, Fate
from service.batch.firing.task_sync import Pause
from service.batch.ledger import database_time
from service.batch.ledger import runs as run_rows
from service.batch.ledger.migration import LEDGER_HISTORY
from service.batch.ledger.states import FINAL, RunState
from service.batch.ledger.tables import nodes
from service.batch.queue import cancel, enqueue
from service.batch.queue import retry as again
from service.batch.retention.pruning import Keep, Pruner
from service.batch.tasks.discovery import load_tasks
from service.batch.tasks.registry import Task, TaskRegistry
from service.config import Settings
from service.database.engine import Database
from service.database.migrate import migrate
from service.errors import DatabaseUnreachable, InvalidParameters
from service.operations.databases import open_databases
from service.operations.details import only_run

Row = dict[str, Any]

AGAIN_SECONDS = 0.1
MOST_SLOTS = 10_000
"""More slots at once than a person may have meant."""


@asynccontextmanager
async def writing(settings: Settings) -> AsyncIterator[Database]:
    """The ledger, migrated. Raises DatabaseUnreachable where there is none yet: nothing is there to be changed."""
    logs.set_up("CRITICAL")
    database = Database(settings.ledger_url, setting="LEDGER_URL", pooled=False)
    _refuse_missing(database)
    await database.check()
    await migrate(database, LEDGER_HISTORY)
    try:
        yield database
    finally:
        await database.dispose()


def _refuse_missing(database: Database) -> None:
    if database.kind == "sqlite" and not Path(database.url.database or "").exists():
        raise DatabaseUnreachable(
            f"there is no ledger yet at {database.safe_url} (LEDGER_URL): `batch serve` or `batch run` makes it"
        )


async def pause(settings: Settings, task: str, by: str) -> Pause | None:
    """The pause in which the task was already; None: it is paused now. Raises UnknownTask."""
    async with writing(settings) as ledger, ledger.engine.begin() as connection:
        return await task_sync.pause(connection, task, by)


async def resume(settings: Settings, task: str) -> Pause | None:
    """The pause that has ended; None: there was none. Raises UnknownTask."""
    async with writing(settings) as ledger, ledger.engine.begin() as connection:
        return await task_sync.resume(connection, task)


async def pause_of(settings: Settings, task: str) -> Pause | None:
    """The pause in which a task is. Raises UnknownTask."""
    async with writing(settings) as ledger, ledger.engine.begin() as connection:
        return await task_sync.pause_of(connection, task)


async def cancel_run(settings: Settings, given: str, by: str, seconds: float) -> Row:
    """Cancel a run, wait so many seconds for its end, and return its row.

    Raises UnknownRun, and InvalidParameters that names the state of one that is over.
    """
    async with writing(settings) as ledger:
        async with ledger.engine.begin() as connection:
            run = await only_run(connection, given)
            before = await _row(connection, run)
            await cancel.request_cancel(connection, run, f"cancelled by {by}", by)
        if before["state"] in FINAL:
            raise InvalidParameters(f"the run {run} can't be cancelled: it has {_ended(before)}")
        give_up_at = clock.monotonic() + seconds
        while True:
            async with ledger.reader.connect() as connection:
                row = await _row(connection, run)
            if row["state"] in FINAL or clock.monotonic() >= give_up_at:
                return row
            await asyncio.sleep(AGAIN_SECONDS)


async def retry(settings: Settings, given: str, by: str, anew: bool) -> Row:
    """Give a run that is over a new attempt; `anew`: from the beginning. Returns its row. Raises as `again.retry`."""
    async with writing(settings) as ledger:
        async with ledger.engine.begin() as connection:
            run = await only_run(connection, given)
            if not anew:
                await again.retry(connection, run, by)
        if anew:
            async with both(settings) as (application, _):
                await again.retry_from_the_beginning(ledger, application, run, by)
        async with ledger.reader.connect() as connection:
            return await _row(connection, run)


@asynccontextmanager
async def both(settings: Settings) -> AsyncIterator[tuple[Database, Database]]:
    """The application's database and the ledger, migrated."""
    logs.set_up("CRITICAL")
    async with AsyncExitStack() as stack:
        opened = await open_databases(settings)
        for database in opened:
            stack.push_async_callback(database.dispose)
        yield opened


async def prune(settings: Settings, dry: bool) -> Mapping[str, int]:
    """How many rows went, by what they are; `dry`: how many runs of each task would go."""
    async with both(settings) as (application, ledger):
        pruner = Pruner(ledger, application, Keep(settings.KEEP_RUNS_DAYS, settings.KEEP_RUNS_PER_TASK))
        return await (pruner.count() if dry else pruner.prune())


@dataclass(frozen=True)
class Wanted:
    """A backfill as a person asks for it. `anyway`: also more slots than MOST_SLOTS. `dry`: change nothing."""

    task: str
    since: datetime
    until: datetime
    redo: bool = False
    anyway: bool = False
    dry: bool = False


async def fill(settings: Settings, wanted: Wanted, by: str, see: Callable[[Entry], None]) -> Mapping[Fate, int]:
    """Make a backfill's runs, or only look; `see` is called with each slot. Raises InvalidParameters, UnknownTask."""
    task = _loaded(settings, wanted.task)
    async with both(settings) as (application, ledger):
        async with ledger.engine.connect() as connection:
            interval = await backfill.interval_of(connection, task.name, wanted.since, wanted.until)
        if not wanted.anyway and await interval.count(MOST_SLOTS) > MOST_SLOTS:
            raise InvalidParameters(
                f"task {task.name}: there are more than {MOST_SLOTS:,} slots in this interval; --yes allows that"
            )
        made = Backfill(ledger, application, task, by, wanted.redo)
        return await (made.look if wanted.dry else made.make)(interval, see)


async def queue(settings: Settings, name: str, given: Mapping[str, Any], slot: datetime | None, by: str) -> str:
    """Queue a run for the services; returns its id. Raises InvalidParameters, UnknownTask."""
    task = _loaded(settings, name)
    params = checked(task, given)
    async with writing(settings) as ledger, ledger.engine.begin() as connection:
        return await enqueue.enqueue(connection, task, params, slot, by)


async def quarantined(settings: Settings, given: str) -> list[SetAside]:
    """The items that a run set aside. Raises UnknownRun."""
    async with both(settings) as (application, ledger):
        async with ledger.reader.connect() as connection:
            run = await only_run(connection, given)
        return await quarantine.listed(application, run)


async def redrive(settings: Settings, given: str, items: Sequence[str] | None, by: str) -> tuple[str, str]:
    """Queue a run that does a run's quarantined items again, or only these; returns its task and its id.

    Raises UnknownRun, UnknownTask, and InvalidParameters where the run has no such items left.
    """
    async with both(settings) as (application, ledger):
        async with ledger.reader.connect() as connection:
            run = await only_run(connection, given)
            name = (await _row(connection, run))["task"]
        left = {one.item for one in await quarantine.listed(application, run) if one.redriven_by is None}
        if missing := sorted(set(items or ()) - left) or ([] if left else ["none is left"]):
            raise InvalidParameters(f"the run {run} has no such items set aside: {', '.join(missing)}")
        task = _loaded(settings, name)
        params = checked(task, {"redrive": run, **({"items": list(items)} if items else {})})
        async with ledger.engine.begin() as connection:
            return name, await enqueue.enqueue(connection, task, params, None, by, parent=run)


async def is_served(settings: Settings, task: str) -> bool:
    """Whether a service that has the task was seen within a lease."""
    async with writing(settings) as ledger, ledger.engine.connect() as connection:
        since = await database_time.now_of(connection) - timedelta(seconds=settings.LEASE_SECONDS)
        living = select(nodes.c.tasks).where(nodes.c.stopped_at.is_(None), nodes.c.fires, nodes.c.seen_at >= since)
        return any(task in names for names in (await connection.execute(living)).scalars())


def _loaded(settings: Settings, name: str) -> Task:
    logs.set_up("CRITICAL")
    load_tasks(settings.TASKS_DIR)
    return TaskRegistry.get(name)


async def _row(connection: AsyncConnection, run: str) -> Row:
    row = await run_rows.get(connection, run)
    assert row is not None
    return row


def _ended(row: Row) -> str:
    state = "been " if row["state"] in (RunState.CANCELLED, RunState.SKIPPED) else ""
    return f"{state}{row['state']}" + (f" ({row['reason']})" if row["reason"] else "")
