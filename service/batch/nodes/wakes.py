"""Wakes: a node hears what other processes tell when they commit. What it does not hear, its polls
find later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from service.batch.ledger.wakes import Wake
from service.batch.nodes.file_watch import FileWatch
from service.database.engine import Database

if TYPE_CHECKING:
    from service.batch.nodes.listener import Listener

SHORTEST_PAUSE = 0.02
"""Seconds between two wakes, at least. What is told in between is one wake, so that a flood costs
no flood of looks.
"""


class Wakes:
    """Hears what the other processes of one ledger tell. It is used on one event loop, which is
    that of `database`.
    """

    def __init__(self, database: Database, node: str, on_wake: Callable[[Wake], None]) -> None:
        """`database`: of one connection that is kept open, and whose use begins after this.
        `on_wake` is called at once
        when something is told, and after that at most once in SHORTEST_PAUSE.
        """
        self._on_wake = on_wake
        self._kept = Wake()
        self._pause: asyncio.TimerHandle | None = None
        self._source: FileWatch | Listener | None = None
        if database.kind == "sqlite":
            self._source = FileWatch(database, self._hear)
        elif database.url.drivername == "postgresql+asyncpg":
            from service.batch.nodes.listener import Listener  # it needs the driver of PostgreSQL

            self._source = Listener(database, node, self._hear)

    async def stop(self) -> None:
        """Hear nothing more."""
        if self._pause is not None:
            self._pause.cancel()
        if self._source is not None:
            await self._source.stop()

    def _hear(self, wake: Wake) -> None:
        if wake == Wake():
            return
        if self._pause is not None:
            self._kept |= wake
            return
        self._pause = asyncio.get_running_loop().call_later(SHORTEST_PAUSE, self._go_on)
        self._on_wake(wake)

    def _go_on(self) -> None:
        kept = self._kept
        self._kept = Wake()
        self._pause = None
        self._hear(kept)
