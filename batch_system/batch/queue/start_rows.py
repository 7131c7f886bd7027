"""A start as a row of `batch_starts`, which is committed with the application's data."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from batch_system.batch.ledger.json_rows import storable
from batch_system.batch.ledger.runs import NewRun
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.waits import Gate
from batch_system.batch.queue.requests import LONGEST_KEY, Merging


class StoredStart(BaseModel):
    """What the column `run` has. A name that is not known here was written by a newer version."""

    model_config = ConfigDict(extra="forbid")

    task: str = Field(max_length=100)
    params: dict[str, Any] | None = None
    slot: AwareDatetime | None = None
    key: str | None = Field(default=None, min_length=1, max_length=LONGEST_KEY)
    due_at: AwareDatetime | None = None
    """Before this instant the run does not begin."""
    gate: Gate | None = None
    exclusive: str | None = None
    priority: int = 0
    requested_by: str | None = None
    parent: str | None = None
    traceparent: str | None = None
    merging: Merging | None = None

    def new_run(self, id: str, at: datetime, now: datetime, follow_up: str | None) -> NewRun:
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
        new.id, new.traceparent = id, self.traceparent
        if follow_up != id:
            new.awaited_by = follow_up
        if self.due_at is not None:
            new.wait(self.due_at, self.gate)
        return new


FIELDS = tuple(StoredStart.model_fields.keys() - {"due_at", "merging"})


def stored(
    run: NewRun, follow_up: NewRun | None = None, merging: Merging | None = None
) -> dict[str, Any]:
    """The row of a new run, by column. `follow_up`: that of its group."""
    values = vars(run)
    kept = {name: values[name] for name in FIELDS if values[name] is not None}
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
