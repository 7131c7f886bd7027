"""The engine that executes runs, without its background loop. Alone, because only this class of
testing derives from a part of the service.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from batch_system.batch.execution.engine import LocalEngine


async def nothing() -> None:
    """The default action after a turn."""


class DrivenEngine(LocalEngine):
    """A LocalEngine that claims and executes runs only while `settle` is awaited.

    `start` begins the background loop, so it is called only at the end, when the engine is drained
    and stopped.
    """

    async def settle(self, after_each: Callable[[], Awaitable[None]] = nothing) -> None:
        """Claim and execute runs until no run is active and none can be claimed. `after_each`:
        called after each turn.
        """
        await self._turn()
        while self._attempts:
            await self._until_needed()
            await self._turn()
            await after_each()
