"""The timeline of tasks: what was planned and what ran, some hours before and after now, in few
queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.ledger import buckets, json_rows
from batch_system.batch.ledger.run_rows import newest_by_hand_of_each, run_rows
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.tables import HELD_SQL, OF_SLOT_SQL, attempts, missed, runs
from batch_system.batch.night import tally
from batch_system.batch.night.tally import Window
from batch_system.concurrency.offload import offload
from batch_system.operations.night.lanes import MOST_SLOTS, Cell, Lane, LaneRange, LaneRun

HOURS = (1, 3, 6, 12, 24)
USUAL_HOURS = 12
MOST_LISTED = 300
"""At most this many future slots are drawn; if there are more, only their number is shown."""
MOST_BESIDE = 40
"""At most this many manual runs are shown in a lane: the newest ones."""

MOST_RETRIED = 300
"""Each attempt is drawn for at most this many runs with several attempts: the newest ones."""

_NAMES = (
    "id",
    "task",
    "slot",
    "origin",
    "state",
    "created_at",
    "started_at",
    "finished_at",
    "attempt",
)
_SECOND = timedelta(seconds=1)


@dataclass(frozen=True)
class AttemptSpan:
    """An attempt that has ended. `outcome`: a word, such as failed."""

    begin: datetime
    end: datetime
    outcome: str


@dataclass(frozen=True)
class TaskLane:
    """The lane of a task. `ahead`: how many slots are to come; they are in the lane unless there
    are too many.

    `expected`: how many seconds a run usually takes; None: not known. `attempts`: of runs with
    several ones, by run.
    """

    lane: Lane
    ahead: int
    expected: float | None
    attempts: dict[str, list[AttemptSpan]]


@dataclass(frozen=True)
class Timeline:
    """`hours` before and after `now`. `lanes`: the tasks with something in it, those that run
    first, then the next due.

    `without`: the tasks with nothing in it. `accounted_from`: earlier slots of dense lanes are not
    counted yet.
    """

    now: datetime
    hours: int
    lanes: list[TaskLane]
    without: list[str]
    accounted_from: datetime | None


async def timeline(
    connection: AsyncConnection,
    shown: Mapping[str, float | None],
    opened: Mapping[str, OpenSchedule],
    window: Window,
    now: datetime,
    hours: int,
) -> Timeline:
    """`shown`: the tasks, in the order of the lanes, with the seconds that a run usually takes.

    `window`: the slots of the last 24 hours at least.
    """
    begin, end = now - timedelta(hours=hours), now + timedelta(hours=hours)
    names = list(shown)
    by_task = await _tally(connection, names, window, begin, now)
    sums = {name: tally.summed(by_task[name].values()) for name in names}
    sparse = [name for name in names if sum(sums[name].values()) <= MOST_SLOTS]
    found, retried = await _runs(connection, sparse, begin, now)
    spans = await _attempts(connection, retried)
    ranges = await _missed(connection, sparse, opened, begin, now)
    ahead, planned = await offload(
        _planned, {name: opened[name] for name in names if name in opened}, now, end
    )
    lanes = []
    for name in names:
        row = opened.get(name)
        is_dense = name not in sparse
        lane = Lane(
            task=name,
            counts=sums[name],
            runs=found.get(name, []),
            missed=ranges.get(name, []),
            cells=[Cell(at=at, counts=counts) for at, counts in sorted(by_task[name].items())]
            if is_dense
            else [],
            planned=planned.get(name, []),
            is_paused=row is not None and row.paused_by is not None,
        )
        its = {run.id: spans[run.id] for run in lane.runs if run.id in spans}
        lanes.append(
            TaskLane(lane=lane, ahead=ahead.get(name, 0), expected=shown[name], attempts=its)
        )
    used = [each for each in lanes if _has_something(each)]
    without = [each.lane.task for each in lanes if not _has_something(each)]
    return Timeline(
        now=now, hours=hours, lanes=used, without=without, accounted_from=window.accounted_from
    )


def _has_something(each: TaskLane) -> bool:
    return bool(each.ahead or each.lane.runs or each.lane.cells or each.lane.missed)


async def _tally(
    connection: AsyncConnection,
    names: Sequence[str],
    window: Window,
    begin: datetime,
    now: datetime,
) -> dict[str, dict[datetime, dict[str, int]]]:
    """The slots of these tasks by class, for each ten minutes."""
    by_task = await tally.of_tasks(connection, names, buckets.between(begin, now))
    first = buckets.bucket_of(begin)
    for (bucket, task), counts in window.untallied.items():
        if task in by_task and bucket >= first:
            by_task[task][bucket] = dict(counts)
    return by_task


async def _runs(
    connection: AsyncConnection, names: Sequence[str], begin: datetime, now: datetime
) -> tuple[dict[str, list[LaneRun]], list[str]]:
    """The runs of the slots since `begin`, what runs now, and the newest manual runs, by task.

    Also the ids of those with several attempts.
    """
    if not names:
        return {}, []
    theirs = json_rows.is_among(runs.c.task, names, connection.dialect.name)
    slots = run_rows(_NAMES, theirs, OF_SLOT_SQL, runs.c.slot >= begin, runs.c.slot <= now)
    held = run_rows(_NAMES, HELD_SQL)
    rows = {row.id: row for row in await connection.execute(slots.limit(len(names) * MOST_SLOTS))}
    rows |= {row.id: row for row in await connection.execute(held) if row.task in names}
    by_hand = await newest_by_hand_of_each(connection, names, _NAMES, MOST_BESIDE, begin, now)
    rows |= {row.id: row for row in by_hand}
    found: dict[str, list[LaneRun]] = defaultdict(list)
    for row in sorted(rows.values(), key=lambda row: (row.slot or row.created_at, row.id)):
        found[row.task].append(LaneRun.of_row(row, row.started_at))
    retried = sorted((row.created_at, row.id) for row in rows.values() if row.attempt > 1)
    return found, [run for _, run in retried[-MOST_RETRIED:]]


async def _attempts(
    connection: AsyncConnection, retried: Sequence[str]
) -> dict[str, list[AttemptSpan]]:
    """The attempts of these runs that have ended, the oldest first."""
    found: dict[str, list[AttemptSpan]] = defaultdict(list)
    if retried:
        columns = (attempts.c.run, attempts.c.started_at, attempts.c.ended_at, attempts.c.outcome)
        theirs = json_rows.is_among(attempts.c.run, retried, connection.dialect.name)
        for row in await connection.execute(
            select(*columns).where(theirs).order_by(attempts.c.run, attempts.c.fence)
        ):
            found[row.run].append(
                AttemptSpan(begin=row.started_at, end=row.ended_at, outcome=row.outcome)
            )
    return found


async def _missed(
    connection: AsyncConnection,
    names: Sequence[str],
    opened: Mapping[str, OpenSchedule],
    begin: datetime,
    now: datetime,
) -> dict[str, list[LaneRange]]:
    """The slots that did not run, each as a range of its own where they can be computed."""
    if not names:
        return {}
    theirs = json_rows.is_among(missed.c.task, names, connection.dialect.name)
    query = select(missed).where(theirs, missed.c.last_slot >= begin, missed.c.first_slot <= now)
    rows = await connection.execute(
        query.order_by(missed.c.last_slot.desc()).limit(len(names) * MOST_SLOTS)
    )
    by_task: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_task[row.task].append(row)
    return await offload(_ranges, by_task, opened, begin, now)


def _ranges(
    by_task: Mapping[str, Sequence[Any]],
    opened: Mapping[str, OpenSchedule],
    begin: datetime,
    now: datetime,
) -> dict[str, list[LaneRange]]:
    found: dict[str, list[LaneRange]] = defaultdict(list)
    for task, rows in by_task.items():
        row = opened.get(task)
        for each in rows:
            first, last = max(each.first_slot, begin), min(each.last_slot, now)
            slots = _slots(row, first - _SECOND, last, MOST_SLOTS) if row is not None else []
            if len(slots) > each.count:
                slots = []
            for a, b, number in [(at, at, 1) for at in slots] or [(first, last, each.count)]:
                found[task].append(LaneRange(first=a, last=b, cause=each.cause, count=number))
    return found


def _planned(
    opened: Mapping[str, OpenSchedule], now: datetime, end: datetime
) -> tuple[dict[str, int], dict[str, list[datetime]]]:
    """How many slots are to come, and the slots themselves if there are not too many, by task."""
    ahead, listed = {}, {}
    found: dict[Schedule, tuple[int, list[datetime]]] = {}  # many tasks have the same schedule
    for name, row in opened.items():
        if not row.is_usable:
            continue
        if row.schedule not in found:
            number = count(row.schedule, now, end)
            slots = list(row.schedule.between(now, end)) if number <= MOST_LISTED else []
            found[row.schedule] = number, slots
        ahead[name], listed[name] = found[row.schedule]
    return ahead, listed


def _slots(row: OpenSchedule, after: datetime, until: datetime, most: int) -> list[datetime]:
    """The slots in (after, until]; none if there are more than `most`, or the schedule can't be
    used.
    """
    found = list(islice(row.schedule.between(after, until), most + 1)) if row.is_usable else []
    return found if len(found) <= most else []
