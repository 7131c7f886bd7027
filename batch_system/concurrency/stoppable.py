"""Work in a thread of its own that ends early when the awaiting task is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

CHECK_EVERY_SECONDS = 0.1


class Stopped(Exception):
    """The work ended early because a stop was requested."""


class Stop:
    """Asks a thread to end. The thread calls `check` between two pieces of work."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._lock = threading.Lock()
        self._on_request: Callable[[], None] | None = None

    def request(self) -> None:
        with self._lock:
            self._requested.set()
            if self._on_request:
                self._on_request()

    def is_requested(self) -> bool:
        return self._requested.is_set()

    def check(self) -> None:
        """Raises Stopped if a stop was requested."""
        if self._requested.is_set():
            raise Stopped

    @contextmanager
    def calling(self, on_request: Callable[[], None]) -> Iterator[None]:
        """Call `on_request` if a stop is requested during the block.

        This is for a thread that can't call `check` because it waits for something else.
        """
        with self._lock:
            self._on_request = on_request
            if self._requested.is_set():
                on_request()
        try:
            yield
        finally:
            with self._lock:
                self._on_request = None


def in_own_loop(work: Coroutine[Any, Any, T], stop: Stop) -> T:
    """Run `work` on a new event loop in this thread. If a stop is requested, cancel it and raise
    Stopped.
    """
    return asyncio.run(_until_stopped(work, stop))


async def _until_stopped(work: Coroutine[Any, Any, T], stop: Stop) -> T:
    task, is_cancelled = asyncio.ensure_future(work), False
    while not task.done():
        # A second cancel would interrupt the cleanup of the task.
        if stop.is_requested() and not is_cancelled:
            is_cancelled = task.cancel()
        await asyncio.wait([task], timeout=CHECK_EVERY_SECONDS)
    if task.cancelled():
        raise Stopped
    return task.result()


async def in_thread(work: Callable[[Stop], T]) -> T:
    """Await `work` in a new thread. When cancelled, raise CancelledError only after the thread has
    ended.
    """
    stop = Stop()
    executor = ThreadPoolExecutor(1, thread_name_prefix="backup")
    future = asyncio.get_running_loop().run_in_executor(executor, work, stop)
    executor.shutdown(wait=False)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.request()
        await asyncio.wait([future])
        future.exception()
        raise
