"""Waiting runs of slots: which slots of other tasks they wait for, and the opener, which opens and
closes them when what they wait for may be over. For a slot that was fired on time, the overlap
policy decides.

The run of a slot waits for the last slot of each upstream task at or before its own. Overlap is
decided when a run opens, not when it was fired: a run that waits is in the way of no other one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing.overlap import Overlap
from batch_system.batch.ledger import database_time, json_rows, runs, schedules, transitions, waits
from batch_system.batch.ledger import tasks as known_tasks
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import Active, NewRun
from batch_system.batch.ledger.schedules import OpenSchedule
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.ledger.waits import WaitingRun
from batch_system.batch.nodes.ledger_poll import SOON, LedgerChanges
from batch_system.batch.nodes.outage import Outage
from batch_system.batch.queue import gates
from batch_system.batch.queue.cancel import request_cancel
from batch_system.batch.queue.gates import Closed
from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.registry import Task
from batch_system.concurrency.background import Background
from batch_system.concurrency.offload import offload
from batch_system.database.engine import Database
from batch_system.errors import InvalidSchedule
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

MOST_LEFT = 5
"""A node without the duty of the watch looks at what waits after this many polls: every five
seconds.
"""
_SECOND = timedelta(seconds=1)
_AGAIN = (0.05, 0.1, 0.2, 0.4)
"""Seconds until the next looks after looks that could open no run that was ready: a start that
postpones it may have locked it for a moment, but a run of which another node has loaded the task
stays ready.
"""
MANY = 100
"""Of more runs than this the slots are computed in a thread."""


def as_waiting(new: Iterable[NewRun], after: After) -> Iterator[NewRun]:
    """These new runs of slots, as waiting runs."""
    for run in new:
        run.wait(run.due_at, after.on)
        run.wait_until = run.due_at + timedelta(seconds=after.within)
        yield run


async def record_slots(
    connection: AsyncConnection, waiting: Sequence[tuple[NewRun, After]]
) -> None:
    """Write the slots that these new runs wait for. They stay the same even if a schedule changes
    later.

    A task without an open schedule is written without a slot, which closes the run, because there
    is nothing to wait for.
    """
    if not waiting:
        return
    names = {name for _, after in waiting for name in after.tasks}
    opened = await schedules.still_open(connection, names)
    rows = [(run, name, opened.get(name)) for run, after in waiting for name in after.tasks]
    found = await offload(_by_open, rows) if len(rows) > MANY else _by_open(rows)
    older = {
        name
        for (run, name, row), slot in zip(rows, found, strict=True)
        if row is not None and slot is None
    }
    histories = {name: await schedules.history(connection, name) for name in sorted(older)}
    slots = [
        slot
        if slot is not None or row is None
        else _by_history(histories[name], run.slot) or _before_all(run, row)
        for (run, name, row), slot in zip(rows, found, strict=True)
    ]
    new = [
        {"run": run.id, "task": name, "slot": slot}
        for (run, name, _), slot in zip(rows, slots, strict=True)
    ]
    await json_rows.insert(connection, waits.waits, new)


def _by_open(rows: Sequence[tuple[NewRun, str, OpenSchedule | None]]) -> list[datetime | None]:
    """The slot of each row by the open schedule of its task; None if that schedule began later."""
    return [
        _last(row.cron, row.timezone, row.valid_from, run.slot)
        if row is not None and row.is_usable
        else None
        for run, _, row in rows
    ]


def _by_history(rows: Sequence[Mapping[str, Any]], at: datetime | None) -> datetime | None:
    """The last slot at or before `at` by all schedules that a task has had."""
    assert at is not None
    for row in reversed(rows):
        if row["valid_from"] < at:
            until = min(at, row["valid_until"] or at)
            try:
                slot = _last(row["cron"], row["timezone"], row["valid_from"], until)
            except InvalidSchedule:  # another version of the service wrote it
                continue
            if slot is not None:
                return slot
    return None


def _before_all(run: NewRun, row: OpenSchedule) -> datetime | None:
    """For a backfilled run before the task's first schedule: the last slot at or before its own, by
    the present schedule.

    A backfill makes runs of such slots by the task's present schedule.
    """
    if run.origin != Origin.BACKFILL or run.slot is None or not row.is_usable:
        return None
    return schedule(row.cron, row.timezone).previous(run.slot + _SECOND)


def _last(cron: str, timezone: str, valid_from: datetime, at: datetime | None) -> datetime | None:
    """The last slot of a schedule at or before `at`, if it is after `valid_from`, when the schedule
    began.
    """
    assert at is not None
    slot = schedule(cron, timezone).previous(at + _SECOND)
    return slot if slot is not None and slot > valid_from else None


# The opener.


class Opener(Background):
    """Looks at what waits when it is woken: after outcomes were written that may be awaited, and
    each second.

    It looks after the transaction that wrote an outcome, never in it: two transactions that end the
    last two runs of a group at the same moment do not see each other.
    """

    def __init__(
        self,
        ledger: Database,
        tasks: Mapping[str, Task],
        on_opened: Callable[[], None],
        outage: Outage | None = None,
        on_closed: Callable[[Sequence[Closed]], None] = lambda _: None,
    ) -> None:
        """`tasks`: those that this node has loaded, if it fires. `on_opened`: called when runs were
        queued. `on_closed`: called with runs that were closed, after that was committed.
        """
        self._ledger = ledger
        self._tasks = tasks
        self._on_opened = on_opened
        self._on_closed = on_closed
        self._outage = outage or Outage()
        self._woken = asyncio.Event()
        self._upstreams: Callable[[], Collection[str]] = tuple
        self._watches: Callable[[], bool] = bool
        self._timer: asyncio.TimerHandle | None = None
        self._fruitless = 0
        """How many looks in turn could open no run that was ready."""
        self._left = 0
        """How many polls in turn this node has left what waits to the node of the watch."""

    def follow(self, upstreams: Callable[[], Collection[str]], watches: Callable[[], bool]) -> None:
        """On a node that fires: `upstreams` returns the tasks whose slots others wait for;
        `watches` whether this node has the duty of the watch, and so looks each second for what
        other nodes have left. A node without it looks now and then: it may be the only one that has
        loaded a task, and so the only one that opens its slots.
        """
        self._upstreams = upstreams
        self._watches = watches

    def on_ended(self, outcomes: Sequence[Outcome]) -> None:
        """Look at what waits if one of these outcomes, which were committed, may be awaited."""
        upstreams = self._upstreams()
        if any(
            each.is_awaited or each.split is not None or each.task in upstreams for each in outcomes
        ):
            self.wake()

    def on_changes(self, changes: LedgerChanges) -> None:
        """Take the result of a ledger poll."""
        if self._outage.has_failed("opener"):
            self.wake()
        if not changes.is_waiting:
            return
        self._left += 1
        if self._watches() or self._left >= MOST_LEFT:
            self._left = 0
            self.wake()

    def wake(self) -> None:
        """Look at what waits. Returns at once."""
        self._woken.set()

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                while await self.settle():
                    pass
                self._outage.over_for("opener")
            except Exception as error:  # the background loop's boundary; the next look finds them
                if self._outage.cause_for("opener", self._ledger, error) is None:
                    logger.exception(
                        "opening waiting runs failed; they are looked at again within a second"
                    )

    async def settle(self) -> int:
        """Open and close what is ready in one transaction. Returns how many runs it has settled."""
        async with self.limited_turn():
            settled = await self._open_and_close()
        if settled is None:
            return 0
        if settled.closed:
            self._on_closed(settled.closed)
        if settled.number:
            self._on_opened()
        return settled.number

    def _look_again(self, seconds: float | None) -> None:
        """Look after so many seconds, when a run may open, instead of at the next poll."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self.wake)

    async def _open_and_close(self) -> Settled | None:
        async with self._ledger.reader.connect() as connection:
            now = await database_time.now_of(connection)
            due_at = await waits.next_due(connection, now, now + SOON)
            is_any_ready = await waits.is_any_ready(connection, now)
        seconds = (due_at - now).total_seconds() if due_at is not None else None
        if not is_any_ready:
            self._fruitless = 0
            self._look_again(seconds)
            return None
        async with self._ledger.engine.begin() as connection:
            settled = await open_and_close(
                connection, self._tasks, await database_time.now_of(connection)
            )
        if settled.number:
            self._fruitless = 0
            return settled
        again = [*_AGAIN[self._fruitless : self._fruitless + 1]]
        self._fruitless += 1
        self._look_again(min([*again, *([seconds] if seconds is not None else [])], default=None))
        return settled


