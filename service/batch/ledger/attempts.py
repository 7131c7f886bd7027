"""Queries on attempts that have ended. An attempt that is still running is kept in the row of its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows
from service.batch.ledger.runs import PROGRESS_COLUMNS
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import attempts

FINISH_COLUMNS = ("id", "fence", "state", "reason", "result", "due_at", "rank", "finished_at", *PROGRESS_COLUMNS)
"""Columns of runs that the end of an attempt changes, besides `fingerprint`, and by which it finds its run."""
COLUMNS = ("run", "fence", "number", "node", "started_at", "ended_at", "outcome", "error")


@dataclass(slots=True)
class Outcome:
    """How one attempt ended, and the next state of its run.

    `id`: of the run. `number`: of the attempt, from 1. `outcome`: a word for the attempt, such as "lost". `due_at`: the
    instant at which a run that goes on may start again; None: the run has ended. `fingerprint`: what is wrong with the
    run, as a class of errors; None if nothing is. All instants are aware.
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
    slot: datetime | None = None
    fingerprint: str | None = None
    is_awaited: bool = False
    """Whether the run is a member of a group, whose follow-up waits for it."""


def finish_row(outcome: Outcome) -> dict[str, Any]:
    """What the end of an attempt writes to the row of its run."""
    row = {name: getattr(outcome, name, None) for name in FINISH_COLUMNS}
    row["ended_at"] = outcome.ended_at
    if outcome.fingerprint is not None:  # so that the rows of runs that go well are no longer by it
        row["fingerprint"] = outcome.fingerprint
    row["finished_at"] = None if outcome.due_at is not None else outcome.ended_at
    return row


async def record(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> None:
    """Write the row of each attempt that has ended."""
    rows = [{**{name: getattr(outcome, name, None) for name in COLUMNS}, "run": outcome.id} for outcome in outcomes]
    await json_rows.insert(connection, attempts, rows, "(run, fence)")


async def unrecorded(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of `outcomes` that are not in the ledger. The others were written by a COMMIT whose reply was lost."""
    statement = select(attempts.c.run, attempts.c.fence, attempts.c.outcome).where(
        attempts.c.run.in_([outcome.id for outcome in outcomes])
    )
    recorded = {tuple(row) for row in await connection.execute(statement)}
    return [outcome for outcome in outcomes if (outcome.id, outcome.fence, outcome.outcome) not in recorded]


async def of_run(connection: AsyncConnection, run: str) -> list[dict[str, Any]]:
    """The attempts of a run that have ended, oldest first, as rows by column name."""
    statement = select(attempts).where(attempts.c.run == run).order_by(attempts.c.fence)
    return [dict(row) for row in (await connection.execute(statement)).mappings()]
