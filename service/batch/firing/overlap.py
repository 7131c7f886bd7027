"""What becomes of a task's on-time slots while runs of it are active: the overlap policies. Pure: no database."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from service.batch.ledger.runs import Active, NewRun
from service.batch.ledger.states import Origin, RunState
from service.batch.queue.concurrency import free_lanes
from service.batch.tasks.registry import Task


class Overlap:
    """The on-time runs of one task that are active, and the lanes that are empty. Slots are admitted oldest first.

    What was missed first, and what a person started, is in nobody's way; but while it runs it holds a lane.
    """

    def __init__(self, task: Task, active: Iterable[Active]) -> None:
        self._task = task
        self._is_bounded = task.exclusive is not None
        active = list(active)
        on_time = [run for run in active if run.origin == Origin.SCHEDULE and not run.catch_up]
        self._ahead: list[Active | NewRun] = sorted(on_time, key=_waits_last)
        self._lanes = free_lanes(task.lanes, {run.lane for run in active if run.state == RunState.RUNNING})
        self.replaced: list[tuple[Active, str]] = []
        """Runs that are to be cancelled, each with the reason."""

    def admit(self, run: NewRun, now: datetime) -> bool:
        """Decide about a new run of a slot; returns whether it may start at once, if a lane is left for it."""
        if not self._is_bounded:
            return True
        if self._task.policies.overlap == "replace":
            self._replace_by(run, now)
        reason = self._in_the_way()
        if reason is not None:
            run.skip(reason, now)
            return False
        self._ahead.append(run)
        return len(self._ahead) <= self._task.lanes

    def take_lane(self, run: NewRun) -> bool:
        if not self._is_bounded:
            return True
        if not self._lanes:
            return False
        run.lane = self._lanes[0]
        return True

    def started(self, run: NewRun) -> None:
        self._lanes = [lane for lane in self._lanes if lane != run.lane]

    def _in_the_way(self) -> str | None:
        """Why a slot is skipped: a sentence with the run that is in its way."""
        policies, lanes = self._task.policies, self._task.lanes
        if policies.overlap == "skip" and len(self._ahead) >= lanes:
            return _still(self._ahead[0], len(self._ahead) - 1)
        if policies.overlap == "wait" and len(self._ahead) >= lanes + policies.max_waiting:
            return _already(self._ahead[-1], len(self._ahead) - lanes - 1)
        return None

    def _replace_by(self, new: NewRun, now: datetime) -> None:
        """Cancel the oldest, so that with the new one there are as many as may run."""
        reason = f"{named(new)} replaced it"
        while len(self._ahead) >= self._task.lanes:
            old = min(self._ahead, key=_slot)
            self._ahead.remove(old)
            if isinstance(old, NewRun):  # fired late, together with it
                old.cancel(reason, now)
            else:
                self.replaced.append((old, reason))


def named(run: Active | NewRun) -> str:
    return f"run {run.id}" + (f" of slot {run.slot:%Y-%m-%d %H:%M:%S} UTC" if run.slot else "")


def _waits_last(run: Active | NewRun) -> tuple[bool, datetime]:
    return run.state == RunState.QUEUED, _slot(run)


def _slot(run: Active | NewRun) -> datetime:
    assert run.slot is not None
    return run.slot


def _still(run: Active | NewRun, others: int) -> str:
    if isinstance(run, NewRun):
        return f"{named(run)}{_and(others)} was fired late, together with it"
    return f"{named(run)}{_and(others)} was still {run.state}"


def _already(run: Active | NewRun, others: int) -> str:
    return f"{named(run)}{_and(others)} was already waiting for its turn"


def _and(others: int) -> str:
    """More runs that are in the way too."""
    return "" if others < 1 else f" (and {others} more)"
