"""TaskRegistry: the tasks that this process has loaded. Each is checked when it is registered."""

from __future__ import annotations

import functools
import hashlib
import inspect
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from zoneinfo import ZoneInfo

from batch_system.batch.cron.cron import Schedule
from batch_system.batch.cron.zones import zone_of
from batch_system.batch.tasks.after import After
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.calendars import ExceptOn
from batch_system.batch.tasks.declaration import (
    MONITORING,
    POLICIES,
    Monitoring,
    Policies,
    description_of,
    instance,
    name_of,
    one_line,
    refuse_abstract,
    static,
    tags_of,
)
from batch_system.batch.tasks.limit import Queueing
from batch_system.batch.tasks.parameters import Parameters
from batch_system.batch.tasks.partitioned_task import PartitionedTask
from batch_system.batch.tasks.partitions import Partition
from batch_system.batch.tasks.task_schedule import (
    has_schedule,
    schedule_in,
    schedule_of,
    timezone_of,
)
from batch_system.errors import InvalidTask, UnknownTask
from batch_system.escaping import echoed
from batch_system.redaction import Redaction
from batch_system.settings.reading import get_settings

T = TypeVar("T", bound=BaseTask)
R = TypeVar("R")
DIGEST_DIGITS = 16
OF_PARTS = "/parts"  # this suffix on a task's name makes the name of the queue of its parts


@dataclass(frozen=True, slots=True)
class Task:
    """A registered task class, with the values that were read from it at its registration.

    Attributes:
      source: The file of the class, relative to the working directory if it is inside it.
      digest: The beginning of the SHA-256 of that file; None if it can't be read.
      on_loop: Whether `run`, or each stage of a partitioned task, is a coroutine function;
          otherwise it runs in a thread.
      may_change: Whether schedule or timezone is a property, or the dates of except_on are read
          from elsewhere, so that the value may differ the next time.
      schedule: None for a task that is only started by hand.
      partition: The declarations of a partitioned task; None for other tasks.
      queueing: In which queue each of its runs is.
    """

    cls: type[BaseTask]
    name: str
    description: str
    source: str
    digest: str | None
    policies: Policies
    parameters: Parameters
    on_loop: bool
    may_change: bool
    zone: ZoneInfo
    schedule: Schedule | None = field(compare=False)
    monitoring: Monitoring
    tags: tuple[str, ...] = ()
    after: After | None = None
    partition: Partition | None = None
    queueing: Queueing = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "queueing", self._queueing())

    def _queueing(self) -> Queueing:
        limit = self.policies.limit
        if limit is None:
            return Queueing(self.name, self.exclusive)
        default = self.parameters.defaults().get(limit.key) if limit.key is not None else None
        return Queueing(self.name, None, limit.plain, default, self.policies.rate)

    @property
    def follows(self) -> str | None:
        """The task whose slots this one shares, for a task without a schedule that waits for
        others.
        """
        return (
            self.after.tasks[0] if self.after is not None and not has_schedule(self.cls) else None
        )

    @property
    def pool(self) -> str:
        """The name of the pool in which its runs execute."""
        return self.policies.pool

    @property
    def exclusive(self) -> str | None:
        """The name of the queue whose runs take lanes: the task's name, or None if any number may
        run at once.
        """
        return (
            None
            if self.policies.overlap == "allow" and self.policies.max_running is None
            else self.name
        )

    @property
    def queue_of_parts(self) -> str:
        """The name of the queue whose lanes the parts of its runs take."""
        return self.name + OF_PARTS

    @property
    def lanes(self) -> int:
        """How many runs of the queue may run at once."""
        limit = self.policies.limit
        return limit.usual if limit is not None else self.policies.max_running or 1

    def read_schedule(self) -> Schedule | None:
        """Read the schedule from a new instance. Raises InvalidTask, which names the class and its
        file.
        """
        return _read(self.cls, schedule_of)


