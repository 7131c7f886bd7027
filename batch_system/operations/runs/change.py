"""Changes single runs: starts, cancels, acknowledges and retries them; and deletes old ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.incidents import acknowledging
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.states import FINAL, RunState, StartPriority
from batch_system.batch.queue import cancel as cancelling
from batch_system.batch.queue import enqueue
from batch_system.batch.queue import retry as retrying
from batch_system.batch.queue.requests import (
    INSTANT,
    LONGEST_KEY,
    StartRequest,
    Starts,
    is_instant,
    merging_of,
)
from batch_system.batch.retention.pruning import Pruner
from batch_system.errors import InvalidParameters, WrongState
from batch_system.escaping import brief, echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import RunNow, RunsAfter, Started
from batch_system.operations.incidents.ending import tell_followers
from batch_system.operations.incidents.notes import check_note
from batch_system.operations.runs import read
from batch_system.operations.runs.read import row_of, run_of
from batch_system.operations.starting.startable import startable_task

CANCEL_POLL_SECONDS = 0.1
"""The interval at which a cancelled run is read until it has ended."""


async def start(
    context: Context,
    task: str,
    params: Mapping[str, Any],
    slot: datetime | None = None,
    key: str | None = None,
    at: datetime | None = None,
    note: str | None = None,
    merging: Mapping[str, float | None] | None = None,
    priority: StartPriority | None = None,
) -> Started:
    """Queue a run for any service. `slot`: aware; None: the instant of the start.

    The task may be one that only other processes have loaded. `key`: if the task has a run with
    this key already, that run is returned. `at`: when it begins at the earliest (aware); None: at
    once. `note`: why. `merging`: the seconds of `debounce`, `at_most` and `once_in`, see
    queue/starts.py, as for `priority`. Raises UnknownTask, and InvalidParameters before anything is
    written.
    """
    _check_slot_and_key(slot, key)
    merges = merging_of(f"start({task})", key, merging or {}, at=at)
    if at is not None and not is_instant(at):
        raise InvalidParameters(f"at is {echoed(at)}; allowed: {INSTANT}")
    async with context.databases.changing() as connection:
        startable = await startable_task(connection, context, task)
        values = startable.checked(params)
        own = key if merges is None else None
        request = StartRequest(startable, values, own, slot, at, merging=merges, priority=priority)
        run = await enqueue.write(connection, Starts((request,)), context.actor.name)
        after = {
            "params": context.redaction.masked(values),
            "slot": slot.isoformat() if slot else None,
        }
        after |= {"at": at.isoformat()} if at is not None else {}
        after |= {"priority": priority} if priority is not None else {}
        after |= {"how": run.how} if run.how in ("merged", "dropped") else {}
        now = await database_time.now_of(connection)
        await audit.record(
            connection,
            context.actor.by,
            "run.start",
            now,
            task=task,
            run=str(run),
            after=after,
            note=note,
        )
    context.wake()
    return Started(id=str(run), task=task, how=run.how, until=run.until)


def _check_slot_and_key(slot: datetime | None, key: str | None) -> None:
    if slot is not None and not is_instant(slot):
        raise InvalidParameters(f"slot is {echoed(slot)}; allowed: {INSTANT}")
    if key is not None and not 0 < len(key) <= LONGEST_KEY:
        raise InvalidParameters(f"key is {echoed(key)}; allowed: 1 to {LONGEST_KEY} characters")


async def cancel(
    context: Context, given: str, wait_seconds: float = 0.0, note: str | None = None
) -> RunNow:
    """Cancel a run, wait at most `wait_seconds` for its end, and return the run as it is then.

    `note`: the reason of the caller, which follows "cancelled by" in the reason of the run.

    Raises UnknownRun, and WrongState, which names the state, if the run has ended.
    """
    run = await run_of(context, given)
    async with context.databases.changing() as connection:
        before = await row_of(connection, run)
        name = context.actor.name
        if before["state"] not in FINAL:
            state = await cancelling.request_cancel(
                connection, run, _reason(f"cancelled by {name}", note), name
            )
            await _record(context, connection, "run.cancel", before, state, note)
    if before["state"] in FINAL:
        raise WrongState(f"the run {run} can't be cancelled: it has {_describe_end(before)}")
    give_up_at = clock.monotonic() + wait_seconds
    while True:
        now = await read.current(context, run)
        if now.state in FINAL or clock.monotonic() >= give_up_at:
            return now
        await asyncio.sleep(CANCEL_POLL_SECONDS)


def _reason(what: str, note: str | None) -> str:
    """The reason that a run gets: what was done, and the note of the person."""
    return f"{what}: {brief(note, audit.LONGEST_NOTE)}" if note else what


def _describe_end(row: Mapping[str, Any]) -> str:
    """How a run ended; the text continues "it has"."""
    state = "been " if row["state"] in (RunState.CANCELLED, RunState.SKIPPED) else ""
    return f"{state}{row['state']}" + (f" ({row['reason']})" if row["reason"] else "")


async def acknowledge(context: Context, given: str, note: str) -> RunNow:
    """Record that a person takes care of a failed run, and why: it no longer counts as open.
    Returns the run.

    Raises UnknownRun, InvalidParameters if the note is too short or too long, and WrongState if the
    run has not failed, or was made good or acknowledged already.
    """
    check_note(note)
    run = await run_of(context, given)
    async with context.databases.changing() as connection:
        row, now = await row_of(connection, run), await database_time.now_of(connection)
        done = await acknowledging.acknowledge_runs(
            connection, [run], context.actor.name, note, now
        )
        if not done.is_new:
            raise WrongState(
                f"the run {run} can't be acknowledged: it is no failed run that is open"
            )
        await tell_followers(connection, context, done.closed, now)
        await _record(context, connection, "run.acknowledge", row, row["state"], note)
    return await read.current(context, run)


async def retry(
    context: Context, given: str, from_the_beginning: bool, and_after: bool, note: str | None
) -> RunNow:
    """Give a run that has ended a new attempt, which resumes after its last checkpoint. Returns the
    run.

    `from_the_beginning`: the attempt does everything again. The run may have succeeded then.
    `and_after`: the runs that come after it and have ended do everything again too, when it has
    succeeded. Raises UnknownRun, WrongState, and InvalidParameters for `and_after` without
    `from_the_beginning`.
    """
    run = await run_of(context, given)
    if and_after and not from_the_beginning:
        raise InvalidParameters(
            "--and-after needs --again: what comes after is run again from the beginning"
        )
    name, databases = context.actor.name, context.databases
    after: Sequence[str] = ()
    if from_the_beginning:
        await databases.migrate_both()
        after = (
            [each for ids in (await _after(context, run)).values() for each in ids]
            if and_after
            else []
        )
        await retrying.retry_from_the_beginning(
            databases.ledger, databases.application, run, name, after
        )
    async with databases.changing() as connection:
        row = await row_of(connection, run)
        if not from_the_beginning:
            await retrying.retry(connection, run, name)
        action = "run.retry_from_the_beginning" if from_the_beginning else "run.retry"
        await _record(context, connection, action, row, RunState.QUEUED, note)
        for other in after:
            await _record(
                context, connection, action, await row_of(connection, other), RunState.WAITING, note
            )
    context.wake()
    return await read.current(context, run)


async def comes_after(context: Context, given: str) -> RunsAfter:
    """How many runs of which tasks come after a run and have ended. Raises UnknownRun."""
    run = await run_of(context, given)
    return RunsAfter(
        run=run, tasks={task: len(ids) for task, ids in (await _after(context, run)).items()}
    )


async def _after(context: Context, run: str) -> Mapping[str, Sequence[str]]:
    """The ids of the runs that come after a run and have ended, by task."""
    async with context.databases.changing() as connection:
        return await retrying.comes_after(connection, run)


async def prune(context: Context) -> Mapping[str, int]:
    """Delete old runs and what belongs to them. Returns how many rows were deleted, by kind. Raises
    DatabaseError.
    """
    await context.databases.migrate_both()
    return await _pruner(context).prune()


async def count_prunable(context: Context) -> Mapping[str, int]:
    """How many runs pruning would delete, by task; empty if there is no ledger yet. Raises
    DatabaseError.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            return {}
    return await _pruner(context).count()


def _pruner(context: Context) -> Pruner:
    return Pruner(context.databases.ledger, context.databases.application, context.keep)


async def _record(
    context: Context,
    connection: AsyncConnection,
    action: str,
    row: Mapping[str, Any],
    state: str | None,
    note: str | None,
) -> None:
    now, by = await database_time.now_of(connection), context.actor.by
    run, before, after = row["id"], {"state": row["state"]}, {"state": state}
    await audit.record(
        connection,
        by,
        action,
        now,
        task=row["task"],
        run=run,
        before=before,
        after=after,
        note=note,
    )
