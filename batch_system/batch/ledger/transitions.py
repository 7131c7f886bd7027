"""The only module that changes the state of runs: one statement for each kind of change, built from
TRANSITIONS.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row, Select, Text, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import attempts, buckets, json_rows, parts, queue_rows, waits, wakes
from batch_system.batch.ledger.attempts import IS_RUNNING, PROGRESS, EncodedOutcomes, Outcome
from batch_system.batch.ledger.runs import Claimed, locked_by_id
from batch_system.batch.ledger.states import (
    ACTIVE,
    FINAL,
    TRANSITIONS,
    Origin,
    Rank,
    RunState,
    before,
)
from batch_system.batch.ledger.tables import PLAIN_STATE, is_one_of, runs
from batch_system.database import sql

CLAIMED_COLUMNS = [runs.c[name] for name in Claimed.__dataclass_fields__]
Rows = Sequence[Mapping[str, Any]]
_CLAIMED = ", ".join(f"batch_runs.{column.name}" for column in CLAIMED_COLUMNS)


# Claiming: to `running`.


async def claim(
    connection: AsyncConnection,
    ids: Sequence[str],
    node: str,
    now: datetime,
    lanes: Mapping[str, int] | None = None,
) -> list[Claimed]:
    """Give a node those of the runs `ids` that may still start. Returns them.

    An interrupted run keeps its attempt, and so does one that goes on after its parts. `lanes`: the
    lane of each run that takes another one than the first. Raises IntegrityError if another run is
    running in one of these lanes.
    """
    if not ids:
        return []
    kind = connection.dialect.name
    statement = sql.statement(
        f"UPDATE batch_runs SET state = '{RunState.RUNNING}', node = :node, fence = fence + 1, "
        f"attempt = attempt + CASE WHEN {queue_rows.GOES_ON} THEN 0 ELSE 1 END, "
        "started_at = coalesce(started_at, :now), attempt_started_at = :now, reason = NULL, "
        f"lane = {queue_rows.claimed(kind, bool(lanes))} RETURNING {_CLAIMED}",
        now=runs.c.due_at,
        node=runs.c.node,
    )
    rows = [{"id": i, "lane": lanes.get(i, 1)} for i in ids] if lanes else [{"id": i} for i in ids]
    parameters = {"rows": json_rows.encode(rows, kind), "node": node, "now": now}
    return [
        Claimed(*row)
        for row in await connection.execute(statement.columns(*CLAIMED_COLUMNS), parameters)
    ]


# The end of an attempt: from `running`.


async def finish(
    connection: AsyncConnection, outcomes: Sequence[Outcome], encoded: EncodedOutcomes | None = None
) -> list[Outcome]:
    """Write the outcomes of attempts. Returns those that were not written, because another node
    holds their run now.

    A run with a request to cancel it is cancelled instead of retried, resumed or split. `encoded`:
    the outcomes, if the caller has encoded them before. Raises ValueError if a running run may not
    change to a state in `outcomes`.
    """
    if not outcomes:
        return []
    following = TRANSITIONS[RunState.RUNNING]
    if wrong := {RunState.CANCELLED, *(outcome.state for outcome in outcomes)} - following:
        raise ValueError(f"a run that is running can't become {', '.join(sorted(wrong))}")
    kind = connection.dialect.name
    encoded = encoded or attempts.encode(outcomes, kind)
    goes_on = is_one_of((state for state in ACTIVE if state in following), "v.state")
    is_cancelled = f"batch_runs.cancel_reason IS NOT NULL AND {goes_on}"
    statement = (
        f"UPDATE batch_runs SET state = CASE WHEN {is_cancelled} THEN '{RunState.CANCELLED}' "
        "ELSE v.state END, "
        f"reason = CASE WHEN {is_cancelled} THEN batch_runs.cancel_reason ELSE v.reason END, "
        "result = v.result, "
        f"finished_at = CASE WHEN batch_runs.cancel_reason IS NOT NULL OR NOT {goes_on} THEN "
        "v.ended_at END, "
        f"due_at = coalesce(v.due_at, batch_runs.due_at), rank = {attempts.RANK}, "
        f"gate = CASE WHEN {is_cancelled} THEN batch_runs.gate ELSE coalesce(v.gate, "
        "batch_runs.gate) END, "
        "wait_until = CASE WHEN v.gate IS NULL THEN batch_runs.wait_until END, "
        f"{attempts.NOTICED}, {attempts.OPENED_AGAIN}, {PROGRESS}, rate = NULL "
        f"FROM {encoded.source(kind)} "
        f"WHERE batch_runs.id = v.id AND batch_runs.fence = v.fence AND {IS_RUNNING}"
    )
    written = await attempts.write(connection, statement, outcomes, encoded)
    refused = [outcome for outcome in outcomes if outcome.id not in written]
    wakes.queued(
        connection, [each.task for each in outcomes if written.get(each.id) == RunState.INTERRUPTED]
    )
    if refused:
        encoded = attempts.encode([outcome for outcome in outcomes if outcome.id in written], kind)
    await attempts.record(connection, encoded)
    for outcome in outcomes:
        if outcome.split is not None and written.get(outcome.id) == RunState.WAITING:
            await _store_split(connection, outcome, outcome.split)
    return await attempts.unrecorded(connection, refused) if refused else []


async def _store_split(connection: AsyncConnection, outcome: Outcome, split: parts.Split) -> None:
    """Insert the parts of a run that waits for them from now on, or queue those again that did not
    succeed.
    """
    if split.params is None:
        again = [part.id for part in await parts.not_succeeded(connection, outcome.id)]
        await reopen(connection, again, Rank.MANUAL, "its run", outcome.ended_at)
        return
    rows = outcome.split_rows or split.rows(connection.dialect.name)
    await parts.insert(connection, outcome.id, split, rows, outcome.ended_at)
    wakes.queued(connection, [outcome.task] * len(split.params))


# Requests of people.


async def cancel(
    connection: AsyncConnection, ids: Sequence[str], reason: str, by: str, now: datetime
) -> dict[str, RunState]:
    """Cancel runs, or write requests to the rows of those whose cancel has to wait (parts.GOES_ON).
    An earlier request stays.

    With the follow-up of a group, its members that are not over are cancelled, and with a run, its
    parts. Returns the state of each run after that, without those that have ended or do not exist.
    """
    kind = connection.dialect.name
    # is_one_of keeps SQLite from using the index on states, by which it would read all runs of
    # these states.
    condition = (
        f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)}) "
        f"AND {is_one_of(before(RunState.CANCELLED))}"
    )
    statement = sql.statement(
        f"UPDATE batch_runs SET reason = CASE WHEN {parts.GOES_ON} THEN reason ELSE :reason END, "
        f"finished_at = CASE WHEN {parts.GOES_ON} THEN finished_at ELSE :now END, "
        "cancel_at = coalesce(cancel_at, :now), cancel_by = coalesce(cancel_by, :by), "
        "cancel_reason = coalesce(cancel_reason, :reason), noticed_at = NULL, "
        f"state = CASE WHEN {parts.GOES_ON} THEN state ELSE '{RunState.CANCELLED}' END "
        f"WHERE {locked_by_id(condition, kind)} RETURNING id, state",
        **{name: runs.c[column] for name, column in attempts.CANCEL_TYPES.items()},
    )
    values = json_rows.of_ids(ids, kind) | {"reason": reason, "by": by, "now": now}
    await waits.lock_with_members(connection, ids)
    rows = (await connection.execute(statement.columns(runs.c.id, runs.c.state), values)).all()
    cancelled = {run: RunState(state) for run, state in rows}
    over = [run for run, state in cancelled.items() if state != RunState.RUNNING]
    if len(over) < len(cancelled):
        wakes.asked(connection)
    if over:
        await _cancel_members(connection, over, values)
    return cancelled


async def _cancel_members(
    connection: AsyncConnection, ids: Sequence[str], values: Mapping[str, Any]
) -> None:
    """Cancel the active members of the groups whose follow-ups `ids` were cancelled."""
    theirs = json_rows.is_among(runs.c.awaited_by, ids, connection.dialect.name)
    members = select(runs.c.id).where(theirs, text(is_one_of(ACTIVE)))
    if active := (await connection.execute(members)).scalars().all():
        await cancel(connection, sorted(active), values["reason"], values["by"], values["now"])


async def reopen(
    connection: AsyncConnection,
    ids: Sequence[str],
    rank: int,
    by: str,
    now: datetime,
    anew: bool = False,
) -> set[str]:
    """Queue those of the runs `ids` that have ended, except those that have succeeded. Returns
    their ids.

    `anew`: runs that have succeeded are queued too, and the progress of the runs is deleted. Their
    fences go on rising. Attempts and losses are counted from zero again. The runs count as caught
    up from now on, so that overlap policies do not consider them for slots on time. Runs that were
    closed because one of them had not succeeded wait again.

    A run that was split keeps its parts; with `anew` they are deleted, and it is split again. The
    run is left as it is while one of its parts is active. A part is queued only while its parent
    waits.
    """
    kind = connection.dialect.name
    # is_one_of keeps SQLite from using the index on states, by which it would read all ended runs.
    ended = (state for state in before(RunState.QUEUED) if state in FINAL)
    may_reopen = is_one_of(state for state in ended if anew or state != RunState.SUCCEEDED)
    no_progress = attempts.NO_PROGRESS if anew else ""
    gate = "NULL" if anew else f"CASE WHEN {parts.is_split()} THEN gate END"
    condition = (
        f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)}) AND {may_reopen} "
        f"AND {parts.MAY_REOPEN}"
    )
    statement = sql.statement(
        f"UPDATE batch_runs SET state = '{RunState.QUEUED}', rank = :rank, catch_up = true, "
        "due_at = :now, "
        f"requested_by = :by, {attempts.AS_NEW}, {no_progress}gate = {gate}, wait_until = NULL "
        f"WHERE {locked_by_id(condition, kind)} RETURNING id, slot, origin, task",
        now=runs.c.due_at,
        by=Text(),
    )
    values = json_rows.of_ids(ids, kind) | {"rank": rank, "by": by, "now": now}
    awaiting = await waits.lock_awaiting(connection, ids)
    columns = [runs.c[name] for name in ("id", "slot", "origin", "task")]
    queued = (await connection.execute(statement.columns(*columns), values)).all()
    wakes.queued(connection, [run.task for run in queued])
    if anew:
        await parts.remove(connection, [run.id for run in queued])
    return await _are_active_again(
        connection, queued, awaiting, now, are_all=len(queued) == len(ids)
    )


async def wait_anew(
    connection: AsyncConnection,
    gated: Rows,
    rank: int,
    by: str,
    now: datetime,
    awaiting: Sequence[str] = (),
) -> set[str]:
    """Let those of these runs that have ended, in any state, wait once more for what they wait for.

    They begin from the beginning, and count as caught up, as with `reopen`. `gated`: the `id`, the
    `gate` and the `wait_until` of each run. `awaiting`: the runs that wait for them. The caller has
    locked all of them. Returns the ids of the runs that wait now.
    """
    kind, columns = connection.dialect.name, [runs.c[name] for name in ("id", "gate", "wait_until")]
    ended = (state for state in before(RunState.WAITING) if state in FINAL)
    has_ended = f"{is_one_of(ended, PLAIN_STATE)} AND {parts.HAS_NO_ACTIVE}"
    statement = sql.statement(
        f"UPDATE batch_runs SET state = '{RunState.WAITING}', rank = :rank, catch_up = true, "
        "due_at = :now, "
        f"requested_by = :by, {attempts.AS_NEW}, {attempts.NO_PROGRESS}gate = v.gate, "
        "wait_until = v.wait_until "
        f"FROM {json_rows.source(columns, kind)} WHERE batch_runs.id = v.id AND {has_ended} "
        "RETURNING batch_runs.id, batch_runs.slot, batch_runs.origin",
        now=runs.c.due_at,
        by=Text(),
    )
    values = {"rows": json_rows.encode(gated, kind), "rank": rank, "by": by, "now": now}
    waiting = (
        await connection.execute(statement.columns(runs.c.id, runs.c.slot, runs.c.origin), values)
    ).all()
    await parts.remove(connection, [run.id for run in waiting])
    return await _are_active_again(
        connection, waiting, awaiting, now, are_all=len(waiting) == len(gated)
    )


async def _are_active_again(
    connection: AsyncConnection,
    rows: Sequence[Row[Any]],
    awaiting: Sequence[str],
    now: datetime,
    are_all: bool,
) -> set[str]:
    """Let the runs that were closed because of these runs wait again, and their slots be counted
    anew. Returns their ids.

    `awaiting`: the runs that wait for them and, unless `are_all`, also for others that stay as they
    are.
    """
    if not are_all:
        awaiting = await waits.lock_awaiting(connection, [run.id for run in rows]) if rows else []
    changed = [run.slot for run in rows if run.origin != Origin.MANUAL]
    changed += await wait_again(connection, awaiting, now)
    await buckets.slots_have_changed(connection, changed, now)
    return {run.id for run in rows}


# Waiting runs.


async def open_waiting(connection: AsyncConnection, ids: Sequence[str], now: datetime) -> None:
    """Queue those of the runs `ids` that are waiting. The caller has locked them."""
    await _change(
        connection,
        (RunState.WAITING, RunState.QUEUED),
        [{"id": run} for run in ids],
        "due_at = :now",
        now,
    )


async def join_parts(connection: AsyncConnection, ids: Sequence[str], now: datetime) -> None:
    """Queue those of the runs `ids` that wait for their parts: all have succeeded. They go on
    before other runs.
    """
    values = f"due_at = :now, rank = {Rank.JOINING}, {parts.PROGRESS}"
    await _change(
        connection, (RunState.WAITING, RunState.QUEUED), [{"id": run} for run in ids], values, now
    )


async def fail_split(connection: AsyncConnection, failing: Rows, now: datetime) -> None:
    """Fail runs that wait for their parts. `failing`: the `id`, `reason` and `fingerprint` of
    each.
    """
    values = (
        f"reason = v.reason, finished_at = :now, fingerprint = v.fingerprint, {parts.PROGRESS}, "
        f"{attempts.UNNOTICED}"
    )
    await _change(connection, (RunState.WAITING, RunState.FAILED), failing, values, now)


async def close_waiting(
    connection: AsyncConnection,
    reasons: Mapping[str, str],
    now: datetime,
    gate: bool,
    without_cause: Collection[str] = (),
) -> None:
    """Skip those runs that are waiting. The caller has locked them. `reasons`: the reason by the id
    of the run.

    `gate`: whether they keep their gate, because what they waited for has closed them: then they
    wait again when that is retried. `without_cause`: those that the watch has to notice, because
    nobody knows what keeps them back.
    """
    values = (
        f"reason = v.reason, finished_at = :now{'' if gate else ', gate = NULL'}, "
        f"{attempts.NOTICED_IF_BAD}"
    )
    closing = [
        {
            "id": run,
            "reason": reason,
            "fingerprint": attempts.KEPT_BACK if run in without_cause else None,
        }
        for run, reason in reasons.items()
    ]
    await _change(connection, (RunState.WAITING, RunState.SKIPPED), closing, values, now)


async def wait_again(
    connection: AsyncConnection, ids: Sequence[str], now: datetime
) -> list[datetime]:
    """Let those of the runs `ids` wait again that were closed by what they waited for. The caller
    has locked them.

    They wait as long as before, from `now` on. Returns their slots, whose buckets the caller has to
    mark.

    Slots among `ids` count as caught up, including those that still wait: they were not on time, so
    no overlap policy skips them, and they delay no slot of today.
    """
    if not ids:
        return []
    kind = connection.dialect.name
    on_time = (
        f"origin = '{Origin.SCHEDULE}' AND NOT catch_up AND gate IS NOT NULL AND NOT "
        f"{parts.is_split()}"
    )
    is_meant = f"id IN (SELECT v.id FROM {json_rows.source([runs.c.id], kind)}) AND {on_time}"
    not_over = is_one_of([RunState.WAITING, RunState.SKIPPED], PLAIN_STATE)
    caught_up = (
        f"UPDATE batch_runs SET catch_up = true, rank = {Rank.CATCH_UP} WHERE {is_meant} "
        f"AND {not_over}"
    )
    await connection.execute(text(caught_up), json_rows.of_ids(ids, kind))
    closed = (text(is_one_of([RunState.SKIPPED], PLAIN_STATE)), runs.c.gate.is_not(None))
    theirs = json_rows.is_among(runs.c.id, ids, connection.dialect.name)
    columns = [runs.c[name] for name in ("id", "slot", "origin", "due_at", "wait_until")]
    rows = (await connection.execute(select(*columns).where(theirs, *closed))).all()
    again = [
        {"id": row.id, "wait_until": row.wait_until and now + (row.wait_until - row.due_at)}
        for row in rows
    ]
    values = "reason = NULL, finished_at = NULL, due_at = :now, wait_until = v.wait_until"
    await _change(connection, (RunState.SKIPPED, RunState.WAITING), again, values, now)
    return [row.slot for row in rows if row.origin != Origin.MANUAL]


async def _change(
    connection: AsyncConnection,
    change: tuple[RunState, RunState],
    rows: Rows,
    values: str,
    now: datetime,
) -> None:
    """Make a change of the table TRANSITIONS to those of the runs in `rows` that are in its first
    state.

    `values`: SQL for the rest of the SET clause, with :now.
    """
    old, new = change
    if not rows or new not in TRANSITIONS[old]:
        return
    kind = connection.dialect.name
    source = json_rows.source(
        [runs.c[name] for name in ("id", "reason", "wait_until", "fingerprint")], kind
    )
    is_meant = f"batch_runs.id = v.id AND {is_one_of([old], PLAIN_STATE)} RETURNING batch_runs.task"
    statement = sql.statement(
        f"UPDATE batch_runs SET state = '{new}', {values} FROM {source} WHERE {is_meant}",
        now=runs.c.due_at,
    )
    given = {"rows": json_rows.encode(rows, kind), "now": now}
    changed = await connection.execute(statement, given)
    wakes.queued(connection, changed.scalars() if new == RunState.QUEUED else ())


# Runs that no node will start.


async def fail_waiting(
    connection: AsyncConnection, ids: Select[Any], condition: str, reason: str, now: datetime
) -> int:
    """Fail the runs with these ids that still wait. Returns how many. `condition`: READY_SQL or
    RETRYING_SQL.
    """
    may_fail = text(is_one_of(before(RunState.FAILED)))
    failing = update(runs).where(runs.c.id.in_(ids), text(condition), may_fail)
    values = {"state": RunState.FAILED, "reason": reason, "finished_at": now}
    values |= attempts.failed_without_attempt(attempts.UNSERVED, now)
    return (await connection.execute(failing.values(values))).rowcount
