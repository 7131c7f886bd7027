"""What `batch tasks`, `runs` and `account` list: read from the ledger and the tasks folder, changing neither."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock, logs
from service.batch.account import accounting
from service.batch.account.account import Account, AccountedSlot
from service.batch.context.progress import pace
from service.batch.firing import task_sync
from service.batch.ledger import database_time, schedules, tables
from service.batch.ledger import runs as run_rows
from service.batch.ledger.migration import LEDGER_HISTORY
from service.batch.ledger.schedules import OpenSchedule
from service.batch.ledger.states import RunState
from service.batch.tasks.discovery import BrokenFile, load_tasks
from service.batch.tasks.registry import Task, TaskRegistry
from service.config import Settings
from service.database.engine import Database
from service.database.migrate import refuse_newer
from service.errors import DatabaseError, InvalidParameters, UnknownTask
from service.escaping import echoed

Row = dict[str, Any]


async def tasks(settings: Settings) -> list[Row]:
    """The loaded tasks by name, then the files that can't be used."""
    logs.set_up("CRITICAL")
    broken = load_tasks(settings.TASKS_DIR)
    async with ledger(settings) as connection:
        opened = await schedules.open_schedules(connection) if connection is not None else {}
        served = await task_sync.served_from(connection) if connection is not None else {}
    loaded = sorted(TaskRegistry.tasks().values(), key=lambda task: task.name)
    listed = [_task_row(task, opened.get(task.name), served.get(task.name)) for task in loaded]
    return [*listed, *map(_broken_row, broken)]


def _task_row(task: Task, opened: OpenSchedule | None, served_from: str | None) -> Row:
    """`served_from`: the file that the services have it from."""
    schedule = opened.schedule if opened is not None else task.schedule
    paused = opened is not None and opened.paused_by is not None
    return {
        "name": task.name,
        "description": task.description,
        "schedule": schedule.cron if schedule else None,
        "timezone": schedule.timezone if schedule else None,
        "next_run_time": schedule.next(clock.now()) if schedule and not paused else None,
        "paused": paused,
        "source": task.source,
        "served_from": served_from,
        "error": None,
    }


def _broken_row(file: BrokenFile) -> Row:
    nothing = dict.fromkeys(["name", "description", "schedule", "timezone", "next_run_time"])
    return {**nothing, "paused": False, "source": file.source, "served_from": None, "error": file.error}


async def runs(
    settings: Settings, task: str | None, state: str | None, since: datetime | None, limit: int
) -> list[Row]:
    """Runs, newest first. Raises InvalidParameters for an unknown state, UnknownTask for a task nobody has seen."""
    if state is not None and state not in list(RunState):
        raise InvalidParameters(f"there is no state {echoed(state)}; allowed: {', '.join(RunState)}")
    async with ledger(settings) as connection:
        if task is not None:
            await _refuse_unknown(connection, task)
        if connection is None:
            return []
        found = await connection.execute(run_rows.listing(task, state, since, limit))
        now = await database_time.now_of(connection)
        return [with_pace(row, now) for row in found.mappings()]


def with_pace(run: Mapping[str, Any], now: datetime) -> Row:
    """A run's row with the `rate` that it has at `now`, the ledger's time, and the `eta`."""
    rate, eta = pace(run, now)
    return {**run, "rate": rate, "eta": eta}


async def accounts(
    settings: Settings, since: datetime, until: datetime | None, task: str | None, see: Callable[[AccountedSlot], None]
) -> list[Account]:
    """What became of the slots since then, by task; `see` is called with each. Raises UnknownTask."""
    async with ledger(settings) as connection:
        if task is not None:
            await _refuse_unknown(connection, task)
        if connection is None:
            return []
        lease = settings.LEASE_SECONDS
        return [found async for found in accounting.accounts(connection, since, until, task, lease, see)]


async def _refuse_unknown(connection: AsyncConnection | None, task: str) -> None:
    names: list[str] = []
    if connection is not None:
        names = sorted((await connection.execute(select(tables.tasks.c.name))).scalars())
    if task not in names:
        raise UnknownTask(f"the ledger knows no task {echoed(task)}; it knows: {', '.join(names) or 'none'}")


@asynccontextmanager
async def ledger(settings: Settings) -> AsyncIterator[AsyncConnection | None]:
    """The ledger for reading; None where there is none yet, and none is made."""
    database = Database(settings.ledger_url, setting="LEDGER_URL", pooled=False)
    if database.kind == "sqlite" and _is_to_come(Path(database.url.database or "")):
        yield None
        return
    await database.check()
    try:
        async with database.reader.connect() as connection:
            there = await connection.run_sync(lambda sync: inspect(sync).has_table(tables.runs.name))
            if there:
                await connection.run_sync(refuse_newer, LEDGER_HISTORY, database)
            yield connection if there else None
    except (DBAPIError, DatabaseError, OSError) as error:
        raise database.unreachable(error) from error


def _is_to_come(file: Path) -> bool:
    """Not there, but it could be made: another folder than the one that was meant is a mistake to be told."""
    return file.parent.is_dir() and not file.exists()
