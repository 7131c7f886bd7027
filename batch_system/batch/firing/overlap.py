"""The overlap policies: what becomes of a task's on-time slots while runs of it are active. Uses no
database.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

from batch_system.batch.ledger.runs import Active, NewRun
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.queue.concurrency import free_lanes
from batch_system.batch.tasks.registry import Task


class Overlap:
    """Decides about the new on-time runs of one task, oldest slot first, given its `active` runs.

    Active runs that catch up, or that a person started, neither cause a skip nor are replaced. They
    hold a lane while they are running.
    """

    def __init__(
        self,
        task: Task,
        active: Iterable[Active],
        together: str = "was fired late, together with it",
    ) -> None:
        """`together`: how the reason says that a new run blocks another new run."""
        self._task = task
        self._together = together
        self._is_bounded = task.exclusive is not None
        active = list(active)
        on_time = [run for run in active if run.origin == Origin.SCHEDULE and not run.catch_up]
        self._ahead: list[Active | NewRun] = sorted(on_time, key=_waits_last)
        self._lanes = free_lanes(task.lanes, {run.lane for run in active if run.has_lane})
        self.replaced: list[tuple[Active, str]] = []
        """Active runs that the caller has to cancel, each with the reason."""

    def admit(self, run: NewRun, now: datetime) -> bool:
        """Decide about the new run of a slot. Returns whether it may start now if a lane is free.

        With "skip" or "wait", a run without a place is skipped; "replace" cancels the oldest runs.
        """
        if not self._is_bounded:
            return True
        if self._task.policies.overlap == "replace":
            self._replace_by(run, now)
        reason = self._reason_to_skip()
        if reason is not None:
            run.skip(reason, now)
            return False
        self._ahead.append(run)
        return len(self._ahead) <= self._task.lanes

    def take_lane(self, run: NewRun) -> bool:
        """Give the run the first free lane. Returns False if all lanes are taken. A run of a task
        with a limit gets its lane when it is claimed.
        """
        if self._task.policies.limit is not None:
            return False
        if not self._is_bounded:
            return True
        if not self._lanes:
            return False
        run.lane = self._lanes[0]
        return True

    def started(self, run: NewRun) -> None:
        """Count the lane of this run as taken."""
        self._lanes = [lane for lane in self._lanes if lane != run.lane]

    def _reason_to_skip(self) -> str | None:
        """Why the next slot is skipped: a sentence that names the run that blocks it. None if it is
        not skipped.
        """
        policies, lanes = self._task.policies, self._task.lanes
        if policies.overlap == "skip" and len(self._ahead) >= lanes:
            return self._still_active(self._ahead[0], len(self._ahead) - 1)
        if policies.overlap == "wait" and len(self._ahead) >= lanes + policies.max_waiting:
            return _already_waiting(self._ahead[-1], len(self._ahead) - lanes - 1)
        return None

    def _still_active(self, run: Active | NewRun, others: int) -> str:
        how = self._together if isinstance(run, NewRun) else f"was still {run.state}"
        return f"{named(run)}{_and(others)} {how}"

    def _replace_by(self, new: NewRun, now: datetime) -> None:
        """Cancel the oldest runs until the new one has room."""
        reason = f"{named(new)} replaced it"
        while len(self._ahead) >= self._task.lanes:
            old = min(self._ahead, key=_slot)
            self._ahead.remove(old)
            if isinstance(old, NewRun):  # both fire late, in this transaction
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


def _already_waiting(run: Active | NewRun, others: int) -> str:
    return f"{named(run)}{_and(others)} was already waiting for its turn"


def _and(others: int) -> str:
    """The number of other runs that block it, in words."""
    return "" if others < 1 else f" (and {others} more)"
