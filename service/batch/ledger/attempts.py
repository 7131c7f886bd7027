"""Queries on attempts that have ended. An attempt that is still running is kept in the row of its
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows
from service.batch.ledger.parts import Split
from service.batch.ledger.states import RunState
from service.batch.ledger.tables import attempts, runs

COLUMNS = ("fence", "number", "node", "started_at", "ended_at", "outcome", "error")
"""The columns that have the names and the values of attributes of an outcome."""


@dataclass(slots=True)
class Outcome:
    """How one attempt ended, and the next state of its run.

    `id`: of the run. `number`: of the attempt, from 1. `outcome`: a word for the attempt, such as
    "lost". `due_at`: the instant at which a run that goes on may start again; None: the run has
    ended. `fingerprint`: what is wrong with the run, as a class of errors; None if nothing is. All
    instants are aware.
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
    """Whether the run is a member of a group, or a part: another run waits for it."""
    part: int | None = None
    """The number of a part."""
    split: Split | None = None
    """What the run was split into. It waits for its parts now."""
    harm: str | None = None
    """What the attempt may have done to its node, for which its run pays; None: nothing."""
    harm_is_proven: bool = False
    split_rows: str | None = None
    """The parts as `Split.rows` has encoded them before the transaction."""


@dataclass(frozen=True, slots=True)
class EncodedOutcomes:
    """Outcomes as the parameter :rows of the statements that write them: of that for runs, and of
    that for attempts.

    `same`: columns of attempts that have the same value in all rows. They are not in `rows`.
    `is_plain`: no outcome has more than most have.
    """

    rows: str
    same: dict[str, Any]
    is_plain: bool


async def record(connection: AsyncConnection, encoded: EncodedOutcomes) -> None:
    """Write the row of each attempt that has ended."""
    columns = {"run": runs.c.id} | {
        name: attempts.c[name] for name in COLUMNS if name not in encoded.same
    }
    await json_rows.insert_encoded(
        connection, attempts, columns, encoded.rows, encoded.same, "(run, fence)"
    )


async def unrecorded(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of `outcomes` that are not in the ledger. The others were written by a COMMIT whose
    reply was lost.
    """
    statement = select(attempts.c.run, attempts.c.fence, attempts.c.outcome).where(
        attempts.c.run.in_([outcome.id for outcome in outcomes])
    )
    recorded = {tuple(row) for row in await connection.execute(statement)}
    return [
        outcome
        for outcome in outcomes
        if (outcome.id, outcome.fence, outcome.outcome) not in recorded
    ]


async def of_run(connection: AsyncConnection, run: str) -> list[dict[str, Any]]:
    """The attempts of a run that have ended, oldest first, as rows by column name."""
    statement = select(attempts).where(attempts.c.run == run).order_by(attempts.c.fence)
    return [dict(row) for row in (await connection.execute(statement)).mappings()]
