"""Opening: waiting runs that may start now are queued. For a slot that was fired on time, the
overlap policy decides.

Overlap is decided when a run opens, not when it was fired: a run that waits is in nobody's way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.firing.overlap import Overlap
from service.batch.ledger import runs, schedules, transitions
from service.batch.ledger import tasks as known_tasks
from service.batch.ledger.runs import Active, NewRun
from service.batch.ledger.states import Origin, RunState
from service.batch.ledger.waits import Waiting
from service.batch.queue import waiting
from service.batch.queue.cancel import request_cancel
from service.batch.queue.waiting import Closed
from service.batch.tasks.registry import Task


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

    The row of a task's schedule is locked, so that no slot of it is fired meanwhile. If another
    node has locked it, its runs are left for the next time. So are they if another transaction has
    locked a run that has to be replaced: an opening waits for nobody, since it has locked runs in
    another order than those who lock several by their ids.
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
