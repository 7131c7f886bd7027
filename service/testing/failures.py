"""The errors that `fail_next` has set up: the next attempts of a task raise them instead of calling `run()`."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, NoReturn

from service.batch.tasks.base import BaseTask
from service.batch.tasks.registry import Task


class Failures:
    """The errors that the next attempts of each task are to raise, in this order."""

    def __init__(self) -> None:
        self._errors: defaultdict[str, deque[BaseException]] = defaultdict(deque)

    def add(self, name: str, error: BaseException, times: int) -> None:
        self._errors[name].extend([error] * times)

    def prepare(self, task: Task, instance: BaseTask) -> None:
        """Replace the method `run` of a new instance if an error is set up for its task."""
        if self._errors[task.name]:
            vars(instance)["run"] = _failing(self._errors[task.name].popleft(), task.on_loop)


def _failing(error: BaseException, on_loop: bool) -> Any:
    def fail(**_: Any) -> NoReturn:
        raise error

    async def fail_on_loop(**_: Any) -> NoReturn:
        raise error

    return fail_on_loop if on_loop else fail
