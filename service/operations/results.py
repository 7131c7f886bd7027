"""What operations answer: frozen models, whose fields are the keys of `--json` and of the HTTP API.

Instants are aware, in UTC, unless a field says otherwise.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from service.batch.context.progress import pace
from service.errors import DamagedRow

N = TypeVar("N")
"""The node of a run: its id, or what is known of it."""


class Result(BaseModel):
    """The base of all answers. What a row of the ledger has beyond the fields is left out."""

    model_config = ConfigDict(frozen=True, defer_build=True)  # a command uses few of them

    def __repr__(self) -> str:
        """Bounded: asyncio makes the text of a task's result when the loop ends, and a result may be large."""
        fields = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in self)
        return f"{type(self).__name__}({fields})"

    __str__ = __repr__

    @classmethod
    def of(cls, row: Mapping[Any, Any], **more: Any) -> Self:
        """Made from a row of the ledger; `more` are fields that the row has not, or has otherwise.

        Raises DamagedRow where a column has something else than this code writes there.
        """
        try:
            return cls.model_validate({**row, **more})
        except ValidationError as error:
            fields = ", ".join(sorted({str(wrong["loc"][0]) for wrong in error.errors()}))
            raise DamagedRow(f"the ledger has a row that can't be read: {cls.__name__}, {fields}") from None


class Slot(Result):
    """A slot; `local` is the same instant in the schedule's time zone."""

    slot: datetime
    local: datetime


class TaskSummary(Result):
    """A task of the loaded files; or a file that can't be used, which has an `error` and no name.

    `next_run_time` is None without a schedule and during a pause. `served_from`: the file from which running services
    have loaded it; None where no service has the task.
    """

    name: str | None = None
    description: str | None = None
    schedule: str | None = None
    timezone: str | None = None
    next_run_time: datetime | None = None
    paused: bool = False
    source: str
    served_from: str | None = None
    error: str | None = None


class Node(Result):
    """A process that is, or was, part of the service. `loop_lag`: seconds that a callback waited on its event loop."""

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
    fires: bool

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Whatever else somebody has written there names no tasks."""
        return value if isinstance(value, list) else []


class RunShort(Result, Generic[N]):
    """The short form of a run. `rate`: items a second; `eta`: when it will be done at that rate. None: not known."""

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
    count: int | None
    total: int | None
    message: str | None
    rate: float | None
    progress_at: datetime | None
    eta: datetime | None

    @classmethod
    def at(cls, row: Mapping[Any, Any], now: datetime) -> Self:
        """Made from a run's row; `now` is the ledger's time, for `rate` and `eta`."""
        rate, eta = pace(row, now)
        return cls.of(row, rate=rate, eta=eta)


class RunSummary(RunShort[str | None]):
    """A run as lists show it. `node`: the id of the process that runs it, or ran it last."""


class RunRow(RunShort[N], Generic[N]):
    """What the ledger has about a run in its own row."""

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


class RunNow(RunRow[str | None]):
    """A run at one moment; `now` is the ledger's time."""

    now: datetime


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
    """A line of a run's log. `at`: ISO 8601, as it was logged."""

    at: str
    level: str
    logger: str
    text: str


class LogBlock(Result):
    """Lines that a run has logged in a row, all in one attempt and under one fence."""

    fence: int
    attempt: int
    lines: list[Line]


class RunDetails(RunRow[Node | None]):
    """All about one run. `timezone`: of its task's schedule. `log`: the last lines."""

    timezone: str | None
    attempts: list[Attempt]
    log: list[Line]


class Parameter(Result):
    """A parameter of a task's `run()`. `type` and `default` are Python, as text."""

    name: str
    type: str | None
    default: str | None
    required: bool


class MissedRange(Result):
    """Slots of a task that did not run, from the first to the last, and why."""

    id: str
    task: str
    first_slot: datetime
    last_slot: datetime
    count: int
    reason: str
    created_at: datetime


class ScheduleSpan(Result):
    """A schedule that a task has, or had, and from when until when. Slots up to `fired_until` were handled."""

    id: str
    task: str
    cron: str
    timezone: str
    valid_from: datetime
    valid_until: datetime | None
    node: str
    fired_until: datetime


class TaskDetails(Result):
    """All about one task. `policies` are those that differ from the defaults, by dotted name, such as retry.attempts.

    `is_loaded`: its file can be used here; else `parameters` is None, and the rest is what the ledger knows.
    """

    name: str
    description: str | None
    source: str
    is_loaded: bool
    schedule: str | None
    timezone: str | None
    words: str | None
    next: list[Slot]
    policies: dict[str, Any]
    parameters: list[Parameter] | None
    paused_at: datetime | None
    paused_by: str | None
    removed_at: datetime | None
    first_seen_at: datetime | None
    runs: list[RunSummary]
    missed: list[MissedRange]
    schedules: list[ScheduleSpan]


class Paused(Result):
    """The pause of a task. `is_new`: it began, or ended, by this very request."""

    at: datetime
    by: str
    is_new: bool


class Quarantined(Result):
    """An item that a run set aside. `item`: its key as JSON text. `error` has `type`, `message` and `traceback`.

    `times`: how often it was tried. `redriven_by`: the run that has done it again.
    """

    run: str
    task: str
    item: str
    error: dict[str, Any]
    times: int
    at: datetime
    redriven_by: str | None


class Started(Result):
    """A run that was queued."""

    id: str
    task: str
