"""The opener: opens and closes waiting runs when something that they wait for may have ended. The
overlap policy decides about on-time slots.

It decides when a run opens, not when its slot fires, because a waiting run blocks no other run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.firing.overlap import Overlap
from service.batch.ledger import database_time, runs, schedules, transitions, waits
from service.batch.ledger import tasks as known_tasks
from service.batch.ledger.attempts import Outcome
from service.batch.ledger.runs import Active, NewRun
from service.batch.ledger.states import Origin, RunState
from service.batch.ledger.waits import Waiting
from service.batch.nodes.ledger_poll import LedgerChanges
from service.batch.nodes.outage import Outage
from service.batch.queue import waiting
from service.batch.queue.cancel import request_cancel
from service.batch.queue.waiting import Closed
from service.batch.tasks.registry import Task
from service.concurrency.background import Background
from service.database.engine import Database
from service.logs import get_logger

logger = get_logger("service.batch")

MOST_LEFT = 5
"""A node without the duty of the watch looks at waiting runs after this many polls, which is every
five seconds.
"""


class Opener(Background):
    """Looks at waiting runs when it is woken: each second, and after outcomes were written that
    runs may wait for.

    It looks after the transaction that wrote an outcome, never in it, because two transactions that
    end the last two runs of a group at the same moment do not see each other.
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
        queued. `on_closed`: called with runs that were closed, after the commit.
        """
        self._ledger = ledger
        self._tasks = tasks
        self._on_opened = on_opened
        self._on_closed = on_closed
        self._outage = outage or Outage()
        self._woken = asyncio.Event()
        self._upstreams: Callable[[], Collection[str]] = tuple
        self._watches: Callable[[], bool] = bool
        self._left = 0
        """How many polls in a row this node has left waiting runs to the node with the watch."""

    def follow(self, upstreams: Callable[[], Collection[str]], watches: Callable[[], bool]) -> None:
        """For a node that fires. `upstreams` returns the tasks whose slots others wait for.
        `watches` returns whether this node has the duty of the watch, and so looks each second at
        runs that other nodes have left. A node without that duty looks less often: it may be the
        only node that has loaded a task, and so the only one that can open its slots.
        """
        self._upstreams = upstreams
        self._watches = watches

    def on_ended(self, outcomes: Sequence[Outcome]) -> None:
        """Look at waiting runs if some may wait for one of these committed outcomes."""
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
        """Look at waiting runs soon. Returns at once."""
        self._woken.set()

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            try:
                while await self.settle() >= waiting.MOST:
                    pass
                self._outage.over_for("opener")
            except Exception as error:  # the background loop's boundary; the next look tries again
                if self._outage.cause_for("opener", self._ledger, error) is None:
                    logger.exception(
                        "opening waiting runs failed; the next attempt is within a second"
                    )

    async def settle(self) -> int:
        """Open and close ready runs in one transaction. Returns their number."""
        async with self.limited_turn():
            settled = await self._open_and_close()
        if settled is None:
            return 0
        if settled.closed:
            self._on_closed(settled.closed)
        if settled.number:
            self._on_opened()
        return settled.number

    async def _open_and_close(self) -> Settled | None:
        async with self._ledger.reader.connect() as connection:
            now = await database_time.now_of(connection)
            if not await waits.is_any_ready(connection, now):
                return None
        async with self._ledger.engine.begin() as connection:
            return await open_and_close(
                connection, self._tasks, await database_time.now_of(connection)
            )


@dataclass(frozen=True)
class Settled:
    """The number of waiting runs that were opened or closed, and the closed ones."""

    number: int
    closed: Sequence[Closed]


async def open_and_close(
    connection: AsyncConnection, tasks: Mapping[str, Task], now: datetime
) -> Settled:
    """Open and close the waiting runs that are ready, in the caller's transaction.

    `tasks`: those that the node has loaded, if it fires. On-time slots of other tasks are not
    opened here, because this node does not know their overlap policy. The slots of removed tasks
    are, because no node knows their policy and none starts their runs. `now`: the database time.
    """
    decided = await waiting.decide(connection, now, tasks=tasks)
    slots = [run for run in decided.opening if run.is_on_time]
    on_time = [run for run in slots if run.task in tasks]
    number, closed = await waiting.apply(connection, decided, now), decided.closed
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
    on_time: Sequence[Waiting],
    tasks: Mapping[str, Task],
    now: datetime,
) -> Settled:
    """Open these runs, as far as the overlap policies of their tasks admit them.

    The row of a task's schedule is locked, so that no slot of it fires meanwhile. If another node
    has locked that row, the task's runs are left for the next time. They are also left if another
    transaction has locked a run that has to be replaced: an opening waits for no lock, because it
    locks runs in another order than transactions that lock several by their ids.
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
    task: Task, opening: list[Waiting], active: list[Active], now: datetime
) -> tuple[list[str], dict[str, str], list[tuple[Active, str]]]:
    """The runs that open, the reasons of those that are skipped, and the active runs that they
    replace.

    If many open at once, "wait" admits the oldest slots first, the other policies the newest.
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


def _as_new(run: Waiting, task: Task) -> NewRun:
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


def _slot_of(run: Waiting) -> datetime:
    assert run.slot is not None
    return run.slot
