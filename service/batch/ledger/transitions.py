"""The only module that changes the state of runs: one statement for each kind of change, built from TRANSITIONS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, Text, bindparam, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import attempts, json_rows, tables
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.night import buckets
from service.batch.ledger.runs import PROGRESS, PROGRESS_COLUMNS, Claimed, is_running, locked_by_id
from service.batch.ledger.states import ACTIVE, TRANSITIONS, Origin, RunState, before
from service.batch.ledger.tables import is_one_of, runs

CLAIMED_COLUMNS = [runs.c[name] for name in Claimed.__dataclass_fields__]
FINISH_COLUMNS = ("id", "fence", "state", "reason", "result", "due_at", "rank", "finished_at", *PROGRESS_COLUMNS)
_READ_COLUMNS = [*(runs.c[name] for name in (*FINISH_COLUMNS, "fingerprint")), tables.attempts.c.ended_at]


# Claiming: to `running`.


async def claim(
    connection: AsyncConnection, ids: Sequence[str], node: str, now: datetime, lanes: Mapping[str, int] | None = None
) -> list[Claimed]:
    """Give a node those of the runs `ids` that may still start. Returns them. An interrupted run keeps its attempt.

    `lanes`: the lane of each run that takes another lane than the first. Raises IntegrityError if another run is
    running in one of these lanes.
    """
    if not ids:
        return []
    kind = connection.dialect.name
    statement = text(
        f"UPDATE batch_runs SET state = '{RunState.RUNNING}', node = :node, fence = fence + 1, "
        f"attempt = attempt + CASE WHEN state = '{RunState.INTERRUPTED}' THEN 0 ELSE 1 END, "
        "started_at = coalesce(started_at, :now), attempt_started_at = :now, reason = NULL, "
        f"lane = {_claimed(kind, bool(lanes))} RETURNING {', '.join(f'batch_runs.{c.name}' for c in CLAIMED_COLUMNS)}"
    ).bindparams(bindparam("now", type_=runs.c.due_at.type), bindparam("node", type_=runs.c.node.type))
    rows = [{"id": i, "lane": lanes.get(i, 1)} for i in ids] if lanes else [{"id": i} for i in ids]
    parameters = {"rows": json_rows.encode(rows, kind), "node": node, "now": now}
    return [Claimed(*row) for row in await connection.execute(statement.columns(*CLAIMED_COLUMNS), parameters)]


def _claimed(kind: str, has_lanes: bool) -> str:
    """The value of `lane` and the WHERE clause of `claim`.

    Without other lanes than the first it is no join, which would take quadratic time on SQLite.
    """
    may_start = is_one_of(before(RunState.RUNNING))
    condition = f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)}) AND {may_start}"
    if kind == "postgresql":
        locked = f"SELECT id FROM batch_runs WHERE {condition} ORDER BY id FOR UPDATE SKIP LOCKED"
        condition = f"batch_runs.id = ANY(ARRAY({locked}))"
    if not has_lanes:
        return f"1 WHERE {condition}"
    source = json_rows.source([runs.c.id, runs.c.lane], kind)
    condition = condition if kind == "postgresql" else may_start
    return f"v.lane FROM {source} WHERE batch_runs.id = v.id AND {condition}"


# The end of an attempt: from `running`.


async def finish(connection: AsyncConnection, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Write the outcomes of attempts. Returns those that were not written, because another node holds their run now.

    A run that has a request to cancel it is cancelled instead of retried or resumed. Raises ValueError if a running run
    may not change to a state in `outcomes`.
    """
    if not outcomes:
        return []
    following = TRANSITIONS[RunState.RUNNING]
    if wrong := {RunState.CANCELLED, *(outcome.state for outcome in outcomes)} - following:
        raise ValueError(f"a run that is running can't become {', '.join(sorted(wrong))}")
    kind = connection.dialect.name
    goes_on = is_one_of((state for state in ACTIVE if state in following), "v.state")
    is_cancelled = f"batch_runs.cancel_reason IS NOT NULL AND {goes_on}"
    statement = text(
        f"UPDATE batch_runs SET state = CASE WHEN {is_cancelled} THEN '{RunState.CANCELLED}' ELSE v.state END, "
        f"reason = CASE WHEN {is_cancelled} THEN batch_runs.cancel_reason ELSE v.reason END, result = v.result, "
        f"finished_at = CASE WHEN {is_cancelled} THEN v.ended_at ELSE v.finished_at END, "
        "due_at = coalesce(v.due_at, batch_runs.due_at), rank = coalesce(v.rank, batch_runs.rank), "
        # What is wrong with a run is noticed after each end of an attempt, once (see tables.UNNOTICED_RUN_SQL).
        "fingerprint = coalesce(v.fingerprint, batch_runs.fingerprint), noticed_at = NULL, "
        f"{_OPENED_AGAIN}, {PROGRESS}, rate = NULL "
        f"FROM {json_rows.source(_READ_COLUMNS, kind)} "
        f"WHERE batch_runs.id = v.id AND batch_runs.fence = v.fence AND {is_running(kind)} RETURNING batch_runs.id"
    )
    by_id = sorted(outcomes, key=lambda outcome: outcome.id)  # the usual order of locks, so that deadlocks are rare
    encoded = json_rows.encode(map(_finish_row, by_id), kind)
    written = set((await connection.execute(statement.columns(runs.c.id), {"rows": encoded})).scalars())
    await attempts.record(connection, [outcome for outcome in outcomes if outcome.id in written])
    if len(written) == len(outcomes):
        return []
    return await attempts.unrecorded(connection, [outcome for outcome in outcomes if outcome.id not in written])


