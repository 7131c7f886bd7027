"""One page that many people see while it changes: it is rendered once for all, and only its changes
are sent.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

from batch_system import clock
from batch_system.errors import BatchError
from batch_system.logs import get_logger
from batch_system.web.stream import Event

logger = get_logger("batch_system.batch")

LEAST_SECONDS = 1.0
"""The shortest time between two renderings of the parts of a page."""
MOST_SHARE = 4.0
"""The wait between two renderings is at least this many times as long as the last one took."""
MOST_REST = 10.0
"""The most seconds between two renderings: the last one may have waited for something, or its
process may have been stopped meanwhile.
"""
MOST_BEHIND = 10
"""A browser that has not seen this many versions gets the whole page again."""
AT_ONCE = 2
"""At most this many of the pages that are watched on an event loop are rendered at once."""
SLOW_SECONDS = 60.0
"""How often a slow part, such as a chart that moves with time, is sent."""


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


class Part(NamedTuple):
    """A piece of HTML, and where it goes. `target`: the id of an element. `swap`: a way in which
    htmx swaps it in.
    """

    target: str
    swap: str
    html: str


class Watch:
    """The parts of one page, as a viewer of this kind sees them.

    `make`: renders them. `rest_seconds`: after this time they are rendered anew without an event.
    `slow`: targets of parts that are sent once in SLOW_SECONDS. `quiet`: targets that are not sent
    to viewers who have just come.
    """

    def __init__(
        self,
        make: Callable[[], Awaitable[Sequence[Part]]],
        rest_seconds: float,
        slow: Collection[str] = (),
        quiet: Collection[str] = (),
    ) -> None:
        self.version = 0
        self.is_fresh = False
        self.used_at = clock.monotonic()
        self._make = make
        self._rest_seconds = rest_seconds
        self._slow = slow
        self._quiet = quiet
        self._parts: dict[str, tuple[Part, int]] = {}
        self._slow_at: dict[str, float] = {}
        self._noted = -1
        self._is_outdated = True
        self._made_at = 0.0
        self._took = 0.0
        self._making: asyncio.Task[None] | None = None
        self._told: dict[int, bytes] = {}

    def note(self, events: Sequence[Event]) -> None:
        """Note that something has happened. All viewers get the same events, each of which counts
        once.
        """
        newest = max((event.number for event in events), default=-1)
        if newest > self._noted:
            self._noted = newest
            self._is_outdated = True

    async def refresh(self) -> None:
        """Render the parts if they are outdated, and the last rendering is long enough ago."""
        self.used_at = clock.monotonic()
        if self._making is None and self._is_due():
            self._making = asyncio.get_running_loop().create_task(self._remake())
        if self._making is not None:
            await asyncio.shield(self._making)

    def changes(self, seen: int) -> bytes:
        """What a viewer who has seen this version gets, as the data of an event; empty if it is the
        newest version.
        """
        if seen < self.version - MOST_BEHIND:
            seen = 0
        if seen not in self._told:
            parts = [part for part, version in self._parts.values() if version > seen]
            self._told[seen] = data_of(
                part for part in parts if seen or part.target not in self._quiet
            )
        return self._told[seen]

    def _is_due(self) -> bool:
        passed = clock.monotonic() - self._made_at
        if self._made_at and passed < max(LEAST_SECONDS, min(self._took * MOST_SHARE, MOST_REST)):
            return False
        return self._is_outdated or passed >= self._rest_seconds

    async def _remake(self) -> None:
        began = clock.monotonic()
        self._took = 0.0  # a failed rendering does not show how long one takes
        self._is_outdated = False
        try:
            async with _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE)):
                self._compare(await self._make())
            self.is_fresh = True
            self._took = clock.monotonic() - began
        except BatchError as error:
            self.is_fresh = False
            self._is_outdated = True
            logger.debug(f"live page: {error.message}")
        except Exception:
            self.is_fresh = False
            self._is_outdated = True
            logger.exception("a live page could not be rendered")
        finally:
            self._made_at = clock.monotonic()
            self._making = None

    def _compare(self, parts: Sequence[Part]) -> None:
        changed = [part for part in parts if self._has_changed(part)]
        if changed or not self.version:
            is_first = not self.version
            self.version += 1
            for part in changed:
                is_unsent = is_first and part.target in self._slow
                self._parts[part.target] = (part, 0 if is_unsent else self.version)
            self._told.clear()
        for target in self._parts.keys() - {part.target for part in parts}:
            del self._parts[target]

    def _has_changed(self, part: Part) -> bool:
        known = self._parts.get(part.target)
        if known is not None and known[0] == part:
            return False
        if part.target in self._slow:
            now = clock.monotonic()
            if known is not None and now - self._slow_at[part.target] < SLOW_SECONDS:
                return False
            self._slow_at[part.target] = now
        return True


def data_of(parts: Iterable[Part]) -> bytes:
    """Parts as the data of a server-sent event."""
    text = "".join(
        f"<hx-partial hx-target=\"[id='{part.target}']\" "
        f'hx-swap="{part.swap}">{part.html}</hx-partial>'
        for part in parts
    )
    return (
        b"".join(b"data: %b\n" % line for line in re.split(rb"\r\n|\r|\n", text.encode()))
        if text
        else b""
    )
