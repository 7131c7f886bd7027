"""What a run waits for, and the chain that it is in, as people and programs read it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from batch_system.operations.asking.results import KeptBack, Result


class InTheWay(Result):
    """A slot in the way of a run that waits for it: its `task`, and its `run` with the `state`, if
    it has one.

    `reason`: why it has no run, if that is known.
    """

    task: str
    slot: datetime | None = None
    run: str | None = None
    state: str | None = None
    reason: str | None = None


class Blocker(Result):
    """What a waiting run waits for, the first thing that holds it.

    Attributes:
        kind: paused, unserved (no service has the task), pool (no node of its `pool` has the task),
            run (of the same task), limit (as many runs of its key, or of all keys, are running as
            the limit of its task allows), rate (as many have begun as the rate of its task allows),
            room (all nodes are busy), or slot (of another task, which the run comes after).
        running: How many runs of its key are running; for a rate, how many have begun.
        limit: How many may.
        per: For a rate, the seconds of its period.
        at: For a rate, when the next may begin.
        key: Such as "tenant=acme"; None if it is hidden.
        state: Of the run in the way, if it is one of a slot.
        reason: Why the slot has no run, if that is known.
        cause: What is in the way at the beginning of the chain, if the slot waits itself.
    """

    kind: Literal["paused", "unserved", "pool", "run", "limit", "rate", "room", "slot"]
    by: str | None = None
    run: str | None = None
    task: str | None = None
    pool: str | None = None
    running: int | None = None
    limit: int | None = None
    per: float | None = None
    at: datetime | None = None
    key: str | None = None
    state: str | None = None
    reason: str | None = None
    cause: InTheWay | None = None


class Awaited(Result):
    """Something that a run in the state `waiting` waits for, and that is not over.

    Attributes:
        kind: `instant`: until `at`. `slot`: the slot `at` of `task`, whose `run` has this `state`,
            or was not made yet. `group`, `parts`: `active` of `members` runs.
        cause: What is in the way at the beginning of the chain, if the slot waits itself.
    """

    kind: Literal["instant", "slot", "group", "parts"]
    at: datetime | None = None
    task: str | None = None
    run: str | None = None
    state: str | None = None
    active: int | None = None
    members: int | None = None
    cause: InTheWay | None = None

    @property
    def ended(self) -> int:
        """How many members of its group, or how many of its parts, have ended."""
        return (self.members or 0) - (self.active or 0)


class Waiting(Result):
    """Whether a run waits, and what for. `blocker`: None if it does not wait, or nothing is known
    to hold it.

    `eta`: about when it ends; None: no estimate. `awaits`: what a run in the state `waiting` waits
    for.
    """

    run: str
    task: str
    state: str
    blocker: Blocker | None
    eta: datetime | None
    awaits: Sequence[Awaited] = ()


class LateRun(Result):
    """A run that is late or slow now. `why`: slow, stalled, timeout, waits, or retries.

    `elapsed`, `p95`, `timeout`: seconds. `eta`: about when it ends; None: no estimate.
    `next_attempt_at`: of a run that is retried. `done`, `total`, `rate`: what a running run has
    reported: items, and items a second.
    """

    run: str
    task: str
    slot: datetime | None
    state: str
    why: Literal["slow", "stalled", "timeout", "waits", "retries"]
    elapsed: float
    p95: float | None = None
    timeout: float | None = None
    done: int | None = None
    total: int | None = None
    rate: float | None = None
    eta: datetime | None = None
    blocker: Blocker | None = None
    next_attempt_at: datetime | None = None
    attempt: int | None = None


class Link(Result):
    """The runs of a task that are in one state at a step of a chain: how many (`count`).

    `run`, `slot`: of the only one. `state`: None if the slot has no run, or the task has none yet.
    """

    task: str
    state: str | None
    count: int = 1
    run: str | None = None
    slot: datetime | None = None


class Step(Result):
    """A step of a chain. `more`: how many links are not named."""

    links: Sequence[Link]
    more: int = 0


class Chain(Result):
    """What a run, or a task, comes after (`before`, the last step is next to it), and what comes
    `after` it.

    `keeps_back`: the runs that wait for a success of the run, or were closed because it has not
    succeeded.
    """

    before: Sequence[Step] = ()
    after: Sequence[Step] = ()
    keeps_back: Sequence[KeptBack] = ()

    @property
    def is_one(self) -> bool:
        """Whether there is anything before or after."""
        return bool(self.before or self.after)


class Upcoming(Result):
    """A run that waits for an instant: when it starts (`at`), and who has asked for it."""

    id: str
    at: datetime
    requested_by: str | None
