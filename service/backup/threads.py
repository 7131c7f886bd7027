"""Work in a thread of its own, which a cancel of the awaiting task ends early."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The work ended early because it was asked to."""


class Stop:
    """Asks the thread to end; the thread calls `check` between two pieces of work."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def ask(self) -> None:
        self._asked.set()

    def asked(self) -> bool:
        return self._asked.is_set()

    def check(self) -> None:
        if self._asked.is_set():
            raise Stopped


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
