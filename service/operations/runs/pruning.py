"""Deletes old runs on request. A service does the same every hour."""

from __future__ import annotations

from collections.abc import Mapping

from service.batch.retention.pruning import Pruner
from service.operations.asking.context import Context


async def prune(context: Context) -> Mapping[str, int]:
    """Delete old runs and what belongs to them. Returns how many rows were deleted, by kind. Raises
    DatabaseError.
    """
    await context.databases.migrate_both()
    return await _pruner(context).prune()


async def count(context: Context) -> Mapping[str, int]:
    """How many runs pruning would delete, by task; empty if there is no ledger yet. Raises
    DatabaseError.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            return {}
    return await _pruner(context).count()


def _pruner(context: Context) -> Pruner:
    return Pruner(context.databases.ledger, context.databases.application, context.keep)
