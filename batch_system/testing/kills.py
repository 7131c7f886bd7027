"""Kills: from the commit of a chunk or the end of a part on, no code of active runs is executed,
not even a `finally`.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from inspect import iscoroutine
from typing import Any, Self
from weakref import WeakSet

from batch_system.batch.context import current_run
from batch_system.batch.tasks.base import BaseTask
from batch_system.testing.records import RunRecord


class Kill:
    """Freezes all coroutines of runs as soon as one run has come this far, as a `kill -9` would.

    Attributes:
      chunks: How many chunks the run has committed.
      parts: How many parts of its task have succeeded.
      is_done: Whether the run has been killed.
    """

    def __init__(
        self,
        run: str,
        after_chunk: int | None,
        on_kill: Callable[[], None],
        after_part: int | None = None,
    ) -> None:
        """`after_chunk`, `after_part`: after how many of these the run is killed. `on_kill` is
        called during the commit of a chunk, or after the commit of a part, and must not block.
        """
        self.chunks = self.parts = 0
        self.is_done = False
        self._run = run
        self._on_kill = on_kill
        self._after_chunk = after_chunk
        self._after_part = after_part
        self._coroutines: WeakSet[FreezableCoroutine] = WeakSet()
        self._tasks: WeakSet[asyncio.Task[Any]] = WeakSet()

    def committed(self, run: str) -> None:
        """Count a chunk that `run` has committed, and kill the run if this is chunk
        `after_chunk`.
        """
        if run != self._run or self.is_done:
            return
        self.chunks += 1
        self._kill_if(self.chunks == self._after_chunk)

    def part_succeeded(self) -> None:
        """Count a part that has succeeded, and kill the run if this is part `after_part`."""
        if not self.is_done:
            self.parts += 1
            self._kill_if(self.parts == self._after_part)

    @property
    def counted(self) -> str:
        """How far the run has come, for a message."""
        return f"chunk {self.chunks}" if self._after_part is None else f"{self.parts} parts"

    def missed(self, run: RunRecord) -> str:
        """Why the run was not killed. `run`: its present record."""
        state = run.state if run.reason is None else f"{run.state} ({run.reason})"
        if self._after_part is not None:
            wanted, did = f"part {self._after_part}", f"{self.parts} of its parts succeeded"
        else:
            wanted, did = f"chunk {self._after_chunk}", f"it committed {self.chunks}"
        return f"{run.task} was not killed after {wanted}: {did}, and {state}"

    def _kill_if(self, is_time: bool) -> None:
        if is_time:
            self.is_done = True
            self._on_kill()

    def prepare(self, instance: BaseTask) -> None:
        """Prepare a new instance, so that its `run()` is frozen at the kill."""
        run = instance.run

        def freezable_run(**parameters: Any) -> Any:
            result = run(**parameters)
            return self._freezable(result) if iscoroutine(result) else result

        vars(instance)["run"] = freezable_run

    @contextmanager
    def freezing_tasks(self) -> Iterator[None]:
        """Make the kill also freeze the asyncio tasks that runs create on this event loop."""
        loop = asyncio.get_running_loop()
        previous_factory = loop.get_task_factory()

        def create_task(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
            create: Any = previous_factory or _create_task
            if current_run.current_run_if_any() is None:
                return create(loop, coroutine, **options)
            task = create(loop, self._freezable(coroutine), **options)
            self._tasks.add(task)
            return task

        loop.set_task_factory(create_task)
        try:
            yield
        finally:
            loop.set_task_factory(previous_factory)

    def end_frozen_tasks(self) -> None:
        """End the asyncio tasks of the frozen coroutines. That executes no more code of the
        coroutines.
        """
        for coroutine in self._coroutines:
            coroutine.prevent_closing()
        for task in list(self._tasks):
            task.cancel()

    def _freezable(self, coroutine: Coroutine[Any, Any, Any]) -> FreezableCoroutine:
        freezable = FreezableCoroutine(coroutine, self)
        self._coroutines.add(freezable)
        return freezable


class FreezableCoroutine(Coroutine[Any, Any, Any]):
    """Wraps a coroutine. After the kill, the coroutine is never continued from the `await` at which
    it waits.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], kill: Kill) -> None:
        self._coroutine = coroutine
        self._kill = kill

    def send(self, value: Any) -> Any:
        if self._kill.is_done:  # wait for a future that nothing completes
            return next(asyncio.get_running_loop().create_future().__await__())
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        if self._kill.is_done:
            raise error[1] if len(error) > 1 and error[1] is not None else error[0]
        return self._coroutine.throw(*error)

    def close(self) -> None:
        if not self._kill.is_done:
            self._coroutine.close()

    def prevent_closing(self) -> None:
        """Keep one reference to the coroutine for ever, so that Python never frees it.

        Before Python frees a coroutine, even at the end of the process, it executes each `finally`
        in it.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._coroutine))

    def __await__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        """The attributes of the wrapped coroutine. Libraries and debuggers read some: cr_frame,
        cr_running, …
        """
        return getattr(self._coroutine, name)


def _create_task(
    loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any
) -> asyncio.Task[Any]:
    return asyncio.Task(coroutine, loop=loop, **options)


def check_number(number: Any, name: str = "kill_after_chunk") -> None:
    """Raise ValueError if nothing can be killed after this number of chunks or parts."""
    is_int = isinstance(number, int) and not isinstance(number, bool)
    if number is not None and not (is_int and number > 0):
        raise ValueError(f"{name} is {number!r}; allowed: an int from 1")
