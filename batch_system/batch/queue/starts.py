"""start() and start_sync(): code queues a run, in an HTTP handler or in another run. Any node with
the task runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, overload

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from batch_system.batch.ledger import tables
from batch_system.batch.ledger.states import StartPriority
from batch_system.batch.queue import enqueue, session_starts
from batch_system.batch.queue.requests import StartedRun, StartRequest, Starts
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import TaskRegistry


@overload
async def start(
    task: type[BaseTask],
    /,
    *,
    debounce: float | timedelta,
    at_most: float | timedelta | None = None,
    session: AsyncSession | None = None,
    key: str | None = None,
    slot: datetime | None = None,
    priority: StartPriority | None = None,
    params: Mapping[str, Any] | None = None,
    **given: Any,
) -> StartedRun: ...


@overload
async def start(
    task: type[BaseTask],
    /,
    *,
    once_in: float | timedelta,
    session: AsyncSession | None = None,
    key: str | None = None,
    slot: datetime | None = None,
    at: datetime | None = None,
    delay: float | timedelta | None = None,
    priority: StartPriority | None = None,
    params: Mapping[str, Any] | None = None,
    **given: Any,
) -> StartedRun: ...


@overload
async def start(
    task: type[BaseTask],
    /,
    *,
    session: AsyncSession | None = None,
    key: str | None = None,
    slot: datetime | None = None,
    at: datetime | None = None,
    delay: float | timedelta | None = None,
    in_group: bool = False,
    priority: StartPriority | None = None,
    params: Mapping[str, Any] | None = None,
    **given: Any,
) -> str: ...


async def start(
    task: type[BaseTask],
    /,
    *,
    session: AsyncSession | None = None,
    key: str | None = None,
    slot: datetime | None = None,
    at: datetime | None = None,
    delay: float | timedelta | None = None,
    in_group: bool = False,
    debounce: float | timedelta | None = None,
    at_most: float | timedelta | None = None,
    once_in: float | timedelta | None = None,
    priority: StartPriority | None = None,
    params: Mapping[str, Any] | None = None,
    **given: Any,
) -> str:
    """Queue a run of `task` with `given`, the parameters of its `run()`, and return its id (a UUID)
    at once.

    A process of the service runs it as soon as it has capacity and the runs before it in the task's
    queue have started. Without `session` the run is written in a transaction of its own: a rollback
    of the caller's transaction does not remove it.

    Args:
      session: The run exists if, and only if, the transaction of this session commits. It is a
          session on the application's database (DATABASE_URL): that of `get_db()`, of a chunk, or
          of your own `async_sessionmaker`.
      key: 1 to 200 characters. The same key starts a task once: if the task already has a run with
          this key, with any parameters and in any state, the id of that run is returned. A key is
          known as long as its run is kept.
      slot: The instant (aware) that the run is for; by default the instant of this call.
      at: The instant (aware) before which the run does not begin, by the clock of the ledger. It
          begins at most a second later if there is capacity. An instant in the past means at once.
      delay: The same in seconds from now, or as a timedelta.
      in_group: Whether the run joins the group of the calling run: the follow-up of that group
          waits for it. Not with `session`.
      debounce: Seconds, or a timedelta. The run begins when none of the task's starts with this
          `key` has come for this time. Until then they are one run, which waits, with the
          parameters of the newest one.
      at_most: How long such a run is postponed at most, from its first start on; by default 10
          times `debounce`.
      once_in: Seconds, or a timedelta. For this time after a start, those with the same `key` make
          no run.
      priority: "high": the run goes before the others of its queue, and among the keys of a limit
          the runs of high priority get up to half of what may begin. "low": it goes after them.
          Between tasks, the attribute `priority` of a task decides.
      params: The parameters of `run()` as a dict, if one of them has the name of an argument of
          `start()`.

    With `debounce` or `once_in`, `key` names what belongs together, and by default it is the whole
    task. The id has the attributes `how` and `until` then: see StartedRun.

    Raises InvalidParameters before anything is written, UnknownTask if no service has loaded the
    task, DatabaseError if the ledger can't be reached, and with `in_group` LeaseLost if another
    node now holds the calling run. With `session` also what its database raises.
    """
    own = {"key": key, "slot": slot, "at": at, "delay": delay, "in_group": in_group}
    own |= {"debounce": debounce, "at_most": at_most, "once_in": once_in, "priority": priority}
    starts = _checked(task, given, params, own)
    run = await (
        enqueue.submit(starts) if session is None else session_starts.write(session, starts)
    )
    return run if debounce is not None or once_in is not None else str(run)


def start_sync(
    task: type[BaseTask],
    /,
    *,
    session: Session,
    key: str | None = None,
    slot: datetime | None = None,
    at: datetime | None = None,
    delay: float | timedelta | None = None,
    debounce: float | timedelta | None = None,
    at_most: float | timedelta | None = None,
    once_in: float | timedelta | None = None,
    priority: StartPriority | None = None,
    params: Mapping[str, Any] | None = None,
    **given: Any,
) -> str:
    """`start()` for synchronous code: the run exists if, and only if, the transaction of this
    synchronous SQLAlchemy session commits.

    The arguments and errors are those of `start()`. It blocks for as long as the session's
    database takes to insert a row.
    """
    own = {"key": key, "slot": slot, "at": at, "delay": delay}
    own |= {"debounce": debounce, "at_most": at_most, "once_in": once_in, "priority": priority}
    return str(session_starts.write_sync(session, _checked(task, given, params, own)))


async def run_of(task: type[BaseTask], key: str) -> str | None:
    """The id of the run that a task has with this start key, in any state; None if there is none.

    Raises DatabaseError if the ledger can't be reached.
    """
    database, runs = enqueue.ledger(), tables.runs
    query = select(runs.c.id).where(runs.c.task == TaskRegistry.of(task).name, runs.c.key == key)
    try:
        async with database.reader.connect() as connection:
            return (await connection.execute(query)).scalar()
    except (DBAPIError, OSError) as error:
        raise database.unreachable(error) from error


def _checked(
    task: type[BaseTask],
    given: Mapping[str, Any],
    params: Mapping[str, Any] | None,
    own: dict[str, Any],
) -> Starts:
    request = StartRequest.checked(TaskRegistry.of(task), given, params=params, **own)
    return Starts((request,), in_group=own.get("in_group", False))