_HAS_FAILED = f"v.state = '{RunState.FAILED}'"
_OPENED_AGAIN = ", ".join(
    f"{name} = CASE WHEN {_HAS_FAILED} THEN NULL ELSE batch_runs.{name} END"
    for name in ("acknowledged", "made_good_at", "made_good_by")
)
"""A run that fails again is neither acknowledged nor made good."""


def _finish_row(outcome: Outcome) -> dict[str, Any]:
    row = {name: getattr(outcome, name, None) for name in FINISH_COLUMNS}
    row["ended_at"] = outcome.ended_at
    if outcome.fingerprint is not None:  # so that the rows of runs that go well are no longer by it
        row["fingerprint"] = outcome.fingerprint
    row["finished_at"] = None if outcome.due_at is not None else outcome.ended_at
    return row


# Requests of people.


async def cancel(
    connection: AsyncConnection, ids: Sequence[str], reason: str, by: str, now: datetime
) -> dict[str, RunState]:
    """Cancel waiting runs, and write requests to the rows of running ones. An earlier request is not changed.

    Returns the state of each run after that, without those that have ended or do not exist.
    """
    kind = connection.dialect.name
    # is_one_of keeps SQLite from using the index on states, by which it would read all runs of these states.
    condition = (
        f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)}) AND {is_one_of(before(RunState.CANCELLED))}"
    )
    is_running = f"state = '{RunState.RUNNING}'"
    statement = text(
        f"UPDATE batch_runs SET reason = CASE WHEN {is_running} THEN reason ELSE :reason END, "
        f"finished_at = CASE WHEN {is_running} THEN finished_at ELSE :now END, "
        "cancel_at = coalesce(cancel_at, :now), cancel_by = coalesce(cancel_by, :by), "
        "cancel_reason = coalesce(cancel_reason, :reason), noticed_at = NULL, "
        f"state = CASE WHEN {is_running} THEN state ELSE '{RunState.CANCELLED}' END "
        f"WHERE {locked_by_id(condition, kind)} RETURNING id, state"
    ).bindparams(*(bindparam(name, type_=runs.c[column].type) for name, column in _CANCEL_TYPES.items()))
    values = {"rows": json_rows.encode([{"id": i} for i in ids], kind), "reason": reason, "by": by, "now": now}
    cancelled = await connection.execute(statement.columns(runs.c.id, runs.c.state), values)
    return {run: RunState(state) for run, state in cancelled}


_CANCEL_TYPES = {"reason": "reason", "by": "cancel_by", "now": "cancel_at"}


async def reopen(
    connection: AsyncConnection,
    ids: Sequence[str],
    rank: int,
    by: str,
    now: datetime,
    anew: bool = False,
) -> set[str]:
    """Queue those of the runs `ids` that have ended, except those that have succeeded. Returns their ids.

    `anew`: runs that have succeeded are queued too, and the progress of the runs is deleted. Their fences go on rising.
    Attempts and losses are counted from zero again. The runs count as caught up from now on, so that overlap policies
    do not consider them for slots on time.
    """
    kind = connection.dialect.name
    # is_one_of keeps SQLite from using the index on states, by which it would read all ended runs.
    may_reopen = is_one_of(state for state in before(RunState.QUEUED) if anew or state != RunState.SUCCEEDED)
    no_progress = "".join(f"{name} = NULL, " for name in PROGRESS_COLUMNS) if anew else ""
    condition = f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)}) AND {may_reopen}"
    statement = text(
        f"UPDATE batch_runs SET state = '{RunState.QUEUED}', rank = :rank, catch_up = true, due_at = :now, "
        "requested_by = :by, reason = NULL, result = NULL, started_at = NULL, finished_at = NULL, "
        "attempts_before = attempt, losses = 0, count_lost = NULL, "
        f"{no_progress}cancel_at = NULL, cancel_by = NULL, cancel_reason = NULL "
        f"WHERE {locked_by_id(condition, kind)} RETURNING id, slot, origin"
    ).bindparams(bindparam("now", type_=runs.c.due_at.type), bindparam("by", type_=Text()))
    rows = json_rows.encode([{"id": i} for i in ids], kind)
    values = {"rows": rows, "rank": rank, "by": by, "now": now}
    queued = (await connection.execute(statement.columns(runs.c.id, runs.c.slot, runs.c.origin), values)).all()
    await buckets.slots_have_changed(connection, [run.slot for run in queued if run.origin != Origin.MANUAL], now)
    return {run.id for run in queued}


# Runs that no node will start.

UNSERVED = "unserved"
"""The fingerprint of a run that has failed because no service had its task."""


async def fail_waiting(
    connection: AsyncConnection, ids: Select[Any], condition: str, reason: str, now: datetime
) -> int:
    """Fail the runs with these ids that still wait. Returns how many. `condition`: WAITING_SQL or RETRYING_SQL."""
    may_fail = text(is_one_of(before(RunState.FAILED)))
    failing = update(runs).where(runs.c.id.in_(ids), text(condition), may_fail)
    values = {"state": RunState.FAILED, "reason": reason, "finished_at": now}
    values |= {"fingerprint": UNSERVED, "noticed_at": None, "acknowledged": None, "made_good_at": None}
    return (await connection.execute(failing.values(values))).rowcount
