"""The messages that are sent when a person closes incidents, or undoes that."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.incidents import telling
from batch_system.batch.incidents.watched import watched_tasks
from batch_system.operations.asking.context import Context


async def tell_followers(
    connection: AsyncConnection, context: Context, closed: Sequence[Row[Any]], at: datetime
) -> None:
    """Write messages about incidents that a person has closed, to programs and to services that
    keep incidents.

    People get no message, because one of them has done it.
    """
    followers = context.followers() if closed else []
    if followers:
        watched = await watched_tasks(connection)
        await telling.tell_of_the_end(connection, closed, watched, lambda _: followers, at)


async def tell_followers_again(
    connection: AsyncConnection, context: Context, reopened: Row[Any], at: datetime
) -> None:
    """Write messages to the same receivers that an incident is open again."""
    followers = context.followers()
    if followers and reopened.told_at is not None:
        await telling.tell_again(
            connection, reopened, await watched_tasks(connection), lambda _: followers, at
        )
