"""start(): a run that code asks for, from a request or from another run. Any node with the task takes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.context.current_run import current_run_if_any
from service.batch.ledger import database_time, runs, tables
from service.batch.ledger.runs import NewRun
from service.batch.tasks.base import BaseTask
from service.batch.tasks.registry import Task, TaskRegistry
from service.config import get_settings
from service.database.engine import Database
from service.errors import InvalidParameters, UnknownTask
from service.escaping import echoed

LONGEST_KEY = 200

Wake = Callable[[], None]

# A service's ledger, and what wakes its engine, on its event loop.
_services: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Database, Wake]] = WeakKeyDictionary()


async def start(task: type[BaseTask], /, *, key: str | None = None, slot: datetime | None = None, **params: Any) -> str:
    """Start a run of `task` with these parameters of its `run()`, and return the run's id at once.

    It runs in whichever process of the service has room, after what the task has to do already. It is written in a
    transaction of its own: a rollback of yours does not take it back.

    Args:
        key: 1 to 200 characters. The same key starts a task once: where it has a run with this key, whatever its
            parameters and state, that one's id is returned. A key is known for as long as its run is kept.
        slot: The instant (aware) to run it for; None: that of the start.

    Raises InvalidParameters before anything is written, UnknownTask when no service has loaded the task, and
    DatabaseError when the ledger can't be reached.
    """
    known = TaskRegistry.of(task)
    checked = _checked(known, key, slot, params)
    database, wake = _services.get(asyncio.get_running_loop()) or _outside()
    try:
        async with database.engine.begin() as connection:
            parent = current_run_if_any()
            by = f"task {parent.task}" if parent else None
            run_id = await enqueue(connection, known, checked, slot, by, key, parent.id if parent else None)
    except DBAPIError as error:
        raise database.unreachable(error) from error
    wake()
    return run_id


async def enqueue(
    connection: AsyncConnection,
    task: Task,
    params: dict[str, Any] | None,
    slot: datetime | None,
    by: str | None,
    key: str | None = None,
    parent: str | None = None,
) -> str:
    """Queue a run with checked parameters, in the caller's transaction; returns its id. Raises UnknownTask."""
    await _refuse_unknown(connection, task)
    now = await database_time.now_of(connection)
    asked: dict[str, Any] = {"params": params, "requested_by": by, "key": key, "parent": parent}
    new = NewRun.queued(task.name, slot, now, exclusive=task.exclusive, priority=task.policies.priority, **asked)
    return await runs.insert_once(connection, new)


def use_service(database: Database, wake: Wake) -> None:
    """Make `start()` on this event loop use a service's ledger, and wake its engine."""
    _services[asyncio.get_running_loop()] = database, wake


def use_no_service() -> None:
    _services.pop(asyncio.get_running_loop(), None)


def _outside() -> tuple[Database, Wake]:
    return Database(get_settings().ledger_url, setting="LEDGER_URL", pooled=False), lambda: None


def _checked(task: Task, key: str | None, slot: datetime | None, params: dict[str, Any]) -> dict[str, Any] | None:
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= LONGEST_KEY):
        raise InvalidParameters(f"start({task.name}): key is {echoed(key)}; allowed: 1 to {LONGEST_KEY} characters")
    if slot is not None and slot.utcoffset() is None:
        raise InvalidParameters(f"start({task.name}): slot is {echoed(slot)}; allowed: an aware datetime")
    if "key" in task.parameters.names:
        raise InvalidParameters(f"start({task.name}): run() has a parameter `key`, which is start()'s own: rename it")
    return task.parameters.to_json(params) or None


async def _refuse_unknown(connection: AsyncConnection, task: Task) -> None:
    """Nobody would ever run it."""
    known = select(tables.tasks.c.name).where(tables.tasks.c.name == task.name, tables.tasks.c.removed_at.is_(None))
    if (await connection.execute(known)).first() is None:
        raise UnknownTask(
            f"{task.name}: no service has loaded this task, which is in {task.source}: it runs what is in "
            "TASKS_DIR, or was registered before its start"
        )
