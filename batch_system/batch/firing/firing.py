"""Firing: one transaction turns due slots into runs and missed ranges, and moves the cursors of
their schedules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing import misfires, waiting
from batch_system.batch.firing.misfires import SlotPlan, is_behind, plan_paused, plan_slots
from batch_system.batch.firing.overlap import Overlap
from batch_system.batch.ledger import database_time, missed_ranges, runs, schedules
from batch_system.batch.ledger.missed_ranges import Cause, MissedRange
from batch_system.batch.ledger.runs import Active, Claimed, NewRun
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import RunState
from batch_system.batch.nodes.clock_steps import ClockStep, ClockSteps
from batch_system.batch.nodes.ledger_poll import LOOK_SECONDS
from batch_system.batch.queue.cancel import request_cancel
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.declaration import Missed
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.offload import offload
from batch_system.metrics.process import Fate

BUSY_AGAIN = timedelta(milliseconds=100)
"""The wait before another try with a schedule that another node was firing."""

LEAST_SHARE = 100
"""One transaction catches up at least this many slots of a schedule; further schedules wait."""

PlanKey = tuple[str, str, datetime, str | None, datetime | None, Missed]
"""What a plan depends on: cron expression, zone, cursor, pauser, pause, and missed policy."""
SlotPlans = Mapping[PlanKey, SlotPlan]
WhyMissed = Callable[[datetime, datetime], str | None]


@dataclass
class Fired:
    """The result of one firing.

    Attributes:
      now: The database time that decided which slots were due.
      behind: Schedules with missed slots that were not handled, because they have no plan yet
          (see `plan_ahead`).
      claimed: The runs that this node has to start.
      queued: The number of new runs in the queue.
      waiting: The number of new runs that wait for other slots.
      again_at: Tasks that have to be fired again, and when.
      handled: Tasks whose slots up to `now` are all handled.
      slots: The number of slots of each task by fate.
    """

    now: datetime
    behind: list[OpenSchedule] = field(default_factory=list)
    claimed: list[Claimed] = field(default_factory=list)
    queued: int = 0
    waiting: int = 0
    again_at: dict[str, datetime] = field(default_factory=dict)
    handled: list[str] = field(default_factory=list)
    slots: Counter[tuple[str, Fate]] = field(default_factory=Counter)

    def count(self, made: Sequence[NewRun], plans: Sequence[tuple[OpenSchedule, SlotPlan]]) -> None:
        """Add the runs that were made, and the tasks whose plans were carried out."""
        self.claimed = [runs.claimed_from(run) for run in made if run.state == RunState.RUNNING]
        self.slots.update((run.task, _fate(run)) for run in made)
        self.handled = [row.task for row, plan in plans if plan.is_complete]
        self.slots.update(
            {(row.task, Fate.MISSED): plan.missed.count for row, plan in plans if plan.missed}
        )


@dataclass
class _NewRuns:
    """The new runs of a firing by `node` at `now`: those that can start, while `capacity` lasts,
    and those that wait.

    `replaced`: active runs that have to be cancelled because of new ones, each with the reason.
    """

    node: str
    capacity: Capacity
    now: datetime
    ready: list[NewRun] = field(default_factory=list)
    waiting: list[tuple[NewRun, After]] = field(default_factory=list)
    replaced: list[tuple[Active, str]] = field(default_factory=list)

    def add(
        self, slots: list[NewRun], task: Task, after: After | None, active: list[Active]
    ) -> None:
        """Add the runs for the slots of one task. `active`: its active runs."""
        if after is not None:
            self.waiting += [(run, after) for run in waiting.as_waiting(slots, after)]
            return
        overlap = Overlap(task, active)
        self.ready += _decided(slots, task, overlap, self.node, self.capacity, self.now)
        self.replaced += overlap.replaced

    async def write(self, connection: AsyncConnection) -> list[NewRun]:
        """Insert the runs, and cancel those that they replace. Returns the runs that were inserted,
        because their slot had no run yet.
        """
        new = self.ready + [run for run, _ in self.waiting]
        inserted = await runs.insert(connection, new)
        await waiting.record_slots(
            connection, [(run, after) for run, after in self.waiting if run.id in inserted]
        )
        # A slot that already has its run replaces no run.
        known = {run.task for run in new if run.id not in inserted and not run.catch_up}
        await _cancel(
            connection, [(run, reason) for run, reason in self.replaced if run.task not in known]
        )
        return [run for run in new if run.id in inserted]


async def fire(
    connection: AsyncConnection,
    names: Collection[str],
    tasks: Mapping[str, Task],
    node: str,
    capacity: Capacity,
    now: datetime | None = None,
    ahead: SlotPlans | None = None,
    *,
    is_early: bool = False,
    steps: ClockSteps | None = None,
    why_missed: WhyMissed = lambda first, last: None,
) -> Fired:
    """Handle every slot of the tasks called `names` that is due at `now`, in the caller's
    transaction.

    `now` is the database time, read here by default. While `capacity` lasts, runs are inserted as
    running, and returned as claimed by `node`. A schedule that another node is firing at this
    moment is skipped, and named in `again_at`.

    `ahead`: the plans of schedules that are behind; None: all are planned here. A schedule without
    a plan, or whose cursor has moved since, is returned in `behind` instead of being handled.

    `is_early`: `now` lies in the future. Tasks for which something can't be decided yet are named
    in `again_at`. `steps`: those of the ledger's clock; nothing is fired while that clock is
    doubtful. `why_missed`: returns why the slots between two instants were not fired, if this
    process knows.
    """
    opened = await schedules.lock(connection, [name for name in names if name in tasks])
    asked_at, is_given = clock.boottime(), now is not None
    now = now or await database_time.now_of(connection)
    if steps is not None and not is_given and steps.is_doubtful(now, asked_at):
        return Fired(now, again_at=dict.fromkeys(names, now + timedelta(seconds=LOOK_SECONDS)))
    fired = Fired(now)
    usable = [row.at(now) for row in opened if row.is_usable]
    due = _due(usable, tasks, now, ahead, fired)
    plans = await _plan_all(due, tasks, now, ahead)
    missing = set(names) & tasks.keys() - {row.task for row in opened}
    busy = await schedules.still_open(connection, missing) if missing else set()
    fired.again_at |= dict.fromkeys(busy, now + BUSY_AGAIN)
    active = await _active(connection, plans, tasks)
    if is_early:
        plans = await _leave_undecided(connection, plans, active, fired)
    over = {} if steps is None else _steps_over(plans, steps)
    new = _NewRuns(node, capacity, now)
    for row, plan in plans:
        slots = _all_of(tasks[row.task], plan, now, over.get(row.task))
        new.add(slots, tasks[row.task], After.from_json(row.after), active.get(row.task, []))
        fired.again_at |= _again(row, plan, now)
    made = await new.write(connection)
    await _move_cursors(connection, plans)
    ranges = [
        (row, _because_of(plan.missed, over.get(row.task), why_missed))
        for row, plan in plans
        if plan.missed
    ]
    await missed_ranges.record(connection, ranges, now)
    fired.queued = sum(run.state == RunState.QUEUED for run in new.ready)
    fired.waiting = len(new.waiting)
    fired.count(made, plans)
    return fired


async def _active(
    connection: AsyncConnection,
    plans: Sequence[tuple[OpenSchedule, SlotPlan]],
    tasks: Mapping[str, Task],
) -> Mapping[str, list[Active]]:
    """The active runs of tasks with on-time slots and a limited concurrency."""
    bounded = [
        row.task for row, plan in plans if plan.on_time and tasks[row.task].exclusive is not None
    ]
    return await runs.active(connection, bounded) if bounded else {}


def _steps_over(
    plans: Sequence[tuple[OpenSchedule, SlotPlan]], steps: ClockSteps
) -> dict[str, ClockStep]:
    """The step of the ledger's clock that affects the plan of each task, by task."""
    found = {row.task: steps.over(row.fired_until) for row, _ in plans}
    return {task: step for task, step in found.items() if step is not None}