class TaskRegistry:
    """All tasks of this process, in the order of their registration. The class itself is the only
    instance.
    """

    _tasks: dict[str, Task] = {}  # noqa: RUF012 - the one registry of the process

    @classmethod
    def register(cls, task_class: type[T]) -> type[T]:
        """Check and add a task class, and return it, so that this is also a decorator. A class may
        be registered twice.

        Raises InvalidTask, which names class, file and attribute, also if another class has the
        same task name.
        """
        if not inspect.isclass(task_class):
            raise InvalidTask(
                f"a task must be a subclass of BaseTask, and {echoed(task_class)} is not a class"
            )
        task = _read(task_class, _task_of)
        existing = cls._tasks.get(task.name)
        if existing is not None and not _is_same(existing.cls, task_class):
            raise InvalidTask(
                f"two tasks are named {echoed(task.name)}: {existing.cls.__qualname__} in "
                f"{existing.source} is used, "
                f"and {task_class.__qualname__} in {task.source} is not; rename one"
            )
        cls._tasks[task.name] = task
        return task_class

    @classmethod
    def get_all_tasks(cls) -> list[type[BaseTask]]:
        """The registered classes, in the order of their registration."""
        return [task.cls for task in cls._tasks.values()]

    @classmethod
    def tasks(cls) -> dict[str, Task]:
        """The registered tasks by name."""
        return dict(cls._tasks)

    @classmethod
    def number(cls) -> int:
        """How many tasks are registered."""
        return len(cls._tasks)

    @classmethod
    def names_after(cls, number: int) -> set[str]:
        """The names of the tasks that were registered after the first `number` ones."""
        return set(itertools.islice(cls._tasks, number, None))

    @classmethod
    def get(cls, name: str) -> Task:
        """The task with this name. Raises UnknownTask, which lists the names of all tasks."""
        try:
            return cls._tasks[name]
        except KeyError:
            raise UnknownTask.named(name, cls._tasks) from None

    @classmethod
    def of(cls, task_class: type[BaseTask]) -> Task:
        """The task of a class, which is registered first if necessary. Raises InvalidTask."""
        for task in cls._tasks.values():
            if task.cls is task_class:
                return task
        cls.register(task_class)
        return next(task for task in cls._tasks.values() if task.cls is task_class)

    @classmethod
    def replace(cls, tasks: Mapping[str, Task]) -> None:
        """Replace the tasks with these names."""
        cls._tasks |= tasks

    @classmethod
    def remove(cls, names: set[str]) -> None:
        """Remove these tasks, because the import of the file that registered them failed."""
        cls._tasks = {name: task for name, task in cls._tasks.items() if name not in names}

    @classmethod
    @contextmanager
    def restored(cls) -> Iterator[None]:
        """For tests: the end of the block restores the tasks from before it."""
        before = cls._tasks
        cls._tasks = dict(before)
        try:
            yield
        finally:
            cls._tasks = before

    @classmethod
    def clear(cls) -> None:
        """For tests: remove all tasks."""
        cls._tasks = {}


def task_classes(module: Any) -> Iterator[type[BaseTask]]:
    """The task classes that a module defines, in order, including abstract ones; classes whose
    names begin with `_` are left out.
    """
    for value in list(vars(module).values()):
        is_here = _is_task(value) and value.__module__ == module.__name__
        if is_here and not value.__name__.startswith("_"):
            yield value


def _is_task(value: Any) -> bool:
    """Whether it is a subclass of BaseTask.

    `issubclass` would remember each class that it was asked about; for one that is not a task it
    checks all tasks.
    """
    return isinstance(value, type) and BaseTask in value.__mro__


def _is_same(existing: type[BaseTask], new: type[BaseTask]) -> bool:
    """Whether both are the same class, possibly from a module that was imported twice."""
    return existing is new or (
        existing.__qualname__ == new.__qualname__ and _file(existing) == _file(new)
    )


def _file(cls: type[Any]) -> str:
    try:
        return inspect.getfile(cls)
    except (TypeError, OSError):
        return "<interactive>"


def _read(cls: type[Any], read: Callable[[Any], R]) -> R:
    """Call `read(cls)`. Any error, including those of the author's code, becomes an InvalidTask
    that names class and file.
    """
    try:
        return read(cls)
    except (Exception, SystemExit) as error:
        raise InvalidTask(
            f"task class {cls.__qualname__} in {_path(cls)}: {one_line(error)}"
        ) from error


def _path(cls: type[Any]) -> str:
    """The file of a class, relative to the working directory if it is inside it."""
    return _relative(_file(cls), os.getcwd())


