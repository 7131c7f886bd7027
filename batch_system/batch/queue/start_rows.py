"""A start as a row of `batch_starts`, which is committed with the application's data."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, model_validator
from sqlalchemy import Row

from batch_system.batch.ledger.json_rows import storable
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.waits import Gate
from batch_system.batch.queue.requests import LONGEST_KEY, Merging
from batch_system.batch.tasks.declaration import LONGEST

ID = r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
Seconds = Annotated[float, Field(gt=0, le=LONGEST.total_seconds())]


class StoredMerging(BaseModel):
    """How a start is merged: see Merging."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field(max_length=LONGEST_KEY)
    debounce: Seconds | None = None
    at_most: Seconds | None = None
    once_in: Seconds | None = None

    @model_validator(mode="after")
    def _is_one_kind(self) -> Self:
        kinds = [(self.debounce, self.at_most), (self.once_in, self.once_in)]
        if sum(None not in kind for kind in kinds) != 1:
            raise ValueError("allowed: debounce and at_most, or once_in")
        return self

    def merging(self) -> Merging:
        return Merging(self.key, self.debounce, self.at_most, self.once_in)


class StoredStart(BaseModel):
    """A row. What its column `run` has that is not known here was written by a newer version.

    It is as hostile as the application's database: nothing in it may make a statement of the ledger
    fail, which hands over other starts too.
    """

    model_config = ConfigDict(extra="forbid")

    id: str = Field(pattern=ID)
    follow_up: str | None = Field(default=None, pattern=ID)
    task: str = Field(max_length=100)
    params: dict[str, Any] | None = None
    slot: AwareDatetime | None = None
    key: str | None = Field(default=None, min_length=1, max_length=LONGEST_KEY)
    due_at: AwareDatetime | None = None
    """Before this instant the run does not begin."""
    gate: Gate | None = None
    exclusive: str | None = Field(default=None, max_length=120)
    priority: int = Field(default=0, ge=-1000, le=1000)
    rank: int = Field(default=Rank.MANUAL, ge=Rank.INTERRUPTED, le=Rank.CATCH_UP)
    requested_by: str | None = None
    parent: str | None = Field(default=None, pattern=ID)
    traceparent: str | None = Field(default=None, max_length=55)
    merging: StoredMerging | None = None

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """Read a row whose `run` is a text. Raises ValidationError."""
        run = _JSON.validate_json(row.run)
        return cls.model_validate({**run, "id": row.id, "follow_up": row.follow_up})

    def new_run(self, at: datetime, now: datetime) -> NewRun:
        """The run of a start that was requested at `at`. `now`: the time of the ledger."""
        new = NewRun.queued(
            self.task,
            self.slot,
            min(at, now),
            exclusive=self.exclusive,
            priority=self.priority,
            params=self.params,
            requested_by=self.requested_by,
            key=self.key,
            parent=self.parent,
        )
        new.id, new.traceparent, new.rank = self.id, self.traceparent, self.rank
        if self.follow_up != self.id:
            new.awaited_by = self.follow_up
        if self.due_at is not None:
            new.wait(self.due_at, self.gate)
        return new


_JSON = TypeAdapter(dict[str, Any])
FIELDS = tuple(StoredStart.model_fields.keys() - {"id", "follow_up", "due_at", "merging", "rank"})


def stored(
    run: NewRun, follow_up: NewRun | None = None, merging: Merging | None = None
) -> dict[str, Any]:
    """The row of a new run, by column. `follow_up`: that of its group."""
    values = vars(run)
    kept = {name: values[name] for name in FIELDS if values[name] is not None}
    if run.rank != Rank.MANUAL:  # an older version knows no ranks here
        kept["rank"] = run.rank
    if run.slot is not None:
        kept["slot"] = run.slot.isoformat()
    if run.state == RunState.WAITING:
        kept["due_at"] = run.due_at.isoformat()
    if merging is not None:
        kept["merging"] = asdict(merging)
    return {
        "id": run.id,
        "at": run.created_at,
        "follow_up": follow_up.id if follow_up is not None else None,
        "run": storable(kept),
    }
