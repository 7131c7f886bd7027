"""The results of operations: frozen models, whose fields are the keys of `--json` and of the HTTP
API.

Instants are aware and in UTC, unless the docstring of a model says otherwise.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from datetime import date, datetime
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from batch_system.batch.context.progress import pace
from batch_system.batch.ledger.states import How
from batch_system.errors import DamagedRow

N = TypeVar("N")
"""The node of a run: its id, or its details."""


SPLIT = ("parts", "fail_fast")
"""The gates of runs that were split (see batch/ledger/parts.py)."""


class Result(BaseModel):
    """The base of all results. Columns of a row that are not fields are left out."""

    model_config = ConfigDict(frozen=True, defer_build=True)  # a command uses few models

    def __repr__(self) -> str:
        """A short text, because asyncio makes the text of a task's result at the end of a loop, and
        it may be large.
        """
        fields = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in self)
        return f"{type(self).__name__}({fields})"

    __str__ = __repr__

    @classmethod
    def of(cls, row: Mapping[Any, Any], **fields: Any) -> Self:
        """Make the result from a row of the ledger; `fields` complete or replace those of the row.

        Raises DamagedRow if a column has a value that this code does not write there.
        """
        try:
            return cls.model_validate({**row, **fields})
        except ValidationError as error:
            names = ", ".join(sorted({str(problem["loc"][0]) for problem in error.errors()}))
            raise DamagedRow(
                f"the ledger has a row that can't be read: {cls.__name__}, {names}"
            ) from None


class Slot(Result):
    """A slot; `local`: the same instant in the schedule's time zone."""

    slot: datetime
    local: datetime


