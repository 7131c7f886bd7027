"""What is asked of a backfill, and what is answered about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import Field

from batch_system.operations.asking.results import Result


@dataclass(frozen=True)
class BackfillRequest:
    """The request for a backfill.

    Attributes:
        task: The name of a loaded task.
        since: The first instant, aware.
        until: The last instant, aware, included.
        redo: Give runs that have ended a new attempt from the beginning.
        allow_many: Allow more than MOST_SLOTS slots.
        dry_run: Change nothing.
        and_after: Do the same with the slots of the tasks that come after, which wait for these
            slots.
    """

    task: str
    since: datetime
    until: datetime
    redo: bool = False
    allow_many: bool = False
    dry_run: bool = False
    and_after: bool = False

    def as_json(self) -> dict[str, Any]:
        """The request as the ledger stores it."""
        interval = {"since": self.since.isoformat(), "until": self.until.isoformat()}
        and_after = {"and_after": True} if self.and_after else {}
        return {"task": self.task, **interval, "redo": self.redo, **and_after}

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> BackfillRequest:
        """The request that `as_json` has stored."""
        since, until = (datetime.fromisoformat(stored[name]) for name in ("since", "until"))
        and_after = bool(stored.get("and_after"))
        return cls(
            stored["task"], since, until, stored["redo"], allow_many=True, and_after=and_after
        )


class BackfillSlot(Result):
    """A slot of a backfill: `action` is new, again or left; `run` and `state` are those of the run
    that it had.
    """

    slot: datetime
    action: str
    run: str | None
    state: str | None


class BackfillCounts(Result):
    """How many slots got a run (`new`), had their run repeated (`again`), or were unchanged
    (`left`).

    `after`: the same of the tasks that come after, by name. `pruned`: how many of the new runs are
    skipped at once, because there are no runs any more of the slots that they wait for. Only a
    preview counts them. `left_out`: the first 100 dates of the interval without slots, by the
    `except_on` of the task.
    """

    new: int
    again: int
    left: int
    pruned: int = 0
    after: dict[str, BackfillCounts] = Field(default_factory=dict)
    left_out: list[str] = Field(default_factory=list)

    @property
    def slots(self) -> int:
        """The number of all slots."""
        return self.new + self.again + self.left

    @property
    def changed(self) -> int:
        """How many runs are made or repeated, also of the tasks that come after."""
        return self.new + self.again + sum(counts.changed for counts in self.after.values())
