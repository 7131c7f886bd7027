"""Deleting what was over long ago, when somebody asks for it; a service does it every hour by itself."""

from __future__ import annotations

from collections.abc import Mapping

from service.batch.retention.pruning import Pruner
from service.operations.context import Context


async def prune(context: Context) -> Mapping[str, int]:
    """Delete, and return how many rows went, by what they are. Raises DatabaseError."""
    await context.databases.migrate_both()
    return await _pruner(context).prune()


async def count(context: Context) -> Mapping[str, int]:
    """How many runs would go, by task; nothing where there is no ledger yet. Raises DatabaseError."""
    async with context.databases.reading() as connection:
        if connection is None:
            return {}
    return await _pruner(context).count()


def _pruner(context: Context) -> Pruner:
    return Pruner(context.databases.ledger, context.databases.application, context.keep)
