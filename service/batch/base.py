"""BaseTask: what an author subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from service.batch.policies import Missed, Retry


class BaseTask(ABC):
    """A batch task. A concrete subclass in a file under `tasks/` registers itself.

    Attributes:
        name: `[a-z0-9_.-]{1,100}`, unique; the task's name in the ledger for ever.
        description: One line for people; the first line of the docstring stands in for a missing one.
        schedule: A cron expression, or None for a task that is only started by hand. May be a property:
            it is read again every few seconds.
        timezone: The IANA zone that the schedule is read in.
        timeout: Seconds (or a timedelta) after which an attempt is ended as failed; None: never.
        retry: How often a failed run is tried again.
        overlap: What happens to a slot while a run of the task is active: "skip" it, or "allow" both.
        missed: What happens to slots that came due while nothing ran.
        priority: From -1000 to 1000; larger goes first where runs wait for room.

    Each attempt has a fresh instance.
    """

    if TYPE_CHECKING:  # so that a subclass may use a class attribute or a property, as it likes

        @property
        def name(self) -> str: ...
        @property
        def description(self) -> str: ...
        @property
        def schedule(self) -> str | None: ...
        @property
        def timezone(self) -> str: ...
    else:
        description = ""
        timezone = "UTC"

    timeout: ClassVar[float | timedelta | None] = None
    retry: ClassVar[Retry] = Retry()
    overlap: ClassVar[str] = "skip"
    missed: ClassVar[Missed | str] = Missed()
    rerun: ClassVar[bool] = True
    max_running: ClassVar[int | None] = None
    priority: ClassVar[int] = 0
    fenced: ClassVar[bool] = True

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The work: `async def run(self)` on the event loop, `def run(self)` in a thread; parameters may follow."""