def _again(row: OpenSchedule, plan: SlotPlan, now: datetime) -> dict[str, datetime]:
    """The task of a plan and the instant, if it has to be fired again."""
    if not plan.is_complete:
        return {row.task: now}
    following = row.schedule.next(now) if not plan.on_time else None
    # If the slot is due by this machine's clock, that clock is ahead of the database's.
    return {row.task: following} if following is not None and following <= clock.now() else {}


async def _leave_undecided(
    connection: AsyncConnection,
    plans: list[tuple[OpenSchedule, SlotPlan]],
    active: Mapping[str, list[Active]],
    fired: Fired,
) -> list[tuple[OpenSchedule, SlotPlan]]:
    """The plans that can be carried out before their slots are due. The other tasks are named in
    `fired`.
    """
    undecided = await schedules.paused(connection, [row.task for row, _ in plans], fired.now)
    undecided |= {
        row.task for row, plan in plans if not _is_plain(row, plan) or active.get(row.task)
    }
    fired.again_at |= dict.fromkeys(undecided, fired.now)
    return [(row, plan) for row, plan in plans if row.task not in undecided]


def _is_plain(row: OpenSchedule, plan: SlotPlan) -> bool:
    """Whether only active runs of the task can still change what becomes of the slots of this
    plan.
    """
    return (
        row.after is None
        and row.paused_by is None
        and not plan.missed
        and not plan.catch_up
        and plan.is_complete
    )


