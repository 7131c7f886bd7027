"""Makes runs for slots of the past on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.firing import backfill
from batch_system.batch.firing.backfill import Backfill, Interval, SlotAction, SlotDecision
from batch_system.batch.ledger import database_time, schedules
from batch_system.batch.ledger.people import audit
from batch_system.batch.ledger.tables import tasks as tasks_table
from batch_system.batch.ledger.waits import Gate
from batch_system.errors import InvalidParameters, WrongState
from batch_system.operations.asking.context import Context
from batch_system.operations.starting.results import BackfillCounts, BackfillRequest, BackfillSlot
from batch_system.operations.starting.startable import startable_task

MOST_SLOTS = 10_000
"""A backfill of more slots is refused unless the request allows it, because it may be a mistake."""
MOST_ALLOWED = 100_000
"""A backfill of more slots is always refused: an interval may have any number of slots, and each is
checked.
"""


class Counted(NamedTuple):
    """What a backfill would do, and the id of the schedule that its slots are computed by."""

    counts: BackfillCounts
    schedule: str


def ignore(_: BackfillSlot) -> None:
    """For callers that need only the counts."""


async def run(
    context: Context, request: BackfillRequest, on_slot: Callable[[BackfillSlot], None] = ignore
) -> BackfillCounts:
    """Make the runs, unless it is a dry run. `on_slot` is called with each slot.

    Raises InvalidParameters, UnknownTask and DatabaseError.
    """
    if request.dry_run:
        return (await counted(context, request, on_slot)).counts
    counts = await make(context, request, context.actor.name, on_slot)
    async with context.databases.changing() as connection:
        now, after = (
            await database_time.now_of(connection),
            {**request.as_json(), **counts.model_dump()},
        )
        await audit.record(
            connection, context.actor.by, "task.backfill", now, task=request.task, after=after
        )
    return counts


async def counted(
    context: Context, request: BackfillRequest, on_slot: Callable[[BackfillSlot], None] = ignore
) -> Counted:
    """What a backfill would do. Nothing is changed. Raises the errors of `run`."""
    task_backfill, interval = await _prepared(context, request, context.actor.name)
    pruned_until = await _pruned_until(context, interval)
    pruned = 0

    def see(decision: SlotDecision) -> None:
        nonlocal pruned
        is_new = decision.action == SlotAction.NEW
        pruned += is_new and pruned_until is not None and decision.slot < pruned_until
        on_slot(BackfillSlot(**decision._asdict()))

    counts = await task_backfill.look(interval, see)
    after = await _after(context, request, context.actor.name, interval)
    theirs = {each.task.name: await each.look(span) for each, span in after}
    update = {"pruned": pruned, "left_out": await interval.left_out()}
    return Counted(_counts(counts, theirs).model_copy(update=update), interval.schedule_id)


async def _pruned_until(context: Context, interval: Interval) -> datetime | None:
    """The instant before which the runs that these slots wait for may be deleted already; None if
    they wait for no success.
    """
    if interval.after is None or interval.after.on != Gate.SUCCESS:
        return None
    rows = tasks_table.c
    begins = select(func.max(rows.accounted_from)).where(rows.name.in_(interval.after.tasks))
    async with context.databases.reading() as connection:
        return (await connection.execute(begins)).scalar() if connection is not None else None


async def make(
    context: Context,
    request: BackfillRequest,
    by: str,
    on_slot: Callable[[BackfillSlot], None] = ignore,
) -> BackfillCounts:
    """Make the runs, as requested by the person `by`. A slot that has a run is left alone, unless
    `redo`.
    """
    await context.databases.migrate_both()
    task_backfill, interval = await _prepared(context, request, by)
    counts = await task_backfill.make(
        interval, lambda decision: on_slot(BackfillSlot(**decision._asdict()))
    )
    after = await _after(context, request, by, interval)
    made = {each.task.name: await each.make(theirs) for each, theirs in after}
    context.wake()
    return _counts(counts, made).model_copy(update={"left_out": await interval.left_out()})


async def refuse_other_schedule(connection: AsyncConnection, request: Mapping[str, Any]) -> None:
    """Raises WrongState if the task's schedule has changed since the preview."""
    opened = (await schedules.open_schedules(connection)).get(request["task"])
    if opened is None or opened.id != request["schedule"]:
        raise WrongState(
            f"the schedule of task {request['task']} has changed since the preview: make a new "
            "preview"
        )


async def _prepared(
    context: Context, request: BackfillRequest, by: str
) -> tuple[Backfill, Interval]:
    databases = context.databases
    async with databases.reading() as connection:
        if connection is None:
            raise InvalidParameters(
                f"task {request.task}: there is no ledger yet, so there are no slots to backfill"
            )
        task = await startable_task(connection, context, request.task)
        interval = await backfill.interval_of(connection, task.name, request.since, request.until)
    await _refuse_many(request, task.name, interval)
    return Backfill(databases.ledger, databases.application, task, by, request.redo), interval


async def _refuse_many(request: BackfillRequest, task: str, interval: Interval) -> None:
    most = MOST_ALLOWED if request.allow_many else MOST_SLOTS
    if await interval.count(most) > most:
        hint = "backfill a shorter interval" if request.allow_many else "--yes allows that"
        raise InvalidParameters(
            f"task {task}: there are more than {most:,} slots in this interval; {hint}"
        )


async def _after(
    context: Context, request: BackfillRequest, by: str, first: Interval
) -> list[tuple[Backfill, Interval]]:
    """The backfills of the tasks that come after, in their order; empty if they were not
    requested.
    """
    if not request.and_after:
        return []
    databases = context.databases
    async with databases.reading() as connection:
        assert connection is not None
        intervals = await backfill.intervals_after(connection, request.task, first)
        tasks = {name: await startable_task(connection, context, name) for name in intervals}
    for name, interval in intervals.items():
        await _refuse_many(request, name, interval)
    given = (databases.ledger, databases.application)
    return [
        (Backfill(*given, tasks[name], by, request.redo, comes_after=True), interval)
        for name, interval in intervals.items()
    ]


def _counts(
    counts: Mapping[SlotAction, int], after: Mapping[str, Mapping[SlotAction, int]]
) -> BackfillCounts:
    return BackfillCounts(
        new=counts[SlotAction.NEW],
        again=counts[SlotAction.AGAIN],
        left=counts[SlotAction.LEFT],
        after={name: _counts(theirs, {}) for name, theirs in after.items()},
    )