class Node(Result):
    """A process of the service, which may have stopped. `loop_lag`: how many seconds a callback
    waited on its loop.

    `lost_at`: when other nodes found that it had ended without saying so; then it is `stopped_at`
    as well. `version`: of this package. `application`: the version of the application around it.
    `fires`: whether it is a service, which fires schedules; others only execute runs. `pools`:
    whose runs it claims; none for a process such as `batch run`. `capacity`: how many runs it
    executes at once; None: not known. `troubles`: why it is not ready, or what holds up its runs,
    by part, as its `/readyz` says it.
    """

    id: str
    host: str
    pid: int
    version: str
    started_at: datetime
    beats: int
    seen_at: datetime
    draining: bool
    loop_lag: float
    tasks: list[str]
    stopped_at: datetime | None
    lost_at: datetime | None = None
    fires: bool
    application: str | None
    capacity: int | None = None
    pools: list[str] = []
    troubles: dict[str, str] = {}

    def state(self, is_alive: bool) -> str:
        """In one word what became of it. `is_alive`: it was seen within its lease, and its process
        is there.
        """
        if self.stopped_at is not None:
            return "lost" if self.lost_at is not None else "stopped"
        if is_alive:
            return "draining" if self.draining else "running"
        return "silent"

    @field_validator("tasks", "pools", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """A value that is no list, which somebody else must have written, counts as an empty
        list.
        """
        return value if isinstance(value, list) else []

    @field_validator("troubles", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """A value that is no object, such as NULL in the row of an older node, counts as an empty
        one.
        """
        return (
            {str(part): str(value[part]) for part in sorted(value)}
            if isinstance(value, Mapping)
            else {}
        )


class RunShort(Result, Generic[N]):
    """The short form of a run. `rate`: items a second. `eta`: when the run will be done at that
    rate.

    Both are None if they are not known. `gate`: which end of what it waits for opens it (`success`
    or `end`); of a run that was split `parts` or `fail_fast`. A run that what it waited for has
    closed keeps its `gate`.
    """

    id: str
    task: str
    slot: datetime | None
    origin: str
    state: str
    reason: str | None
    attempt: int
    node: N
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt_started_at: datetime | None
    gate: str | None = None
    count: int | None
    total: int | None
    message: str | None
    rate: float | None
    progress_at: datetime | None
    eta: datetime | None

    @property
    def is_split(self) -> bool:
        """Whether it was split, so that it has, or had, parts."""
        return self.gate in SPLIT

    @property
    def began_at(self) -> datetime | None:
        """When its last attempt began. Of a run that was split it is the first one: the last one is
        its join.
        """
        return self.started_at if self.is_split else self.attempt_started_at

    @classmethod
    def at(cls, row: Mapping[Any, Any], now: datetime) -> Self:
        """Make the result from the row of a run; `now`: the ledger's time, for `rate` and `eta`.
        Raises DamagedRow.
        """
        rate, eta = pace(row, now)
        return cls.of(row, rate=rate, eta=eta)


class RunSummary(RunShort[str | None]):
    """A run in a list. `node`: the id of the process that executes it, or executed it last.

    `fingerprint`: what is wrong with the run, as a class of errors. `quarantined`: how many items
    it has set aside that no other run has processed since.
    """

    fingerprint: str | None = None
    quarantined: int = 0


class RunRow(RunShort[N], Generic[N]):
    """All columns of a run in the ledger.

    `fingerprint`: what is wrong with the run, as a class of errors. `noticed_at`: when the watch
    has seen its end. `acknowledged`: the incident with which a person has acknowledged it.
    `made_good_by`: the run whose success made it good, which may be the run itself. `traceparent`:
    the span that asked for the run, as the W3C header of this name. `part`: the number of a part,
    from 1. `awaited_by`: the run that waits for this one. `wait_until`: when it has waited long
    enough.
    """

    params: dict[str, Any] | None
    result: Any
    priority: int
    rank: int
    catch_up: bool
    exclusive: str | None
    lane: int
    due_at: datetime
    attempts_before: int
    losses: int
    fence: int
    count_before: int | None
    count_lost: int | None
    requested_by: str | None
    key: str | None
    parent: str | None
    cancel_at: datetime | None
    cancel_by: str | None
    cancel_reason: str | None
    traceparent: str | None
    fingerprint: str | None
    noticed_at: datetime | None
    acknowledged: str | None
    made_good_at: datetime | None
    made_good_by: str | None
    awaited_by: str | None = None
    wait_until: datetime | None = None
    part: int | None = None


class RunNow(RunRow[str | None]):
    """A run at one moment; `now`: the ledger's time at that moment."""

    now: datetime


class RunsAfter(Result):
    """How many runs come after the run with the id `run` and have ended, by task (`tasks`)."""

    run: str
    tasks: dict[str, int]


class KeptBack(Result):
    """Runs of a task that failed runs keep back: how many `slots`, and how many `runs` without a
    slot.

    `at_least`: there may be more, because only this many are counted.
    """

    task: str
    slots: int
    runs: int
    at_least: bool = False


class Attempt(Result):
    """An attempt that has ended. `error` has `type`, `message` and `traceback`."""

    run: str
    fence: int
    number: int
    node: str | None
    started_at: datetime
    ended_at: datetime
    outcome: str
    error: dict[str, Any] | None


class Line(Result):
    """A line of a run's log. `at`: the instant as ISO 8601 text, as it was logged."""

    at: str
    level: str
    logger: str
    text: str


class PartShort(Result):
    """A part of a run, by its number. `count` and `total`: its progress."""

    id: str
    part: int
    state: str
    reason: str | None
    attempt: int
    started_at: datetime | None
    finished_at: datetime | None
    count: int | None
    total: int | None


class PartsOfRun(Result):
    """The parts of a run. `states`: how many of them there are in each state. `count` and `total`:
    the sums of theirs.

    `order`: the states in the order of the parts, at most 200; of more parts, each is the worst one
    of several that follow one another. `parts`: at most 200 of them: those that did not succeed
    first, then running ones, then the slowest ones.
    """

    number: int
    states: dict[str, int]
    count: int | None
    total: int | None
    order: list[str]
    parts: list[PartShort]


class RunDetails(RunRow[Node | None]):
    """The details of a run. `timezone`: of the schedule of its task. `log`: the last lines of its
    log.

    `parts`: of a run that was split; None for others.
    """

    timezone: str | None
    parts: PartsOfRun | None = None
    attempts: list[Attempt]
    log: list[Line]


class LogBlock(Result):
    """Consecutive lines of a run's log, all of one attempt and one fence."""

    fence: int
    attempt: int
    lines: list[Line]


class Parameter(Result):
    """A parameter of a task's `run()`. `type` and `default`: Python expressions as text."""

    name: str
    type: str | None
    default: str | None
    required: bool


class MissedRange(Result):
    """Consecutive slots of a task that did not run, and the reason."""

    id: str
    task: str
    first_slot: datetime
    last_slot: datetime
    count: int
    reason: str
    created_at: datetime


class LeftOutDate(Result):
    """A date on which a schedule has no slots, with its name. `slot`: the first one that it would
    have.
    """

    date: date
    name: str
    slot: datetime


class ScheduleSpan(Result):
    """A schedule that a task has or had, with the interval of its validity. Slots up to
    `fired_until` were handled. `given`: the expression as it was written, if that has an `H`.
    `except_on`: the dates that it leaves out, in words; `calendar`: their hash.
    """

    id: str
    task: str
    cron: str
    given: str | None = None
    except_on: str | None = None
    calendar: str | None = None
    timezone: str
    valid_from: datetime
    valid_until: datetime | None
    node: str
    fired_until: datetime


class Quarantined(Result):
    """An item that a run set aside. `item`: its key as JSON text. `error` has `type`, `message` and
    `traceback`.

    `times`: how often it was tried. `redriven_by`: the id of the run that has processed it again.
    """

    run: str
    task: str
    item: str
    error: dict[str, Any]
    times: int
    at: datetime
    redriven_by: str | None


class Started(Result):
    """A run that was queued, or the one that counts instead: see StartedRun."""

    id: str
    task: str
    how: How = "created"
    until: datetime | None = None
