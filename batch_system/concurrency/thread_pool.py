"""A pool of daemon threads: a call that hangs in one of them does not keep the process from
ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from batch_system import failures

Work = tuple["Future[Any]", Callable[[], Any]]


class ThreadPool:
    """Runs at most `limit` calls at once; further calls wait.

    A call that does not end after its cancellation is abandoned, and a new thread replaces the one
    that it blocks. At most `limit` calls are abandoned at a time; beyond that, the threads that
    they block are not replaced.
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
        """How many more calls would start without waiting."""
        return max(0, self._limit - self._busy)

    def submit(self, call: Callable[..., Any], *args: Any) -> Future[Any]:
        """Start `call` in a thread, with a copy of the caller's context variables."""
        future: Future[Any] = Future()
        context = contextvars.copy_context()
        with self._lock:
            self._grow(self._busy + 1)
            self._busy += 1
        self._work.put((future, lambda: context.run(call, *args)))
        return future

    async def run(self, call: Callable[..., Any], *args: Any, patience: float = 0.0) -> Any:
        """Await `call` in a thread. When cancelled, wait up to `patience` seconds for its end, then
        abandon it.
        """
        future = self.submit(call, *args)
        waiting = asyncio.wrap_future(_shielded(future))
        waiting.add_done_callback(_retrieve_exception)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            # The call has begun, and may check whether it was asked to stop.
            if not future.cancel():
                await asyncio.wait([waiting], timeout=patience)
            raise
        finally:
            if not future.done() or future.cancelled():
                self._abandon(future)

    def _grow(self, calls: int) -> None:
        """Start one more thread if this many calls at once need it."""
        if self._threads < min(calls, self._limit):
            threading.Thread(
                target=self._serve, name=f"batch-run-{self._threads + 1}", daemon=True
            ).start()
            self._threads += 1

    def _abandon(self, future: Future[Any]) -> None:
        with self._lock:
            if future.cancelled():  # no thread has begun the call
                self._busy -= 1
            elif not future.done() and len(self._abandoned) < self._limit:
                self._abandoned.add(future)
                self._busy -= 1
                self._threads -= 1
                # The operating system may refuse another thread.
                with contextlib.suppress(RuntimeError):
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
        """End the idle threads. Threads that hang are daemon threads, and end with the process."""
        for _ in range(self._threads):
            self._work.put(None)


def _shielded(future: Future[Any]) -> Future[Any]:
    """A future with the same outcome, whose cancellation does not cancel the original."""
    copy: Future[Any] = Future()

    def settle(done: Future[Any]) -> None:
        if copy.set_running_or_notify_cancel() and not done.cancelled():
            error = done.exception()
            copy.set_exception(error) if error is not None else copy.set_result(done.result())

    future.add_done_callback(settle)
    return copy


def _retrieve_exception(future: asyncio.Future[Any]) -> None:
    """Keep asyncio from logging that the exception of an abandoned call was never retrieved."""
    if not future.cancelled():
        future.exception()


def _settle(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        result = call()
    except StopIteration as error:  # a future can't hold a StopIteration
        failure = RuntimeError(f"run() raised StopIteration({failures.message_of(error)})")
        failure.__cause__ = error
        future.set_exception(failure)
    except BaseException as error:  # noqa: BLE001
        # This is the boundary of the attempt in a thread: the future holds the error.
        future.set_exception(error)
    else:
        future.set_result(result)
