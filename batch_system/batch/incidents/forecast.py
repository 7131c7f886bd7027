"""The forecast: when slots with a deadline will have succeeded, and the path that decides it. Pure.

A running run ends when its progress says so, else when runs of its task usually end. Another one
begins when the last of what it waits for has ended: slots of other tasks, earlier runs of its own
task, a free place. It then takes as long as half of the last runs of its task (p50). There is no
probability: the medians are added.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal

from batch_system.batch.firing.pauses import NEVER
from batch_system.batch.ledger.states import ACTIVE, RunState

State = Literal["kept", "on_time", "late", "at_risk", "unknown", "paused"]
"""`unknown`: there is no forecast yet. `at_risk`: something in the path needs a person first.
`paused`: the task is paused at the deadline, so that this does not count.
"""
Obstacle = Literal[
    "failed", "cancelled", "skipped", "missed", "paused", "gone", "overlap", "waited"
]
"""Why a slot will not succeed by itself. `overlap`: it will be skipped, because an earlier run goes
on. `waited`: it will be skipped, because what it waits for takes longer than `within`.
"""
Slot = tuple[str, datetime | None]
"""A task and one of its slots; None: the task had no slot then, or the run is not of a slot."""

FEW = 10
"""With fewer successes of a task there is no forecast for what it takes part in."""
MARGIN = timedelta(minutes=1)
"""A slot is called late only if it will have succeeded more than this after its deadline, and more
than a share of the time that is left until then: what is far ahead is known less exactly.
"""
SHARE = 0.1
LONGEST = 10 * 365 * 86_400.0


@dataclass(frozen=True, slots=True)
class KnownTask:
    """What is usual for a task, and what its runs are held by. Times are in seconds.

    Attributes:
      needs_success: Whether what its slots wait for has to succeed, or only to end.
      within: How long its slots wait.
      lanes: How many of its runs run at once; None: any number.
      pauses: When it was, is or will be paused, as far as that is known: from an instant on, which
          belongs to the pause, until another one, or NEVER.
      handled: Its slots up to this instant were fired, or were missed.
    """

    p50: float | None = None
    p95: float | None = None
    successes: int = 0
    needs_success: bool = True
    within: float = LONGEST
    overlap: str = "skip"
    lanes: int | None = 1
    pauses: Sequence[tuple[datetime, datetime]] = ()
    handled: datetime | None = None
    pool: str = "default"

    def paused_until(self, at: datetime, created: datetime | None = None) -> datetime | None:
        """When it fires again if it is paused at an instant; None if it is not paused then.

        `created`: when a run was made. Only later pauses hold it.
        """
        held = [each for each in self.pauses if created is None or each[0] >= created]
        end = at
        while ends := [until for begin, until in held if begin <= end < until]:
            end = max(ends)
        return end if end > at else None


@dataclass(frozen=True, slots=True)
class KnownRun:
    """A run as the ledger has it.

    `created_at`: when it was made. `began_at`: when its attempt began, or a run that waits for
    its parts. `good_at`: when another run has made it good.
    """

    id: str
    state: RunState
    due_at: datetime
    began_at: datetime | None = None
    ended_at: datetime | None = None
    done: int | None = None
    total: int | None = None
    rate: float | None = None
    good_at: datetime | None = None
    created_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Promise:
    """A slot that must have succeeded by its deadline."""

    task: str
    slot: datetime
    deadline: datetime


@dataclass(frozen=True, slots=True)
class Room:
    """A pool whose places are all taken: what runs, and what waits for a place, the first one
    first.
    """

    running: Sequence[tuple[str, KnownRun]]
    queue: Sequence[tuple[str, KnownRun]] = ()


@dataclass(frozen=True)
class Facts:
    """What a forecast is made from, as it is `now`.

    Attributes:
      runs: The runs of the slots that promises need, as far as they have any.
      before: The slots that a slot waits for.
      active: The runs of a task that run or will run next, each with its slot if it has one, the
        oldest slot first.
      full: The pools without a free place.
    """

    now: datetime
    tasks: Mapping[str, KnownTask]
    runs: Mapping[Slot, KnownRun] = field(default_factory=dict)
    before: Mapping[Slot, Sequence[Slot]] = field(default_factory=dict)
    active: Mapping[str, Sequence[tuple[datetime | None, KnownRun]]] = field(default_factory=dict)
    full: Mapping[str, Room] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """One slot of a path, or a run of no slot.

    Attributes:
      begins_at: When it began, or will begin.
      ends_at: When it has succeeded, or will have; None if nobody knows.
      is_over: Whether it has succeeded.
      before: The step that decides when it begins.
      obstacle: Why it will not succeed by itself; if that is what is `before` it, None.
      unknown: The task that has too few successes for a forecast.
    """

    task: str
    slot: datetime | None
    run: KnownRun | None
    usual: KnownTask
    begins_at: datetime | None = None
    ends_at: datetime | None = None
    is_over: bool = False
    before: Step | None = None
    obstacle: Obstacle | None = None
    unknown: str | None = None

    @property
    def is_blocked(self) -> bool:
        """Whether it needs a person before it can succeed."""
        return self.ends_at is None and self.unknown is None

    def after_pauses(self, at: datetime) -> datetime:
        """When it can begin if nothing but a pause holds it at an instant; NEVER if a person has to
        end that.
        """
        made = self.run.created_at if self.run is not None else self.slot
        return self.usual.paused_until(at, made) or at

    @property
    def path(self) -> list[Step]:
        """The steps that decide when this one ends, the first one first."""
        steps = [self]
        while (before := steps[-1].before) is not None:
            steps.append(before)
        return steps[::-1]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What will become of a promise.

    `retry_until`: what is in the way has to go on by then, so that the slot is in time even by long
    durations (p95); None if nothing is in the way, or these are not known.
    """

    promise: Promise
    state: State
    path: Sequence[Step]
    retry_until: datetime | None = None

    @property
    def ends_at(self) -> datetime | None:
        """When the slot has succeeded, or will have; None if nobody knows."""
        return self.path[-1].ends_at

    @property
    def obstacle(self) -> Step | None:
        """The step that needs a person."""
        return next((step for step in self.path if step.obstacle is not None), None)


