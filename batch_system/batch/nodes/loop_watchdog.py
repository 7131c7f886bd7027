"""The loop watchdog: a thread that ends the process when its event loop is blocked, or does not
stop in time.

It is separate from the heartbeat's thread: the heartbeat stops before the node leaves the ledger,
but the process may hang later, too. This module knows no database and no signals.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from batch_system import clock
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

TICK_SECONDS = 0.25
ASK_SECONDS = 1.0
"""How often a callback is scheduled on the event loop, which wakes the loop."""

GRACE_SECONDS = 2.0
"""How long after DRAIN_SECONDS the process is ended, if it has not ended by itself."""

LAST_SECONDS = 2.0
"""How long writing the last log lines and leaving the ledger may take. They may hang for the same
reason as the event loop.
"""

MOST_FRAMES = 15
"""How many frames of the stack are logged. The outer frames belong to the server."""

EXIT_CODE = 70
"""The exit code of a process that its watchdog has ended before its work was done (EX_SOFTWARE of
sysexits.h).
"""


class Watchdog:
    """Ends this process in three cases: the event loop that made the watchdog is blocked for
    `max_block` seconds (0: never); the process has not stopped in time; a second signal asks the
    process to stop.

    Every quarter of a second it calls `look`, with the seconds for which the event loop has worked
    since the last call. It calls `leave` and `flush` before it ends the process. All of them run in
    its own threads.
    """

    is_drained: bool
    """Whether the work is done, so that the process can end now with exit code 0."""
    has_failed = False
    """Whether a part of this process can't go on. The process then ends with EXIT_CODE once the
    work is done.
    """

    def __init__(
        self,
        max_block: float,
        leave: Callable[[], None],
        flush: Callable[[], None],
        look: Callable[[float], None] = lambda _: None,
        accuse: Callable[[str, str], None] = lambda run, what: None,
    ) -> None:
        """`accuse`: records what the run with this id does. It is called before a blocked process
        is ended.
        """
        self._max_block = max_block
        self._leave = leave
        self._flush = flush
        self._look = look
        self._accuse = accuse
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self.is_drained = self._is_asked = False
        self._asked_at = self._ticked_at = clock.monotonic()
        self.blocked = 0.0
        """For how many seconds the event loop has not answered."""
        self._end_at: float | None = None
        self._signal: int | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="batch-watchdog", daemon=True).start()

    def stop(self) -> None:
        """End the thread at its next tick. Returns at once."""
        self._stopping.set()

    # Signal handlers call the next two functions, so these take no lock.

    def end_after(self, seconds: float) -> None:
        """End the process GRACE_SECONDS after `seconds`, if it has not ended by then. Later calls
        change nothing.
        """
        if self._end_at is None:
            self._end_at = clock.monotonic() + seconds + GRACE_SECONDS

    def end_now(self, number: int) -> None:
        """End the process by the signal `number`, whose handler is the system's default by now."""
        self._signal = number

    def _watch(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            passed = self.measure()
            self._look(passed if self.blocked == 0.0 else 0.0)
            if self.has_failed and self.is_drained:
                self._end_failed()
            if self._signal is not None:
                self._end_by_signal(self._signal)
            if self._end_at is not None and clock.monotonic() >= self._end_at:
                self._end_late()
            if 0 < self._max_block <= self.blocked:
                self._end_blocked()

    def _end_by_signal(self, number: int) -> None:
        self._log_and_leave(
            logging.WARNING,
            "asked again to stop: the process ends now; its runs will be resumed",
        )
        os.kill(os.getpid(), number)
        os._exit(128 + number)

    def _end_failed(self) -> None:
        self._log_and_leave(
            logging.WARNING, f"this process ends with the exit code {EXIT_CODE}, see above"
        )
        os._exit(EXIT_CODE)

    def _end_late(self) -> None:
        if self.has_failed:
            self._end_failed()
        if self.is_drained:
            text = (
                "the service has stopped, but its process has not ended (an open connection, a "
                "hung thread): "
                "it is ended now"
            )
            self._log_and_leave(logging.WARNING, text)
            os._exit(0)
        text = (
            f"the service has not stopped {GRACE_SECONDS:g} s after DRAIN_SECONDS: its process is "
            "ended now"
        )
        if self.blocked > 2 * ASK_SECONDS:
            text = f"{text}; {self._blocked_where()}"
        self._log_and_leave(logging.ERROR, text)
        os._exit(EXIT_CODE)

    def _end_blocked(self) -> None:
        """End the process without leaving the ledger.

        The run that blocks the loop then counts as lost (see harm.py).
        """
        text = (
            "this process is ended, so that it is started anew (MAX_LOOP_BLOCK is "
            f"{self._max_block:g}): {self._blocked_where()}"
        )
        self._log_and_leave(logging.CRITICAL, text, self._accuse_blocker)
        os._exit(EXIT_CODE)

    def measure(self) -> float:
        """Schedule a callback on the event loop, or add to `blocked` while the last one has not
        run. Called at each tick.

        A loop that is not running does not count as blocked. The time for which a process was
        frozen does not count either, because there were no ticks. Returns the seconds since the
        last tick, at most those of two ticks.
        """
        now = clock.monotonic()
        passed = min(now - self._ticked_at, 2 * TICK_SECONDS)
        self._ticked_at = now
        if self._is_asked:
            self.blocked += passed if self._loop.is_running() else 0.0
        elif now >= self._asked_at + ASK_SECONDS:
            self._asked_at = now
            self._is_asked = True
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # the loop is closed
                self._is_asked = False
        return passed

    def _answer(self) -> None:
        self._is_asked = False
        self.blocked = 0.0

    def _blocked_where(self) -> str:
        """For how long the event loop has been blocked, by which run, in which line, and the
        innermost frames.
        """
        stack = traceback.extract_stack(sys._current_frames().get(self._loop_thread))
        task = asyncio.current_task(self._loop)
        blocker = f"by {task.get_name()}" if task is not None else "by a callback"
        lines = "".join(traceback.format_list(stack[-MOST_FRAMES:])).rstrip()
        return (
            f"the event loop has been blocked for {self.blocked:.0f} s {blocker}, in "
            f"{_line_of(stack)}\n{lines}"
        )

    def _accuse_blocker(self) -> None:
        task = asyncio.current_task(self._loop)
        if task is not None and (named := _RUN.match(task.get_name())):
            stack = traceback.extract_stack(sys._current_frames().get(self._loop_thread))
            self._accuse(
                named[1],
                f"it blocked the event loop for {self.blocked:.0f} s, in {_line_of(stack)}",
            )

    def _log_and_leave(
        self, level: int, text: str, leave: Callable[[], None] | None = None
    ) -> None:
        """Log the reason and leave the ledger, or call `leave` instead, in threads, within
        LAST_SECONDS.

        Either may hang, because a log handler of the application may hold a lock that they need.
        """

        def log() -> None:
            logger.log(level, text)
            self._flush()
            logging.shutdown()

        threads = [
            threading.Thread(target=call, daemon=True) for call in (log, leave or self._leave)
        ]
        for thread in threads:
            thread.start()
        give_up_at = clock.monotonic() + LAST_SECONDS
        for thread in threads:
            thread.join(max(0.0, give_up_at - clock.monotonic()))


_RUN = re.compile(r"run ([0-9a-f-]{36}) of ")
"""The name of the asyncio task of an attempt."""
_LIBRARIES = tuple(
    sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib", "scripts")
)
_OURS = f"{Path(__file__).parents[1]}{os.sep}"


def _line_of(stack: traceback.StackSummary) -> str:
    """The innermost line of the author's code, or the innermost line of all if there is none, as
    "file line 7".
    """
    authors = [frame for frame in stack if not frame.filename.startswith((_OURS, "<", *_LIBRARIES))]
    frame = (authors or list(stack))[-1]
    return f"{frame.filename} line {frame.lineno}"