def _fate(run: NewRun) -> Fate:
    if run.state == RunState.SKIPPED:
        return Fate.SKIPPED
    if run.state == RunState.CANCELLED:
        return Fate.REPLACED
    return Fate.CAUGHT_UP if run.catch_up else Fate.ON_TIME


async def _move_cursors(
    connection: AsyncConnection, plans: list[tuple[OpenSchedule, SlotPlan]]
) -> None:
    """Move the cursor of each schedule that had a slot to the end of its plan."""
    ids_by_cursor: dict[datetime, list[str]] = {}
    for row, plan in plans:
        if plan.on_time or plan.catch_up or plan.missed:
            ids_by_cursor.setdefault(plan.fired_until, []).append(row.id)
    for cursor, ids in ids_by_cursor.items():
        await schedules.move_cursors(connection, ids, cursor)


def _due(
    opened: list[OpenSchedule],
    tasks: Mapping[str, Task],
    now: datetime,
    ahead: SlotPlans | None,
    fired: Fired,
) -> list[OpenSchedule]:
    """The schedules that can be handled now. The others are added to `fired`."""
    due = []
    for row in opened:
        if row.paused_until is not None and row.paused_until <= now:
            # The schedule sync has to record the end of the pause first.
            fired.again_at[row.task] = now + BUSY_AGAIN
        elif (
            ahead is not None
            and is_behind(row.schedule, row.fired_until, now)
            and _key(row, tasks) not in ahead
        ):
            fired.behind.append(row)
            fired.again_at[row.task] = now
        else:
            due.append(row)
    return due