def forecasts(facts: Facts, promises: Iterable[Promise]) -> list[Forecast]:
    """What will become of these promises, in their order."""
    reckoning = _Reckoning(facts)
    return [_forecast(reckoning, promise) for promise in promises]


def ends_by_progress(
    done: int | None, total: int | None, rate: float | None, now: datetime
) -> datetime | None:
    """When a running run ends by its progress; None if it says nothing about that."""
    if done is None or total is None or total <= done or rate is None or not rate > 0:
        return None
    return now + timedelta(seconds=min((total - done) / rate, LONGEST))


def _forecast(reckoning: _Reckoning, promise: Promise) -> Forecast:
    found = _as_if_it_counts(reckoning, promise)
    step = found.path[-1]
    is_open = found.state != "on_time" and not step.is_over
    if is_open and step.usual.paused_until(promise.deadline) is not None:
        return replace(found, state="paused", retry_until=None)
    return found


def _as_if_it_counts(reckoning: _Reckoning, promise: Promise) -> Forecast:
    now, deadline = reckoning.facts.now, promise.deadline
    step = reckoning.step((promise.task, promise.slot))
    path, end = step.path, step.ends_at
    if step.is_over and end is not None:
        return Forecast(promise, "kept" if end <= deadline else "late", path)
    if step.is_blocked:
        first = next(number for number, each in enumerate(path) if each.obstacle is not None)
        usual = [each.usual for each in path[first:]]
        short, long = (_sum([getattr(each, name) for each in usual]) for name in ("p50", "p95"))
        is_late = now >= deadline or (short is not None and now + short > deadline + MARGIN)
        until = deadline - long if long is not None else None
        return Forecast(promise, "late" if is_late else "at_risk", path, until)
    if end is None:
        return Forecast(promise, "late" if now >= deadline else "unknown", path)
    is_late = now >= deadline or _is_after(end, deadline, now)
    return Forecast(promise, "late" if is_late else "on_time", path)


