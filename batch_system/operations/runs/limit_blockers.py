"""What a waiting run of a task with a limit or a rate waits for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import rates
from batch_system.batch.queue import concurrency
from batch_system.batch.tasks.limit import Queueing
from batch_system.operations.runs.waiting import Blocker


async def blocker_of(
    connection: AsyncConnection,
    run: Row[Any],
    queueing: Queueing,
    running: Mapping[str, Sequence[Row[Any]]],
    now: datetime,
    is_secret: bool,
) -> Blocker | None:
    """The limit, the total or the rate that holds this run; None if none does. `running`: the runs
    that are running, by task. `is_secret`: whether its key is hidden.
    """
    limit, rate = queueing.limit, queueing.rate
    assert limit is not None
    everything = [each for its in running.values() for each in its]
    of_key = [each for each in everything if each.exclusive == run.exclusive]
    key = None if is_secret else _key_in(run.exclusive)
    of_all = [each for each in everything if (each.exclusive or "").startswith(queueing.prefix)]
    queue = run.exclusive or ""
    number = (await concurrency.numbers_of(connection, limit, [queue]))[queue]
    if len(of_key) >= number:
        return _limit(of_key, number, key or (None if limit.key else queueing.shared_name))
    if limit.total is not None and len(of_all) >= limit.total:
        return _limit(of_all, limit.total, queueing.shared_name)
    if rate is None:
        return None
    begun, next_at = await rates.begun(connection, queueing.bucket_of(queue), now)
    if begun < rate.number:
        return None
    return Blocker(
        kind="rate",
        running=begun,
        limit=rate.number,
        per=rate.per,
        at=next_at,
        key=key if rate.key is not None else rate.name or queueing.task,
    )


def _limit(running: Sequence[Row[Any]], number: int, key: str | None) -> Blocker:
    first = running[0] if running else None
    return Blocker(
        kind="limit",
        run=first.id if first is not None else None,
        task=first.task if first is not None else None,
        running=len(running),
        limit=number,
        key=key,
    )


def _key_in(queue: str | None) -> str | None:
    """The key in the name of a queue; None for one that is hashed there, or that has none."""
    key = (queue or "").partition("[")[2].removesuffix("]")
    return None if not key or key.startswith("#") else key
