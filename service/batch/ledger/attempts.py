"""Queries on attempts that have ended. The attempt that is going on stands on the row of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import attempts

COLUMNS = ("run", "fence", "number", "node", "started_at", "ended_at", "outcome", "error")


@dataclass(slots=True)
class Outcome:
    """How one attempt ended, and the state that follows for its run.

    `id` is the run's, `number` the attempt's. `due_at`: when the run may start again, if it goes on.
    """

    id: str
    fence: int
    state: RunState
    outcome: str
    number: int
    node: str
    task: str
    started_at: datetime
    ended_at: datetime
    reason: str | None = None
    result: Any = None
    error: dict[str, Any] | None = None
    due_at: datetime | None = None
    rank: int | None = None
    count: int | None = None
    total: int | None = None
    count_before: int | None = None
    message: str | None = None
    progress_at: datetime | None = None


async def record(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> None:
    """Write the row of each attempt that has ended."""
    rows = [{**{name: getattr(outcome, name, None) for name in COLUMNS}, "run": outcome.id} for outcome in outcomes]
    await json_rows.insert(connection, attempts, rows, "(run, fence)")


async def unrecorded(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of these that are not in the ledger. One that is there was written by a COMMIT whose reply was lost."""
    known = select(attempts.c.run, attempts.c.fence, attempts.c.outcome).where(
        attempts.c.run.in_([outcome.id for outcome in outcomes])
    )
    there = {tuple(row) for row in await connection.execute(known)}
    return [outcome for outcome in outcomes if (outcome.id, outcome.fence, outcome.outcome) not in there]


async def of_run(connection: AsyncConnection, run: str) -> list[dict[str, Any]]:
    """The attempts of a run that have ended, oldest first."""
    statement = select(attempts).where(attempts.c.run == run).order_by(attempts.c.fence)
    return [dict(row) for row in (await connection.execute(statement)).mappings()]
