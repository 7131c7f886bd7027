"""The upstream of a test's run: `batch.run(Load, upstream={"extract": {"rows": 3}})`. Alone,
because it knows no service.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from batch_system.batch.context.current_run import current_run
from batch_system.batch.context.upstream import Done, Upstream
from batch_system.batch.execution import results
from batch_system.batch.ledger.states import RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import Task

Given = Mapping[str, Any] | Sequence[Any]
"""The results by the name of the task; or for a follow-up the results of the members of its group.
A Done is used as it is.
"""


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
    return Done(task, new_id(), slot, RunState.SUCCEEDED, {}, results.as_json(value))


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
