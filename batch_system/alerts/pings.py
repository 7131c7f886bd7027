"""Calls dead man's switches: each minute for the service while it works, and for runs of tasks that
have one.

An address that hangs or fails delays nothing, and is not called again for the same event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

from batch_system.alerts import sending
from batch_system.concurrency.background import Background
from batch_system.logs import get_logger

if TYPE_CHECKING:
    import httpx

logger = get_logger("batch_system.batch")

EVERY_SECONDS = 60.0
LATE = timedelta(seconds=3 * EVERY_SECONDS)
"""Pings are in vain if none has succeeded for so long."""
TIMEOUT = 10.0
MOST_WAITING = 1_000
"""The most calls that wait. Further ones are dropped, which is logged."""
AT_ONCE = 8


class Pings(Background):
    """`url`: that of the service, if it has one. `is_working`: whether the service fires, and its
    heartbeat writes. `on_called`: called after each call of `url`, with None, or why that has
    failed, such as "has answered 503".
    """

    def __init__(
        self,
        url: str | None,
        is_working: Callable[[], bool],
        on_called: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        self._url = url
        self._is_working = is_working
        self._on_called = on_called
        self._waiting: asyncio.Queue[str] = asyncio.Queue(MOST_WAITING)
        self._is_full = False
        self._is_needed = asyncio.Event()
        if url is not None:
            self._is_needed.set()

    def tell(self, url: str) -> None:
        """Call this address soon."""
        self._is_needed.set()
        try:
            self._waiting.put_nowait(url)
            self._is_full = False
        except asyncio.QueueFull:
            if not self._is_full:
                logger.warning(
                    f"calls to dead man's switches are dropped: {MOST_WAITING:,} are waiting"
                )
            self._is_full = True

    async def _loop(self) -> None:
        await self._is_needed.wait()
        while True:
            try:
                await self._call_all()
            except Exception:
                # The background loop's boundary. The cause may be a missing file of certificates,
                # for example.
                logger.exception(
                    "dead man's switches can't be called, the next attempt is in a minute"
                )
            await asyncio.sleep(EVERY_SECONDS)

    async def _call_all(self) -> None:
        async with await sending.open_client(TIMEOUT) as client:
            # Not a TaskGroup, because an error of one call would end all of them.
            workers = [
                asyncio.create_task(self._work_off(client), name=f"batch-ping {n}")
                for n in range(AT_ONCE)
            ]
            try:
                while True:
                    if self._url is not None and self._is_working():
                        self.tell(self._url)
                    await asyncio.sleep(EVERY_SECONDS)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.wait(workers)

    async def _work_off(self, client: httpx.AsyncClient) -> None:
        while True:
            url = await self._waiting.get()
            error = await _call(client, url)
            if error is not None:
                logger.warning(f"a dead man's switch {error}")
            if url == self._url:
                self._on_called(error)


async def _call(client: httpx.AsyncClient, url: str) -> str | None:
    """Why a call has failed, without the address; None if it has succeeded."""
    try:
        sending.hide(url)
        async with asyncio.timeout(sending.LONGEST_CALL), client.stream("GET", url) as answer:
            return f"has answered {answer.status_code}" if answer.status_code >= 400 else None
    except Exception as error:  # noqa: BLE001
        # For an address that can't be read, httpx passes on errors of any class.
        return f"does not answer ({type(error).__name__})"
