"""Firing: one transaction turns due slots into runs and missed ranges, and moves the cursors of their schedules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from service import clock
from service.batch.cron.cron import schedule
from service.batch.firing import misfires
from service.batch.firing.misfires import Plan, is_behind, plan, plan_none
from service.batch.firing.overlap import Overlap
from service.batch.ledger import database_time, missed_ranges, runs, schedules
from service.batch.ledger.runs import Active, Claimed, NewRun
from service.batch.ledger.schedules import OpenSchedule
from service.batch.ledger.states import RunState
from service.batch.queue.cancel import request_cancel
from service.batch.queue.capacity import Capacity
from service.batch.tasks.policies import Missed
from service.batch.tasks.registry import Task
from service.concurrency.offload import offload

BUSY_AGAIN = timedelta(milliseconds=100)

LEAST_SHARE = 100
"""Of the budget of a transaction: so many missed slots of a schedule at least, or of fewer schedules."""

Key = tuple[str, str, datetime, str | None, Missed]
Plans = Mapping[Key, Plan]
"""What was planned for schedules that are behind, by all that it depends on: the cursor above all."""


@dataclass
class Fired:
    """What one firing did. `again`: tasks whose slots are not all handled yet, and when to look at them.

    `behind`: schedules with missed slots that are to be planned first (see `plan_ahead`).
    """

    now: datetime
    behind: list[OpenSchedule] = field(default_factory=list)
    claimed: list[Claimed] = field(default_factory=list)
    queued: int = 0
    again: dict[str, datetime] = field(default_factory=dict)


async def fire(
    connection: AsyncConnection,
    names: Collection[str],
    tasks: Mapping[str, Task],
    node: str,
    capacity: Capacity,
    now: datetime | None = None,
    ahead: Plans | None = None,
) -> Fired:
    """Handle every slot of these tasks that is due at `now` (the database's time), in the caller's transaction.

    Runs for which this node has room are inserted as running, and returned as claimed. A schedule that another node
    is firing right now is left to it, and looked at again. `ahead`: what was planned for those that are behind; where
    their cursors have moved since, or nothing was planned, they are left out. None: all is planned here.
    """
    opened = await schedules.lock(connection, [name for name in names if name in tasks])
    now = now or await database_time.now_of(connection)
    fired = Fired(now)
    due = _due([row for row in opened if row.is_usable], tasks, now, ahead, fired)
    plans = await _plan_all(due, tasks, now, ahead)
    missing = set(names) & tasks.keys() - {row.task for row in opened}
    busy = await schedules.still_open(connection, missing) if missing else set()
    fired.again |= dict.fromkeys(busy, now + BUSY_AGAIN)
    bounded = [row.task for row, made in plans if made.on_time and tasks[row.task].exclusive is not None]
    active = await runs.active(connection, bounded) if bounded else {}
    new: list[NewRun] = []
    replaced: list[tuple[Active, str]] = []
    for row, made in plans:
        overlap = Overlap(tasks[row.task], active.get(row.task, []))
        new += _runs_of(tasks[row.task], made, overlap, node, capacity, now)
        replaced += overlap.replaced
        if not made.is_complete:
            fired.again[row.task] = now
        elif not made.on_time and (following := row.schedule.next(now)) is not None and following <= clock.now():
            fired.again[row.task] = following  # this machine's clock is ahead of the database's
    inserted = await runs.insert(connection, new)
    await _cancel(connection, replaced)
    await _move_cursors(connection, plans)
    await missed_ranges.record(connection, [(row, made.missed) for row, made in plans if made.missed], now)
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
        await schedules.move_cursors(connection, ids, at)


def _due(
    opened: list[OpenSchedule], tasks: Mapping[str, Task], now: datetime, ahead: Plans | None, fired: Fired
) -> list[OpenSchedule]:
    """Those that are handled now. The others are noted in `fired`."""
    if ahead is None:
        return opened
    handled = []
    for row in opened:
        if is_behind(row.schedule, row.fired_until, now) and _key(row, tasks) not in ahead:
            fired.behind.append(row)
            fired.again[row.task] = now
        else:
            handled.append(row)
    return handled


async def plan_ahead(behind: list[OpenSchedule], tasks: Mapping[str, Task], now: datetime) -> Plans:
    """Plan for schedules that are behind, as far as the budget of a transaction goes; those furthest behind first.

    While no transaction is open: counting what was missed takes long, and SQLite has one writer.
    """
    numbers = Counter(_key(row, tasks) for row in sorted(behind, key=lambda row: row.fired_until))
    share = max(LEAST_SHARE, misfires.BUDGET // max(1, len(behind)))

    def plan_them() -> Plans:
        plans: dict[Key, Plan] = {}
        left = misfires.BUDGET
        for key, number in numbers.items():
            if plans and left < number * share:
                break
            plans[key] = _plan(key, now, max(1, min(share, left // number)))
            left -= number * max(LEAST_SHARE, len(plans[key].catch_up))
        return plans

    return await offload(plan_them)


async def _plan_all(
    opened: list[OpenSchedule], tasks: Mapping[str, Task], now: datetime, ahead: Plans | None
) -> list[tuple[OpenSchedule, Plan]]:
    known = dict(ahead or {})
    behind = sum(is_behind(row.schedule, row.fired_until, now) for row in opened) if ahead is None else 0
    budget = max(1, misfires.BUDGET // max(1, behind))

    def plan_all() -> list[tuple[OpenSchedule, Plan]]:
        for row in opened:
            key = _key(row, tasks)
            if key not in known:  # many tasks have the same schedule and cursor, and so the same plan
                known[key] = _plan(key, now, budget)
        return [(row, known[_key(row, tasks)]) for row in opened]

    return await offload(plan_all) if behind else plan_all()


def _key(row: OpenSchedule, tasks: Mapping[str, Task]) -> Key:
    return row.cron, row.timezone, row.fired_until, row.paused_by, tasks[row.task].policies.missed


def _plan(key: Key, now: datetime, budget: int) -> Plan:
    cron, timezone, fired_until, paused_by, policy = key
    if paused_by is not None:
        return plan_none(schedule(cron, timezone), fired_until, now, f"paused by {paused_by}")
    return plan(schedule(cron, timezone), fired_until, now, policy, budget)


def _runs_of(task: Task, made: Plan, overlap: Overlap, node: str, capacity: Capacity, now: datetime) -> list[NewRun]:
    catch_up = [_new(task, slot, now, catch_up=True) for slot in made.catch_up]
    on_time = [_new(task, slot, now) for slot in made.on_time]
    first = [run for run in on_time if overlap.admit(run, now)]
    for run in first:
        if run.state == RunState.QUEUED and overlap.take_lane(run) and capacity.take(task.on_loop):
            run.start(node, now)
            overlap.started(run)
    return catch_up + on_time


async def _cancel(connection: AsyncConnection, replaced: list[tuple[Active, str]]) -> None:
    for run, reason in sorted(replaced, key=lambda each: each[0].id):  # by id, so that two nodes never deadlock
        await request_cancel(connection, run.id, reason, by="its overlap policy")


def _new(task: Task, slot: datetime, now: datetime, catch_up: bool = False) -> NewRun:
    return NewRun.scheduled(
        task.name, slot, now, catch_up=catch_up, exclusive=task.exclusive, priority=task.policies.priority
    )
