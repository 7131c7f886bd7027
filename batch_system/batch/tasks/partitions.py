"""Partitions: the declarations of a partitioned task, its parts, and how they are stored."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from batch_system.batch.chunks import cursor_json
from batch_system.batch.context.upstream import Done
from batch_system.batch.ledger.parts import PartsGate
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin
from batch_system.batch.tasks.declaration import MOST_RUNNING, check
from batch_system.batch.tasks.parameters import TOO_DEEP
from batch_system.errors import ChunkError, InvalidParameters, InvalidTask
from batch_system.escaping import echoed, is_deep

MOST_PARTS = 10_000
MOST_CHARACTERS = 8_000_000
"""The largest size of the parameters of all parts of a run as JSON, in characters."""

_TYPED = "$"
"""The key under which a value is stored that is not JSON, such as a date."""


class Stage(StrEnum):
    """Which method of a partitioned task an attempt calls."""

    SPLIT = "split"
    WORK = "work"
    JOIN = "join"


class Part(Mapping[str, Any]):
    """A part of a run: `split()` returns `Part(first=1, last=1000)`, and `work()` reads
    `part["first"]`.

    The values are JSON values, or a datetime, date, time, UUID, Decimal or bytes.

    Attributes:
      number: Its number among the parts of its run, from 1, in the order of `split()`; 0 before
          it is stored.
    """

    def __init__(self, **params: Any) -> None:
        self.number = 0
        self._params = params

    @classmethod
    def stored(cls, number: int, params: Mapping[str, Any] | None) -> Part:
        """A part, made from its stored values."""
        part = cls(**{name: _decoded(value) for name, value in (params or {}).items()})
        part.number = number
        return part

    def as_json(self) -> dict[str, Any]:
        """The parameters as JSON values. Raises ValueError, TypeError or ChunkError if they can't
        be stored.
        """
        if deep := next((name for name, value in self._params.items() if is_deep(value)), None):
            raise ValueError(f"{deep}: {TOO_DEEP}")
        return {name: _encoded(value) for name, value in self._params.items()}

    def __getitem__(self, name: str) -> Any:
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._params)

    def __len__(self) -> int:
        return len(self._params)

    def __repr__(self) -> str:
        return f"Part({', '.join(f'{name}={value!r}' for name, value in self._params.items())})"


@dataclass(frozen=True)
class Partition:
    """The declarations of a partitioned task.

    Attributes:
      parallel: How many parts of the task may run at once, on all nodes together.
      fail_fast: Whether the first part that fails cancels the others.
      on_loop: For each stage, whether its method is a coroutine function; otherwise it runs in a
          thread.
      joins: Whether it has a `join()` of its own.
    """

    parallel: int
    fail_fast: bool
    on_loop: Mapping[Stage, bool]
    joins: bool

    @classmethod
    def of(cls, task: Any, base: type[Any]) -> Partition:
        """Read and check the attributes and methods of an instance. `base`: PartitionedTask. Raises
        InvalidTask.
        """
        valid = isinstance(task.parallel, int) and not isinstance(task.parallel, bool)
        allowed = f"an int from 1 to {MOST_RUNNING:,}"
        check(valid and 1 <= task.parallel <= MOST_RUNNING, "parallel", task.parallel, allowed)
        check(isinstance(task.fail_fast, bool), "fail_fast", task.fail_fast, "True or False")
        if ignored := sorted(vars(task).keys() & {"parallel", "fail_fast"}):
            raise InvalidTask(
                f"{', '.join(ignored)} is set on the instance; allowed: a class attribute"
            )
        if type(task).run is not base.run:
            raise InvalidTask(
                "it has a run() of its own: a partitioned task has split(), work() and join() "
                "instead"
            )
        methods = {stage: getattr(task, stage) for stage in Stage}
        _check_signature("work", methods[Stage.WORK], "part: Part")
        _check_signature("join", methods[Stage.JOIN], "parts: list[Done]")
        for stage, method in methods.items():
            if inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method):
                raise InvalidTask(
                    f"{stage}() contains a yield, so its body would never run: use return instead"
                )
        on_loop = {stage: inspect.iscoroutinefunction(method) for stage, method in methods.items()}
        return cls(task.parallel, task.fail_fast, on_loop, type(task).join is not base.join)

    @property
    def gate(self) -> PartsGate:
        return PartsGate.FAIL_FAST if self.fail_fast else PartsGate.PARTS


def _check_signature(name: str, method: Callable[..., Any], parameter: str) -> None:
    try:
        inspect.signature(method).bind(**{parameter.split(":")[0]: None})
    except TypeError:
        raise InvalidTask(
            f"{name}() has other parameters; allowed: `async def {name}(self, {parameter})`"
        ) from None


def stage_of(partition: Partition | None, claimed: Claimed) -> Stage | None:
    """The method that an attempt of this run calls; None for `run()`."""
    if partition is None:
        return None
    if claimed.origin == Origin.PART:
        return Stage.WORK
    return Stage.JOIN if claimed.gate in tuple(PartsGate) else Stage.SPLIT


def with_values(done: Done) -> Done:
    """A part that was done, with the original values of its parameters instead of the stored
    ones.
    """
    return replace(done, params=dict(Part.stored(done.part or 0, done.params)))


def as_json(task: str, parts: Any) -> list[dict[str, Any]]:
    """The parts that `split()` has returned, in the form in which they are stored. Raises
    InvalidParameters, which names the task.
    """
    if not isinstance(parts, Sequence) or isinstance(parts, str | bytes):
        raise _refused(task, f"{echoed(parts)}; allowed: a list of Part(…)")
    if len(parts) > MOST_PARTS:
        raise _refused(task, f"{len(parts):,} parts; allowed: at most {MOST_PARTS:,}")
    stored, size = [], 0
    for number, part in enumerate(parts, start=1):
        if not isinstance(part, Part):
            raise _refused(task, f"{echoed(part)} as part {number}; allowed: Part(…)")
        try:
            stored.append(part.as_json())
            size += len(json.dumps(stored[-1], allow_nan=False))
        except (ValueError, TypeError, RecursionError, ChunkError) as error:
            raise _refused(task, f"a part {number} that can't be stored: {error}") from None
        if size > MOST_CHARACTERS:
            raise _refused(
                task,
                f"parts whose parameters have more than {MOST_CHARACTERS:,} characters "
                "together: put large values into a table or a file, and give each part their place",
            )
    return stored


def _refused(task: str, what: str) -> InvalidParameters:
    return InvalidParameters(f"split() of task {task} has returned {what}")


def _encoded(value: Any) -> Any:
    if isinstance(value, dict) and _TYPED in value:
        raise ValueError(f"a dict with the key {_TYPED!r}, which is taken")
    if value is None or isinstance(value, bool | int | float | str | list | tuple | dict):
        return value
    return {_TYPED: cursor_json.encode([value])[0]}


def _decoded(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {_TYPED}:
        return cursor_json.decode([value[_TYPED]])[0]
    return value
