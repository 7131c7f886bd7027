"""Changes of all runs that match a filter, or of all slots of an interval, with
a preview.

A preview is a row of the ledger that holds the ids of the runs, and is valid for an hour. Beginning
it turns it into a bulk, which any process carries out in transactions of STEP runs, with a cursor.
If that process dies, another one continues.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.ledger import database_time, duties, run_query, transitions
from batch_system.batch.ledger.incidents import acknowledging
from batch_system.batch.ledger.people import audit, previews
from batch_system.batch.ledger.states import ACTIVE, Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.concurrency.offload import offload
from batch_system.errors import InvalidParameters, UnknownPreview, WrongState
from batch_system.escaping import brief, echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.filter import RunFilter
from batch_system.operations.bulks.results import (
    UNDOES,
    Action,
    Bulk,
    BulkAction,
    Preview,
    PreviewedRun,
)
from batch_system.operations.incidents.ending import tell_followers, tell_followers_again
from batch_system.operations.incidents.notes import check_note
from batch_system.operations.people.redacting import hidden_tasks, refuse_secret_filter
from batch_system.operations.runs.listing import query_of, tasks_of
from batch_system.operations.runs.read import refuse_unknown_task
from batch_system.operations.starting import backfill
from batch_system.operations.starting.results import BackfillRequest, BackfillSlot

MOST_RUNS = 100_000
"""A bulk of more runs is refused: narrow the filter."""
STEP = 1_000
"""How many runs are changed in one transaction."""
VALIDITY = timedelta(hours=1)
DUTY_SECONDS = 30.0
COMMAND = new_id()
"""The id under which a process that is not a service carries out bulks."""

STATES: Mapping[str, frozenset[str]] = {
    "retry": frozenset({RunState.FAILED, RunState.CANCELLED, RunState.SKIPPED}),
    "cancel": frozenset(ACTIVE),
    "acknowledge": frozenset({RunState.FAILED}),
    "reopen": frozenset({RunState.FAILED}),
}
"""The states of the runs that each action changes."""

MOST_TASKS = 20
"""A preview counts the runs of at most this many tasks one by one."""


async def preview(context: Context, action: BulkAction, wanted: RunFilter) -> Preview:
    """Which runs a bulk would change. Raises InvalidParameters, and UnknownTask.

    Without states in the filter, it includes the runs in all states that the action can change.
    """
    refuse_secret_filter(context, wanted)
    allowed = STATES[action]
    if other := sorted(set(wanted.state) - allowed):
        states = ", ".join(sorted(allowed))
        raise InvalidParameters(
            f"runs that are {', '.join(other)} can't be changed by {action}; allowed: {states}"
        )
    wanted = wanted.model_copy(update={"state": list(wanted.state) or sorted(allowed)})
    async with context.databases.changing() as connection:
        if wanted.task is not None:
            await refuse_unknown_task(connection, wanted.task)
        runs = await _all_runs(connection, wanted)
        return await keep(
            context, connection, action, runs, wanted.model_dump(mode="json", exclude_defaults=True)
        )


async def preview_undo(context: Context, id: str) -> Preview:
    """What undoing a bulk would change: of its runs those that are still as it has left them.

    Raises UnknownPreview, WrongState for a bulk that has not ended, and InvalidParameters for a
    backfill.
    """
    async with context.databases.changing() as connection:
        row = await previews.get(connection, id)
        if row is None or row["started_at"] is None:
            raise UnknownPreview(f"there is no bulk {echoed(id)}")
        if (action := UNDOES.get(row["action"])) is None:
            raise InvalidParameters(
                f"a bulk of the action {row['action']} can't be undone; allowed are "
                f"{', '.join(UNDOES)}: the runs of a backfill can be cancelled"
            )
        if row["finished_at"] is None:
            raise WrongState(f"the bulk {id} goes on: it can be undone when it has ended")
        packed = await previews.packed_ids(connection, id)
        ids = await offload(previews.unpack, packed, 0, row["count"])
        found: list[Mapping[Any, Any]] = []
        for first in range(0, len(ids), STEP):
            some = ids[first : first + STEP]
            found += await run_query.in_states(
                connection, some, STATES[action], are_acknowledged=action == "reopen"
            )
        return await keep(context, connection, action, found, {"undo": id})


async def keep(
    context: Context,
    connection: AsyncConnection,
    action: Action,
    runs: Sequence[Mapping[Any, Any]],
    request: Mapping[str, Any],
) -> Preview:
    """Keep a preview of these runs (rows with id, task, state, slot and created_at), the newest
    first.

    `request`: what was asked for, which the audit records.
    """
    now = await database_time.now_of(connection)
    preview = Preview(
        id=new_id(),
        action=action,
        count=len(runs),
        first=PreviewedRun.of(runs[0]) if runs else None,
        last=PreviewedRun.of(runs[-1]) if runs else None,
        tasks=dict(Counter(run["task"] for run in runs).most_common(MOST_TASKS)),
        expires_at=now + VALIDITY,
    )
    await _add(
        context,
        connection,
        preview,
        request,
        now,
        await offload(previews.pack, [run["id"] for run in runs]),
    )
    return preview


async def preview_backfill(
    context: Context,
    request: BackfillRequest,
    on_slot: Callable[[BackfillSlot], None] = backfill.ignore,
) -> Preview:
    """How many runs a backfill by the present schedule would make. `on_slot`: called for each of
    its slots.
    """
    counted = await backfill.counted(context, request, on_slot)
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        count = counted.counts.changed
        preview = Preview(
            id=new_id(),
            action="backfill",
            count=count,
            counts=counted.counts,
            expires_at=now + VALIDITY,
        )
        await _add(
            context,
            connection,
            preview,
            {**request.as_json(), "schedule": counted.schedule},
            now,
            None,
        )
    return preview


async def begin(
    context: Context, id: str, action: str, note: str | None = None, task: str | None = None
) -> Bulk:
    """Make a preview a bulk, which a service carries out. Raises UnknownPreview, and WrongState if
    it has begun.

    `action`: "bulk" or "backfill". `task`: the task that the backfill must be for. A backfill is
    refused if the task's schedule has changed since the preview, because its slots would differ.
    Acknowledging runs requires a note: without one, InvalidParameters is raised.
    """
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        row = await previews.get(connection, id)
        if (
            row is None
            or row["action"] not in _kinds(action)
            or task not in (None, row["request"].get("task"))
        ):
            raise UnknownPreview(
                f"there is no such preview {echoed(id)}; a preview is good for an hour"
            )
        if row["action"] == "backfill":
            await backfill.refuse_other_schedule(connection, row["request"])
        if row["action"] == "acknowledge":
            check_note(note)
        by = {
            "name": context.actor.name,
            "role": context.actor.role,
            "source": context.actor.source,
        }
        shortened = brief(note, audit.LONGEST_NOTE) if note else None
        if not await previews.begin(
            connection, id, {**by, "address": context.actor.address}, shortened, now
        ):
            raise await _not_begun(connection, id, now)
        started = {"count": row["count"], "request": context.redaction.masked(row["request"])}
        what = f"bulk.{row['action']}"
        await audit.record(
            connection, context.actor.by, what, now, target=id, after=started, note=shortened
        )
    context.wake_bulks()
    return await get(context, id)


async def get(context: Context, id: str) -> Bulk:
    """A preview or bulk as it is now. Raises UnknownPreview."""
    async with context.databases.reading() as connection:
        row = await previews.get(connection, id) if connection is not None else None
        hidden = await hidden_tasks(connection, context) if connection is not None else ()
    if row is None:
        raise UnknownPreview(
            f"there is no such preview {echoed(id)}; a preview is good for an hour"
        )
    return Bulk.of(row, **({"note": None} if hidden else {}))


async def under_way(context: Context) -> list[str]:
    """The ids of the bulks that have begun and not ended, the oldest first."""
    async with context.databases.reading() as connection:
        return await previews.under_way(connection) if connection is not None else []


async def carry_out(context: Context, id: str) -> None:
    """Carry out a bulk that has begun, until it has ended or another process has taken it. `node`:
    the node that carries it out.
    """
    node = context.node or COMMAND
    while await _step(context, node, id):
        context.wake()


async def _step(context: Context, node: str, id: str) -> bool:
    """Change the next runs of a bulk. Returns False if it has ended, or another process carries
    it out.
    """
    async with context.databases.reading() as connection:
        if connection is None:
            return False
        row = await previews.get(connection, id)
        packed = await previews.packed_ids(connection, id)
    if row is None or row["started_at"] is None or row["finished_at"] is not None:
        return False
    if row["action"] == "backfill":
        return await _backfill(context, node, row)
    position, count = row["position"], row["count"]
    ids = await offload(previews.unpack, packed, position, min(position + STEP, count))
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        if not await duties.take(connection, f"bulk {id}", node, now, DUTY_SECONDS):
            return False
        changed = await _change(connection, context, row, ids, now)
        moved_to = position + len(ids)
        is_over = moved_to >= count
        finished_at = now if is_over else None
        if not await previews.move(
            connection, id, position, to=moved_to, changed=changed, finished_at=finished_at
        ):
            await connection.rollback()
            return False
    return not is_over


async def _backfill(context: Context, node: str, row: Mapping[Any, Any]) -> bool:
    """Make all runs of a backfill. It may be repeated: a slot that has a run is left alone."""
    async with context.databases.changing() as connection:
        now = await database_time.now_of(connection)
        if not await duties.take(connection, f"bulk {row['id']}", node, now, DUTY_SECONDS):
            return False
    name = str(row["started_by"]["name"])
    counts = await backfill.make(context, BackfillRequest.of_json(row["request"]), name)
    async with context.databases.changing() as connection:
        now, changed = await database_time.now_of(connection), counts.changed
        await previews.move(
            connection, row["id"], 0, to=row["count"], changed=changed, finished_at=now
        )
    return False


async def _add(
    context: Context,
    connection: AsyncConnection,
    preview: Preview,
    request: Mapping[str, Any],
    now: datetime,
    ids: bytes | None,
) -> None:
    await previews.add(
        connection,
        id=preview.id,
        action=preview.action,
        actor=context.actor.name,
        request=dict(request),
        ids=ids,
        count=preview.count,
        created_at=now,
        expires_at=preview.expires_at,
    )


def _kinds(action: str) -> tuple[str, ...]:
    return tuple(STATES) if action == "bulk" else (action,)


async def _not_begun(
    connection: AsyncConnection, id: str, now: datetime
) -> UnknownPreview | WrongState:
    row = await previews.get(connection, id)
    if row is None or (row["started_at"] is None and row["expires_at"] <= now):
        return UnknownPreview(
            f"the preview {id} has expired, because it is older than an hour: make a new one"
        )
    return WrongState(
        f"the preview {id} was begun already, at {row['started_at']:%Y-%m-%d %H:%M:%S} UTC"
    )


async def _all_runs(connection: AsyncConnection, wanted: RunFilter) -> list[Mapping[Any, Any]]:
    query = query_of(wanted, await tasks_of(connection, wanted))
    runs: list[Mapping[Any, Any]] = []
    key: run_query.Key | None = None
    columns = ("id", "task", "state", "slot", "created_at")
    while True:
        rows, key = await run_query.page(connection, query, run_query.LOOKED, key, columns)
        runs += rows
        if len(runs) > MOST_RUNS:
            raise InvalidParameters(
                f"more than {MOST_RUNS:,} runs match; narrow the filter, such as by an interval"
            )
        if key is None:
            return runs


async def _change(
    connection: AsyncConnection,
    context: Context,
    row: Mapping[Any, Any],
    ids: list[str],
    now: datetime,
) -> int:
    """Change those of these runs whose state allows it. Returns how many were changed."""
    by = str(row["started_by"]["name"])
    if row["action"] == "retry":
        return len(await transitions.reopen(connection, ids, Rank.MANUAL, by, now))
    if row["action"] == "acknowledge":
        done = await acknowledging.acknowledge_runs(connection, ids, by, row["note"], now)
        await tell_followers(connection, context, done.closed, now)
        return done.runs
    if row["action"] == "reopen":
        undone = await acknowledging.undo_runs(connection, ids)
        for incident in undone.reopened:
            await tell_followers_again(connection, context, incident, now)
        return undone.runs
    reason = f"cancelled by {by}" + (f": {row['note']}" if row["note"] else "")
    return len(await transitions.cancel(connection, ids, reason, by, now))
