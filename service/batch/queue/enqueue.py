"""start(): code queues a run, in an HTTP handler or in another run. Any node that has loaded the task runs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Startable:
    """What is needed of a task to queue a run. `source`: its file. `exclusive`: the queue whose runs take lanes."""

    name: str
    source: str
    exclusive: str | None
    priority: int

    @classmethod
    def of(cls, task: Task) -> Startable:
        """What is needed of a task that this process has loaded."""
        return cls(task.name, task.source, task.exclusive, task.policies.priority)


@dataclass(frozen=True)
class StartRequest:
    """What `start()` was asked for, after its checks."""

    task: Startable
    params: dict[str, Any] | None
    key: str | None
    slot: datetime | None


# For each event loop the ledger of its service, and the function that wakes the engine of that service.
_services: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Database, Wake]] = WeakKeyDictionary()


async def start(task: type[BaseTask], /, *, key: str | None = None, slot: datetime | None = None, **params: Any) -> str:
    """Queue a run of `task` with `params`, the parameters of its `run()`, and return its id (a UUID) at once.

    A process of the service runs it as soon as it has capacity and the runs before it in the task's queue have
    started. The run is written in a transaction of its own: a rollback of the caller's transaction does not remove it.

    Args:
        key: 1 to 200 characters. The same key starts a task once: if the task has a run with this key already, with
            any parameters and in any state, the id of that run is returned. A key is known as long as its run is kept.
        slot: The instant (aware) that the run is for; None: the instant of this call.

    Raises InvalidParameters before anything is written, UnknownTask if no service has loaded the task, and
    DatabaseError if the ledger can't be reached.
    """
    declared = TaskRegistry.of(task)
    request = StartRequest(Startable.of(declared), _checked(declared, key, slot, params), key, slot)
    forward = _forwards.get(asyncio.get_running_loop())
    return await (forward or start_checked)(request)


async def start_checked(request: StartRequest) -> str:
    """Queue the run of a request, and return its id. The run that calls this is its parent.

    Raises UnknownTask and DatabaseError.
    """
    database, wake = _services.get(asyncio.get_running_loop()) or _without_service()
    try:
        async with database.engine.begin() as connection:
            parent = current_run_if_any()
            by = f"task {parent.task}" if parent else None
            run_id = await enqueue(
                connection, request.task, request.params, request.slot, by, request.key, parent.id if parent else None
            )
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    wake()
    return run_id


async def enqueue(
    connection: AsyncConnection,
    task: Startable,
    params: dict[str, Any] | None,
    slot: datetime | None,
    by: str | None,
    key: str | None = None,
    parent: str | None = None,
) -> str:
    """Queue a run in the caller's transaction, and return its id. Raises UnknownTask.

    `params` are checked already. `by`: who asks for the run. `parent`: the id of the run whose code asks for it.
    """
    await _refuse_unknown(connection, task)
    now = await database_time.now_of(connection)
    request: dict[str, Any] = {"params": params, "requested_by": by, "key": key, "parent": parent}
    new_run = NewRun.queued(task.name, slot, now, exclusive=task.exclusive, priority=task.priority, **request)
    return await runs.insert_once(connection, new_run)


_forwards: WeakKeyDictionary[asyncio.AbstractEventLoop, Callable[[StartRequest], Awaitable[str]]] = WeakKeyDictionary()


def use_forward(forward: Callable[[StartRequest], Awaitable[str]]) -> None:
    """Make `start()` on this event loop hand its requests to another process, which returns the ids of the runs."""
    _forwards[asyncio.get_running_loop()] = forward


def use_service(database: Database, wake: Wake) -> None:
    """Make `start()` on this event loop use the ledger of a service. `wake` is called after each start."""
    _services[asyncio.get_running_loop()] = database, wake


def use_no_service() -> None:
    """Make `start()` on this event loop open the ledger of the settings again."""
    _services.pop(asyncio.get_running_loop(), None)


def _without_service() -> tuple[Database, Wake]:
    settings = get_settings()
    return Database(settings.ledger_url, setting=settings.ledger_setting, pooled=False), lambda: None


def _checked(task: Task, key: str | None, slot: datetime | None, params: dict[str, Any]) -> dict[str, Any] | None:
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= LONGEST_KEY):
        raise InvalidParameters(f"start({task.name}): key is {echoed(key)}; allowed: 1 to {LONGEST_KEY} characters")
    if slot is not None and slot.utcoffset() is None:
        raise InvalidParameters(f"start({task.name}): slot is {echoed(slot)}; allowed: an aware datetime")
    if "key" in task.parameters.names:
        raise InvalidParameters(
            f"start({task.name}): run() has a parameter `key`, but start() has a parameter of that name too: rename it"
        )
    return task.parameters.to_json(params) or None


async def _refuse_unknown(connection: AsyncConnection, task: Startable) -> None:
    """Raises UnknownTask if no service has loaded the task: then nothing would ever run it."""
    in_ledger = select(tables.tasks.c.name).where(tables.tasks.c.name == task.name, tables.tasks.c.removed_at.is_(None))
    if (await connection.execute(in_ledger)).first() is None:
        raise UnknownTask(
            f"{task.name}: no service has loaded this task, which is in {task.source}: a service runs the tasks in "
            "TASKS_DIR, and those that were registered before it started"
        )
