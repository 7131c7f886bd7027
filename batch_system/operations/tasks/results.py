"""The results about tasks: a task in a list, and its details."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from batch_system.operations.asking.results import (
    LeftOutDate,
    MissedRange,
    Parameter,
    Result,
    RunSummary,
    ScheduleSpan,
    Slot,
)
from batch_system.operations.runs.waiting import Chain, Upcoming
from batch_system.settings.pools import DEFAULT_POOL


class TaskSummary(Result):
    """A loaded task, or a file that can't be used, which has an `error`, and a name if that is
    known.

    `pool`: where its runs execute. `memory`: how many bytes a run may use at most, where the pool
    can keep that. `next_run_time`: None without a schedule and during a pause. `served_from`: the
    file that running services use. `given`: the schedule as it was written, if that has an `H`.
    `failure_streak`: failed runs since the last success, among its
    newest 100 runs. `p50`, `p95`: this many seconds at most do half, and 95 of 100, of its last
    successes take. None: not known.
    """

    name: str | None = None
    description: str | None = None
    schedule: str | None = None
    given: str | None = None
    timezone: str | None = None
    next_run_time: datetime | None = None
    paused: bool = False
    source: str
    served_from: str | None = None
    words: str | None = None
    pool: str = DEFAULT_POOL
    memory: int | None = None
    tags: list[str] = Field(default_factory=list)
    failure_streak: int = 0
    last_success_at: datetime | None = None
    p50: float | None = None
    p95: float | None = None
    error: str | None = None


def memory_in_words(memory: int | None) -> str | None:
    """A bound of memory in bytes for people, such as `2 GiB`."""
    if memory is None:
        return None
    power = min((memory.bit_length() - 1) // 10, 5)
    return f"{memory / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


class TaskAfter(Result):
    """What the runs of a task wait for: slots of these `tasks`, `within` this many seconds at most.

    `on`: whether each has to succeed (`success`), or only to be over (`end`). `follows`: the task
    whose slots it has.
    """

    tasks: list[str]
    within: float
    on: str
    follows: str | None = None


class TaskDetails(Result):
    """The details of a task. `policies`: those that differ from the defaults, by dotted name, such
    as retry.attempts.

    `is_loaded`: this process has loaded the task. Otherwise `parameters` is None, and the other
    fields are from the ledger. `schema_of_parameters`: their JSON schema, with the defaults of a
    task that is loaded.
    `words`: the schedule in words. `given`: the schedule as it was written, if that has an `H`.
    `owner`: whose the task is. `runbook`: the address of what to
    do. `muted_until`: until then nothing is sent. `paused_until`: when its pause ends by itself.
    How the runs went, `pool` and `memory` are as in TaskSummary. `after`: what its runs wait for.
    `left_out`: the next dates on which it has no slots because of its `except_on`.
    `chain`: the tasks before and after it, each with its last run. `upcoming`: runs that wait for
    an instant, the next ones.
    """

    name: str
    description: str | None
    source: str
    is_loaded: bool
    pool: str
    memory: int | None
    tags: list[str]
    owner: str | None
    runbook: str | None
    muted_until: datetime | None
    schema_of_parameters: dict[str, Any] | None
    schedule: str | None
    given: str | None = None
    timezone: str | None
    words: str | None
    next: list[Slot]
    left_out: list[LeftOutDate] = Field(default_factory=list)
    policies: dict[str, Any]
    parameters: list[Parameter] | None
    paused_at: datetime | None
    paused_by: str | None
    paused_until: datetime | None = None
    removed_at: datetime | None
    first_seen_at: datetime | None
    failure_streak: int = 0
    last_success_at: datetime | None = None
    p50: float | None = None
    p95: float | None = None
    runs: list[RunSummary]
    missed: list[MissedRange]
    schedules: list[ScheduleSpan]
    after: TaskAfter | None = None
    chain: Chain = Chain()
    upcoming: list[Upcoming] = Field(default_factory=list)


class Paused(Result):
    """The pause of a task. `is_new`: this request has begun or ended it. `until`: when it ends by
    itself.
    """

    at: datetime
    by: str
    is_new: bool
    until: datetime | None = None


class PauseOfTask(Result):
    """The pause of a task; None if it is not paused."""

    pause: Paused | None


class Resumed(Result):
    """What resuming a task did. `ended`: the pause that has ended; None if it was not paused.

    `ahead_until`: up to then it would not have fired, because a clock was ahead; None if none was.
    """

    ended: Paused | None
    ahead_until: datetime | None = None


class ResumedAhead(Result):
    """Tasks that fire again. `tasks`: up to which instant a clock that was ahead had fired each of
    them, by name.
    """

    tasks: dict[str, datetime]


class TaskList(Result):
    """The tasks that a process of the service has loaded, and the files that can't be used."""

    tasks: list[TaskSummary]


class Slots(Result):
    """The next slots of a task; empty without a schedule and during a pause. `left_out`: the dates
    up to the last of them on which it has no slots.
    """

    slots: list[Slot]
    left_out: list[LeftOutDate] = Field(default_factory=list)
