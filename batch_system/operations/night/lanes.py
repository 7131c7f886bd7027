"""The lanes of the night: what was planned and what ran, for the tasks about which there is
something to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.ledger import buckets, json_rows
from batch_system.batch.ledger.run_rows import NEWEST_FIRST, run_rows
from batch_system.batch.ledger.schedules import ScheduleInUse
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import (
    BY_HAND_SQL,
    NO_PART_SQL,
    OF_SLOT_SQL,
    attempts,
    missed,
    runs,
)
from batch_system.batch.night import tally
from batch_system.batch.night.tally import Window
from batch_system.concurrency.offload import offload
from batch_system.operations.night.results import Night

MOST_LANES = 12
MOST_SLOTS = 60
"""A lane with more slots is drawn from the tally: a cell for each ten minutes, which shows the
worst outcome in them.
"""
MOST_PLANNED = 60

Planned = tuple[ScheduleInUse, list[datetime]]
"""A schedule, and its slots to come."""

_NAMES = (
    "id",
    "slot",
    "origin",
    "state",
    "created_at",
    "started_at",
    "finished_at",
    "attempt",
    "attempt_started_at",
)
_OUTCOMES = {
    "failed": "failed",
    "timed out": "failed",
    "interrupted": "interrupted",
    "lost": "interrupted",
}
"""How an attempt that was not the last one of its run is drawn, by its outcome."""


class LaneRun(NamedTuple):
    """A run in a lane, or one of its earlier attempts, which has no slot here. `begin`: None: it
    has not begun. `end`:
    None while it goes on.
    """

    id: str
    slot: datetime | None
    state: str
    created_at: datetime
    begin: datetime | None
    end: datetime | None

    @classmethod
    def of_row(cls, row: Any, begin: datetime | None) -> LaneRun:
        """Make it from the row of a run that began at `begin`."""
        return cls(
            id=row.id,
            slot=row.slot if row.origin != Origin.MANUAL else None,
            state=row.state,
            created_at=row.created_at,
            begin=begin,
            end=row.finished_at,
        )


@dataclass(frozen=True)
class LaneRange:
    """Slots that did not run, from the first to the last one. `cause`: down, paused, gone or
    other.
    """

    first: datetime
    last: datetime
    cause: str
    count: int


class Cell(NamedTuple):
    """The slots of ten minutes, by class."""

    at: datetime
    counts: dict[str, int]


@dataclass(frozen=True)
class Lane:
    """A task in the window. Either `runs` and `missed`, or `cells` if there are too many slots to
    draw each.

    `planned`: the slots to come; `is_paused`: they will not run. `counts`: the slots of the window,
    by class.
    """

    task: str
    counts: dict[str, int]
    runs: Sequence[LaneRun] = ()
    missed: Sequence[LaneRange] = ()
    cells: Sequence[Cell] = ()
    planned: Sequence[datetime] = ()
    is_paused: bool = False


@dataclass(frozen=True)
class Lanes:
    """`rest`: all other tasks together, of which there are `others`; None if there are none."""

    lanes: list[Lane]
    rest: Lane | None
    others: int


async def lanes_of(
    connection: AsyncConnection,
    found: Night,
    window: Window,
    used: Sequence[ScheduleInUse],
    until: datetime,
    ahead: timedelta | None,
) -> Lanes:
    """The lanes of the tasks of the blocks, in their order. `ahead`: how far after `until` planned
    slots are shown.
    """
    begin = window.accounted_from or found.since
    wanted = buckets.between(begin, until)
    names = _names(found)[:MOST_LANES]
    by_task = await tally.of_tasks(connection, names, wanted)
    for (bucket, task), counts in window.untallied.items():
        if task in by_task:
            by_task[task][bucket] = dict(counts)
    planned = await offload(_planned, used, until, ahead) if ahead is not None else []
    slots = {name: its for each, its in planned for name in each.tasks & set(names)}
    paused = {name for each in used for name in each.paused & set(names)}
    lanes = [
        await _lane(
            connection, name, by_task[name], slots.get(name, []), name in paused, begin, until
        )
        for name in names
    ]
    others = {task for _, task in window.untallied}.union(*(each.tasks for each in used))
    others -= set(names)
    rest = _rest(window, by_task, others, planned) if others else None
    return Lanes(lanes=lanes, rest=rest, others=len(others))


def _names(found: Night) -> list[str]:
    """The tasks of the blocks: what needs a person, what is late, what did not run, what was dealt
    with.
    """
    blocks: list[str | None] = [need.task for need in found.needs]
    blocks += [run.task for run in found.late]
    for each in found.did_not_run:
        blocks += [each.task, *each.tasks]
    blocks += [each.task for each in found.dealt_with]
    return list(dict.fromkeys(name for name in blocks if name))


def _planned(used: Sequence[ScheduleInUse], until: datetime, ahead: timedelta) -> Sequence[Planned]:
    """The slots of the schedules that do not have too many to draw each."""
    return [
        (each, list(each.schedule.between(until, until + ahead)))
        for each in used
        if count(each.schedule, until, until + ahead) <= MOST_PLANNED
    ]


async def _lane(
    connection: AsyncConnection,
    name: str,
    by_bucket: Mapping[datetime, Mapping[str, int]],
    planned: list[datetime],
    is_paused: bool,
    begin: datetime,
    until: datetime,
) -> Lane:
    counts = tally.summed(by_bucket.values())
    lane = Lane(task=name, counts=counts, planned=planned, is_paused=is_paused)
    if sum(counts.values()) > MOST_SLOTS:
        cells = [Cell(bucket, dict(each)) for bucket, each in sorted(by_bucket.items())]
        return replace(lane, cells=cells)
    rows = [
        *await _of_slots(connection, name, begin, until),
        *await _beside(connection, name, begin, until),
    ]
    last = [
        LaneRun.of_row(row, row.attempt_started_at if row.attempt > 1 else row.started_at)
        for row in rows
    ]
    found = [*await _earlier(connection, rows), *last]
    return replace(lane, runs=found, missed=await _missed(connection, name, begin, until))


async def _earlier(connection: AsyncConnection, rows: Sequence[Row[Any]]) -> list[LaneRun]:
    """The attempts before the last one of each run: a run that failed and was retried shows
    both.
    """
    again = {row.id: row for row in rows if row.attempt > 1}
    if not again:
        return []
    columns = (attempts.c.run, attempts.c.outcome, attempts.c.started_at, attempts.c.ended_at)
    query = select(*columns).where(
        json_rows.is_among(attempts.c.run, sorted(again), connection.dialect.name)
    )
    return [
        LaneRun(id=run, slot=None, state=_OUTCOMES[outcome], created_at=begin, begin=begin, end=end)
        for run, outcome, begin, end in await connection.execute(
            query.order_by(attempts.c.started_at)
        )
        if outcome in _OUTCOMES
        and end is not None
        and (again[run].attempt_started_at or end) >= end
    ]


async def _of_slots(
    connection: AsyncConnection, name: str, begin: datetime, until: datetime
) -> Sequence[Row[Any]]:
    within = (runs.c.slot >= begin, runs.c.slot < until)
    query = run_rows(_NAMES, runs.c.task == name, *within, OF_SLOT_SQL)
    return (await connection.execute(query.order_by(runs.c.slot).limit(MOST_SLOTS))).all()


async def _beside(
    connection: AsyncConnection, name: str, begin: datetime, until: datetime
) -> Sequence[Row[Any]]:
    """The newest runs by hand, or started by code."""
    within = (runs.c.created_at >= begin, runs.c.created_at < until)
    query = run_rows(_NAMES, runs.c.task == name, *within, BY_HAND_SQL, NO_PART_SQL)
    return (await connection.execute(query.order_by(*NEWEST_FIRST).limit(MOST_SLOTS))).all()


async def _missed(
    connection: AsyncConnection, name: str, begin: datetime, until: datetime
) -> list[LaneRange]:
    query = select(missed).where(
        missed.c.task == name, missed.c.last_slot >= begin, missed.c.first_slot < until
    )
    rows = (
        await connection.execute(query.order_by(missed.c.last_slot).limit(MOST_SLOTS))
    ).mappings()
    return [
        LaneRange(
            first=row["first_slot"], last=row["last_slot"], cause=row["cause"], count=row["count"]
        )
        for row in rows
    ]


def _rest(
    window: Window,
    by_task: Mapping[str, Mapping[datetime, Mapping[str, int]]],
    others: Set[str],
    planned: Sequence[Planned],
) -> Lane:
    """All tasks without a lane of their own. Their slots are those of the window less those of
    `by_task`.
    """
    cells = []
    for bucket, counts in sorted(window.by_bucket.items()):
        left = Counter(counts)
        for buckets_of_task in by_task.values():
            left.subtract(buckets_of_task.get(bucket, {}))
        if +left:
            cells.append(Cell(at=bucket, counts=dict(+left)))
    coming = sorted({slot for each, its in planned if each.tasks & others for slot in its})
    return Lane(
        task="",
        counts=tally.summed(cell.counts for cell in cells),
        cells=cells,
        planned=coming[:MOST_PLANNED],
    )
