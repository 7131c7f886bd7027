"""Runs short blocking calls of the service in threads of its own. Authors use the default threads of the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from service.concurrency.thread_pool import ThreadPool

T = TypeVar("T")

_threads = ThreadPool(4)


async def offload(call: Callable[..., T], *args: object) -> T:
    """Await `call(*args)` in one of four threads that all callers share, so the call must be short."""
    result: T = await _threads.run(call, *args)
    return result