async def plan_ahead(
    behind: list[OpenSchedule], tasks: Mapping[str, Task], now: datetime
) -> SlotPlans:
    """Plan for schedules that are behind, the oldest cursor first, until the budget of a
    transaction is used up.

    Call it while no transaction is open: counting missed slots takes long, and SQLite allows only
    one writer.
    """
    schedules_by_key = Counter(
        _key(row, tasks) for row in sorted(behind, key=lambda row: row.fired_until)
    )
    share = max(LEAST_SHARE, misfires.BUDGET // max(1, len(behind)))

    def plan_within_budget() -> SlotPlans:
        plans: dict[PlanKey, SlotPlan] = {}
        left = misfires.BUDGET
        for key, number in schedules_by_key.items():
            if plans and left < number * share:
                break
            plans[key] = _plan(key, now, max(1, min(share, left // number)))
            left -= number * max(LEAST_SHARE, len(plans[key].catch_up))
        return plans

    return await offload(plan_within_budget)


async def _plan_all(
    opened: list[OpenSchedule], tasks: Mapping[str, Task], now: datetime, ahead: SlotPlans | None
) -> list[tuple[OpenSchedule, SlotPlan]]:
    plans = dict(ahead or {})
    behind = (
        sum(is_behind(row.schedule, row.fired_until, now) for row in opened) if ahead is None else 0
    )
    budget = max(1, misfires.BUDGET // max(1, behind))

    def plan_all() -> list[tuple[OpenSchedule, SlotPlan]]:
        for row in opened:
            key = _key(row, tasks)
            if key not in plans:
                # Many tasks share a schedule and a cursor, and so a plan.
                plans[key] = _plan(key, now, budget)
        return [(row, plans[_key(row, tasks)]) for row in opened]

    return await offload(plan_all) if behind else plan_all()


def _key(row: OpenSchedule, tasks: Mapping[str, Task]) -> PlanKey:
    pause, policy = (row.paused_by, row.paused_at), tasks[row.task].policies.missed
    return row.cron, row.timezone, row.fired_until, *pause, policy


def _plan(key: PlanKey, now: datetime, budget: int) -> SlotPlan:
    cron, timezone, fired_until, paused_by, paused_at, policy = key
    its = schedule(cron, timezone)
    if paused_by is None:
        return plan_slots(its, fired_until, now, policy, budget)
    return plan_paused(its, fired_until, now, (paused_by, paused_at), policy, budget)


def _because_of(missed: MissedRange, step: ClockStep | None, why_missed: WhyMissed) -> MissedRange:
    """The range with its reason: the step of the clock if that explains it, otherwise what this
    process knows.
    """
    if step is not None and step.explains(missed.first, missed.last):
        return replace(missed, reason=str(step))
    why = why_missed(missed.first, missed.last) if missed.cause == Cause.DOWN else None
    return replace(missed, reason=f"{missed.reason}: {why}") if why is not None else missed


def _decided(
    new: list[NewRun], task: Task, overlap: Overlap, node: str, capacity: Capacity, now: datetime
) -> list[NewRun]:
    for run in new:
        if run.due_at > now:
            run.wait(run.due_at)
    admitted = [run for run in new if not run.catch_up and overlap.admit(run, now)]
    for run in admitted:
        if run.state == RunState.QUEUED and overlap.take_lane(run) and capacity.take(task):
            run.start(node, now)
            overlap.started(run)
    return new


def _all_of(task: Task, plan: SlotPlan, now: datetime, step: ClockStep | None) -> list[NewRun]:
    """The runs of a plan, as queued ones. Runs for slots that a clock step covers are due once the
    clock is trusted.
    """
    new = [
        NewRun.scheduled(
            task.name,
            slot,
            now,
            catch_up=was_missed,
            exclusive=task.queueing.of(None),
            priority=task.policies.priority,
        )
        for was_missed, slots in ((True, plan.catch_up), (False, plan.on_time))
        for slot in slots
    ]
    for run, slot in zip(new, plan.catch_up, strict=False):
        if step is not None and step.covers(slot):
            run.due_at = max(now, step.trusted_at)
    return new


async def _cancel(connection: AsyncConnection, replaced: list[tuple[Active, str]]) -> None:
    # In the order of their ids, so that two nodes never deadlock.
    for run, reason in sorted(replaced, key=lambda pair: pair[0].id):
        await request_cancel(connection, run.id, reason, by="its overlap policy")
