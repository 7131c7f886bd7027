"""TaskRegistry: the tasks of this process, checked as they come in."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from service.batch.base import BaseTask
from service.batch.parameters import Parameters
from service.batch.policies import Policies
from service.batch.schedule import Schedule, schedule
from service.errors import BatchError, InvalidTask, UnknownTask
from service.logs import get_logger

logger = get_logger(__name__)

T = TypeVar("T", bound=BaseTask)
R = TypeVar("R")

NAME = re.compile(r"[a-z0-9_.-]{1,100}")


@dataclass(frozen=True)
class Task:
    """A registered task class, with what was read from it when it was registered."""

    cls: type[BaseTask]
    name: str
    description: str
    source: str
    policies: Policies
    parameters: Parameters
    on_loop: bool
    schedule: Schedule | None = field(compare=False)

    @property
    def exclusive(self) -> str | None:
        """What at most one running run may hold: the task's name, or nothing where overlap is allowed."""
        return None if self.policies.overlap == "allow" else self.name

    @property
    def may_change(self) -> bool:
        """Whether the schedule is a property, whose value may differ the next time it is read."""
        statics = (inspect.getattr_static(self.cls, name, None) for name in ("schedule", "timezone"))
        return not all(isinstance(value, str | None) for value in statics)

    def read_schedule(self) -> Schedule | None:
        """Read it from a fresh instance. Raises InvalidTask naming class and file."""
        return _reading(self.cls, _schedule_of)


class TaskRegistry:
    """All tasks of this process (a singleton, as classes are). Order of registration is kept."""

    _tasks: dict[str, Task] = {}  # noqa: RUF012 - the one registry of the process

    @classmethod
    def register(cls, task_class: type[T]) -> type[T]:
        """Check and add a task class, and return it, so it works as a decorator too. The same class twice is one task.

        Raises InvalidTask naming class, file and attribute, also when another class has the name.
        """
        task = _reading(task_class, _task_of)
        known = cls._tasks.get(task.name)
        if known is not None and not _same(known.cls, task_class):
            raise InvalidTask(
                f"two tasks are named {task.name!r}: {known.cls.__qualname__} in {known.source} "
                f"and {task_class.__qualname__} in {task.source}; rename one"
            )
        cls._tasks[task.name] = task
        if known is None:
            logger.debug(f"Registered task: {task.name}")
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
    def get(cls, name: str) -> Task:
        """Raises UnknownTask, which lists the names there are."""
        try:
            return cls._tasks[name]
        except KeyError:
            names = ", ".join(sorted(cls._tasks)) or "none"
            raise UnknownTask(f"no task is named {name!r}; the tasks are: {names}") from None

    @classmethod
    def remove(cls, names: set[str]) -> None:
        """Forget these: the file that registered them failed to import as a whole."""
        cls._tasks = {name: task for name, task in cls._tasks.items() if name not in names}

    @classmethod
    def clear(cls) -> None:
        """For tests: forget all."""
        cls._tasks = {}


def concrete_tasks(module: Any) -> Iterator[type[BaseTask]]:
    """The task classes that this module defines, in order: neither abstract nor named with a leading underscore."""
    for value in list(vars(module).values()):
        if not (inspect.isclass(value) and issubclass(value, BaseTask) and value.__module__ == module.__name__):
            continue
        if not inspect.isabstract(value) and not value.__name__.startswith("_"):
            yield value


def _same(known: type[BaseTask], new: type[BaseTask]) -> bool:
    """The same class, or the same one from a module that was imported again."""
    return known is new or (known.__qualname__ == new.__qualname__ and _file(known) == _file(new))


def _file(cls: type[Any]) -> str:
    try:
        return inspect.getfile(cls)
    except (TypeError, OSError):
        return "<interactive>"


def _reading(cls: type[Any], read: Callable[[Any], R]) -> R:
    """Every error on the way names the class and its file."""
    try:
        return read(cls)
    except BatchError as error:
        raise InvalidTask(f"task class {cls.__qualname__} in {_shown(cls)}: {error.message}") from error


def _shown(cls: type[Any]) -> str:
    file = _file(cls)
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def _task_of(cls: type[BaseTask]) -> Task:
    if not (inspect.isclass(cls) and issubclass(cls, BaseTask)):
        raise InvalidTask("it is not a subclass of BaseTask")
    if inspect.isabstract(cls) or not callable(getattr(cls, "run", None)):
        raise InvalidTask("it has no run(): write `async def run(self)` or `def run(self)`")
    instance = _instance(cls)
    name = _attribute(instance, "name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidTask(f"name is {name!r}; allowed: 1 to 100 of a-z 0-9 _ . -")
    docstring = (inspect.getdoc(cls) or "").split("\n")[0] if cls.__doc__ else ""
    description = str(_attribute(instance, "description") or docstring)
    parameters = Parameters(name, cls.run)
    schedule = _schedule_of(cls)
    if schedule is not None and parameters.required:
        raise InvalidTask(
            f"run() needs {', '.join(parameters.required)}, which a scheduled run can't fill: "
            "give a default, or set schedule = None"
        )
    on_loop = inspect.iscoroutinefunction(cls.run)
    return Task(cls, name, description, _shown(cls), Policies.of(cls), parameters, on_loop, schedule)


def _instance(cls: type[BaseTask]) -> BaseTask:
    try:
        return cls()
    except TypeError as error:
        raise InvalidTask(f"it can't be made without arguments: {error}") from error


def _attribute(instance: BaseTask, name: str) -> Any:
    """A class attribute or property. What a property raises is the author's error, so it is caught here whole."""
    try:
        return getattr(instance, name, None)
    except Exception as error:
        raise InvalidTask(f"{name} can't be read: {type(error).__name__}: {error}") from error


def _schedule_of(cls: type[BaseTask]) -> Schedule | None:
    instance = _instance(cls)
    if not hasattr(cls, "schedule"):
        raise InvalidTask("schedule is missing; allowed: a cron expression, or None to start it by hand only")
    cron = _attribute(instance, "schedule")
    if cron is None:
        return None
    timezone = _attribute(instance, "timezone")
    for name, value in (("schedule", cron), ("timezone", timezone)):
        if not isinstance(value, str):
            raise InvalidTask(f"{name} is {value!r}; allowed: a string" + (" or None" if name == "schedule" else ""))
    return schedule(cron, timezone)
