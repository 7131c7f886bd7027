"""When a process has to stop: the drain begins at the signal, not when the server comes to the lifespan's end.

A server ends the lifespan after its open connections, and a blocked event loop never gets there at all. So the handlers
here stand before the server's own, which are called after them, and the watchdog hears of the signal in its thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from service import logs, sentry
from service.batch.nodes.loop_watchdog import Watchdog
from service.config import Settings
from service.server.batch_service import BatchService

logger = logs.get_logger("service.batch")


class Stopping:
    """Stops the service once: when a signal asks for it, or when the server ends the lifespan."""

    def __init__(self, batch: BatchService, settings: Settings, is_guest: bool) -> None:
        """`is_guest`: the application is somebody else's, and so is what comes after its lifespan."""
        self._batch = batch
        self._is_guest = is_guest
        self._drain_seconds = settings.DRAIN_SECONDS
        self._loop = asyncio.get_running_loop()
        self._watchdog = Watchdog(settings.MAX_LOOP_BLOCK, batch.leave_at_once, _flush, self._look_at_server)
        self._is_asked_by_server = _server_event()
        self._before: dict[int, Any] = {}
        self._seen: set[int] = set()
        self._is_asked = self._is_final = False
        self._is_by_server = False
        self._work: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See signals, and watch the event loop. Once the process has to end, the watchdog stays until it has."""
        self._watchdog.start()
        self._take_signals()
        try:
            yield
        finally:
            self._give_signals_back()
            if not self._is_final:
                self._watchdog.stop()

    async def by_server(self) -> None:
        """Stop, because the server ends the lifespan."""
        self._is_by_server = True
        await asyncio.shield(self._stopped())

    def _stopped(self) -> asyncio.Task[None]:
        if self._work is None:
            self._begin()
            self._work = asyncio.create_task(self._stop())
        return self._work

    async def _stop(self) -> None:
        await self._batch.stop()
        self._watchdog.is_drained = not self._batch.engine.running

    def _begin(self) -> None:
        """Fire nothing more, from now on."""
        if self._batch.is_stopping:
            return
        if running := self._batch.engine.running:
            logger.info(f"Stopping: {running} running, with {self._drain_seconds:g} s to end")
        self._batch.drain().add_done_callback(self._drained)

    def _drained(self, _: asyncio.Task[None]) -> None:
        self._watchdog.is_drained = not self._batch.engine.running

    def _ask(self, call: Callable[[], object], is_final: bool = True) -> None:
        """Somebody asked for an end. Called in the main thread between any two lines of it, or in the watchdog's.

        `is_final`: of the process, not only of what it does (Ctrl-C in a shell of Python or under pytest).
        """
        self._is_asked, self._is_final = True, self._is_final or is_final
        self._watchdog.end_after(self._drain_seconds)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call)

    def _look_at_server(self) -> None:
        if not self._is_asked and self._is_asked_by_server():
            self._ask(self._begin)

    def _take_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):
                self._before[number] = before
                signal.signal(number, self._on_signal)

    def _give_signals_back(self) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_impatient(number):
            signal.signal(number, signal.SIG_DFL)
            self._watchdog.end_now(number)
            return
        self._seen.add(number)
        before = self._before[number]
        if before is signal.SIG_DFL:
            self._number = number
            self._ask(lambda: self._stopped().add_done_callback(self._die))
            return
        self._ask(self._begin, number == signal.SIGTERM or not self._is_guest)
        before(number, frame)

    def _is_impatient(self, number: int) -> bool:
        """Whether somebody asks for the second time.

        What a terminal sends as SIGINT, others may pass on as SIGTERM. And a server may send its workers SIGTERM at any
        time, such as hypercorn when one of them has ended.
        """
        if number == signal.SIGINT:
            return bool(self._seen)
        return number in self._seen and multiprocessing.parent_process() is None

    def _die(self, _: asyncio.Task[None]) -> None:
        """Nobody else handles this signal: do what it would have done."""
        if not self._is_by_server:
            signal.signal(self._number, signal.SIG_DFL)
            signal.raise_signal(self._number)


def _server_event() -> Callable[[], bool]:
    """Whether hypercorn has asked this worker to end. It does so by an event between processes, and by no signal.

    The worker's own code looks at it too, but on the event loop, and ends the lifespan only after open connections.
    """
    given = getattr(multiprocessing.current_process(), "_kwargs", {})
    event = given.get("shutdown_event")
    return event.is_set if event is not None else lambda: False


def _flush() -> None:
    logs.flush()
    sentry.flush()
