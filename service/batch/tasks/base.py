"""BaseTask: what an author subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, overload

from service.batch.tasks.policies import Missed, MissedPolicy, OverlapPolicy, Retry

MYPY = False
T = TypeVar("T")

if TYPE_CHECKING:
    from sqlalchemy import Row, Select

    from service.batch.chunks.chunks import Chunks
    from service.batch.chunks.sources import CursorSource, File
    from service.batch.chunks.steps import Step

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

    @overload
    def chunks(
        self,
        source: Select[T],
        *,
        key: Any,
        size: int = ...,
        name: str | None = ...,
        start: Any = ...,
        stop: Any = ...,
        pause: float = ...,
        retry_chunk: bool = ...,
        total: bool = ...,
    ) -> Chunks[T]: ...
    @overload
    def chunks(
        self,
        source: Select[*tuple[Any, ...]],
        *,
        key: Any,
        size: int = ...,
        name: str | None = ...,
        start: Any = ...,
        stop: Any = ...,
        pause: float = ...,
        retry_chunk: bool = ...,
        total: bool = ...,
    ) -> Chunks[Row[*tuple[Any, ...]]]: ...
    @overload
    def chunks(
        self,
        source: Iterable[T] | AsyncIterable[T] | CursorSource[T],
        *,
        size: int = ...,
        name: str | None = ...,
        pause: float = ...,
        retry_chunk: bool = ...,
        total: bool = ...,
        file: File | None = ...,
    ) -> Chunks[T]: ...
    def chunks(
        self,
        source: Any,
        *,
        key: Any = None,
        size: int = 1000,
        name: str | None = None,
        start: Any = None,
        stop: Any = None,
        pause: float = 0,
        retry_chunk: bool = False,
        total: bool = False,
        file: File | None = None,
    ) -> Chunks[Any]:
        """Long work in transactions of `size` items; a later attempt goes on behind the last one that was committed.

            async for chunk in self.chunks(select(User), key=User.id):
                async with chunk as (db, users):
                    ...

        Args:
            source: A select without an order and a limit of its own; or an iterable, an async one, or an object with
                `async def after(self, cursor, size)`, which returns items and the cursor behind them.
            key: The columns that tell a select's rows apart and order them: one, its desc(), or a tuple of such.
            name: Of its place; needed for a loop inside a loop. Default: by its number in the run.
            start: The first key, which is included.
            stop: The key before which it ends.
            pause: Seconds between two chunks.
            retry_chunk: Hand a chunk out again, up to five times, when the database refused it for a reason that passes
                (a deadlock, a serialization failure, a lost connection). Only for bodies that touch nothing else.
            total: Count the items when the loop begins, so that it is known which share is done, and when the rest will
                be. That is a COUNT(*) beside the work, in each attempt.
            file: The file that an iterable reads, such as csv.reader(file): a later attempt refuses a changed one.

        Raises ChunkError for what would lose or double items.
        """
        from service.batch.chunks.chunks import chunks

        return chunks(source, size, name, pause, retry_chunk, total, file, key=key, start=start, stop=stop)

    def step(self, name: str) -> Step:
        """A part of a run that is not repeated once it is done, in whatever attempt.

            async with self.step("download") as step:
                if not step.is_done:
                    step.result = await download()

        What `step.db` changed is committed together with the result (JSON). Raises ChunkError.
        """
        from service.batch.chunks.steps import Step

        return Step(name)

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The work: `async def run(self)` on the event loop, `def run(self)` in a thread; parameters may follow."""
