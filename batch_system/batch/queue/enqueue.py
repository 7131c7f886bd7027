"""Writes the runs that code or a person asks for: into the ledger of this process's service, or
through another process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any
from weakref import WeakKeyDictionary

from sqlalchemy import make_url, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.context.current_run import CurrentRun, current_run_if_any
from batch_system.batch.ledger import database_time, key_counts, merges, runs, tables
from batch_system.batch.ledger import tasks as known_tasks
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RANK_OF_PRIORITY
from batch_system.batch.queue.requests import Merging, StartedRun, StartRequest, Starts
from batch_system.batch.queue.requests import Startable as Startable
from batch_system.database.engine import Database
from batch_system.errors import InvalidParameters, LeaseLost, TooManyWaiting, UnknownTask
from batch_system.settings.reading import get_settings

Wake = Callable[[], None]
Forward = Callable[[Starts], Awaitable[StartedRun]]

# For each event loop: the ledger of its service, and the function that wakes the engine of that
# service.
_services: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[Database, Wake]] = WeakKeyDictionary()


async def submit(starts: Starts) -> StartedRun:
    """Write the requested runs, or have another process do so. Returns what `write` returns."""
    forward = _forwards.get(asyncio.get_running_loop())
    return await (forward or start_checked)(starts)


async def start_checked(starts: Starts) -> StartedRun:
    """Write the requested runs. The calling run is their parent. Returns what `write` returns.

    Raises UnknownTask, InvalidParameters, LeaseLost and DatabaseError.
    """
    database, wake = _services.get(asyncio.get_running_loop()) or _without_service()
    parent = current_run_if_any()
    by = f"task {parent.task}" if parent else None
    try:
        async with database.engine.begin() as connection:
            group = await _group_of(connection, parent) if starts.in_group else None
            run = await write(connection, starts, by, parent.id if parent else None, group)
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error
    wake()
    return run


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
    starts = Starts((StartRequest(task, params, key, slot, at=at),))
    return str(await write(connection, starts, by, parent))


async def write(
    connection: AsyncConnection,
    starts: Starts,
    by: str | None,
    parent: str | None = None,
    group: str | None = None,
) -> StartedRun:
    """Write the requested runs, in the caller's transaction. Raises UnknownTask and TooManyWaiting.

    `by`: who asks for them. `parent`: the id of the run whose code asks for them. `group`: the
    follow-up that waits for them. Returns what `insert` returns.
    """
    await refuse_unknown(connection, starts.tasks)
    await refuse_too_many(connection, starts)
    now = await database_time.now_of(connection)
    new, follow_up = planned(starts, now, by, parent, group)
    merging = starts.runs[0].merging if starts.runs else None
    if merging is not None:
        return await merge(connection, new[0], merging)
    return await insert(connection, new, follow_up)


async def refuse_too_many(connection: AsyncConnection, starts: Starts) -> None:
    """Raises TooManyWaiting if a key would have more waiting runs than the limit's backlog."""
    asked: dict[tuple[str, str], list[StartRequest]] = {}
    for request in starts.runs:
        if request.task.queueing.backlog is not None:
            place = request.task.name, request.task.queueing.of(request.params) or ""
            asked.setdefault(place, []).append(request)
    if not asked:
        return
    most = max(its[0].task.queueing.backlog or 0 for its in asked.values())
    numbers = await key_counts.numbers_waiting(connection, asked, most)
    for place, its in asked.items():
        queueing, waiting = its[0].task.queueing, numbers[place]
        if waiting + len(its) > (queueing.backlog or 0):
            raise TooManyWaiting(
                f"{queueing.task}: {waiting:,} runs of {queueing.words_of(its[0].params)} wait "
                f"already (backlog={queueing.backlog})"
            )


def planned(
    starts: Starts, now: datetime, by: str | None, parent: str | None, group: str | None = None
) -> tuple[list[NewRun], NewRun | None]:
    """The new runs, and their follow-up. `now`: the instant of the start."""
    follow_up = _new(starts.then, now, by, parent) if starts.then is not None else None
    members = [_new(each, now, by, parent) for each in starts.runs]
    for member in members:
        member.awaited_by = follow_up.id if follow_up else group
    if follow_up is not None:
        follow_up.awaited_by = group
        if members:
            follow_up.wait(follow_up.due_at, starts.gate)
    return members, follow_up


async def insert(
    connection: AsyncConnection, members: Sequence[NewRun], follow_up: NewRun | None
) -> StartedRun:
    """Insert new runs and their follow-up, if there is one, in the caller's transaction.

    Returns the id of the follow-up, otherwise that of the first run, or of the run that already has
    its key. If the key of the follow-up is known, nothing is inserted.
    """
    new = [*([follow_up] if follow_up else []), *members]
    first = new[0]
    if first.key is None:
        await runs.insert_group(connection, new)
        return StartedRun(first.id, "created")
    if (known := await runs.insert_once(connection, first)) != first.id:
        return StartedRun(known, "known")
    await runs.insert_group(connection, new[1:])
    return StartedRun(first.id, "created")


async def merge(connection: AsyncConnection, new: NewRun, merging: Merging) -> StartedRun:
    """Merge a new run with earlier starts, or insert it, in the caller's transaction."""
    if merging.debounce is not None:
        assert merging.at_most is not None
        at_latest = new.created_at + timedelta(seconds=merging.at_most)
        new.wait(new.created_at + timedelta(seconds=merging.debounce))
        run = await merges.debounce(connection, new, merging.key, at_latest)
        return StartedRun(run.run, "created" if run.is_new else "merged", run.until)
    assert merging.once_in is not None
    until = new.created_at + timedelta(seconds=merging.once_in)
    run = await merges.once_in(connection, new, merging.key, until)
    return StartedRun(run.run, "created" if run.is_new else "dropped", run.until)


def _new(request: StartRequest, now: datetime, by: str | None, parent: str | None) -> NewRun:
    task = request.task
    asked: dict[str, Any] = {
        "params": request.params,
        "requested_by": by,
        "key": request.key,
        "parent": parent,
    }
    queue = task.queueing.of(request.params)
    new = NewRun.queued(
        task.name, request.slot, now, exclusive=queue, priority=task.priority, **asked
    )
    if request.priority is not None:
        new.rank = RANK_OF_PRIORITY[request.priority]
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


def ledger_url(loop: asyncio.AbstractEventLoop | None) -> str:
    """The URL of the ledger that this event loop uses, without its password; None: no loop."""
    service = _services.get(loop) if loop is not None else None
    return str(service[0].url if service is not None else make_url(get_settings().ledger_url))


def wake_of(loop: asyncio.AbstractEventLoop) -> Wake | None:
    """What wakes the engine of this event loop's service, if it has one."""
    service = _services.get(loop)
    return service[1] if service is not None else None


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


async def refuse_unknown(connection: AsyncConnection, startables: Sequence[Startable]) -> None:
    """Raises UnknownTask if no service has loaded one of these tasks, because nothing would ever
    run it.
    """
    sources = {task.name: task.source for task in startables}
    known = await known_tasks.loaded(connection, sources)
    if unknown := sorted(sources.keys() - known):
        raise UnknownTask(
            f"{unknown[0]}: no service has loaded this task, which is in {sources[unknown[0]]}: a "
            "service runs the tasks in TASKS_DIR, and those that were registered before it started"
        )
