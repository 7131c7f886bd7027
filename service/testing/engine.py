"""The local engine without its background loop: a test says when it works."""

from __future__ import annotations

from service.batch.execution.local_engine import LocalEngine


class DrivenEngine(LocalEngine):
    """A LocalEngine that works while `settle` is awaited, and at no other time. Do not `start` it."""

    async def settle(self) -> None:
        """Run everything that may be claimed, until nothing more may be."""
        await self._turn()
        while self._attempts:
            await self._until_needed()
            await self._turn()
