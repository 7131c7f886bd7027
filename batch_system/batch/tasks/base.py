"""BaseTask: the base class of all tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Mapping
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, overload

from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.calendars import Calendar, Holidays
from batch_system.batch.tasks.declaration import Alerts, Missed, MissedPolicy, OverlapPolicy, Retry
from batch_system.batch.tasks.limit import Limit, Rate
from batch_system.settings.pools import DEFAULT_POOL

MYPY = False
T = TypeVar("T")
Excluded = date | Collection[date] | Mapping[date, str] | Holidays | Calendar | None

if TYPE_CHECKING:
    from sqlalchemy import Row, Select

    from batch_system.batch.chunks.chunks import Chunks
    from batch_system.batch.chunks.sources import CursorSource, File
    from batch_system.batch.chunks.steps import Step

    T_co = TypeVar("T_co", covariant=True)

    class Property(Protocol[T_co]):
        """A property whose value is a T_co."""

        def __get__(self, instance: Any, owner: type[Any] | None = None, /) -> T_co: ...


class BaseTask(ABC):
    """A batch task. A concrete subclass in a file under `tasks/` registers itself.

    Attributes:
      name: The unique name of the task in the ledger, `[a-z0-9_.-]{1,100}`. Under another name it
          is another task.
      description: One line for people; by default the first line of the docstring.
      schedule: A cron expression, or None for a task that is only started by hand. It may be a
          property, which is read again every few seconds.
      timezone: The IANA name of the time zone of the schedule.
      except_on: Dates without slots in the zone of the schedule: a date, a list of dates, a mapping
          of dates to names, Holidays("DE", "BY"), Calendar("bank"), or a tuple of these.
      after: The names of tasks whose slots this one waits for, or an After(…). Without a schedule
          of its own, the task has the slots of the first of them.
      timeout: Seconds (or a timedelta) after which an attempt is ended as failed; None for no
          timeout.
      retry: How often a failed run is tried again, and after which waits.
      overlap: What happens to a slot while a run of the task is active: "skip" skips it, "wait"
          lets it wait for the end of that run, "allow" starts it, "replace" cancels that run.
      max_running: How many runs of the task may run at once, on all nodes together. None stands
          for one, or with overlap = "allow" for any number.
      limit: How many runs may run at once, such as Limit(2, key="tenant"): two for each value of
          the parameter `tenant`. Slots are not skipped then, as with overlap = "allow".
      rate: How many runs may begin within a period, such as Rate(10, per=60, key="tenant"): ten in
          a minute for each value of `tenant`. Slots wait for it.
      max_waiting: How many slots may wait with overlap = "wait"; further slots are skipped.
      missed: What happens to slots that came due while no service ran.
      rerun: Whether a run goes on in a new attempt after its process stopped or was lost; False
          makes it fail.
      priority: From -1000 to 1000. If runs of several tasks wait, larger numbers start first.
      pool: Where its runs execute, `[a-z0-9_]{1,40}`. "default" is the event loop and the threads
          of the service. A setting defines any other name, such as BATCH_POOL_CPU for the pool
          "cpu".
      memory: How much memory a run may use, such as "2 GiB", if its pool has a process for each
          run.
      tags: Names by which lists of tasks and runs are filtered, each `[a-z0-9_.-]{1,100}`. The
          parameters, results and logs of a task with the tag "secret" are hidden from viewers.
      owner: Whose task it is, such as "payments #payments-oncall". Messages about incidents name
          the owner.
      runbook: The address of a page that says what to do when the task fails.
      alerts: When incidents of the task are sent, and to whom.
      deadline: Until when a slot must have succeeded: a time of day in the task's zone ("06:00",
          the first one after the slot), or a timedelta after the slot.
      expect: A function that gets the result of a run and returns whether the run did what it is
          for, such as `lambda result: result["rows"] > 0`. If it is false, the run has succeeded,
          but is reported as empty.
      expect_every: The seconds (or a timedelta) within which a run of the task must succeed.
      each_slot_counts: Whether a failed slot is made good only by a success of the same slot
          (True), or by any later success (False). None: True if `run` has a parameter `slot`.
      ping: The address of a dead man's switch, called when a run begins (/start), succeeds, or
          fails (/fail).
      fenced: Whether commits of a run to the application's database are refused once another node
          holds the run.

    Each attempt uses a new instance.
    """

    # A subclass may use a class attribute or a property. mypy (for which MYPY is true) lets both
    # override a property; pyright (which checks both branches, and uses the last declaration) needs
    # the union of both.
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

    except_on: ClassVar[Excluded | tuple[Excluded, ...]] = None
    after: ClassVar[str | tuple[str, ...] | After | None] = None
    timeout: ClassVar[float | timedelta | None] = None
    retry: ClassVar[Retry] = Retry()
    overlap: ClassVar[OverlapPolicy] = "skip"
    missed: ClassVar[Missed | MissedPolicy] = Missed()
    rerun: ClassVar[bool] = True
    max_running: ClassVar[int | None] = None
    max_waiting: ClassVar[int] = 1
    limit: ClassVar[Limit | None] = None
    rate: ClassVar[Rate | None] = None
    priority: ClassVar[int] = 0
    pool: ClassVar[str] = DEFAULT_POOL
    memory: ClassVar[str | int | None] = None
    tags: ClassVar[tuple[str, ...]] = ()
    owner: ClassVar[str | None] = None
    runbook: ClassVar[str | None] = None
    alerts: ClassVar[Alerts] = Alerts()
    deadline: ClassVar[str | timedelta | None] = None
    expect: ClassVar[Callable[[Any], Any] | None] = None
    expect_every: ClassVar[float | timedelta | None] = None
    each_slot_counts: ClassVar[bool | None] = None
    ping: ClassVar[str | None] = None
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
        """Process many items in transactions of `size` items. A later attempt goes on after the
        last committed one.

          async for chunk in self.chunks(select(User), key=User.id):
              async with chunk as (db, users):
                  ...

        Args:
          source: A select without ORDER BY and LIMIT; or an iterable, an async iterable, or an
              object with `async def after(self, cursor, size)`, which returns items and the
              cursor after them.
          key: The columns that identify and order the rows of a select: a column, its desc(), or
              a tuple of these.
          name: The name of the loop's position, needed for a loop inside a loop. By default it is
              the number of the loop in the run.
          start: The key of the first row, which is included.
          stop: The key at which the loop ends, which is excluded.
          pause: The seconds between two chunks.
          retry_chunk: Whether a chunk is tried up to five times if the database refuses it for a
              temporary reason (a deadlock, a serialization failure, a lost connection). Use it
              only if the body changes nothing else.
          total: Whether the items are counted when the loop begins, to show progress in percent
              and an expected end. It costs a COUNT(*) in each attempt, at the same time as the
              work.
          file: The file that an iterable such as csv.reader(file) reads. A later attempt fails if
              it has changed.

        Raises ChunkError for arguments with which items could be lost or processed twice.
        """
        from batch_system.batch.chunks.chunks import chunks

        return chunks(
            source, size, name, pause, retry_chunk, total, file, key=key, start=start, stop=stop
        )

    def step(self, name: str) -> Step:
        """A part of a run that later attempts do not repeat once it is done.

            async with self.step("download") as step:
                if not step.is_done:
                    step.result = await download()

        Changes made with `step.db` are committed together with the result, which must fit into
        JSON. Raises ChunkError.
        """
        from batch_system.batch.chunks.steps import Step

        return Step(name)

    def _methods_with_parameters(self) -> tuple[Callable[..., Any], ...]:
        """`run`, and the methods to which it passes the values of its `**parameters`."""
        return (self.run,)

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The work: `async def run(self)` runs on the event loop, `def run(self)` in a thread. It
        may have parameters.
        """