def _is_after(end: datetime, limit: datetime, now: datetime) -> bool:
    """Whether an expected end is surely enough after an instant."""
    return end > limit + max(MARGIN, (end - now) * SHARE)


def _sum(seconds: Sequence[float | None]) -> timedelta | None:
    known = [each for each in seconds if each is not None]
    return timedelta(seconds=sum(known)) if len(known) == len(seconds) else None


_NOTHING = KnownTask()


class _Reckoning:
    """The steps of one moment, each reckoned once."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._steps: dict[Slot, Step] = {}
        self._begun: set[Slot] = set()
        self._places: dict[str, tuple[Mapping[str, datetime], datetime]] = {}

    def step(self, slot: Slot) -> Step:
        """The step of a slot."""
        if slot not in self._steps:
            task, at = slot
            if slot in self._begun or at is None or task not in self.facts.tasks:
                # Tasks of several services may wait for each other.
                return Step(task, at, None, _NOTHING, obstacle="gone")
            self._begun.add(slot)
            run = self.facts.runs.get(slot)
            self._steps[slot] = self._reckon(Step(task, at, run, self.facts.tasks[task]))
        return self._steps[slot]

    def _reckon(self, plain: Step) -> Step:
        run = plain.run
        before = [self.step(each) for each in self.facts.before.get((plain.task, plain.slot), ())]
        good = [each for each in before if each.is_over and each.ends_at is not None]
        begun = replace(plain, before=max(good, key=_end_of, default=None))
        if run is None:
            if plain.usual.paused_until(_at(plain)) is not None:
                return replace(plain, obstacle="paused")
            is_missed = plain.usual.handled is not None and _at(plain) <= plain.usual.handled
            return replace(plain, obstacle="missed") if is_missed else self._to_come(plain, before)
        if run.state == RunState.SUCCEEDED or run.good_at is not None:
            end = run.ended_at if run.state == RunState.SUCCEEDED else run.good_at
            return replace(
                begun, begins_at=run.began_at, ends_at=end or self.facts.now, is_over=True
            )
        if run.state == RunState.RUNNING or (run.state == RunState.WAITING and run.began_at):
            return self._running(begun)
        if run.state in ACTIVE:
            return self._to_come(plain, before)
        wrong = next((each for each in before if each.is_blocked), None)
        if run.state == RunState.SKIPPED and wrong is not None and plain.usual.needs_success:
            return replace(plain, before=wrong)
        return replace(plain, begins_at=run.began_at, obstacle=_obstacle_of(run.state))

    def _running(self, step: Step) -> Step:
        assert step.run is not None
        begun = replace(step, begins_at=step.run.began_at)
        end = self._end_of(step.run, step.usual)
        return replace(begun, ends_at=end) if end else replace(begun, unknown=step.task)

    def _to_come(self, plain: Step, before: Sequence[Step]) -> Step:
        """The step of a slot that has not begun, or waits for its next attempt."""
        run, usual, now = plain.run, plain.usual, self.facts.now
        begin = plain.after_pauses(max(now, _at(plain), run.due_at if run is not None else now))
        if begin == NEVER:
            return replace(plain, obstacle="paused")
        has_waited = run is not None and run.state != RunState.WAITING
        waits_for = [] if has_waited else [each for each in before if self._is_awaited(each, usual)]
        waits_for += self._earlier(plain)
        for each in waits_for:
            if each.is_blocked:
                return replace(plain, before=each)
        for each in waits_for:
            if each.unknown is not None:
                return replace(plain, before=each, unknown=each.unknown)
        last = max(waits_for, key=_end_of, default=None)
        if last is not None and last.ends_at is not None and last.ends_at > begin:
            begin = last.ends_at
            if not has_waited and begin > _at(plain) + timedelta(seconds=usual.within):
                return replace(plain, before=last, obstacle="waited")
            is_of_it = run is None and last.task == plain.task
            if usual.overlap == "skip" and is_of_it and _is_after(begin, _at(plain), now):
                return replace(plain, before=last, obstacle="overlap")
        begin = plain.after_pauses(max(begin, self._place_at(usual.pool, run)))
        if begin == NEVER:
            return replace(plain, obstacle="paused")
        step = replace(plain, before=last, begins_at=begin)
        if usual.p50 is None or usual.successes < FEW:
            return replace(step, unknown=plain.task)
        return replace(step, ends_at=begin + timedelta(seconds=usual.p50))

    def _is_awaited(self, step: Step, usual: KnownTask) -> bool:
        """Whether a slot waits for this one. For one that needs no success, one that ended is
        over, and one that will be skipped as well.
        """
        return usual.needs_success or not step.is_blocked

    def _earlier(self, plain: Step) -> list[Step]:
        """The run of the same task whose end the slot has to wait for."""
        usual, slot = plain.usual, _at(plain)
        if usual.lanes is None or usual.overlap == "replace":
            return []
        ends = []
        for at, run in self.facts.active.get(plain.task, ()):
            if (plain.run is None or run.id != plain.run.id) and (at is None or at < slot):
                known = self.facts.runs.get((plain.task, at))
                is_by_hand = known is None or known.id != run.id
                alone = Step(plain.task, at, run, usual)
                ends.append(self._running(alone) if is_by_hand else self.step((plain.task, at)))
        if len(ends) < usual.lanes:
            return []
        unsure = [each for each in ends if each.ends_at is None]
        return unsure[:1] or sorted(ends, key=_end_of)[-usual.lanes :][:1]

    def _end_of(self, run: KnownRun, usual: KnownTask) -> datetime | None:
        """When a running run ends; None if nothing is known about that."""
        now, began = self.facts.now, run.began_at
        if (end := ends_by_progress(run.done, run.total, run.rate, now)) is not None:
            return end
        if began is None or usual.p50 is None or usual.p95 is None or usual.successes < FEW:
            return None
        elapsed = (now - began).total_seconds()
        if elapsed <= usual.p50:
            return began + timedelta(seconds=usual.p50)
        # Of those that take so long, about half end before the middle. What exceeds p95 goes on for
        # as long again as it has exceeded it.
        return now + timedelta(seconds=max((usual.p95 - elapsed) / 2, elapsed - usual.p95))

    def _place_at(self, pool: str, run: KnownRun | None) -> datetime:
        """When a run gets a place in its pool; None: one that is not in the queue yet."""
        if pool not in self.facts.full:
            return self.facts.now
        if pool not in self._places:
            self._places[pool] = self._take_places(self.facts.full[pool])
        by_run, free_at = self._places[pool]
        return by_run.get(run.id, free_at) if run is not None else free_at

    def _take_places(self, room: Room) -> tuple[Mapping[str, datetime], datetime]:
        now = self.facts.now
        usual = self.facts.tasks
        ends = [self._end_of(run, usual.get(task, _NOTHING)) or now for task, run in room.running]
        free = ends or [now]  # all may have ended between two queries
        heapq.heapify(free)
        by_run = {}
        for task, run in room.queue:
            by_run[run.id] = heapq.heappop(free)
            seconds = usual.get(task, _NOTHING).p50 or 0.0
            heapq.heappush(free, by_run[run.id] + timedelta(seconds=seconds))
        return by_run, free[0]


def _at(step: Step) -> datetime:
    assert step.slot is not None
    return step.slot


def _end_of(step: Step) -> datetime:
    assert step.ends_at is not None
    return step.ends_at


def _obstacle_of(state: RunState) -> Obstacle:
    if state == RunState.CANCELLED:
        return "cancelled"
    return "skipped" if state == RunState.SKIPPED else "failed"
