"""What the ledger should say, in plain Python: by docs/policies.md and docs/runs.md, without the
service's code.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)

WAITING = ("queued", "retrying", "interrupted")
ACTIVE = (*WAITING, "running", "waiting")
FINAL = ("succeeded", "failed", "cancelled", "skipped")

# The order of the queue of a task.
JOINING, INTERRUPTED, ON_TIME, BY_HAND, CAUGHT_UP = range(-1, 4)

LOST = "the node was lost while it ran"

GATES = ("parts", "fail_fast")
"""The gate of a run that was split says so."""
BAD = ("failed", "cancelled", "skipped")


class AnyReason:
    """Some words must stand there. What they are is tested elsewhere."""

    def fits(self, text: str) -> bool:
        return bool(text)


CLOSED = AnyReason()


@dataclass(frozen=True)
class After:
    """The tasks whose slots those of a task wait for, how long at most, and which end of theirs
    opens it.
    """

    tasks: tuple[str, ...]
    within: int
    on: str


@dataclass(frozen=True)
class Policy:
    """What a task says about itself. Times in seconds."""

    overlap: str = "skip"
    max_running: int | None = None
    max_waiting: int = 1
    missed: str = "once"
    max_age: int = 86_400
    max_count: int | None = None
    attempts: int = 1
    rerun: bool = True
    priority: int = 0
    after: After | None = None
    parts: int | None = None
    """Into how many parts its runs are split, `parallel` of which may run at once; None: they are
    not.
    """
    parallel: int = 1
    fail_fast: bool = False
    limit: int | None = None
    """So many runs of each value of their parameter at once; None: it has none."""

    @property
    def lanes(self) -> int | None:
        """So many runs at once; None: any number."""
        return self.max_running if self.overlap == "allow" else self.max_running or 1


class Blamed(NamedTuple):
    """A reason that names another run. Any of `runs` will do, each with what the sentence says
    about it.
    """

    runs: tuple[tuple[Run, str], ...]
    others: int = 0

    def fits(self, text: str) -> bool:
        more = f" (and {self.others} more)" if self.others > 0 else ""
        return text in {f"{run.named}{more} {says}" for run, says in self.runs}


@dataclass(eq=False)
class Run:
    task: Task
    number: int
    slot: datetime | None
    origin: str
    rank: int
    created_at: datetime
    due_at: datetime
    catch_up: bool = False
    state: str = "queued"
    reason: str | Blamed | AnyReason | None = None
    gate: str | None = None
    wait_until: datetime | None = None
    waits: dict[str, datetime | None] = field(default_factory=dict)
    """The slots of other tasks that it waits for."""
    awaited_by: Run | None = None
    part: int | None = None
    """The number of a part."""
    is_opened_unasked: bool = False
    """By a node that does not know its overlap policy, when no other one did either."""
    attempt: int = 0
    attempts_before: int = 0
    losses: int = 0
    count: int | None = None
    has_said: bool = False
    most_at_a_loss: int = 0
    fence: int = 0
    node: str | None = None
    started_at: datetime | None = None
    attempt_started_at: datetime | None = None
    finished_at: datetime | None = None
    cancel: str | Blamed | None = None
    key: str | None = None
    value: str = "a"
    """That of the parameter of a limit; by default the one of `run()`."""
    ended: dict[int, tuple[int, str]] = field(default_factory=dict)
    """The attempt number and the outcome of each fence under which it has ended."""
    id: str = ""

    @property
    def is_on_time(self) -> bool:
        return self.origin == "schedule" and not self.catch_up

    @property
    def is_split(self) -> bool:
        return self.gate in GATES

    def is_part_of(self, run: str) -> bool:
        """`run`: an id."""
        return self.part is not None and self.awaited_by is not None and self.awaited_by.id == run

    @property
    def queue(self) -> tuple[str, bool, str]:
        value = self.value if self.task.policy.limit is not None else ""
        return self.task.name, self.part is not None, value

    @property
    def has_lane(self) -> bool:
        """Also while it waits for its parts, and then until its attempt goes on."""
        return (
            self.state == "running"
            or (self.state == "waiting" and self.is_split)
            or self.is_joining
        )

    @property
    def is_joining(self) -> bool:
        return self.state == "queued" and self.rank == JOINING

    @property
    def named(self) -> str:
        return f"run {self.id}" + (
            f" of slot {self.slot:%Y-%m-%d %H:%M:%S} UTC" if self.slot else ""
        )

    def __str__(self) -> str:
        if self.awaited_by is not None and self.part is not None:
            return f"part {self.part} of {self.awaited_by}"
        return (
            f"{self.task.name} {self.slot:%H:%M:%S}"
            if self.slot
            else f"{self.task.name} by hand {self.number}"
        )


class Span(NamedTuple):
    """A schedule that was in force in (after, until], with a slot every `period` seconds."""

    period: int
    after: datetime
    until: datetime | None = None


@dataclass(eq=False)
class Task:
    name: str
    policy: Policy
    place: int
    handled: datetime
    spans: list[Span]
    accounted_from: datetime
    paused_by: str | None = None
    paused_at: datetime | None = None
    removed_at: datetime | None = None
    runs: list[Run] = field(default_factory=list)
    missed: dict[datetime, str] = field(default_factory=dict)

    def of_slot(self, slot: datetime) -> Run | None:
        return next((run for run in self.runs if run.slot == slot and run.origin != "manual"), None)

    def lanes_taken(self, by_parts: bool = False) -> int:
        """In the queue of the task, or in that of the parts of its runs."""
        return sum(run.has_lane for run in self.runs if (run.part is not None) == by_parts)

    def slots(self, until: datetime) -> Iterable[datetime]:
        """All that its schedules have ever had."""
        for span in self.spans:
            yield from slots(
                span.period, span.after, until if span.until is None else min(span.until, until)
            )


@dataclass
class Node:
    tasks: list[str]
    beats: int = 0
    is_stopped: bool = False


class Ending(NamedTuple):
    """How an attempt ended, as its node will say it. `wait`: seconds until it is tried again.

    `parts`: into how many it has split its run.
    """

    state: str
    outcome: str
    reason: str | None = None
    wait: int = 0
    parts: int | None = None


def slots(period: int, after: datetime, until: datetime) -> Iterable[datetime]:
    """Multiples of the period in (after, until]."""
    step = timedelta(seconds=period)
    slot = EPOCH + ((after - EPOCH) // step + 1) * step
    while slot <= until:
        yield slot
        slot += step


class Model:
    """The ledger as it should be. `now` is moved from outside."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.tasks: dict[str, Task] = {}
        self.nodes: dict[str, Node] = {}
        self.happened: Counter[str] = Counter()
        self.resumed: set[str] = set()
        """Parts that go on because a person has retried them or their run, since the last
        comparison.
        """
        self._numbers = itertools.count()

    @property
    def runs(self) -> list[Run]:
        return [run for task in self.tasks.values() for run in task.runs]

    def know(self, name: str, policy: Policy, period: int) -> None:
        spans = [Span(period, self.now)]
        self.tasks[name] = Task(name, policy, next(self._numbers), self.now, spans, self.now)

    # Firing

    def fire(self, names: Collection[str], node: str, room: int) -> None:
        """`room`: so many of the new runs the node may start at once."""
        there = [self.tasks[name] for name in names if self.tasks[name].removed_at is None]
        for task in sorted(there, key=lambda task: task.place):
            due = list(slots(task.spans[-1].period, task.handled, self.now))
            if task.paused_by is not None:
                self._miss(task, due, f"paused by {task.paused_by}")
                continue
            late = [slot for slot in due if self.now - slot >= MINUTE]
            kept = self._kept(task.policy, late)
            self._miss(task, [slot for slot in late if slot not in kept], "no service fired it")
            together = (
                [slot for slot in due if slot not in late][:-1]
                if task.policy.missed == "all"
                else []
            )
            for slot in (*kept, *together):
                if task.of_slot(slot) is None:
                    self._hold_back(self._new(task, slot, "schedule", CAUGHT_UP))
                    self.happened["caught up"] += 1
            on_time = [slot for slot in due if slot not in late]
            room = self._come(
                task, on_time[-1:] if task.policy.missed == "all" else on_time, node, room
            )
            task.handled = max(task.handled, self.now)

    def _kept(self, policy: Policy, late: list[datetime]) -> list[datetime]:
        """The missed slots that run all the same."""
        young = [slot for slot in late if (self.now - slot).total_seconds() < policy.max_age]
        most = {"skip": 0, "once": 1, "all": policy.max_count or len(young)}[policy.missed]
        return young[len(young) - most :] if most < len(young) else young

    def _miss(self, task: Task, due: Iterable[datetime], reason: str) -> None:
        for slot in due:
            task.missed[slot] = reason
            self.happened["missed"] += 1
        task.handled = max(task.handled, self.now)

    def _come(self, task: Task, due: list[datetime], node: str, room: int) -> int:
        """On-time slots: all are decided upon, oldest first; then those that may start do. Returns
        the room left.
        """
        # The lane of a split run that is replaced is free when that is committed.
        taken = task.lanes_taken()
        new = [self._admit(task, slot) for slot in due]
        for run, may_start in new:
            if run.state != "queued" or not may_start or room < 1:
                continue
            if task.policy.lanes is not None and taken >= task.policy.lanes:
                continue
            if task.policy.limit is not None:
                continue  # it waits for the turn of its value
            room, taken = room - 1, taken + 1
            self._start(run, node)
            self.happened["started when fired"] += 1
        return room

    def _admit(self, task: Task, slot: datetime) -> tuple[Run, bool]:
        """A new run of an on-time slot, and whether no earlier slot keeps it from starting."""
        policy, lanes = task.policy, task.policy.lanes
        ahead = [run for run in task.runs if run.is_on_time and run.state in ACTIVE]
        run = self._new(task, slot, "schedule", ON_TIME)
        self._hold_back(run)
        if lanes is None or run.state == "waiting":
            return run, True
        if policy.overlap == "replace":
            ahead = self._replace(ahead, run, lanes)
        if policy.overlap == "skip" and len(ahead) >= lanes:
            blamed = tuple((other, _still(other, run)) for other in ahead)
            self._skip(run, Blamed(blamed, len(ahead) - 1))
        if policy.overlap == "wait" and len(ahead) >= lanes + policy.max_waiting:
            waiting = [other for other in ahead if other.state == "queued"]
            blamed = tuple((other, "was already waiting for its turn") for other in waiting)
            self._skip(run, Blamed(blamed, len(ahead) - lanes - 1))
        return run, len(ahead) < lanes

    def _skip(self, run: Run, reason: Blamed) -> None:
        run.state, run.reason, run.finished_at = "skipped", reason, self.now
        self.happened[f"skipped by {run.task.policy.overlap}"] += 1

    def _replace(self, ahead: list[Run], run: Run, lanes: int) -> list[Run]:
        """The oldest have to end, so that with the new one there are as many as may run."""
        ahead = sorted(ahead, key=lambda old: old.slot or self.now)
        reason = Blamed(((run, "replaced it"),))
        while len(ahead) >= lanes:
            old = ahead.pop(0)
            self.happened["replaced"] += 1
            self._ask_to_end(old, reason)
        return ahead

    # Runs

    def _new(self, task: Task, slot: datetime | None, origin: str, rank: int) -> Run:
        catch_up = rank == CAUGHT_UP
        run = Run(task, next(self._numbers), slot, origin, rank, self.now, self.now, catch_up)
        task.runs.append(run)
        return run

    # Waiting

    def _hold_back(self, run: Run) -> None:
        """The run of a slot waits for slots of other tasks: of each the last one at or before its
        own.

        Slots from before the first schedule of such a task are those that a backfill would give it.
        """
        after = run.task.policy.after
        if after is None or run.slot is None:
            return
        self._wait(run, self.now, after.on)
        run.wait_until = self.now + timedelta(seconds=after.within)
        for name in after.tasks:
            upstream = self.tasks[name]
            earlier = list(upstream.slots(run.slot)) if upstream.removed_at is None else []
            if not earlier and upstream.removed_at is None and run.origin == "backfill":
                period = upstream.spans[-1].period
                earlier = list(slots(period, run.slot - timedelta(seconds=period), run.slot))
            run.waits[name] = earlier[-1] if earlier else None

    def _wait(self, run: Run, until: datetime, gate: str | None) -> None:
        run.state, run.due_at, run.gate = "waiting", until, gate

    def start_later(self, task: Task, seconds: int) -> Run:
        run = self.start(task, None)
        self._wait(run, self.now + timedelta(seconds=seconds), None)
        return run

    def start_group(
        self, task: Task, then: Task, number: int, on: str, outer: Run | None
    ) -> list[Run]:
        """The follow-up, and then the members. `outer`: the follow-up that waits for this one."""
        follow_up, *members = (self.start(each, None) for each in (then, *[task] * number))
        follow_up.awaited_by = outer
        for member in members:
            member.awaited_by = follow_up
        if members:
            self._wait(follow_up, self.now, on)
        return [follow_up, *members]

    def members(self, run: Run) -> list[Run]:
        return [each for each in self.runs if each.awaited_by is run and each.part is None]

    def parts(self, run: Run) -> list[Run]:
        return [each for each in run.task.runs if each.awaited_by is run and each.part is not None]

    def look(self, loaded: Collection[str]) -> int:
        """A node opens and closes what is ready. Returns how many."""
        waiting = [run for run in self.runs if run.state == "waiting" and not run.is_split]
        split = [run for run in self.runs if run.state == "waiting" and run.is_split]
        becomes = {run: self._becomes(run) for run in waiting}
        slots: dict[Task, list[Run]] = {}
        for run in (run for run in waiting if becomes[run] == "queued"):
            if run.is_on_time and run.task.name in loaded:
                slots.setdefault(run.task, []).append(run)
            elif run.is_on_time and run.task.removed_at is None:
                becomes[run] = (
                    # A node that has loaded the task decides about the overlap of its slots
                    "waiting"
                )
            else:
                run.is_opened_unasked = run.is_on_time
                self._open(run)
        for run in (run for run in waiting if becomes[run] == "skipped"):
            self.happened["closed"] += 1
            run.state, run.reason, run.finished_at = "skipped", CLOSED, self.now
        settled = sum([self._settle_split(run) for run in split])
        for task, opening in slots.items():
            self._open_slots(task, opening)
        return settled + sum(state != "waiting" for state in becomes.values())

    def _settle_split(self, run: Run) -> bool:
        """It goes on when all its parts have succeeded, and fails when they are over otherwise.

        False: it waits on.
        """
        parts = self.parts(run)
        active = [part for part in parts if part.state in ACTIVE]
        bad = [part for part in parts if part.state in BAD]
        if run.cancel is not None and not active and run.due_at <= self.now:
            run.state, run.reason, run.finished_at = "cancelled", run.cancel, self.now
            return True
        if run.due_at > self.now or (active and not (bad and run.gate == "fail_fast")):
            return False
        if active:
            unasked = [part for part in active if part.cancel is None]
            first = min(bad, key=_failed_first)
            for part in unasked:
                self._ask_to_end(part, f"part {first.part} did not succeed")
            self.happened["failed fast"] += len(unasked)
            return bool(unasked)
        counts = [part.count for part in parts if part.count is not None]
        run.count = sum(counts) if counts else run.count
        if bad:
            run.state, run.reason, run.finished_at = "failed", _parts_failed(parts), self.now
            self.happened["failed with its parts"] += 1
        else:
            run.state, run.due_at, run.rank = "queued", self.now, JOINING
            self.happened["parts are over"] += 1
        return True

    def _open(self, run: Run) -> None:
        run.state, run.due_at = "queued", self.now

    def _open_slots(self, task: Task, opening: list[Run]) -> None:
        """On-time slots that open at one moment, as far as the overlap policy lets them: "wait" the
        oldest first.
        """
        policy, lanes = task.policy, task.policy.lanes
        ahead = [
            run
            for run in task.runs
            if run.is_on_time and run.state in ACTIVE and not _has_not_opened(run)
        ]
        for run in sorted(opening, key=_slot, reverse=policy.overlap != "wait"):
            before = [other for other in ahead if _slot(other) > _slot(run)]
            if policy.overlap == "replace" and lanes is not None and len(before) >= lanes:
                self._close_by_overlap(run, f"a newer slot of {task.name} runs")
                continue
            if policy.overlap == "replace" and lanes is not None:
                ahead = self._replace(ahead, run, lanes)
            if policy.overlap == "skip" and lanes is not None and len(ahead) >= lanes:
                blamed = tuple((other, _in_the_way(other, opening)) for other in ahead)
                self._close_by_overlap(run, Blamed(blamed, len(ahead) - 1))
            elif (
                policy.overlap == "wait"
                and lanes is not None
                and len(ahead) >= lanes + policy.max_waiting
            ):
                queued = [other for other in ahead if other.state == "queued"]
                blamed = tuple((other, "was already waiting for its turn") for other in queued)
                self._close_by_overlap(run, Blamed(blamed, len(ahead) - lanes - 1))
            else:
                self._open(run)
                ahead = [*ahead, run]
                self.happened["slot opened"] += 1

    def _close_by_overlap(self, run: Run, reason: str | Blamed) -> None:
        run.gate = None
        run.state, run.reason, run.finished_at = "skipped", reason, self.now
        self.happened["skipped when opened"] += 1

    def _becomes(self, run: Run) -> str:
        if run.due_at > self.now:
            return "waiting"
        members, upstreams = (
            self.members(run),
            [self._upstream(*each) for each in run.waits.items()],
        )
        if run.gate is not None and "pending" in (*upstreams, *(_end_of(each) for each in members)):
            is_late = (
                run.wait_until is not None
                and run.wait_until <= self.now
                and run.task.paused_at is None
            )
            return "skipped" if is_late else "waiting"
        if run.gate != "success":
            return "queued"
        ends = {*upstreams, *(_end_of(each) for each in members)}
        return "queued" if ends <= {"succeeded"} else "skipped"

    def _upstream(self, name: str, slot: datetime | None) -> str:
        """How a slot ended: succeeded, otherwise, or pending: it may still be fired, or its run is
        active.
        """
        task = self.tasks[name]
        run = task.of_slot(slot) if slot is not None else None
        if run is not None:
            return _end_of(run)
        is_to_come = slot is not None and task.handled < slot
        return (
            "pending"
            if is_to_come and task.removed_at is None and task.paused_at is None
            else "otherwise"
        )

    def _wait_again(self, awaited: Run) -> None:
        """What was closed because this run had not succeeded waits again, and what was closed
        because of that.
        """
        for run in self._awaiting(awaited):
            if run.gate is None or run.state not in ("waiting", "skipped"):
                continue
            if run.is_on_time and not run.is_split:
                run.catch_up, run.rank = True, CAUGHT_UP
            if run.state == "skipped":
                self.happened["waits again"] += 1
                run.state, run.reason, run.finished_at = "waiting", None, None
                run.wait_until = run.wait_until and self.now + (run.wait_until - run.due_at)
                run.due_at = self.now
            self._wait_again(run)

    def _awaiting(self, awaited: Run) -> list[Run]:
        """The runs that wait, or have waited, for this one."""

        def is_meant(run: Run) -> bool:
            of_slot = awaited.origin != "manual" and awaited.slot is not None
            is_slots = of_slot and run.waits.get(awaited.task.name) == awaited.slot
            return awaited.awaited_by is run or is_slots

        return [run for run in self.runs if is_meant(run)]

    def coming_after(self, first: Run) -> list[Run]:
        """The runs that come after this one, in whichever depth, and are over."""
        found: list[Run] = []
        asked = [first]
        while asked:
            asked = [run for each in asked for run in self._awaiting(each)]
            asked = [run for run in dict.fromkeys(asked) if run not in found and run is not first]
            found += asked
        return [run for run in found if run.state in FINAL]

    def awaited(self) -> list[Run]:
        """The runs that are over, and have been waited for; first those for a run that
        succeeded.
        """
        over = [run for run in self.runs if run.state in FINAL and self.coming_after(run)]
        return sorted(
            over, key=lambda run: all(each.state != "succeeded" for each in self.coming_after(run))
        )

    def again_with_what_comes_after(self, run: Run) -> bool:
        """A person runs it from the beginning, and what comes after it."""
        after = self.coming_after(run)
        if not self.reopen(run, BY_HAND, FINAL, anew=True):
            return False
        for each in after:
            self._wait_anew(each, BY_HAND)
        for each in after:
            self._wait_again(each)
        return True

    def _wait_anew(self, run: Run, rank: int) -> None:
        if run.state not in FINAL or self._has_active_parts(run):
            return
        self.happened["waits anew"] += 1
        rule = (
            run.task.policy.after
            if run.origin != "manual" and run.task.removed_at is None
            else None
        )
        own = None if run.is_split else run.gate
        self._begin_anew(run, rank)
        self._drop_parts(run)
        self._wait(run, self.now, rule.on if rule else own or "success")
        run.wait_until = self.now + timedelta(seconds=rule.within) if rule else None
        run.count = None

    def _begin_anew(self, run: Run, rank: int) -> None:
        run.rank, run.catch_up, run.due_at = rank, True, self.now
        run.reason = run.started_at = run.finished_at = run.cancel = None
        run.attempts_before, run.losses, run.most_at_a_loss = run.attempt, 0, 0

    # Parts

    def _split(self, run: Run, number: int | None) -> None:
        """It waits for its parts: new ones, or (None) those that have not succeeded, which are run
        again.
        """
        run.state, run.reason, run.wait_until = "waiting", None, None
        run.gate = "fail_fast" if run.task.policy.fail_fast else "parts"
        if number is None:
            again = [part for part in self.parts(run) if part.state in BAD]
            self.happened["runs its bad parts again"] += len(again)
            for part in again:
                self.resumed.add(part.id)
                self.reopen(part, BY_HAND, BAD)
            return
        for part in range(1, number + 1):
            new = self._new(run.task, None, "part", run.rank)
            new.created_at, new.catch_up, new.awaited_by, new.part = (
                run.created_at,
                run.catch_up,
                run,
                part,
            )
        self.happened["split"] += 1
        self.happened["split into nothing"] += not number

    def has_succeeded_parts(self, run: Run) -> bool:
        return all(part.state == "succeeded" for part in self.parts(run))

    def _has_active_parts(self, run: Run) -> bool:
        return run.is_split and any(part.state in ACTIVE for part in self.parts(run))

    def _drop_parts(self, run: Run) -> None:
        gone = self.parts(run)
        run.task.runs = [each for each in run.task.runs if each not in gone]
        self.happened["split anew"] += bool(gone)

    def _start(self, run: Run, node: str) -> None:
        goes_on = run.state == "queued" and run.attempt > run.attempts_before
        self.happened["joins"] += goes_on
        run.attempt += run.state != "interrupted" and not goes_on
        run.fence += 1
        run.state, run.node, run.reason = "running", node, None
        run.started_at = run.started_at or self.now
        run.attempt_started_at = self.now
        run.has_said = False

    def _ask_to_end(self, run: Run, reason: str | Blamed) -> None:
        if run.state == "running":
            run.cancel = run.cancel or reason
        else:
            self.happened["cancelled with its parts"] += self._has_active_parts(run)
            if (
                run.state == "waiting"
                and run.is_split
                and any(part.state == "running" for part in self.parts(run))
            ):
                self.happened["cancelled after its parts"] += run.cancel is None
                run.cancel = run.cancel or reason
            else:
                run.state, run.reason, run.finished_at = "cancelled", reason, self.now
            for member in (*self.members(run), *self.parts(run)):
                if member.state in ACTIVE:
                    self._ask_to_end(member, reason)

    # Claiming

    def claim(self, names: Collection[str], node: str, most: int) -> list[Run]:
        """The first that may start, one after the other."""
        claimed: list[Run] = []
        while len(claimed) < most and (first := self._first(names)) is not None:
            self.happened[f"claimed {first.state}"] += 1
            self._start(first, node)
            claimed.append(first)
        return claimed

    def claim_as(self, names: Collection[str], node: str, most: int, ids: Collection[str]) -> None:
        """Start the runs that a node has claimed. Which values of a limit come first is a matter of
        turns, but within a value, and among all other runs, the first go first.
        """
        left = set(ids)
        unlimited = [name for name in names if self.tasks[name].policy.limit is None]
        while left:
            firsts = [self._first(unlimited), *self._firsts_of_values(names)]
            first = next((run for run in firsts if run is not None and run.id in left), None)
            assert first is not None, f"claimed {left}, and should be among {firsts}"
            self.happened[f"claimed {first.state}"] += 1
            self.happened["claimed in turn"] += first.task.policy.limit is not None
            self._start(first, node)
            left.remove(first.id)
        if len(ids) < most:
            more = self._first(names)
            assert more is None, f"did not claim {more}"

    def _firsts_of_values(self, names: Collection[str]) -> list[Run]:
        limited = [self.tasks[name] for name in names if self.tasks[name].policy.limit is not None]
        ready = [run for task in limited for run in task.runs if self._may_start(run)]
        firsts = {run.queue: run for run in sorted(ready, key=_place, reverse=True)}
        return list(firsts.values())

    def _first(self, names: Collection[str]) -> Run | None:
        ready = [run for name in names for run in self.tasks[name].runs if self._may_start(run)]
        return min(ready, key=_place, default=None)

    def _may_start(self, run: Run) -> bool:
        if run.state not in WAITING or run.due_at > self.now or self.is_held(run):
            return False
        policy, lanes = run.task.policy, run.task.policy.lanes
        if policy.limit is not None:
            going = [each for each in run.task.runs if each.queue == run.queue and each.has_lane]
            return len(going) < policy.limit
        if run.part is not None:
            return run.task.lanes_taken(by_parts=True) < policy.parallel
        if lanes is None or run.is_joining:
            return True
        before = run.task.lanes_taken()
        if policy.overlap == "wait" and run.state == "queued" and run.rank == ON_TIME:
            before += sum(
                r.is_on_time and r.state in ("retrying", "interrupted") for r in run.task.runs
            )
        return before < lanes

    def is_held(self, run: Run) -> bool:
        """By a pause of its task: that holds the runs that there were when it began."""
        paused_at = run.task.paused_at
        return paused_at is not None and run.created_at <= paused_at

    def is_asked(self, run: Run) -> bool:
        """To stop, by a person."""
        return run.cancel is not None or self.is_held(run)

    def claim_these(
        self, wanted: Mapping[str, int], lanes: Mapping[str, int], node: str
    ) -> list[Run] | None:
        """Take those of these runs that are still to be had, each in this lane; None: the database
        refuses all.
        """
        still = [run for run in self.runs if run.id in wanted and run.state in WAITING]
        bounded = [
            run
            for run in self.runs
            if run.part is not None
            or (run.task.policy.lanes, run.task.policy.limit) != (None, None)
        ]
        taken = Counter((run.queue, lanes[run.id]) for run in bounded if run.has_lane)
        new = [run for run in still if not run.is_joining]
        taken.update((run.queue, wanted[run.id]) for run in new)
        if any(taken[run.queue, wanted[run.id]] > 1 for run in new if run in bounded):
            self.happened["claim refused"] += 1
            return None
        for run in still:
            self._start(run, node)
        self.happened["claimed by an old look"] += len(still)
        self.happened["claimed by another meanwhile"] += len(wanted) - len(still)
        return still

    # Ends

    def ending(self, run: Run, number: int, how: str, stage: str | None = None) -> Ending:
        """What a node says of an attempt with this number that ended so. `stage`: of one of a
        partitioned task.
        """
        if stage == "join" and how != "interrupted" and not self.has_succeeded_parts(run):
            return Ending("waiting", "resumed")
        if how == "succeeded" and stage == "split":
            return Ending("waiting", "split", parts=run.task.policy.parts)
        if how == "succeeded":
            return Ending("succeeded", "succeeded")
        if how == "interrupted":
            return self.left(run, "the service stopped")
        if number - run.attempts_before < run.task.policy.attempts:
            return Ending("retrying", how, "ValueError: no", wait=30)
        return Ending("failed", how, "ValueError: no")

    def left(self, run: Run, reason: str) -> Ending:
        if run.task.policy.rerun:
            return Ending("interrupted", "interrupted", reason)
        return Ending(
            "failed",
            "interrupted",
            f"{reason} while it ran, and it is not run again (rerun = False)",
        )

    def finish(self, run: Run, fence: int, number: int, ending: Ending) -> bool:
        """False: it bounces, for another node holds the run, or has written another end of this
        attempt.
        """
        if run.state != "running" or run.fence != fence:
            is_there = run.ended.get(fence) == (number, ending.outcome)
            self.happened["written twice" if is_there else "bounced"] += 1
            return is_there
        run.ended[fence] = (number, ending.outcome)
        self._follow(run, ending)
        self.happened[f"ended as {ending.outcome}"] += 1
        return True

    def _follow(self, run: Run, ending: Ending) -> None:
        run.rank = max(run.rank, INTERRUPTED)
        if ending.state == "waiting" and run.cancel is None:
            self._split(run, ending.parts)
            return
        run.state, run.reason = ending.state, ending.reason
        if ending.state in FINAL:
            run.finished_at = self.now
            return
        if run.cancel is not None:
            self.happened["cancelled instead of going on"] += 1
            run.state, run.reason, run.finished_at = "cancelled", run.cancel, self.now
        run.due_at = self.now + timedelta(seconds=ending.wait)
        if ending.state == "interrupted":
            run.rank = INTERRUPTED

    def ask_to_end(self, run: Run, reason: str) -> str:
        """A person cancels it. Returns its state then."""
        if run.state in ACTIVE:
            self.happened[f"cancel of {run.state}"] += 1
            self._ask_to_end(run, reason)
        return run.state

    def reopen(self, run: Run, rank: int, states: Sequence[str], anew: bool = False) -> bool:
        """A person wants it to go on; `anew`: from the beginning. False: it is in none of these
        states.
        """
        if run.state not in states or self._has_active_parts(run):
            return False
        parent = run.awaited_by if run.part is not None else None
        if parent is not None and (parent.state != "waiting" or parent.cancel is not None):
            self.happened["part left alone"] += 1
            return False
        self.happened[f"again after {run.state}"] += 1
        self.happened["part again"] += run.part is not None
        self._begin_anew(run, rank)
        run.state, run.count = "queued", None if anew else run.count
        run.wait_until = None
        if anew or not run.is_split:
            run.gate = None
            self._drop_parts(run)
        self._wait_again(run)
        return True

    # Nodes

    def beat(self, node: str) -> bool:
        """False: others have taken it for dead."""
        known = self.nodes[node]
        known.beats += not known.is_stopped
        return not known.is_stopped

    def others(self, than: str) -> dict[str, tuple[int, bool]]:
        """Those that another node looks at, with their counters, and whether they are stopped."""
        holders = {run.node for run in self.runs if run.state == "running"}
        seen = {name: node for name, node in self.nodes.items() if name != than}
        return {
            n: (o.beats, o.is_stopped) for n, o in seen.items() if not o.is_stopped or n in holders
        }

    def rescue(self, dead: Mapping[str, int]) -> list[str]:
        """`dead`: the counters with which nodes fell silent."""
        gone = [node for node, beats in dead.items() if self.nodes[node].beats == beats]
        self.happened["living node left alone"] += len(dead) - len(gone)
        lost = [run for run in self.runs if run.state == "running" and run.node in gone]
        if not lost and all(self.nodes[node].is_stopped for node in gone):
            return []
        for run in lost:
            self.finish(run, run.fence, run.attempt, self._lost(run))
        for node in gone:
            self.nodes[node].is_stopped = True
        return gone

    def _lost(self, run: Run) -> Ending:
        if not run.task.policy.rerun:
            self.happened["lost for good"] += 1
            return Ending("failed", "lost", LOST)
        self._count_the_loss(run)
        often = f"{LOST}, {run.losses} times without progress"
        if run.losses >= 5:
            self.happened["poison"] += 1
            return Ending(
                "failed", "lost", f"poison: {often}; do not retry it before that is mended"
            )
        if run.losses == 1:
            return Ending("interrupted", "lost", LOST)
        self.happened["waits after a loss"] += 1
        run.attempts_before += 1
        wait = (30, 60, 120)[run.losses - 2]
        return Ending("retrying", "lost", f"{often}: it goes on after {wait} s", wait=wait)

    def say(self, run: Run, fence: int, count: int) -> None:
        """A node writes how many items an attempt has counted, from zero on."""
        if run.state == "running" and run.fence == fence:
            run.count, run.has_said = count, True

    def _count_the_loss(self, run: Run) -> None:
        if run.has_said and (run.count or 0) > run.most_at_a_loss:
            self.happened["got on before it was lost"] += run.losses > 0
            run.losses = 0
        run.losses += 1
        run.most_at_a_loss = max(run.most_at_a_loss, run.count or 0)

    def leave(self, node: str, reason: str) -> None:
        """It stops in order, or comes back: what it still holds is interrupted."""
        for run in self.runs:
            if run.state == "running" and run.node == node:
                self.happened["left behind"] += 1
                self.finish(run, run.fence, run.attempt, self.left(run, reason))

    # What a person does to tasks

    def start(self, task: Task, key: str | None, value: str = "a") -> Run:
        known = next((run for run in task.runs if key is not None and run.key == key), None)
        if known is not None:
            self.happened["started once by its key"] += 1
            return known
        run = self._new(task, None, "manual", BY_HAND)
        run.key, run.value = key, value
        return run

    def backfill(self, task: Task, since: datetime, redo: bool) -> None:
        # What may still be fired on time is left to that.
        until = max(task.handled, self.now - MINUTE)
        for slot in slots(task.spans[-1].period, since - timedelta(microseconds=1), until):
            run = task.of_slot(slot)
            if run is None:
                new = self._new(task, slot, "backfill", CAUGHT_UP)
                self._hold_back(new)
                self._wait_again(new)
                self.happened["backfilled"] += 1
            elif redo:
                self.reopen(run, CAUGHT_UP, FINAL, anew=True)

    def pause(self, task: Task, by: str, is_loaded: bool) -> None:
        """Who has not loaded the task can't fire what is due: it is missed."""
        if task.paused_by is not None:
            return
        if is_loaded:
            self.fire([task.name], "", 0)
        elif task.removed_at is None:
            due = slots(task.spans[-1].period, task.handled, self.now)
            self._miss(task, due, f"not handled yet when it was paused by {by}")
        task.paused_by, task.paused_at = by, self.now

    def resume(self, task: Task) -> None:
        if task.paused_by is not None and task.paused_at is not None:
            self.fire([task.name], "", 0)
            for run in task.runs:
                if run.state == "waiting" and run.wait_until is not None:
                    run.wait_until += self.now - task.paused_at
            task.paused_by = task.paused_at = None

    def prune(self, before: datetime, per_task: int, kept: Collection[str]) -> list[Run]:
        """What ended before goes, but for the newest of each task, members of groups, and what is
        awaited.

        `kept`: the ids of the runs that are still in the ledger. A member may go as soon as its
        follow-up is gone, or be left for the next time.
        """
        gone = []
        for task in self.tasks.values():
            runs = [run for run in task.runs if run.part is None]
            newest = sorted(runs, key=lambda run: (run.created_at, run.number))[-per_task:]
            old = [run for run in runs if run.finished_at is not None and run.finished_at < before]
            old = [run for run in old if run.awaited_by is None or run.id not in kept]
            old = [run for run in old if not self._is_awaited(run)]
            old = [
                run
                for run in old
                if run.state in FINAL and run not in newest and not self._has_active_parts(run)
            ]
            parts = [part for run in old for part in self.parts(run)]
            self.happened["pruned with its parts"] += bool(parts)
            gone += [*old, *parts]
            task.runs = [run for run in task.runs if run not in gone]
        self.happened["pruned"] += len(gone)
        return gone

    def _is_awaited(self, run: Run) -> bool:
        """Whether a run that is not over waits for its slot."""
        return any(each.state in ACTIVE and run in self._waits_of(each) for each in self.runs)

    def _waits_of(self, run: Run) -> list[Run]:
        """The runs of the slots that it waits for."""
        found = (
            self.tasks[name].of_slot(slot) for name, slot in run.waits.items() if slot is not None
        )
        return [each for each in found if each is not None]

    def remove(self, task: Task) -> None:
        """No service has it any more: its schedule ends."""
        due = slots(task.spans[-1].period, task.handled, self.now)
        self._miss(task, due, "its file is gone")
        task.spans[-1] = task.spans[-1]._replace(until=self.now)
        task.removed_at = self.now
        self.happened["removed"] += 1

    def restore(self, task: Task) -> None:
        """A service has it again: its schedule counts from now on."""
        task.removed_at, task.handled, task.place = None, self.now, next(self._numbers)
        task.spans.append(Span(task.spans[-1].period, self.now))

    def fail_unserved(self, grace: timedelta) -> Counter[str]:
        """What has waited for so long for a task that was removed as long ago."""
        failed: Counter[str] = Counter()
        before = self.now - grace
        for run in self.runs:
            removed_at = run.task.removed_at
            if (
                removed_at is not None
                and removed_at < before
                and run.state in WAITING
                and run.due_at < before
            ):
                run.state, run.reason, run.finished_at = (
                    "failed",
                    "no service has had this task for 24 h",
                    self.now,
                )
                failed[run.task.name] += 1
        self.happened["failed as an orphan"] += failed.total()
        return failed

    def set_period(self, task: Task, period: int) -> None:
        """A deployment with another schedule: it counts from now on."""
        if task.spans[-1].period == period:
            return
        self.fire([task.name], "", 0)
        task.spans[-1] = task.spans[-1]._replace(until=self.now)
        task.spans.append(Span(period, self.now))
        task.place = next(self._numbers)
        self.happened["schedule changed"] += 1


