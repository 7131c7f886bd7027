"""The last runs of a task, for a small chart: how long each took, and how it ended."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import parts
from batch_system.batch.ledger.run_rows import newest_of_each

LAST = 60


class _Run(NamedTuple):
    id: str
    task: str
    state: str
    gate: str | None
    started_at: datetime | None
    attempt_started_at: datetime | None
    finished_at: datetime | None


class Spark(NamedTuple):
    """A run. `seconds`: of its last attempt, or from its split to its end; None if it has not begun
    or goes on.
    """

    run: str
    state: str
    seconds: float | None


async def sparks_of(
    connection: AsyncConnection, tasks: Iterable[str], last: int = LAST
) -> dict[str, list[Spark]]:
    """The last runs of each of these tasks, the oldest first, in one query. There should be few
    tasks.
    """
    found: dict[str, list[Spark]] = {task: [] for task in dict.fromkeys(tasks)}
    rows = await newest_of_each(connection, list(found), _Run._fields, last)
    for run in map(_Run._make, rows):
        found[run.task].append(Spark(run.id, run.state, parts.seconds_taken(run)))
    return found