@dataclass(frozen=True)
class Settled:
    """How many waiting runs were opened or closed, and those that were closed."""

    number: int
    closed: Sequence[Closed]


async def open_and_close(
    connection: AsyncConnection, tasks: Mapping[str, Task], now: datetime
) -> Settled:
    """Open and close the waiting runs for which the time has come, in the caller's transaction.

    `tasks`: those that the node has loaded, if it fires. Of others it opens no on-time slots,
    except of tasks that were removed: no node knows their overlap policy, and none starts their
    runs. `now`: the database time.
    """
    decided = await gates.decide(connection, now, tasks=tasks)
    slots = [run for run in decided.opening if run.is_on_time]
    on_time = [run for run in slots if run.task in tasks]
    number, closed = await gates.apply(connection, decided, now), decided.closed
    if others := {run.task for run in slots} - tasks.keys():
        gone = await known_tasks.removed(connection, others)
        left = [run.id for run in slots if run.task in gone]
        await transitions.open_waiting(connection, left, now)
        number += len(left)
    if on_time:
        opened = await _open_slots(connection, on_time, tasks, now)
        number, closed = number + opened.number, [*closed, *opened.closed]
    return Settled(number, closed)


async def _open_slots(
    connection: AsyncConnection,
    on_time: Sequence[WaitingRun],
    tasks: Mapping[str, Task],
    now: datetime,
) -> Settled:
    """Open these runs, as far as the overlap policies of their tasks admit them.

    The row of a task's schedule is locked, so that no slot of it is fired meanwhile. If another
    node has locked it, its runs are left for the next time. So are they if another transaction has
    locked a run that has to be replaced: an opening waits for no lock, since it has locked runs in
    another order than transactions that lock several by their ids.
    """
    names = {run.task for run in on_time}
    locked = {row.task for row in await schedules.lock(connection, names)}
    unscheduled = names - locked - (await schedules.still_open(connection, names - locked)).keys()
    bounded = [name for name in locked | unscheduled if tasks[name].exclusive is not None]
    active = await runs.active(connection, bounded) if bounded else {}
    opening: list[str] = []
    skipped: dict[str, str] = {}
    for name in sorted(locked | unscheduled):
        theirs = [run for run in on_time if run.task == name]
        admitted, refused, replaced = _admit(tasks[name], theirs, active.get(name, []), now)
        if not await runs.lock_at_once(connection, [run.id for run, _ in replaced]):
            continue
        opening += admitted
        skipped |= refused
        for run, reason in sorted(replaced, key=lambda pair: pair[0].id):
            await request_cancel(connection, run.id, reason, by="its overlap policy")
    await transitions.open_waiting(connection, opening, now)
    await transitions.close_waiting(connection, skipped, now, gate=False)
    closed = [
        Closed.of(run, RunState.SKIPPED, skipped[run.id]) for run in on_time if run.id in skipped
    ]
    return Settled(len(opening) + len(skipped), closed)