def _end_of(run: Run) -> str:
    if run.state in ACTIVE:
        return "pending"
    return "succeeded" if run.state == "succeeded" else "otherwise"


def _has_not_opened(run: Run) -> bool:
    return run.state == "waiting" and not run.is_split


def _failed_first(part: Run) -> tuple[bool, int]:
    return part.state != "failed", part.part or 0


def _parts_failed(parts: Sequence[Run]) -> str:
    failed = [str(part.part) for part in parts if part.state == "failed"]
    cancelled = [str(part.part) for part in parts if part.state == "cancelled"]
    named = failed or cancelled
    what = "failed" if failed else "cancelled"
    also = f"; {len(cancelled)} cancelled" if failed and cancelled else ""
    return f"{len(named)} of {len(parts)} parts {what}: {', '.join(named)}{also}"


def _slot(run: Run) -> datetime:
    assert run.slot is not None
    return run.slot


def _in_the_way(other: Run, opening: Collection[Run]) -> str:
    return "opened together with it" if other in opening else f"was still {other.state}"


def _place(run: Run) -> tuple[int, int, datetime, str]:
    return -run.task.policy.priority, run.rank, run.due_at, run.id  # ids rise with the time


def _still(other: Run, run: Run) -> str:
    if other.created_at == run.created_at:
        return "was fired late, together with it"
    return f"was still {other.state}"
