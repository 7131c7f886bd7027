"""The lanes of the night: what was planned and what ran, for the tasks about which there is
something to say.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Row, select
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.counting import count
from batch_system.batch.ledger import buckets, json_rows
from batch_system.batch.ledger.run_rows import newest_by_hand_of_each, run_rows
from batch_system.batch.ledger.schedules import ScheduleInUse
from batch_system.batch.ledger.states import Origin
from batch_system.batch.ledger.tables import (
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
    "task",
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
    sums = {name: tally.summed(by_task[name].values()) for name in names}
    sparse = [name for name in names if sum(sums[name].values()) <= MOST_SLOTS]
    its_runs = await _runs(connection, sparse, begin, until)
    ranges = await _missed(connection, sparse, begin, until)
    lanes = [
        Lane(
            task=name,
            counts=sums[name],
            runs=its_runs.get(name, ()),
            missed=ranges.get(name, ()),
            cells=() if name in sparse else [Cell(*each) for each in sorted(by_task[name].items())],
            planned=slots.get(name, ()),
            is_paused=name in paused,
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


async def _runs(
    connection: AsyncConnection, names: Sequence[str], begin: datetime, until: datetime
) -> dict[str, list[LaneRun]]:
    """The runs of the slots, and the newest ones by hand or started by code, by task. An earlier
    attempt of a run comes before all of them, so that its last one is drawn over it.
    """
    if not names:
        return {}
    theirs = json_rows.is_among(runs.c.task, names, connection.dialect.name)
    within = (runs.c.slot >= begin, runs.c.slot < until)
    of_slots = run_rows(_NAMES, theirs, *within, OF_SLOT_SQL).order_by(runs.c.slot)
    by_hand = await newest_by_hand_of_each(connection, names, _NAMES, MOST_SLOTS, begin, until)
    rows = [
        *await connection.execute(of_slots.limit(len(names) * MOST_SLOTS)),
        *reversed(by_hand),
    ]
    found = await _earlier(connection, rows)
    for row in rows:
        began = row.attempt_started_at if row.attempt > 1 else row.started_at
        found[row.task].append(LaneRun.of_row(row, began))
    return found


async def _earlier(
    connection: AsyncConnection, rows: Sequence[Row[Any]]
) -> dict[str, list[LaneRun]]:
    """The attempts before the last one of each run, by task: a run that failed and was retried
    shows both.
    """
    found: dict[str, list[LaneRun]] = defaultdict(list)
    again = {row.id: row for row in rows if row.attempt > 1}
    if not again:
        return found
    columns = (attempts.c.run, attempts.c.outcome, attempts.c.started_at, attempts.c.ended_at)
    query = select(*columns).where(
        json_rows.is_among(attempts.c.run, sorted(again), connection.dialect.name)
    )
    for run, outcome, begin, end in await connection.execute(query.order_by(columns[2])):
        last = again[run].attempt_started_at
        if outcome in _OUTCOMES and end is not None and (last or end) >= end:
            found[again[run].task].append(LaneRun(run, None, _OUTCOMES[outcome], begin, begin, end))
    return found


async def _missed(
    connection: AsyncConnection, names: Sequence[str], begin: datetime, until: datetime
) -> dict[str, list[LaneRange]]:
    found: dict[str, list[LaneRange]] = defaultdict(list)
    if not names:
        return found
    columns = [missed.c[name] for name in ("task", "first_slot", "last_slot", "cause", "count")]
    theirs = json_rows.is_among(missed.c.task, names, connection.dialect.name)
    within = (missed.c.last_slot >= begin, missed.c.first_slot < until)
    query = select(*columns).where(theirs, *within).order_by(missed.c.last_slot)
    for task, *each in await connection.execute(query.limit(len(names) * MOST_SLOTS)):
        found[task].append(LaneRange(*each))
    return found


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
