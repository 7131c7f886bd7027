"""start() and start_all(): code queues runs, in an HTTP handler or in another run. Any node with
the task runs them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.context.current_run import CurrentRun, current_run_if_any
from batch_system.batch.ledger import database_time, json_rows, runs, tables
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.queue.requests import Startable as Startable
from batch_system.batch.queue.requests import StartRequest, Starts
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import TaskRegistry
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, LeaseLost, UnknownTask
from batch_system.settings.reading import get_settings

Wake = Callable[[], None]
Forward = Callable[[Starts], Awaitable[str]]

# For each event loop: the ledger of its service, and the function that wakes the engine of that
# service.
_services: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Database, Wake]] = WeakKeyDictionary()


async def start(
    task: type[BaseTask],
    /,
    *,
    key: str | None = None,
    slot: datetime | None = None,
    at: datetime | None = None,
    delay: float | timedelta | None = None,
    in_group: bool = False,
    params: Mapping[str, Any] | None = None,
    **given: Any,
) -> str:
    """Queue a run of `task` with `given`, the parameters of its `run()`, and return its id (a UUID)
    at once.

    A process of the service runs it as soon as it has capacity and the runs before it in the task's
    queue have started. The run is written in a transaction of its own: a rollback of the caller's
    transaction does not remove it.

    Args:
      key: 1 to 200 characters. The same key starts a task once: if the task already has a run with
          this key, with any parameters and in any state, the id of that run is returned. A key is
          known as long as its run is kept.
      slot: The instant (aware) that the run is for; by default the instant of this call.
      at: The instant (aware) before which the run does not begin, by the clock of the ledger. It
          begins at most a second later if there is capacity. An instant in the past means at once.
      delay: The same in seconds from now, or as a timedelta.
      in_group: Whether the run joins the group of the calling run: the follow-up of that group
          waits for it.
      params: The parameters of `run()` as a dict, if one of them has the name of an argument of
          `start()`.

    Raises InvalidParameters before anything is written, UnknownTask if no service has loaded the
    task, DatabaseError if the ledger can't be reached, and with `in_group` LeaseLost if another
    node now holds the calling run.
    """
    declared = TaskRegistry.of(task)
    own: dict[str, Any] = {"key": key, "slot": slot, "at": at, "delay": delay, "in_group": in_group}
    request = StartRequest.checked(declared, given, params=params, **own)
    return await submit(Starts((request,), in_group=in_group))


async def submit(starts: Starts) -> str:
    """Write the requested runs, or have another process do so. Returns the id that `write`
    returns.
    """
    forward = _forwards.get(asyncio.get_running_loop())
    return await (forward or start_checked)(starts)


async def start_checked(starts: Starts) -> str:
    """Write the requested runs. The calling run is their parent. Returns the id that `write`
    returns.

    Raises UnknownTask, InvalidParameters, LeaseLost and DatabaseError.
    """
    database, wake = _services.get(asyncio.get_running_loop()) or _without_service()
    parent = current_run_if_any()
    by = f"task {parent.task}" if parent else None
    try:
        try:
            async with database.engine.begin() as connection:
                group = await _group_of(connection, parent) if starts.in_group else None
                run_id = await write(connection, starts, by, parent.id if parent else None, group)
        except IntegrityError:
            run_id = await _known(database, starts.then)
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
    at: datetime | None = None,
) -> str:
    """Queue a run for a person, in the caller's transaction, and return its id. Raises UnknownTask.

    `params` are checked already. `by`: who asks for the run. `parent`: the id of the run that it is
    based on. `at`: the instant (aware) before which it does not begin.
    """
    return await write(
        connection, Starts((StartRequest(task, params, key, slot, at=at),)), by, parent
    )


async def write(
    connection: AsyncConnection,
    starts: Starts,
    by: str | None,
    parent: str | None = None,
    group: str | None = None,
) -> str:
    """Write the requested runs, in the caller's transaction. Raises UnknownTask.

    `by`: who asks for them. `parent`: the id of the run whose code asks for them. `group`: the
    follow-up that waits for them. Returns the id of their own follow-up, otherwise that of the
    first run, or of the run that already has its key. If the follow-up's key is known,
    IntegrityError is raised, and nothing may be committed.
    """
    then = starts.then
    await _refuse_unknown(
        connection, [each.task for each in (*starts.runs, *([then] if then else []))]
    )
    now = await database_time.now_of(connection)
    follow_up = _new(then, now, by, parent) if then is not None else None
    members = [_new(each, now, by, parent) for each in starts.runs]
    for member in members:
        member.awaited_by = follow_up.id if follow_up else group
    if follow_up is None and len(members) == 1:
        return await runs.insert_once(connection, members[0])
    if follow_up is not None:
        follow_up.awaited_by = group
        if members:
            follow_up.wait(follow_up.due_at, starts.gate)
    await runs.insert_group(connection, [*members, *([follow_up] if follow_up else [])])
    return follow_up.id if follow_up else ""


def _new(request: StartRequest, now: datetime, by: str | None, parent: str | None) -> NewRun:
    task = request.task
    asked: dict[str, Any] = {
        "params": request.params,
        "requested_by": by,
        "key": request.key,
        "parent": parent,
    }
    new = NewRun.queued(
        task.name, request.slot, now, exclusive=task.exclusive, priority=task.priority, **asked
    )
    at = now + timedelta(seconds=request.delay) if request.delay is not None else request.at
    if at is not None and at > now:
        new.wait(at)
    return new


async def _group_of(connection: AsyncConnection, member: CurrentRun | None) -> str:
    """The follow-up that waits for the calling run. The calling run's row is locked, so it can't
    end before the commit.

    Raises InvalidParameters if it is no member of a group, and LeaseLost if another node holds it.
    """
    if member is None:
        raise InvalidParameters("in_group=True works only inside a run that is a member of a group")
    held = (
        tables.runs.c.id == member.id,
        tables.runs.c.fence == member.fence,
        tables.runs.c.state == "running",
    )
    row = (
        await connection.execute(
            select(tables.runs.c.awaited_by, tables.runs.c.part).where(*held).with_for_update()
        )
    ).first()
    if row is None:
        raise LeaseLost(
            f"{member.task}: another node holds run {member.id} now, so it can start nothing in "
            "its group"
        )
    if row.part is not None:
        raise InvalidParameters(
            f"in_group=True: run {member.id} of {member.task} is a part, and in no group"
        )
    if row.awaited_by is None:
        raise InvalidParameters(
            f"in_group=True: run {member.id} of {member.task} is no member of a group"
        )
    return str(row.awaited_by)


async def _known(database: Database, then: StartRequest | None) -> str:
    """The id of the run that already has the key of this follow-up."""
    assert then is not None
    async with database.reader.connect() as connection:
        same = (tables.runs.c.task == then.task.name, tables.runs.c.key == then.key)
        return str((await connection.execute(select(tables.runs.c.id).where(*same))).scalar_one())


_forwards: WeakKeyDictionary[asyncio.AbstractEventLoop, Forward] = WeakKeyDictionary()


def use_forward(forward: Forward) -> None:
    """Make `start()` on this event loop pass its requests to another process, which returns the ids
    of the runs.
    """
    _forwards[asyncio.get_running_loop()] = forward


def use_service(database: Database, wake: Wake) -> None:
    """Make `start()` on this event loop use the ledger of a service. `wake` is called after each
    start.
    """
    _services[asyncio.get_running_loop()] = database, wake


def ledger() -> Database:
    """The ledger that this event loop uses: that of its service, otherwise that of the settings."""
    return (_services.get(asyncio.get_running_loop()) or _without_service())[0]


def use_no_service() -> None:
    """Make `start()` on this event loop open the ledger of the settings again."""
    _services.pop(asyncio.get_running_loop(), None)


def _without_service() -> tuple[Database, Wake]:
    settings = get_settings()
    ledger = Database(
        settings.ledger_url,
        setting=settings.ledger_setting,
        pooled=False,
        waits_briefly=True,
        pooler=settings.BATCH_DATABASE_POOLER,
    )
    return ledger, lambda: None


async def _refuse_unknown(connection: AsyncConnection, startables: Sequence[Startable]) -> None:
    """Raises UnknownTask if no service has loaded one of these tasks, because nothing would ever
    run it.
    """
    sources = {task.name: task.source for task in startables}
    is_asked = json_rows.is_among(tables.tasks.c.name, sources, connection.dialect.name)
    in_ledger = select(tables.tasks.c.name).where(is_asked, tables.tasks.c.removed_at.is_(None))
    known = set((await connection.execute(in_ledger)).scalars())
    if unknown := sorted(sources.keys() - known):
        raise UnknownTask(
            f"{unknown[0]}: no service has loaded this task, which is in {sources[unknown[0]]}: a "
            "service runs the tasks in TASKS_DIR, and those that were registered before it started"
        )
