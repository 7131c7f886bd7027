"""Threads of our own for what would hold up the event loop: the loop's own threads are the authors'."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from service.concurrency.thread_pool import Threads

T = TypeVar("T")

_threads = Threads(4)


async def offload(call: Callable[..., T], *args: object) -> T:
    """Await `call(*args)` in a thread. Not for what may take long."""
    result: T = await _threads.run(call, *args)
    return result
