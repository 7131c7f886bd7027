"""The local engine without its background loop: it works only when a test calls it."""

from __future__ import annotations

from service.batch.execution.local_engine import LocalEngine


class DrivenEngine(LocalEngine):
    """A LocalEngine that works only while `settle` is awaited. Do not `start` it."""

    async def settle(self) -> None:
        """Execute all runs that may be claimed, until no more can be claimed."""
        await self._turn()
        while self._attempts:
            await self._until_needed()
            await self._turn()
