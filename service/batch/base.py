"""BaseTask: what an author subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from service.batch.policies import Missed, MissedPolicy, OverlapPolicy, Retry

MYPY = False

if TYPE_CHECKING:
    T_co = TypeVar("T_co", covariant=True)

    class Property(Protocol[T_co]):
        """A property whose value is a T_co."""

        def __get__(self, instance: Any, owner: type[Any] | None = None, /) -> T_co: ...


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
        overlap: What happens to a slot while a run of the task is active: "skip" it, let it "wait" for that one's end,
            "allow" both, or "replace" the run that is active.
        max_running: How many runs of the task may run at once, on all nodes together; None: one, and with "allow" any
            number.
        max_waiting: How many slots may wait, with overlap = "wait"; what comes beyond is skipped.
        missed: What happens to slots that came due while nothing ran.
        priority: From -1000 to 1000; larger goes first where runs wait for room.
        fenced: Whether what the run commits to the application's database is refused once another node holds the run.

    Each attempt has a fresh instance.
    """

    # A subclass may use a class attribute or a property, as it likes. mypy (which takes MYPY for true) lets either take
    # the place of a property; pyright (which looks at both branches, and goes by the last) wants to hear of both.
    if TYPE_CHECKING:
        if MYPY:

            @property
            def name(self) -> str: ...
            @property
            def description(self) -> str: ...
            @property
            def schedule(self) -> str | None: ...
            @property
            def timezone(self) -> str: ...
        else:
            name: str | Property[str]
            description: str | Property[str]
            schedule: str | Property[str | None] | None
            timezone: str | Property[str]
    else:
        description = ""
        timezone = "UTC"

    timeout: ClassVar[float | timedelta | None] = None
    retry: ClassVar[Retry] = Retry()
    overlap: ClassVar[OverlapPolicy] = "skip"
    missed: ClassVar[Missed | MissedPolicy] = Missed()
    rerun: ClassVar[bool] = True
    max_running: ClassVar[int | None] = None
    max_waiting: ClassVar[int] = 1
    priority: ClassVar[int] = 0
    fenced: ClassVar[bool] = True

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The work: `async def run(self)` on the event loop, `def run(self)` in a thread; parameters may follow."""
