"""Carries out bulks in a service: those that were begun here, and those of a process that has
died.
"""

from __future__ import annotations

import asyncio

from service.concurrency.background import Background
from service.errors import BatchError
from service.logs import get_logger
from service.operations.operations import Operations

logger = get_logger("service.batch")

RETRY_SECONDS = 10.0
"""After an error, and while another process carries a bulk out, it is looked at again so often."""


class BulkWorker(Background):
    """Looks for bulks when the service starts, when it is woken, and as long as some are under
    way.
    """

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._woken = asyncio.Event()
        self._woken.set()

    def wake(self) -> None:
        """There may be a bulk to carry out."""
        self._woken.set()

    async def _loop(self) -> None:
        while True:
            await self._woken.wait()
            self._woken.clear()
            if await self._carry_out_all():
                await asyncio.sleep(RETRY_SECONDS)
                self._woken.set()

    async def _carry_out_all(self) -> bool:
        """Carry out what is under way. Returns whether something is left that has to be looked at
        again.
        """
        try:
            for bulk in await self._operations.bulks_under_way():
                await self._operations.bulks.carry_out(bulk)
            return bool(await self._operations.bulks_under_way())
        except BatchError as error:
            logger.warning(f"a bulk stopped, and goes on in {RETRY_SECONDS:g} s: {error.message}")
        except Exception:  # the background loop's boundary
            logger.exception(f"a bulk failed, and is tried again in {RETRY_SECONDS:g} s")
        return True
