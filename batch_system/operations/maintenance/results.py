"""The results about maintenance windows."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from batch_system.batch.ledger.states import MaintenanceKind
from batch_system.operations.asking.results import Result


class Maintenance(Result):
    """A maintenance window: from `begins_at` to `ends_at` (UTC) no task of the selection fires
    (`kind` pause), or nothing is sent about these tasks (`kind` mute).

    `tag`, `pool`: which tasks are meant; without both: all tasks. `ends_at`: None for a pause that
    lasts until a person ends it. `state`: planned, now or over. `tasks`: how many tasks are meant
    now. `is_new`: False if such a window lasted already, whose end was changed.
    """

    id: str
    kind: MaintenanceKind
    tag: str | None
    pool: str | None
    begins_at: datetime
    ends_at: datetime | None
    by: str
    note: str | None
    state: Literal["planned", "now", "over"]
    tasks: int
    is_new: bool = False


class MaintenanceList(Result):
    """The maintenance windows that last or are planned, by their beginning."""

    windows: list[Maintenance]
