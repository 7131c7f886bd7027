"""Attempts that have ended: how each ended, the columns of its run that this sets, and its own row.
An attempt that is still running is kept in the row of its run, with its progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import case, literal, null, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import json_rows
from batch_system.batch.ledger.parts import Split
from batch_system.batch.ledger.states import FINAL, Origin, Rank, RunState
from batch_system.batch.ledger.tables import attempts, runs
from batch_system.database.types import stamp

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
    """Outcomes as the parameter :rows of the two statements that write them, the one for runs and
    the one for attempts.

    `same`: columns of attempts that have the same value in all rows. They are not in `rows`.
    `is_plain`: whether no outcome has any of the rare attributes.
    """

    rows: str
    same: dict[str, Any]
    is_plain: bool

    def source(self, kind: str) -> str:
        """SQL for a FROM item with these rows. `kind`: that of the database.

        If all outcomes are plain, the other columns are not read: each of them would take SQLite
        half a microsecond.
        """
        return json_rows.source(_READ, kind, _PLAIN if self.is_plain else None)


# Progress.

PROGRESS_COLUMNS = ("count", "total", "count_before", "message", "progress_at")
PROGRESS = (
    "total = CASE WHEN v.count IS NULL THEN batch_runs.total ELSE v.total END, "
    "count = coalesce(v.count, batch_runs.count), "
    "count_before = coalesce(v.count_before, batch_runs.count_before), "
    "message = CASE WHEN v.count_before IS NULL THEN batch_runs.message ELSE v.message END, "
    "progress_at = coalesce(v.progress_at, batch_runs.progress_at)"
)
"""The SET clause for progress. Columns without a new value stay; `count_before` is NULL if nothing
was reported.
"""

IS_RUNNING = "coalesce(batch_runs.state, '') = 'running'"
"""The condition that a run is running, for statements that join many runs by their ids.

