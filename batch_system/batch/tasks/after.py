"""The slots of other tasks that a task waits for (`after`), as declared and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from batch_system.batch.tasks.declaration import LONGEST, NAME, check

MOST_UPSTREAMS = 20


@dataclass(frozen=True)
class After:
    """The tasks whose slots the runs of a task wait for.

    Attributes:
      tasks: Their names. The first one gives its slots to a task without a schedule of its own.
      within: How many seconds a run waits before it is skipped.
      on: Whether each of these slots has to succeed ("success"), or only to end ("end").
    """

    tasks: tuple[str, ...]
    within: float
    on: str

    def __init__(
        self,
        *tasks: str,
        within: float | timedelta = timedelta(days=1),
        on: Literal["success", "end"] = "success",
    ) -> None:
        """`within`: seconds or a timedelta. Raises InvalidTask, which names the argument and what
        is allowed.
        """
        valid = 0 < len(tasks) <= MOST_UPSTREAMS and len(set(tasks)) == len(tasks)
        valid = valid and all(isinstance(task, str) and NAME.fullmatch(task) for task in tasks)
        check(valid, "after", tasks, f"1 to {MOST_UPSTREAMS} different names of tasks")
        seconds = within.total_seconds() if isinstance(within, timedelta) else within
        valid = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        valid = valid and 0 < seconds <= LONGEST.total_seconds()
        check(valid, "After(within)", within, "seconds above 0 (up to 100 years), or a timedelta")
        check(on in ("success", "end"), "After(on)", on, "'success' or 'end'")
        vars(self).update(tasks=tasks, within=float(seconds), on=on)

    @classmethod
    def of(cls, task: type[Any]) -> After | None:
        """Read the class attribute. Raises InvalidTask."""
        after: Any = task.after
        if after is None or isinstance(after, After):
            return after
        names = (after,) if isinstance(after, str) else after
        check(
            isinstance(names, tuple | list),
            "after",
            after,
            "the name of a task, a tuple of names, or an After(…)",
        )
        return cls(*names)

    def as_json(self) -> dict[str, Any]:
        """The values for the row of a schedule."""
        return {"tasks": list(self.tasks), "within": self.within, "on": self.on}

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> After | None:
        """From the row of a schedule."""
        return cls(*values["tasks"], within=values["within"], on=values["on"]) if values else None
