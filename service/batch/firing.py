"""Firing: one transaction turns due slots into runs and missed ranges, and moves the cursors of their schedules."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch import runs, slots
from service.batch.cancel import request_cancel
from service.batch.offload import offload
from service.batch.overlap import Overlap
from service.batch.planning import ON_TIME, Plan, plan, plan_none
from service.batch.policies import Missed
from service.batch.registry import Task
from service.batch.runs import Active, Claimed, NewRun
from service.batch.slots import OpenSchedule
from service.batch.states import Origin, Rank, RunState
from service.batch.tables import new_id

BUSY_AGAIN = timedelta(milliseconds=100)


@dataclass
class Fired:
    """What one firing did. `again`: tasks whose slots are not all handled yet, and when to look at them."""

    now: datetime
    claimed: list[Claimed] = field(default_factory=list)
    queued: int = 0
    again: dict[str, datetime] = field(default_factory=dict)


@dataclass
class Room:
    """How many runs this node could start right now, on the loop and in threads."""

    runs: int
    threads: int

    def take(self, on_loop: bool) -> bool:
        if self.runs < 1 or (not on_loop and self.threads < 1):
            return False
        self.runs -= 1
        self.threads -= 0 if on_loop else 1
        return True


async def fire(
    connection: AsyncConnection,
    names: Collection[str],
    tasks: Mapping[str, Task],
    node: str,
    room: Room,
    now: datetime | None = None,
) -> Fired:
    """Handle every slot of these tasks that is due at `now` (the database's time), in the caller's transaction.

    Runs for which this node has room are inserted as running, and returned as claimed. A schedule that another node
    is firing right now is left to it, and looked at again.
    """
    opened = await slots.lock(connection, [name for name in names if name in tasks])
    now = now or await slots.now_of(connection)
    plans = await _plan_all([row for row in opened if row.is_usable], tasks, now)
    fired = Fired(now)
    missing = set(names) & tasks.keys() - {row.task for row in opened}
    busy = await slots.still_open(connection, missing) if missing else set()
    fired.again = dict.fromkeys(busy, now + BUSY_AGAIN)
    due = [row.task for row, made in plans if made.on_time]
    active = await runs.active(connection, due) if due else {}
    new: list[NewRun] = []
    replaced: list[tuple[Active, str]] = []
    for row, made in plans:
        overlap = Overlap(tasks[row.task], active.get(row.task, []))
        new += _runs_of(tasks[row.task], made, overlap, node, room, now)
        replaced += overlap.replaced
        if not made.is_complete:
            fired.again[row.task] = now
        elif not made.on_time and (following := row.schedule.next(now)) is not None and following <= clock.now():
            fired.again[row.task] = following  # this machine's clock is ahead of the database's
    inserted = await runs.insert(connection, new)
    await _cancel(connection, replaced)
    await _move_cursors(connection, plans)
    await slots.record_missed(connection, [(row, made.missed) for row, made in plans if made.missed], now)
    fired.claimed = [runs.claimed_from(run) for run in new if run.state == RunState.RUNNING and run.id in inserted]
    fired.queued = sum(run.state == RunState.QUEUED for run in new)
    return fired


async def _move_cursors(connection: AsyncConnection, plans: list[tuple[OpenSchedule, Plan]]) -> None:
    """Those that had a slot: to now, as a rule, and with a long backlog to where that was handled."""
    until: dict[datetime, list[str]] = {}
    for row, made in plans:
        if made.on_time or made.catch_up or made.missed:
            until.setdefault(made.fired_until, []).append(row.id)
    for at, ids in until.items():
        await slots.move_cursors(connection, ids, at)


async def _plan_all(
    opened: list[OpenSchedule], tasks: Mapping[str, Task], now: datetime
) -> list[tuple[OpenSchedule, Plan]]:
    known: dict[Any, Plan] = {}

    def plan_all() -> list[tuple[OpenSchedule, Plan]]:
        return [(row, _plan(row, tasks[row.task].policies.missed, now, known)) for row in opened]

    if any(_is_behind(row, now) for row in opened):
        return await offload(plan_all)
    return plan_all()


def _is_behind(row: OpenSchedule, now: datetime) -> bool:
    """The slots of a downtime may be many, and take long to count."""
    first = row.schedule.next(row.fired_until)
    return first is not None and first <= now - ON_TIME


def _plan(row: OpenSchedule, policy: Missed, now: datetime, known: dict[Any, Plan]) -> Plan:
    """Many tasks have the same schedule and cursor, and so the same plan."""
    key = (row.cron, row.timezone, row.fired_until, row.paused_by, policy)
    if key not in known:
        if row.paused_by is not None:
            known[key] = plan_none(row.schedule, row.fired_until, now, f"paused by {row.paused_by}")
        else:
            known[key] = plan(row.schedule, row.fired_until, now, policy)
    return known[key]


def _runs_of(task: Task, made: Plan, overlap: Overlap, node: str, room: Room, now: datetime) -> list[NewRun]:
    catch_up = [_new(task, slot, Rank.CATCH_UP, now) for slot in made.catch_up]
    on_time = [_new(task, slot, Rank.ON_TIME, now) for slot in made.on_time]
    first = [run for run in on_time if overlap.admit(run, now)]
    for run in first:
        if run.state == RunState.QUEUED and overlap.take_lane(run) and room.take(task.on_loop):
            _start(run, node, now)
            overlap.started(run)
    return catch_up + on_time


async def _cancel(connection: AsyncConnection, replaced: list[tuple[Active, str]]) -> None:
    for run, reason in sorted(replaced, key=lambda each: each[0].id):  # by id, so that two nodes never deadlock
        await request_cancel(connection, run.id, reason, by="its overlap policy")


def _new(task: Task, slot: datetime, rank: int, now: datetime) -> NewRun:
    return NewRun(
        id=new_id(),
        task=task.name,
        slot=slot,
        origin=Origin.SCHEDULE,
        state=RunState.QUEUED,
        rank=rank,
        catch_up=rank == Rank.CATCH_UP,
        due_at=now,
        created_at=now,
        exclusive=task.exclusive,
        priority=task.policies.priority,
    )


def _start(run: NewRun, node: str, now: datetime) -> None:
    """Make it one that this node starts at once."""
    run.state, run.node, run.fence, run.attempt = RunState.RUNNING, node, 1, 1
    run.started_at = run.attempt_started_at = now
