"""`kill_after_chunk`: after a given commit no code of the active runs is executed any more, not even a `finally`."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from inspect import iscoroutine
from typing import Any, Self
from weakref import WeakSet

from service.batch.context import current_run
from service.batch.tasks.base import BaseTask


class Kill:
    """Freezes everything that a service executes when a run has committed a number of chunks, like a `kill -9`.

    Attributes:
        chunks: How many it has committed.
        is_done: It has been killed.
    """

    def __init__(self, run: str, after_chunk: int, on_kill: Callable[[], None]) -> None:
        """`on_kill` is called during the commit, and must not block."""
        self.chunks = 0
        self.is_done = False
        self._run, self._after_chunk, self._on_kill = run, after_chunk, on_kill
        self._coroutines: WeakSet[Mortal] = WeakSet()
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    def committed(self, run: str) -> None:
        if run != self._run or self.is_done:
            return
        self.chunks += 1
        if self.chunks == self._after_chunk:
            self.is_done = True
            self._on_kill()

    def prepare(self, instance: BaseTask) -> None:
        """Prepare a new instance, so that its `run()` is frozen at the kill."""
        run = instance.run

        def mortal(**parameters: Any) -> Any:
            result = run(**parameters)
            return self._mortal(result) if iscoroutine(result) else result

        vars(instance)["run"] = mortal

    @contextmanager
    def of_tasks(self) -> Iterator[None]:
        """Freeze the asyncio tasks too that a run creates on this event loop."""
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()

        def make(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> Any:
            is_mortal = current_run.current_run_if_any() is not None
            coroutine = self._mortal(work) if is_mortal else work
            make_task: Any = before or _make_task
            task = make_task(loop, coroutine, **options)
            if is_mortal:
                self._tasks.add(task)
            return task

        loop.set_task_factory(make)
        try:
            yield
        finally:
            loop.set_task_factory(before)

    def bury(self) -> None:
        """End the asyncio tasks of the frozen coroutines, without any effect on the coroutines."""
        for coroutine in self._coroutines:
            coroutine.outlive_everything()
        for task in list(self._tasks):
            task.cancel()

    def _mortal(self, coroutine: Coroutine[Any, Any, Any]) -> Mortal:
        mortal = Mortal(coroutine, self)
        self._coroutines.add(mortal)
        return mortal


class Mortal(Coroutine[Any, Any, Any]):
    """A coroutine that is never continued after the kill, wherever it was."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], kill: Kill) -> None:
        self._coroutine = coroutine
        self._kill = kill

    def send(self, value: Any) -> Any:
        if self._kill.is_done:
            return next(asyncio.get_running_loop().create_future().__await__())
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        if self._kill.is_done:
            raise error[1] if len(error) > 1 and error[1] is not None else error[0]
        return self._coroutine.throw(*error)

    def close(self) -> None:
        if not self._kill.is_done:
            self._coroutine.close()

    def outlive_everything(self) -> None:
        """Python closes a coroutine that it collects, at its own end too, and that would run each `finally` in it."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._coroutine))

    def __await__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        """Attributes of a coroutine that libraries and debuggers read: cr_frame, cr_running, …"""
        return getattr(self._coroutine, name)


def _make_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    return asyncio.Task(coroutine, loop=loop, **options)
