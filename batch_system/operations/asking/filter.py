"""The filter that people and programs give when they ask for runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from batch_system.batch.ledger.states import Origin, RunState
from batch_system.errors import InvalidParameters
from batch_system.operations.asking.cursors import EPOCH
from batch_system.operations.asking.sentences import About, Allowed, in_words

PARAMETER = r"^[A-Za-z_][A-Za-z0-9_]{0,99}=[^\x00]{0,500}$"
TASK_NAME = r"^[a-z0-9_.-]{1,100}$"
POOL_NAME = r"^[a-z0-9_]{1,40}$"
ID = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"
TEXT = r"^[^\x00]*$"
FINGERPRINT = r"^[0-9a-z_:-]+( [0-9a-z_:-]+)*$"

TaskName = Annotated[
    str,
    StringConstraints(pattern=TASK_NAME),
    Allowed("allowed are 1 to 100 letters from a to z, digits, and _ . -"),
    About("The name of the task."),
]
PoolName = Annotated[
    str,
    StringConstraints(pattern=POOL_NAME),
    Allowed("allowed are 1 to 40 letters from a to z, digits, and _"),
    About("The name of the pool."),
]
RunId = Annotated[str, StringConstraints(pattern=ID)]

MOST_NAMED = 500
"""A filter names at most this many runs."""

EARLIEST, LATEST = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


def _only_rfc_3339(value: Any) -> Any:
    """Refuse numbers and other texts, which pydantic would also take for an instant."""
    if isinstance(value, datetime) or (isinstance(value, str) and RFC_3339.fullmatch(value)):
        return value
    raise ValueError("allowed: an instant with its offset, such as 2026-11-27T02:00:00Z")


def _in_utc(value: datetime) -> datetime:
    """The instant in UTC; one outside the calendar's years becomes the earliest or the latest
    instant.
    """
    try:
        return value.astimezone(UTC)
    except OverflowError:
        return EARLIEST if value < EPOCH else LATEST


class Direction(Enum):
    """Whether a length of time, given instead of an instant, counts back or forward from now."""

    BACK = "back"
    FORWARD = "forward"


@dataclass(frozen=True)
class CountsFrom:
    """A length of time counts from the instant in another field, if that is given."""

    field: str


Instant = Annotated[AwareDatetime, BeforeValidator(_only_rfc_3339), AfterValidator(_in_utc)]
Since = Annotated[Instant, Direction.BACK]
"""An instant. A command also takes an age instead: 2h is two hours ago."""
Ahead = Annotated[Instant, Direction.FORWARD]
"""An instant. A command also takes a length of time instead: 2h is in two hours."""


class RunFilter(BaseModel):
    """Which runs are meant. All conditions have to hold; several states, or origins, are
    alternatives.

    Instants are aware. `…_since` is included, `…_until` is not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: list[RunId] = Field(
        [], max_length=MOST_NAMED, description="Only these runs, parts among them."
    )
    task: TaskName | None = Field(None, description="Only runs of this task.")
    tag: TaskName | None = Field(None, description="Only runs of tasks that have this tag.")
    pool: PoolName | None = Field(None, description="Only runs of tasks of this pool.")
    state: list[RunState] = Field(
        [], max_length=len(RunState), description="Only runs in one of these states."
    )
    not_state: list[RunState] = Field(
        [], max_length=len(RunState), description="No runs in one of these states."
    )
    exclude: list[TaskName] = Field([], max_length=100, description="No runs of these tasks.")
    origin: list[Origin] = Field(
        [], max_length=len(Origin), description="Only runs of one of these origins."
    )
    parent: RunId | None = Field(
        None, description="Only the parts of this run. Other lists have no parts."
    )
    node: RunId | None = Field(
        None, description="Only runs that this node executes, or executed last."
    )
    created_since: Since | None = Field(
        None, description="Only runs that were made at this instant or later."
    )
    created_until: Since | None = Field(
        None, description="Only runs that were made before this instant."
    )
    slot_since: Since | None = Field(None, description="Only runs of this slot or later ones.")
    slot_until: Since | None = Field(None, description="Only runs of slots before this instant.")
    ended_since: Since | None = Field(
        None, description="Only runs that ended at this instant or later."
    )
    ended_until: Since | None = Field(None, description="Only runs that ended before this instant.")
    param: list[
        Annotated[str, StringConstraints(pattern=PARAMETER), Allowed("allowed: name=value")]
    ] = Field(
        [], max_length=10, description="Only runs whose parameter has this value: NAME=VALUE."
    )
    text: Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=TEXT)] | None = (
        Field(
            None,
            description="Only runs whose reason, such as the message of an error, contains this "
            "text.",
        )
    )
    fingerprint: (
        Annotated[
            str,
            StringConstraints(max_length=40, pattern=FINGERPRINT),
            Allowed('allowed is what `batch show` says, such as 1:1f2e3d4c5b6a or "timed out"'),
        ]
        | None
    ) = Field(
        None,
        description="Only runs with this error, by its fingerprint, which a run and an incident "
        "have.",
    )

    @classmethod
    def of(cls, **conditions: Any) -> Self:
        """Make a filter. Raises InvalidParameters, which names the condition and what is
        allowed.
        """
        try:
            return cls(**conditions)
        except ValidationError as error:
            raise InvalidParameters(in_words(error, cls)) from None

    @property
    def states(self) -> frozenset[str]:
        """The states that are meant; empty for all. Raises InvalidParameters if none is left."""
        meant = frozenset(self.state or RunState) - frozenset(self.not_state)
        if not meant:
            raise InvalidParameters("state and not_state: they leave no state")
        return meant if self.state or self.not_state else frozenset()

    @property
    def params(self) -> dict[str, str]:
        """The required values of parameters, by the names of the parameters."""
        return dict(condition.split("=", 1) for condition in self.param)

    @property
    def is_empty(self) -> bool:
        """Whether all runs are meant."""
        return all(getattr(self, name) in (None, []) for name in RunFilter.model_fields)
