"""Work in a thread of its own, which a cancel of the awaiting task ends early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

LISTEN_SECONDS = 0.1


class Stopped(Exception):
    """The work ended early because it was asked to."""


class Stop:
    """Asks the thread to end; the thread calls `check` between two pieces of work."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._lock = threading.Lock()
        self._call: Callable[[], None] | None = None

    def ask(self) -> None:
        with self._lock:
            self._asked.set()
            if self._call:
                self._call()

    def asked(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        if self._asked.is_set():
            raise Stopped

    @contextmanager
    def calls(self, call: Callable[[], None]) -> Iterator[None]:
        """For a thread that can't check, as it waits for another: `call` is called when it is asked to end."""
        with self._lock:
            self._call = call
            if self._asked.is_set():
                call()
        try:
            yield
        finally:
            with self._lock:
                self._call = None


def in_own_loop(work: Coroutine[Any, Any, T], stop: Stop) -> T:
    """`work` on an event loop of this thread, also while it waits for a server, until the thread is asked to end."""
    return asyncio.run(_until_stopped(work, stop))


async def _until_stopped(work: Coroutine[Any, Any, T], stop: Stop) -> T:
    task, is_cancelled = asyncio.ensure_future(work), False
    while not task.done():
        if stop.asked() and not is_cancelled:  # once, or its own cleaning up would be cancelled too
            is_cancelled = task.cancel()
        await asyncio.wait([task], timeout=LISTEN_SECONDS)
    if task.cancelled():
        raise Stopped
    return task.result()


async def in_thread(work: Callable[[Stop], T]) -> T:
    """`work` in a new thread. A cancel is passed on only after the thread has cleaned up and ended."""
    stop = Stop()
    executor = ThreadPoolExecutor(1, thread_name_prefix="backup")
    future = asyncio.get_running_loop().run_in_executor(executor, work, stop)
    executor.shutdown(wait=False)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.ask()
        await asyncio.wait([future])
        future.exception()
        raise
