"""Short ways to make tasks, and to see what the ledger holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Table, select, text

from batch_system import BaseTask, TaskRegistry, clock, current_run
from batch_system.batch.context.current_run import state_of
from batch_system.batch.context.lease import Lease
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.firing import apscheduler, firing, task_sync
from batch_system.batch.firing.apscheduler import Notify
from batch_system.batch.firing.firing import Fired
from batch_system.batch.firing.schedule_sync import ScheduleSync
from batch_system.batch.ledger import database_time, nodes
from batch_system.batch.ledger.tables import new_id, runs
from batch_system.batch.nodes.heartbeat import Heartbeat
from batch_system.batch.nodes.new_tasks import NewTasks
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.live_reload import TasksFolder
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database

NODE = new_id()


def make_task(
    name: str, schedule: str | None = "* * * * *", run: Any = None, **attributes: Any
) -> Task:
    """A registered task; its `run` does nothing unless one is given."""

    async def nothing(self: BaseTask) -> None:
        pass

    cls = type(
        name.title(),
        (BaseTask,),
        {"name": name, "schedule": schedule, "run": run or nothing, **attributes},
    )
    TaskRegistry.register(cls)
    return TaskRegistry.get(name)


async def know(ledger: Database, *tasks: Task, node: str = NODE) -> dict[str, Task]:
    """Put tasks and their schedules into the ledger, as a service does at its start."""
    loaded = {task.name: task for task in tasks}
    async with ledger.engine.begin() as connection:
        await task_sync.record_tasks(connection, loaded, await database_time.now_of(connection))
        await task_sync.set_schedules(connection, {t.name: t.schedule for t in tasks}, loaded, node)
    return loaded


async def fire(
    ledger: Database,
    loaded: dict[str, Task],
    now: datetime,
    capacity: Capacity | None = None,
    node: str = NODE,
) -> Fired:
    """Fire until nothing that is due at `now` is left."""
    first: Fired | None = None
    again = set(loaded)
    while again:
        async with ledger.engine.begin() as connection:
            fired = await firing.fire(
                connection, again, loaded, node, capacity or Capacity(0, 0), now
            )
        first = first or fired
        again = {name for name, at in fired.again_at.items() if at <= now}
    assert first is not None
    return first


@asynccontextmanager
async def heart_of(
    engine: LocalEngine, ledger: Database, node: str = NODE
) -> AsyncIterator[Heartbeat]:
    """The heartbeat of the node that the engine works for. It passes what it reads to the engine,
    as in a service.
    """
    row = {"id": node, "host": "here", "pid": 1, "version": "1", "draining": False, "tasks": []}
    async with ledger.engine.begin() as connection:
        now = await database_time.now_of(connection)
        await nodes.register(connection, {**row, "started_at": now, "seen_at": now})
    url = ledger.url.render_as_string(hide_password=False)
    lease = Lease(30)
    lease.renew(clock.boottime())
    heart = Heartbeat(url, node, lease, beat_seconds=5, lease_seconds=30)
    heart.start(on_loss=engine.give_up, on_rescue=engine.wake, on_changes=engine.on_changes)
    yield heart
    await asyncio.to_thread(heart.stop)


async def rows(ledger: Database, table: Table = runs, **equal: Any) -> list[dict[str, Any]]:
    statement = select(table).order_by(*table.primary_key)
    for name, value in equal.items():
        statement = statement.where(table.c[name] == value)
    async with ledger.engine.connect() as connection:
        return [dict(row) for row in (await connection.execute(statement)).mappings()]


async def until(condition: Any, seconds: float = 30.0) -> Any:
    """Wait until `await condition()` is true, and return its value. Fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
    return found


async def until_waiting(ledger: Database, number: int, seconds: float = 30.0) -> None:
    """On PostgreSQL: wait until this number of transactions wait for locks of other
    transactions.
    """
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock'"
    )

    async def are_there() -> bool:
        async with ledger.reader.connect() as connection:
            return bool((await connection.execute(waiting)).scalar_one() == number)

    await until(are_there, seconds)


async def until_counted() -> None:
    """In a run: wait until its loop knows how many items there are. The loop counts them beside the
    work, which may end first.
    """
    meter = state_of(current_run()).meter

    async def counted() -> bool:
        return meter._reported.total is not None  # latest() would mark it as taken

    await until(counted)


def schedule_sync_of(
    ledger: Database,
    loaded: dict[str, Task],
    node: str,
    notify: Notify = lambda name, slot=None: None,
) -> ScheduleSync:
    """A schedule sync with a scheduler of its own, whose refreshes the test starts."""
    new_tasks = NewTasks(ledger, TasksFolder(Path("tasks")), loaded, node)
    return ScheduleSync(ledger, new_tasks, loaded, node, apscheduler.new_scheduler(), notify, 30.0)


async def refresh(schedules: ScheduleSync) -> None:
    """Refresh the schedules now, without waiting for the next turn of the loop."""
    async with schedules.refreshing:  # its own loop refreshes too
        await schedules._read_own()
        await schedules._read_ledger()
