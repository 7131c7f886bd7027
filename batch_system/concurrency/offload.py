"""Runs short blocking calls of the service in its own threads. Authors use the default threads of
the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from batch_system.concurrency.thread_pool import ThreadPool

T = TypeVar("T")

_threads = ThreadPool(4)


async def offload(call: Callable[..., T], *args: object) -> T:
    """Await `call(*args)` in one of four threads that all callers share, so the call must be
    short.
    """
    result: T = await _threads.run(call, *args)
    return result


class SlowCall(Generic[T]):
    """Repeatedly calls a function of an author in such a thread. A call that hangs must not hold up
    the caller.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._going_on: asyncio.Task[T] | None = None

    async def within(self, seconds: float) -> T | None:
        """The result of the function; None if that takes longer. A later call then gets the result,
        without waiting.
        """
        if self._going_on is not None:
            seconds = 0
        else:
            self._going_on = asyncio.create_task(offload(self._call))
        done, _ = await asyncio.wait([self._going_on], timeout=seconds)
        if not done:
            return None
        ended = self._going_on
        self._going_on = None
        return ended.result()

    async def stop(self) -> None:
        """Stop waiting for a call. The call itself can't be stopped."""
        if self._going_on is not None:
            self._going_on.cancel()
            await asyncio.wait([self._going_on])
