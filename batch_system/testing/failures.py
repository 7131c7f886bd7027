"""The errors that `fail_next` has set up, which the next attempts of a task raise. Alone, because
it knows no service.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, NoReturn

from batch_system.batch.context.current_run import current_run_if_any, state_of
from batch_system.batch.tasks.base import BaseTask
from batch_system.batch.tasks.registry import Task


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
