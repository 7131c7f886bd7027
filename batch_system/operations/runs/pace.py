"""The pace of a run: its chunks, whether it has stalled, and until when it may go on."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from batch_system.batch.chunks import checkpoints
from batch_system.batch.chunks.checkpoints import Committed
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import tasks
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.databases import is_missing_file
from batch_system.operations.asking.results import Result, RunDetails
from batch_system.settings.pools import DEFAULT_POOL

STALLED = 10
"""A run has stalled if nothing was committed for this many times the usual duration of a chunk."""
LEAST_STALLED = 10.0
"""Seconds that a run may take for a chunk in any case."""


class RunPace(Result):
    """`chunks`: how many were committed, by all attempts; None: the run has none, or it is not
    known.

    `chunk_size`: the items of a chunk on average. `stalled`: for how many seconds nothing was
    committed, if that is far longer than usual. `timeout_at`: when its attempt times out.
    `skip_limit`: how many items it may set aside. `lease`: seconds after its last heartbeat until
    the node loses the run. `heartbeat_late`: half of that has passed. `pool`: where it executes, or
    has executed, as its task says now.
    """

    chunks: int | None = None
    chunk_size: float | None = None
    stalled: float | None = None
    timeout_at: datetime | None = None
    skip_limit: int | None = None
    lease: float
    heartbeat_late: bool = False
    pool: str = DEFAULT_POOL


async def pace(context: Context, run: RunDetails) -> RunPace:
    """The pace of a run that was just read: its chunks, whether it has stalled, and until when it
    may go on.
    """
    committed = await _committed(context, run) if run.count is not None else Committed(0, 0)
    chunks = committed.chunks or None
    known = RunPace(
        chunks=chunks,
        chunk_size=committed.items / chunks if chunks else None,
        skip_limit=_skip_limit(context, run.task),
        lease=context.lease_seconds,
        pool=await _pool(context, run.task),
    )
    if run.state != RunState.RUNNING:
        return known
    async with context.databases.reading() as connection:
        if connection is None:
            return known
        policies = (
            await connection.execute(select(tasks.c.policies).where(tasks.c.name == run.task))
        ).scalar()
        now = await database_time.now_of(connection)
    silent = (now - run.node.seen_at).total_seconds() if run.node is not None else 0.0
    more = {
        "stalled": _stalled(run, known.chunk_size, now),
        "timeout_at": _timeout_at(run, policies),
        "heartbeat_late": silent > context.lease_seconds / 2,
    }
    return known.model_copy(update=more)


async def _pool(context: Context, task: str) -> str:
    async with context.databases.reading() as connection:
        query = select(tasks.c.pool).where(tasks.c.name == task)
        return (
            (await connection.execute(query)).scalar() if connection is not None else None
        ) or DEFAULT_POOL


async def _committed(context: Context, run: RunDetails) -> Committed:
    """What the application's database says; nothing if it can't be read, which other checks
    report.
    """
    application = context.databases.application
    if is_missing_file(application):
        return Committed(0, 0)
    try:
        async with application.reader.connect() as connection:
            return await checkpoints.committed(connection, run.id)
    except (DBAPIError, OSError):
        return Committed(0, 0)


def _skip_limit(context: Context, task: str) -> int | None:
    """How many items a run of the task may set aside, if this process has loaded the task."""
    loaded = context.loaded().tasks.get(task)
    skip = getattr(loaded.cls, "skip", None) if loaded is not None else None
    limit = getattr(skip, "limit", None)
    return limit if isinstance(limit, int) else None


def _timeout_at(run: RunDetails, policies: Any) -> datetime | None:
    seconds = policies.get("timeout") if isinstance(policies, dict) else None
    if not isinstance(seconds, int | float) or run.attempt_started_at is None:
        return None
    try:
        return run.attempt_started_at + timedelta(seconds=seconds)
    except OverflowError:
        return None


def _stalled(run: RunDetails, chunk_size: float | None, now: datetime) -> float | None:
    """For how many seconds the run has stalled. The usual duration of a chunk is the time for all
    items of this attempt, divided by the number of chunks. Without chunks, each item counts as one.
    """
    began, at = run.attempt_started_at, run.progress_at
    done = (run.count or 0) - (run.count_before or 0)
    if began is None or at is None or at <= began or done <= 0:
        return None
    usual = (at - began).total_seconds() / done * (chunk_size or 1.0)
    silent = (now - at).total_seconds()
    return silent if silent > max(LEAST_STALLED, STALLED * usual) else None
