"""The columns of runs that the end of an attempt sets, and those that a new beginning clears: for
transitions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any

from sqlalchemy import case, literal, null, text
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import json_rows, tables
from service.batch.ledger.attempts import EncodedOutcomes, Outcome
from service.batch.ledger.run_progress import PROGRESS_COLUMNS
from service.batch.ledger.states import FINAL, Origin, Rank, RunState
from service.batch.ledger.tables import runs
from service.database.types import stamp

_COLUMNS = ("id", "fence", "state", "reason", "result", "due_at", "rank", *PROGRESS_COLUMNS)
_PLAIN = {"id", "fence", "state", "ended_at"}
_READ = [*(runs.c[name] for name in (*_COLUMNS, "fingerprint", "gate")), tables.attempts.c.ended_at]
_RARE = ("reason", "result", "error", "due_at", "rank", "fingerprint", *PROGRESS_COLUMNS)
"""Attributes of outcomes that most of them leave at None."""
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
"""The fingerprint of a slot that was skipped because of what it waited for, although nothing of
that has failed.
"""

# What is wrong with a run is noticed after each end of an attempt, once (see
# tables.UNNOTICED_RUN_SQL). What is wrong with a part is noticed with its parent.
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
"""The SET clause for a run that a person lets begin once more."""


def failed_without_attempt(fingerprint: str, now: datetime) -> dict[str, Any]:
    """The values of a run that fails while it waits for a node. Parts are not noticed by
    themselves.
    """
    is_part = runs.c.origin == Origin.PART
    return {
        "fingerprint": case((is_part, null()), else_=literal(fingerprint)),
        "noticed_at": case((is_part, literal(now, runs.c.noticed_at.type)), else_=null()),
        "acknowledged": None,
        "made_good_at": None,
    }


def encode(outcomes: Sequence[Outcome], kind: str) -> EncodedOutcomes:
    """Encode outcomes in the order of their ids, which is the usual order of locks. `kind`: of the
    database.
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


def read(encoded: EncodedOutcomes, kind: str) -> str:
    """SQL for a FROM item with the rows of `encoded`. `kind`: of the database.

    If all have only what the outcomes of most runs have, the other columns are not looked for: that
    would take SQLite half a microsecond for each of them.
    """
    return json_rows.source(_READ, kind, _PLAIN if encoded.is_plain else None)


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
        f"SELECT v.id FROM {read(encoded, connection.dialect.name)} "
        "JOIN batch_runs r ON r.id = v.id AND r.fence = v.fence "
        f"WHERE r.state <> '{RunState.RUNNING}' "
        "AND NOT EXISTS (SELECT 1 FROM batch_attempts a WHERE a.run = v.id AND a.fence = v.fence)"
    ).columns(runs.c.id)
    changed = await connection.execute(statement, parameters)
    return {run: written[run] for run in changed.scalars()}
