"""What of a run is masked: parameters with a secret name for everybody, and what a viewer may not see."""

from __future__ import annotations

from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import tasks as task_rows
from service.operations.context import Context
from service.operations.results import RunRow

SECRET_TAG = "secret"  # noqa: S105 - the name of a tag
"""Parameters, results and logs of tasks with this tag are hidden from viewers."""

R = TypeVar("R", bound=RunRow[Any])


async def redacted(connection: AsyncConnection, context: Context, run: R) -> R:
    """The run as the caller may see it."""
    if await hides(connection, context, run.task):
        return run.model_copy(update={"params": None, "result": None})
    masked = context.redaction.masked
    return run.model_copy(update={"params": masked(run.params), "result": masked(run.result)})


async def hides(connection: AsyncConnection, context: Context, task: str) -> bool:
    """Whether parameters, results and logs of this task are hidden from the caller."""
    if context.actor.may("operator"):
        return False
    row = await task_rows.get(connection, task)
    return row is not None and isinstance(row["tags"], list) and SECRET_TAG in row["tags"]
