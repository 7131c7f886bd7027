"""Loop lag: how long a callback waits on an event loop, measured from another thread."""

from __future__ import annotations

import asyncio

from service import clock


class LoopLag:
    """How long a callback waits on the event loop, in seconds, measured from another thread.
    `last`: the last one.
    """

    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        self._scheduled_at: float | None = None
        self.last = 0.0

    def take(self) -> float:
        """Schedule a callback, and return the lag of the last one. If that has not run yet, how
        long it has waited.
        """
        if self._scheduled_at is not None:
            return clock.monotonic() - self._scheduled_at
        self._scheduled_at = clock.monotonic()
        try:
            self.loop.call_soon_threadsafe(self._measure)
        except RuntimeError:  # the loop is closed
            self._scheduled_at = None
        return self.last

    def _measure(self) -> None:
        scheduled_at = self._scheduled_at
        self._scheduled_at = None
        if scheduled_at is not None:
            self.last = clock.monotonic() - scheduled_at
