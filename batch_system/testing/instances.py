"""What a test changes in the task instance of an attempt before its `run()`: the errors of
`fail_next`, and the upstream of `batch.run(Load, upstream={"extract": {"rows": 3}})`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, cast

from batch_system.batch.context.current_run import current_run, current_run_if_any, state_of
from batch_system.batch.context.upstream import Done, Upstream
from batch_system.batch.execution.ending import result_as_json
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import Task

Prepare = Callable[[Task, BaseTask], None]

Given = Mapping[str, Any] | Sequence[Any]
"""The results by the name of the task; or for a follow-up the results of the members of its group.
A Done is used as it is.
"""


def prepared(tasks: Mapping[str, Task], prepare: Prepare) -> dict[str, Task]:
    """Copies of these tasks. Each attempt of one calls `prepare` with its new instance before it
    calls `run()`.
    """
    return {
        name: dataclasses.replace(task, cls=_maker(task, prepare)) for name, task in tasks.items()
    }


def _maker(task: Task, prepare: Prepare) -> type[BaseTask]:
    # A function is enough, because an attempt only calls it.
    return cast(type[BaseTask], partial(_make, task, prepare))


def _make(task: Task, prepare: Prepare) -> BaseTask:
    instance = task.cls()
    prepare(task, instance)
    return instance


class Failures:
    """The errors that the next attempts of each task should raise, in this order."""

    def __init__(self) -> None:
        self._errors: defaultdict[tuple[str, int | None], deque[BaseException]] = defaultdict(deque)

    def add(self, name: str, error: BaseException, times: int, part: int | None = None) -> None:
        self._errors[name, part].extend([error] * times)

    def prepare(self, task: Task, instance: BaseTask) -> None:
        """Replace the method `run` of a new instance if an error is set up for its task."""
        run = current_run_if_any()
        part = state_of(run).part if run is not None else None
        if errors := self._errors[task.name, part] or self._errors[task.name, None]:
            vars(instance)["run"] = _failing(errors.popleft(), task.on_loop)


def _failing(error: BaseException, on_loop: bool) -> Any:
    def fail(**_: Any) -> NoReturn:
        raise error

    async def fail_on_loop(**_: Any) -> NoReturn:
        raise error

    return fail_on_loop if on_loop else fail


class MadeUpstreams:
    """The upstreams of the runs with these ids."""

    def __init__(self) -> None:
        self._by_run: dict[str, Given] = {}

    def give(self, run: str, given: Given) -> None:
        """Make the run with this id wait for `given`, as if it had ended."""
        self._by_run[run] = given

    def prepare(self, task: Task, instance: BaseTask) -> None:
        """Make the method `run` of a new instance get the upstream of the test."""
        run = current_run()
        if run.id not in self._by_run:
            return
        body: Any = instance.run
        filled = task.parameters.filled(made(self._by_run[run.id], run.slot))
        vars(instance)["run"] = lambda **given: body(**{**given, **filled})


def made(given: Given, slot_of_run: datetime) -> Upstream:
    """The upstream of a run. `slot_of_run`: the slot of each task whose result is given.

    Raises TypeError.
    """
    if isinstance(given, Mapping):
        return Upstream([_done(name, value, slot_of_run) for name, value in given.items()])
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(
            f"upstream is {given!r}; allowed: results by the names of tasks, or a list of results"
        )
    members = [_done("member", value, None) for value in given]

    async def read(after: str | None) -> Sequence[Done]:
        return members if after is None else ()

    return Upstream((), read)


def _done(task: str, value: Any, slot: datetime | None) -> Done:
    if isinstance(value, Done):
        return value
    return Done(task, new_id(), slot, RunState.SUCCEEDED, {}, result_as_json(value))
