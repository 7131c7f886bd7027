"""Lists of runs: the filter that people and programs give, and pages of runs with a cursor for the next one."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from sqlalchemy.ext.asyncio import AsyncConnection

from service.batch.ledger import database_time, run_query
from service.batch.ledger import tasks as task_rows
from service.batch.ledger.run_query import Key, RunQuery
from service.batch.ledger.states import RunState
from service.errors import InvalidParameters
from service.escaping import echoed
from service.operations.results import Result, RunSummary

MOST_RUNS = 200
"""Longest page of a list."""

CURSOR = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z_[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
PARAMETER = r"^[A-Za-z_][A-Za-z0-9_]{0,99}=[^\x00]{0,500}$"
TASK_NAME = r"^[a-z0-9_.-]{1,100}$"
ID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
TEXT = r"^[^\x00]*$"

Cursor = Annotated[str, StringConstraints(pattern=CURSOR)]
TaskName = Annotated[str, StringConstraints(pattern=TASK_NAME)]
RunId = Annotated[str, StringConstraints(pattern=ID)]
StateName = Literal["queued", "running", "retrying", "interrupted", "succeeded", "failed", "cancelled", "skipped"]
OriginName = Literal["schedule", "manual", "backfill"]


class RunFilter(BaseModel):
    """Which runs are meant. All conditions have to hold; several states, or origins, are alternatives.

    Instants are aware. `…_since` is included, `…_until` is not. `param` and `text` need a task and an interval, because
    no index has them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: TaskName | None = Field(None, description="Only runs of this task.")
    tag: Annotated[str, StringConstraints(pattern=TASK_NAME)] | None = Field(
        None, description="Only runs of tasks that have this tag."
    )
    state: list[StateName] = Field([], max_length=8, description="Only runs in one of these states.")
    origin: list[OriginName] = Field([], max_length=3, description="Only runs of one of these origins.")
    node: RunId | None = Field(None, description="Only runs that this node executes, or executed last.")
    created_since: AwareDatetime | None = Field(None, description="Only runs that were made at this instant or later.")
    created_until: AwareDatetime | None = Field(None, description="Only runs that were made before this instant.")
    slot_since: AwareDatetime | None = Field(None, description="Only runs of this slot or later ones.")
    slot_until: AwareDatetime | None = Field(None, description="Only runs of slots before this instant.")
    ended_since: AwareDatetime | None = Field(None, description="Only runs that ended at this instant or later.")
    ended_until: AwareDatetime | None = Field(None, description="Only runs that ended before this instant.")
    param: list[Annotated[str, StringConstraints(pattern=PARAMETER)]] = Field(
        [], max_length=10, description="Only runs whose parameter has this value: NAME=VALUE."
    )
    text: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=TEXT)] | None = Field(
        None, description="Only runs whose reason, such as the message of an error, contains this text."
    )
    order: Literal["created", "slot"] = Field(
        "created", description="Newest first, by the time of making or by slot. By slot, manual runs are left out."
    )

    @classmethod
    def of(cls, **conditions: Any) -> Self:
        """Make a filter. Raises InvalidParameters, which names the condition and what is allowed."""
        try:
            return cls(**conditions)
        except ValidationError as error:
            sentences = (_sentence(problem) for problem in error.errors())
            raise InvalidParameters("; ".join(sentences)) from None

    @model_validator(mode="after")
    def _check_cost(self) -> Self:
        if (self.param or self.text) and (self.task is None or not self._has_interval):
            raise ValueError("param and text need a task, and created_since, slot_since or ended_since")
        if self.order == "slot" and self.task is None:
            raise ValueError("order=slot needs a task")
        return self

    @property
    def _has_interval(self) -> bool:
        return any((self.created_since, self.slot_since, self.ended_since))

    @property
    def is_empty(self) -> bool:
        """Whether all runs are meant."""
        return self == RunFilter(order=self.order)

    def query(self, tasks: frozenset[str] | None = None) -> RunQuery:
        """The query of the ledger. `tasks`: the tasks that have the tag."""
        times = {n: getattr(self, n) for n in _TIMES}
        return RunQuery(
            task=self.task,
            tasks=tasks,
            states=frozenset(self.state),
            origins=frozenset(self.origin),
            node=self.node,
            params=dict(condition.split("=", 1) for condition in self.param),
            text=self.text,
            by_slot=self.order == "slot",
            **{name: at.astimezone(UTC) if at else None for name, at in times.items()},
        )


_TIMES = [f"{what}_{end}" for what in ("created", "slot", "ended") for end in ("since", "until")]


def _sentence(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"][:1])
    message = problem["msg"].removeprefix("Value error, ")
    if name == "state":
        return f"there is no state {echoed(problem['input'])}; allowed: {', '.join(RunState)}"
    return f"{name} is {echoed(problem['input'])}: {message}" if name else message


class RunPage(Result):
    """A page of runs. `after`: the cursor of the next page; None at the end of the list.

    A page may have fewer runs than the limit although others follow, because the work for one page is limited.
    """

    runs: list[RunSummary]
    after: str | None


async def page(connection: AsyncConnection, wanted: RunFilter, limit: int, after: str | None) -> RunPage:
    """A page of the runs that are wanted. Raises InvalidParameters for a cursor that no page has given."""
    tasks = await tasks_of_tag(connection, wanted)
    before = parse_cursor(after) if after is not None else None
    try:
        rows, key = await run_query.page(connection, wanted.query(tasks), limit, before)
    except OverflowError:
        raise InvalidParameters("an instant of the filter is out of range") from None
    now = await database_time.now_of(connection)
    return RunPage(runs=[RunSummary.at(row, now) for row in rows], after=cursor_of(key) if key else None)


async def tasks_of_tag(connection: AsyncConnection, wanted: RunFilter) -> frozenset[str] | None:
    """The tasks that have the tag of the filter; None without a tag."""
    return await task_rows.tagged(connection, wanted.tag) if wanted.tag is not None else None


def cursor_of(key: Key) -> str:
    """The cursor for a key of a page."""
    at, id = key
    return f"{at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z_{id}"


def parse_cursor(given: str) -> Key:
    """The key in a cursor. Raises InvalidParameters."""
    if re.fullmatch(CURSOR, given):
        at, _, id = given.partition("_")
        try:
            return datetime.fromisoformat(at), id
        except ValueError:
            pass
    raise InvalidParameters(f"after is {echoed(given)}; allowed: the cursor that a page of this list has given")
