"""The new lines of a run's log, read and rendered once for all who have seen the same lines
before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from batch_system import clock
from batch_system.errors import BatchError
from batch_system.pages.frame.watch import Part, data_of

MOST_LINES = 200
"""At most this many lines are sent at once."""
LOOK_SECONDS = 0.5
KEPT_SECONDS = 10.0


class More(NamedTuple):
    """The data of an event with the lines after a place, and the place after them."""

    data: bytes
    place: str


Read = Callable[[str, int], Awaitable[tuple[str, str]]]
"""Reads at most this many lines after a place: their HTML, and the place after them."""


class LogTail:
    """The lines after each place in the log of one run at which there are readers."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._answers: dict[str, tuple[float, asyncio.Task[More]]] = {}

    async def after(self, place: str) -> More:
        """The lines after a place. Requests for the same place within half a second get the same
        answer.
        """
        now = clock.monotonic()
        asked_at, answer = self._answers.get(place, (0.0, None))
        if answer is None or (answer.done() and now - asked_at >= LOOK_SECONDS):
            for old in [each for each, (at, _) in self._answers.items() if now - at > KEPT_SECONDS]:
                del self._answers[old]
            answer = asyncio.get_running_loop().create_task(self._more(place))
            self._answers[place] = now, answer
        return await asyncio.shield(answer)

    async def _more(self, place: str) -> More:
        try:
            html, following = await self._read(place, MOST_LINES)
        except BatchError:
            return More(b"", place)
        return More(data_of([Part("log-lines", "beforeend", html)]) if html else b"", following)
