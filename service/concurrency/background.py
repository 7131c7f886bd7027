"""A background loop of this process: it runs from its start until it is stopped."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import suppress

from service import tracing


class Background(ABC):
    _work: asyncio.Task[None]

    def start(self) -> None:
        with tracing.suppressed():
            self._work = asyncio.create_task(self._loop(), name=f"batch-{type(self).__name__.lower()}")

    @property
    def is_alive(self) -> bool:
        return not self._work.done()

    async def stop(self) -> None:
        self._work.cancel()
        await asyncio.wait([self._work])

    @abstractmethod
    async def _loop(self) -> None: ...


async def is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until the event is set, at most so many seconds. Returns whether it is set.

    With asyncio.wait_for, Python 3.11 would drop a cancel that comes as the event is set, and a stop would not end.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
