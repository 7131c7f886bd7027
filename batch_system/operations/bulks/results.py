"""What is answered about bulks: a preview, and a bulk that has begun."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from pydantic import Field

from batch_system.operations.asking.results import Result
from batch_system.operations.starting.results import BackfillCounts

Action = Literal["retry", "cancel", "acknowledge", "reopen", "backfill"]
"""`reopen` undoes `acknowledge`."""

UNDOES: Mapping[str, Action] = {"retry": "cancel", "cancel": "retry", "acknowledge": "reopen"}
"""The bulks that can be undone, each with the action that does it."""


BulkAction = Literal["retry", "cancel", "acknowledge"]


class PreviewedRun(Result):
    """A run of a preview."""

    id: str
    task: str
    state: str
    slot: datetime | None
    created_at: datetime


class Preview(Result):
    """What a bulk would change: `count` runs or slots. `first` and `last`: the newest and the
    oldest of the runs.

    `tasks`: how many runs of each task, of the twenty with most of them.
    `counts`: of a backfill, what would be done with each slot.
    """

    id: str
    action: Action
    count: int
    first: PreviewedRun | None = None
    last: PreviewedRun | None = None
    tasks: dict[str, int] = Field(default_factory=dict)
    counts: BackfillCounts | None = None
    expires_at: datetime


class Bulk(Result):
    """A change of many runs. `position`: how many of the `count` are done. `changed`: how many of
    them were changed.

    The others had another state by then. `finished_at`: None while it goes on.
    """

    id: str
    action: Action
    actor: str
    count: int
    position: int
    changed: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    note: str | None

    @property
    def can_be_undone(self) -> bool:
        return self.finished_at is not None and self.action in UNDOES
