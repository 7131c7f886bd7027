"""What is answered about slots: the account of an interval, and missed slots that are left."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from batch_system.operations.asking.results import LeftOutDate, Result


class SlotOutcome(Result):
    """What became of one slot.

    `run`: the id of its run. `state`: of that run. `reason`: of that run, or why the slot has no
    run. `text`: what the kind means, if it has to be explained.
    """

    task: str
    slot: datetime
    kind: str
    run: str | None
    state: str | None
    reason: str | None
    text: str | None = Field(exclude=True)


class SlotFinding(Result):
    """Consecutive slots of one kind, which a person should know of: `count` slots from `first` to
    `last`.
    """

    kind: str
    first: datetime
    last: datetime
    count: int
    text: str


class TaskAccount(Result):
    """The account of one task: how many of its slots from `since` to `until` are of each kind.

    `left_out`: the first 100 dates on which it has no slots because of its `except_on`.
    """

    task: str
    since: datetime
    until: datetime
    slots: int
    runs: int
    skipped: int
    missed: int
    due: int
    gaps: int
    complete: bool
    findings: list[SlotFinding]
    left_out: list[LeftOutDate] = Field(default_factory=list)


class Accounts(Result):
    """The accounts of several tasks. `complete`: every slot is accounted for.

    `due`: slots that will be handled soon. `unaccounted`: slots that have no run, skip or missed
    range, or are late. `pools`: for each pool of these tasks in which runs wait for nodes in vain,
    why that is so, now.
    """

    tasks: list[TaskAccount]
    complete: bool
    due: int
    unaccounted: int
    wrong_ranges: int
    unreadable: int
    pools: list[str]


class LeftSlots(Result):
    """Missed slots that were left as they are, or taken up again: how many, and how many of each
    task.
    """

    slots: int
    tasks: dict[str, int]