The state must not drive the join, which would take quadratic time: SQLite would use the index on
states, and PostgreSQL compare all pairs of rows, where its statistics are from a moment at which no
run was running.
"""


async def write_progress(connection: AsyncConnection, progress: list[dict[str, Any]]) -> None:
    """Write the progress of running runs. `progress`: `id`, `fence`, `rate` and PROGRESS_COLUMNS of
    each run.
    """
    if not progress:
        return
    kind = connection.dialect.name
    columns = [runs.c[name] for name in ("id", "fence", "rate", *PROGRESS_COLUMNS)]
    statement = text(
        f"UPDATE batch_runs SET {PROGRESS}, rate = v.rate FROM {json_rows.source(columns, kind)} "
        f"WHERE batch_runs.id = v.id AND batch_runs.fence = v.fence AND {IS_RUNNING}"
    )
    await connection.execute(statement, {"rows": json_rows.encode(progress, kind)})


# The SET clauses for the end of an attempt, and for a new beginning.

_COLUMNS = ("id", "fence", "state", "reason", "result", "due_at", "rank", *PROGRESS_COLUMNS)
_PLAIN = {"id", "fence", "state", "ended_at"}
_READ = [*(runs.c[name] for name in (*_COLUMNS, "fingerprint", "gate")), attempts.c.ended_at]
_RARE = ("reason", "result", "error", "due_at", "rank", "fingerprint", *PROGRESS_COLUMNS)
"""Attributes that are None in most outcomes."""
_OFTEN_SAME = ("number", "node", "outcome", "started_at")
"""Attributes for the rows of attempts that many outcomes have in common."""
_rare_of = attrgetter(*_RARE)
_NOTHING_RARE = (None,) * len(_RARE)

_HAS_FAILED = f"v.state = '{RunState.FAILED}'"
OPENED_AGAIN = ", ".join(
    f"{name} = CASE WHEN {_HAS_FAILED} THEN NULL ELSE batch_runs.{name} END"
    for name in ("acknowledged", "made_good_at", "made_good_by")
)
"""A run that fails again is neither acknowledged nor made good."""

KEPT_BACK = "kept_back"
"""The fingerprint of a slot that was skipped because of what it waited for, although none of those
has failed.
"""

# The watch notices what is wrong with a run once after each end of an attempt (see
# tables.UNNOTICED_RUN_SQL). It notices what is wrong with a part by its parent.
_BEFORE = (
    f"CASE WHEN NOT {_HAS_FAILED} OR batch_runs.fingerprint <> '{KEPT_BACK}' THEN "
    "batch_runs.fingerprint END"
)
_IS_PART = f"batch_runs.origin = '{Origin.PART}'"
NOTICED = (
    f"fingerprint = CASE WHEN {_IS_PART} THEN NULL ELSE coalesce(v.fingerprint, {_BEFORE}) END, "
    f"noticed_at = CASE WHEN {_IS_PART} THEN v.ended_at END"
)


CANCEL_TYPES = {"reason": "reason", "by": "cancel_by", "now": "cancel_at"}
"""The parameters of a cancel, each with the column that has its type."""

UNSERVED = "unserved"
"""The fingerprint of a run that has failed because no service had its task."""

NOTICED_IF_BAD = "fingerprint = coalesce(v.fingerprint, batch_runs.fingerprint), " + ", ".join(
    f"{name} = CASE WHEN v.fingerprint IS NULL THEN batch_runs.{name} END"
    for name in ("noticed_at", "acknowledged", "made_good_at", "made_good_by")
)
"""The SET clause for a run that is skipped, perhaps with a fingerprint."""

UNNOTICED = ", ".join(
    f"{name} = NULL" for name in ("noticed_at", "acknowledged", "made_good_at", "made_good_by")
)
"""The SET clause for a run that fails without an attempt."""


RANK = (
    f"coalesce(v.rank, CASE batch_runs.rank WHEN {Rank.JOINING} THEN {Rank.INTERRUPTED} ELSE "
    "batch_runs.rank END)"
)
"""A run whose join is tried again has no lane meanwhile. So it goes behind those that are queued
for their join.
"""

NO_PROGRESS = "".join(f"{name} = NULL, " for name in PROGRESS_COLUMNS)
AS_NEW = (
    "reason = NULL, result = NULL, started_at = NULL, finished_at = NULL, attempts_before = "
    "attempt, losses = 0, "
    "count_lost = NULL, cancel_at = NULL, cancel_by = NULL, cancel_reason = NULL"
)
"""The SET clause for a run that a person starts anew."""


def failed_without_attempt(fingerprint: str, now: datetime) -> dict[str, Any]:
    """The values of a run that fails while it waits for a node. The watch notices parts only by
    their parents.
    """
    is_part = runs.c.origin == Origin.PART
    return {
        "fingerprint": case((is_part, null()), else_=literal(fingerprint)),
        "noticed_at": case((is_part, literal(now, runs.c.noticed_at.type)), else_=null()),
        "acknowledged": None,
        "made_good_at": None,
    }


def encode(outcomes: Sequence[Outcome], kind: str) -> EncodedOutcomes:
    """Encode outcomes in the order of their ids, which is the usual order of locks. `kind`: that of
    the database.
    """
    values = {name: getattr(outcomes[0], name) for name in _OFTEN_SAME} if outcomes else {}
    same = {
        name: value
        for name, value in values.items()
        if all(getattr(o, name) == value for o in outcomes)
    }
    different = [name for name in _OFTEN_SAME if name not in same]
    if all(outcome.error is None for outcome in outcomes):
        same["error"] = None
    rows, is_plain = [], True
    for outcome in sorted(outcomes, key=lambda outcome: outcome.id):
        row: dict[str, Any] = {
            "id": outcome.id,
            "fence": outcome.fence,
            "state": outcome.state,
            "ended_at": stamp(outcome.ended_at, kind),
        }
        for name in different:
            row[name] = getattr(outcome, name)
        if (rare := _rare_of(outcome)) != _NOTHING_RARE or outcome.split is not None:
            row |= zip(_RARE, rare, strict=True)
            row["gate"] = str(outcome.split.gate) if outcome.split is not None else None
            is_plain = False
        rows.append(row)
    return EncodedOutcomes(json_rows.encode(rows, kind), same, is_plain)


async def write(
    connection: AsyncConnection, update: str, outcomes: Sequence[Outcome], encoded: EncodedOutcomes
) -> dict[str, str]:
    """Execute the UPDATE of runs that have ended. Returns the new states of those that it has
    changed, by id.

    If all have ended for good, the statement returns no rows but their number: SQLite's thread
    would have to wait for the interpreter's lock after each row, which takes milliseconds while the
    event loop is busy.
    """
    parameters = {"rows": encoded.rows}
    if any(outcome.state not in FINAL for outcome in outcomes):
        returning = text(f"{update} RETURNING batch_runs.id, batch_runs.state").columns(
            runs.c.id, runs.c.state
        )
        return dict(iter(await connection.execute(returning, parameters)))
    written: dict[str, str] = {outcome.id: outcome.state for outcome in outcomes}
    if (await connection.execute(text(update), parameters)).rowcount == len(outcomes):
        return written
    # The ends of the others were written before, with the rows of their attempts, or another node
    # holds their runs.
    statement = text(
        f"SELECT v.id FROM {encoded.source(connection.dialect.name)} "
        "JOIN batch_runs r ON r.id = v.id AND r.fence = v.fence "
        f"WHERE r.state <> '{RunState.RUNNING}' "
        "AND NOT EXISTS (SELECT 1 FROM batch_attempts a WHERE a.run = v.id AND a.fence = v.fence)"
    ).columns(runs.c.id)
    changed = await connection.execute(statement, parameters)
    return {run: written[run] for run in changed.scalars()}


# The rows of attempts.


async def record(connection: AsyncConnection, encoded: EncodedOutcomes) -> None:
    """Write the row of each attempt that has ended."""
    columns = {"run": runs.c.id} | {
        name: attempts.c[name] for name in COLUMNS if name not in encoded.same
    }
    await json_rows.insert_encoded(
        connection, attempts, columns, encoded.rows, encoded.same, "(run, fence)"
    )


async def unrecorded(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those of `outcomes` that are not in the ledger. A COMMIT whose reply was lost has written the
    others.
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
