"""Backfills of several tasks together: of all slots that were missed within an interval, such as in
an outage.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from batch_system.batch.incidents.durations import UsualDurations
from batch_system.batch.ledger import database_time
from batch_system.batch.ledger.people import previews
from batch_system.errors import InvalidParameters, UnknownPreview, UnknownTask, WrongState
from batch_system.escaping import echoed
from batch_system.operations.asking.context import Context
from batch_system.operations.asking.results import Result
from batch_system.operations.bulks import bulk
from batch_system.operations.bulks.results import Preview
from batch_system.operations.slots import leaving
from batch_system.operations.starting.results import BackfillRequest, BackfillSlot

MOST_TASKS = 50
"""At most this many tasks are backfilled together; those with the most missed slots come first."""


class TaskBackfill(Result):
    """What a backfill of one task would do. `why`: why nothing can be done; None if something can.

    `first` and `last`: the slots of the first run and of the last one. `p50`: how many seconds a
    run usually takes.
    """

    task: str
    preview: Preview | None
    why: str | None
    first: datetime | None
    last: datetime | None
    p50: float | None


class BackfillPlan(Result):
    """The backfills of several tasks. `more`: how many other tasks have missed slots in the
    interval.
    """

    tasks: list[TaskBackfill]
    more: int

    @property
    def previews(self) -> list[str]:
        """The ids of the previews with runs to make."""
        return [
            each.preview.id
            for each in self.tasks
            if each.preview is not None and each.preview.count
        ]

    @property
    def count(self) -> int:
        """How many runs would be made in all."""
        return sum(each.preview.count for each in self.tasks if each.preview is not None)


class BegunBackfill(Result):
    """The backfill of one task. `changed`: how many of its `count` runs were made.

    `started_at`: None if it has not begun.
    """

    id: str
    task: str
    count: int
    changed: int
    started_at: datetime | None
    finished_at: datetime | None


async def plan(context: Context, since: datetime, until: datetime) -> BackfillPlan:
    """What a backfill of all tasks with missed slots within an interval would do. No run is made
    yet.

    It covers the missed ranges that `slots/leaving.py` would leave: for each task from its first
    slot to its last one.
    """
    requests = _requests(await leaving.unchosen(context, since, until, None))
    tasks = [await _planned(context, request) for request in requests[:MOST_TASKS]]
    return BackfillPlan(tasks=tasks, more=len(requests[MOST_TASKS:]))


def _requests(ranges: Sequence[Row[Any]]) -> list[BackfillRequest]:
    """For each task from its first missed slot to its last one; the tasks with most slots first."""
    slots: Counter[str] = Counter()
    by_task: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in ranges:
        slots[row.task] += row.slots
        by_task[row.task].append(row)
    return [
        BackfillRequest(
            task,
            min(row.first_slot for row in by_task[task]),
            max(row.last_slot for row in by_task[task]),
        )
        for task, _ in slots.most_common()
    ]


async def _planned(context: Context, request: BackfillRequest) -> TaskBackfill:
    slots: list[datetime] = []

    def note(slot: BackfillSlot) -> None:
        if slot.action != "left":
            slots[1:] = [slot.slot]  # the first one, and the last one so far

    preview, why = None, None
    try:
        preview = await bulk.preview_backfill(context, request, note)
    except (InvalidParameters, UnknownTask) as error:
        why = error.message
    ends = (slots[0], slots[-1]) if slots else (None, None)
    p50 = await _p50(context, request.task)
    return TaskBackfill(
        task=request.task, preview=preview, why=why, first=ends[0], last=ends[1], p50=p50
    )


async def _p50(context: Context, task: str) -> float | None:
    async with context.databases.reading() as connection:
        if connection is None:
            return None
        usual = UsualDurations(connection, await database_time.now_of(connection))
        return (await usual.of_task(task)).p50


async def begin(
    context: Context, ids: Sequence[str], note: str | None = None
) -> list[BegunBackfill]:
    """Begin the backfills of a plan, by the ids of its previews. One that has begun already is left
    as it is.

    A backfill can't begin if its preview has expired, or if its task's schedule has changed. Raises
    InvalidParameters, and UnknownPreview.
    """
    known = await begun(context, ids)
    for each in known:
        if each.started_at is None:
            try:
                await bulk.begin(context, each.id, "backfill", note)
            except (WrongState, UnknownPreview):
                # Begun by now, expired, or of another schedule: the answer says which began.
                continue
    return await begun(context, ids)


async def begun(context: Context, ids: Sequence[str]) -> list[BegunBackfill]:
    """How far these backfills are. Raises as `begin_backfills`."""
    if not 0 < len(ids) <= MOST_TASKS:
        raise InvalidParameters(f"allowed are 1 to {MOST_TASKS} previews")
    async with context.databases.reading() as connection:
        rows = [
            await previews.get(connection, id) if connection is not None else None
            for id in dict.fromkeys(ids)
        ]
    found = [row for row in rows if row is not None and row["action"] == "backfill"]
    if len(found) < len(rows):
        raise UnknownPreview(
            f"there is no such preview of a backfill among {echoed(', '.join(ids))}; it is good "
            "for an hour"
        )
    return [BegunBackfill.of(row, task=row["request"]["task"]) for row in found]
