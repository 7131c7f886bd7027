"""Why the runs of some pools wait in vain, or would: the warnings at the top of each page."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents.pool_check import grouped, why
from batch_system.batch.ledger import pools
from batch_system.operations.asking.context import Context
from batch_system.settings.pools import DEFAULT_POOL


class PoolProblem(NamedTuple):
    """Why runs of a pool wait in vain, or would, and what to do."""

    pool: str
    text: str


async def problems(
    connection: AsyncConnection, context: Context, now: datetime
) -> list[PoolProblem]:
    """The problems of all pools, in words. It costs little where there are none."""
    if not await pools.named(connection) - {DEFAULT_POOL}:
        return []
    since = now - timedelta(seconds=context.lease_seconds)
    unclaimed = await pools.unclaimed(connection, since)
    groups = grouped(await pools.in_vain(connection, now, since))
    for pool in unclaimed:
        groups.setdefault((pool, False), [])
    return [
        PoolProblem(
            pool,
            why(
                pool,
                [each.task for each in waiting] or unclaimed[pool],
                sum(each.waiting for each in waiting),
                is_claimed=is_claimed,
            ),
        )
        for (pool, is_claimed), waiting in sorted(groups.items())
    ]
