"""Stops the service when its process has to stop: the drain begins at the signal, not at the end of
the lifespan.

A server ends the lifespan only after its open connections, and with a blocked event loop never. So
the signal handlers here run before the server's own, which they call, and they also inform the
watchdog, which has a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import multiprocessing
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any

from batch_system import clock, logs, sentry
from batch_system.batch.nodes.loop_watchdog import Watchdog
from batch_system.concurrency.offload import offload
from batch_system.server.service import BatchService
from batch_system.settings.settings import Settings
from batch_system.versions import refuse_old_libraries

logger = logs.get_logger("batch_system.batch")

SAME_REQUEST_SECONDS = 0.5
"""Two kinds of signals within this time are one request: a terminal or systemd may send one, and a
parent process the other.
"""


@contextlib.asynccontextmanager
async def serving(
    batch: BatchService, settings: Settings, is_guest: bool
) -> AsyncIterator[BatchService]:
    """Start `batch`, and stop it at the end of the block or at a signal. `is_guest`: the process
    belongs to another application.
    """
    with _hang_up_as_termination():
        await offload(refuse_old_libraries)
        await batch.start()
        stopping = Stopping(batch, settings, is_guest)
        with stopping.watching():
            try:
                yield batch
            finally:
                await stopping.by_server()


@contextlib.contextmanager
def _hang_up_as_termination() -> Iterator[None]:
    """Treat SIGHUP, the end of a terminal or of an ssh session, as SIGTERM, unless it is handled or
    ignored.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return

    def terminate(_: int, __: FrameType | None) -> None:
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGHUP, terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGHUP) is terminate:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Stopping:
    """Stops the service once, on a signal or when the server ends the lifespan."""

    def __init__(self, batch: BatchService, settings: Settings, is_guest: bool) -> None:
        """`is_guest`: the service runs in another application, whose process may continue after the
        lifespan.
        """
        self._batch = batch
        self._is_guest = is_guest
        self._drain_seconds = settings.DRAIN_SECONDS
        self._loop = asyncio.get_running_loop()
        self._watchdog = Watchdog(
            settings.MAX_LOOP_BLOCK, batch.leave_at_once, _flush, self._look, batch.accuse
        )
        batch.supervisor.on_failure = self._on_failure
        self._has_server_request = _server_event()
        self._replaced: dict[int, Any] = {}
        self._received: dict[int, float] = {}
        self._is_requested = self._is_final = False
        self._is_by_server = False
        self._work: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle signals and watch the event loop. If the process has to end, the watchdog works
        until then.
        """
        self._watchdog.start()
        self._replace_handlers()
        try:
            yield
        finally:
            self._restore_handlers()
            if not self._is_final:
                self._watchdog.stop()

    async def by_server(self) -> None:
        """Stop the service because the server ends the lifespan, and wait for that."""
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
        """Begin the drain: from now on nothing more is fired."""
        if self._batch.is_stopping:
            return
        if running := self._batch.engine.running:
            logger.info(f"Stopping: {running} running, with {self._drain_seconds:g} s to end")
        self._batch.drain().add_done_callback(self._drained)

    def _drained(self, _: asyncio.Task[None]) -> None:
        self._watchdog.is_drained = not self._batch.engine.running

    def _request_stop(self, call: Callable[[], object], is_final: bool = True) -> None:
        """Request a stop, which `call` performs on the event loop.

        A signal handler calls this between any two lines of the main thread, and the watchdog in
        its own thread. With `is_final` the process has to end, too, unlike on Ctrl-C in a Python
        shell or under pytest. `call` gets an empty context, because a handler has that of the run
        that it interrupts, and that run's log would get the service's lines.
        """
        self._is_requested = True
        self._is_final = self._is_final or is_final
        self._watchdog.end_after(self._drain_seconds)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, context=contextvars.Context())

    def _on_failure(self) -> None:
        """A part of the service can't go on: end the runs, and then the process. Any thread may
        call it.
        """
        self._watchdog.has_failed = True
        self._request_stop(self._begin)

    def _look(self, seconds: float) -> None:
        self._batch.supervisor.look(seconds)
        if not self._is_requested and self._has_server_request():
            self._request_stop(self._begin)

    def _replace_handlers(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before = signal.getsignal(number)
            if before not in (None, signal.SIG_IGN):
                self._replaced[number] = before
                signal.signal(number, self._on_signal)

    def _restore_handlers(self) -> None:
        for number, before in self._replaced.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_second_request(number):
            signal.signal(number, signal.SIG_DFL)
            self._watchdog.end_now(number)
            return
        is_repeated = number == signal.SIGHUP and bool(self._received)
        self._received.setdefault(number, clock.monotonic())
        if is_repeated:
            return
        before = self._replaced[number]
        if before is signal.SIG_DFL:
            self._number = number
            self._request_stop(lambda: self._stopped().add_done_callback(self._raise_again))
            return
        self._request_stop(self._begin, number != signal.SIGINT or not self._is_guest)
        before(number, frame)

    def _is_second_request(self, number: int) -> bool:
        """Whether this signal asks for an immediate end, because it is the second one.

        SIGINT counts after any first signal, because a parent process may pass on SIGINT as
        SIGTERM. Others count after one of their own kind, and after another kind that does not
        belong to the same request. In a worker process they do not count, because servers may send
        their workers SIGTERM at any time, as hypercorn does when another worker has ended.
        """
        if not self._received:
            return False
        if number == signal.SIGINT:
            return True
        is_later = clock.monotonic() - min(self._received.values()) > SAME_REQUEST_SECONDS
        return (number in self._received or is_later) and multiprocessing.parent_process() is None

    def _raise_again(self, _: asyncio.Task[None]) -> None:
        """Raise the signal again with its default action, because no handler was replaced."""
        if not self._is_by_server:
            signal.signal(self._number, signal.SIG_DFL)
            signal.raise_signal(self._number)


def _server_event() -> Callable[[], bool]:
    """A function that returns whether hypercorn has asked this worker to end, which it does with an
    event.

    The worker's own code checks the event on the event loop, and ends the lifespan only after open
    connections.
    """
    arguments = getattr(multiprocessing.current_process(), "_kwargs", {})
    event = arguments.get("shutdown_event")
    return event.is_set if event is not None else lambda: False


def _flush() -> None:
    logs.flush()
    sentry.flush()
