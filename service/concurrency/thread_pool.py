"""Threads for sync runs: daemon threads of our own, so that none of them can keep the process alive."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from service import failures

Work = tuple["Future[Any]", Callable[[], Any]]


class Threads:
    """At most `limit` calls at once; more wait. A hung one is abandoned: it loses its place to a new thread.

    At most `limit` threads are abandoned at a time; beyond that their places stay taken.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._work: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads = 0
        self._busy = 0
        self._abandoned: set[Future[Any]] = set()

    @property
    def free(self) -> int:
        """How many more calls would start at once."""
        return max(0, self._limit - self._busy)

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start `call` in a thread, with this context's variables."""
        future: Future[Any] = Future()
        context = contextvars.copy_context()
        with self._lock:
            self._grow(self._busy + 1)
            self._busy += 1
        self._work.put((future, lambda: context.run(call, *args)))
        return future

    async def run(self, call: Callable[..., Any], *args: Any, patience: float = 0.0) -> Any:
        """Await `call` in a thread. Cancelled, it waits `patience` seconds for its end, and then gives it up."""
        future = self.submit(call, *args)
        waiting = asyncio.wrap_future(_shielded(future))
        waiting.add_done_callback(_look_at)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            if not future.cancel():  # it has begun, and may look whether it is asked to stop
                await asyncio.wait([waiting], timeout=patience)
            raise
        finally:
            if not future.done() or future.cancelled():
                self._abandon(future)

    def _grow(self, calls: int) -> None:
        """A thread more where so many calls need one."""
        if self._threads < min(calls, self._limit):
            threading.Thread(target=self._serve, name=f"batch-run-{self._threads + 1}", daemon=True).start()
            self._threads += 1

    def _abandon(self, future: Future[Any]) -> None:
        with self._lock:
            if future.cancelled():  # no thread has begun with it
                self._busy -= 1
            elif not future.done() and len(self._abandoned) < self._limit:
                self._abandoned.add(future)
                self._busy -= 1
                self._threads -= 1
                with contextlib.suppress(RuntimeError):  # the system allows no thread more
                    self._grow(self._busy)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            future, call = work
            if future.set_running_or_notify_cancel():
                _settle(future, call)
                with self._lock:
                    if future in self._abandoned:
                        self._abandoned.discard(future)
                        return
                    self._busy -= 1
            del call, work, future

    def close(self) -> None:
        """Let idle threads end. Hung ones are daemons, and end with the process."""
        for _ in range(self._threads):
            self._work.put(None)


def _shielded(future: Future[Any]) -> Future[Any]:
    """A copy that may be cancelled without touching the original."""
    copy: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        if copy.set_running_or_notify_cancel() and not done.cancelled():
            error = done.exception()
            copy.set_exception(error) if error is not None else copy.set_result(done.result())

    future.add_done_callback(settle)
    return copy


def _look_at(future: asyncio.Future[Any]) -> None:
    """What an abandoned call raises later is nobody's business any more."""
    if not future.cancelled():
        future.exception()


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        result = call()
    except StopIteration as error:  # a future can't carry one
        failure = RuntimeError(f"run() raised StopIteration({failures.message_of(error)})")
        failure.__cause__ = error
        future.set_exception(failure)
    except BaseException as error:  # noqa: BLE001 - the attempt's boundary in a thread: the future has it
        future.set_exception(error)
    else:
        future.set_result(result)