def _admit(
    task: Task, opening: list[WaitingRun], active: list[Active], now: datetime
) -> tuple[list[str], dict[str, str], list[tuple[Active, str]]]:
    """The runs that open, the reasons of those that are skipped, and the active runs that they
    replace.

    Where many open at once, "wait" admits the oldest slots first, and the other policies the
    newest.
    """
    overlap = Overlap(task, active, "opened together with it")
    policy = task.policies.overlap
    admitted: list[str] = []
    refused: dict[str, str] = {}
    begun = [each.slot for each in active if each.origin == Origin.SCHEDULE and not each.catch_up]
    for run in sorted(opening, key=_slot_of, reverse=policy != "wait"):
        newer = len(admitted) + sum(slot is not None and slot > _slot_of(run) for slot in begun)
        if policy == "replace" and newer >= task.lanes:
            refused[run.id] = f"a newer slot of {task.name} runs"
            continue
        new = _as_new(run, task)
        overlap.admit(new, now)
        if new.state == RunState.QUEUED:
            admitted.append(run.id)
        else:
            refused[run.id] = new.reason or "its overlap policy"
    return admitted, refused, overlap.replaced


def _as_new(run: WaitingRun, task: Task) -> NewRun:
    new = NewRun.scheduled(
        run.task,
        _slot_of(run),
        run.created_at,
        catch_up=False,
        exclusive=run.exclusive,
        priority=run.priority,
    )
    new.id = run.id
    return new


def _slot_of(run: WaitingRun) -> datetime:
    assert run.slot is not None
    return run.slot
