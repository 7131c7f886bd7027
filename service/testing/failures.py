"""The failures that `fail_next` has set up: attempts that raise an error instead of calling `run()`."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, NoReturn

from service.batch.tasks.base import BaseTask
from service.batch.tasks.registry import Task


class Failures:
    def __init__(self) -> None:
        self._waiting: defaultdict[str, deque[BaseException]] = defaultdict(deque)

    def add(self, name: str, error: BaseException, times: int) -> None:
        self._waiting[name].extend([error] * times)

    def prepare(self, task: Task, instance: BaseTask) -> None:
        """Make a new instance fail if a failure is set up for its task."""
        if self._waiting[task.name]:
            vars(instance)["run"] = _failing(self._waiting[task.name].popleft(), task.on_loop)


def _failing(error: BaseException, on_loop: bool) -> Any:
    def fail(**_: Any) -> NoReturn:
        raise error

    async def fail_on_loop(**_: Any) -> NoReturn:
        raise error

    return fail_on_loop if on_loop else fail