@functools.lru_cache(maxsize=100)
def _relative(file: str, folder: str) -> str:
    try:
        return str(Path(file).relative_to(folder))
    except ValueError:
        return file


def _digest(file: str) -> str | None:
    try:
        status = os.stat(file)
        return _digest_of(file, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@functools.lru_cache(maxsize=100)
def _digest_of(file: str, changed_at: int, size: int) -> str:
    """The digest of a file, which is read once for all classes in it."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:DIGEST_DIGITS]


def _task_of(cls: type[BaseTask]) -> Task:
    if not _is_task(cls):
        raise InvalidTask("it is not a subclass of BaseTask")
    refuse_abstract(cls)
    task: BaseTask = instance(cls)
    run = task.run
    if inspect.isgeneratorfunction(run) or inspect.isasyncgenfunction(run):
        raise InvalidTask("run() contains a yield, so its body would never run: use return instead")
    name = name_of(task)
    parameters = Parameters(name, *task._methods_with_parameters())
    schedule, after = schedule_in(task), After.of(cls)
    partition = Partition.of(task, PartitionedTask) if PartitionedTask in cls.__mro__ else None
    if (schedule is not None or after is not None) and parameters.required:
        raise InvalidTask(
            f"run() needs {', '.join(parameters.required)}, for which a scheduled run has no "
            "value: "
            "give a default, or set schedule = None"
        )
    except_on = ExceptOn.of(cls.except_on)
    if except_on is not None and not has_schedule(cls):
        raise InvalidTask(
            "except_on is set, but the class has no schedule; allowed: with a schedule of its own"
        )
    policies, monitoring = _declared(cls, parameters.takes_slot)
    _check_key(cls, policies, parameters)
    return Task(
        cls=cls,
        name=name,
        description=description_of(task),
        source=_path(cls),
        digest=_digest(_file(cls)),
        policies=policies,
        parameters=parameters,
        on_loop=inspect.iscoroutinefunction(run)
        if partition is None
        else all(partition.on_loop.values()),
        may_change=(except_on is not None and except_on.may_change)
        or not all(
            isinstance(static(cls, attribute), str | None) for attribute in ("schedule", "timezone")
        ),
        zone=zone_of(timezone_of(task)),
        schedule=schedule,
        monitoring=monitoring,
        tags=tags_of(cls),
        after=after,
        partition=partition,
    )


def _check_key(cls: type[BaseTask], policies: Policies, parameters: Parameters) -> None:
    """Raise InvalidTask if the key of the limit or rate is no parameter that all may see."""
    key = policies.limit.key if policies.limit is not None else None
    if key is None:
        return
    if key not in parameters.names:
        which = "Limit" if cls.limit is not None else "Rate"
        raise InvalidTask(
            f"{which}(key) is {key!r}, which is no parameter of run(); allowed: "
            f"{', '.join(parameters.names) or 'none, because run() has no parameters'}"
        )
    if Redaction.of(get_settings().BATCH_SECRET_WORDS).is_secret(key):
        raise InvalidTask(
            f"the key of the limit or rate is {key!r}, which is secret by BATCH_SECRET_WORDS, and "
            "the names of queues show its values; allowed: another parameter"
        )


def _declared(cls: type[BaseTask], takes_slot: bool) -> tuple[Policies, Monitoring]:
    """The policies and the monitoring of a class. Tasks with equal declarations share them."""
    if all(getattr(cls, name) is value for name, value in DEFAULTS):
        return _declared_nothing(takes_slot)
    policies, monitoring = Policies.of(cls), Monitoring.of(cls, takes_slot)
    try:
        return _shared(policies), _shared(monitoring)
    except TypeError:  # such as a subclass of Retry that has no hash
        return policies, monitoring


DEFAULTS = tuple((name, getattr(BaseTask, name)) for name in (*POLICIES, *MONITORING))


@functools.cache
def _declared_nothing(takes_slot: bool) -> tuple[Policies, Monitoring]:
    return Policies.of(BaseTask), Monitoring.of(BaseTask, takes_slot)


@functools.lru_cache(maxsize=1_000)
def _shared(declared: R) -> R:
    """The first of equal values, so that it is stored once."""
    return declared
