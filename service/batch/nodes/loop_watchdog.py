"""The watchdog: a thread that ends the process when its event loop does not.

A thread of its own and not the heartbeat's: that one has to fall silent before the node leaves the ledger, and what can
hang comes after that too. It knows no database and no signals.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from service import clock
from service.logs import get_logger

logger = get_logger("service.batch")

TICK_SECONDS = 0.25
ASK_SECONDS = 1.0
"""How often the event loop is asked for an answer, which wakes it."""

GRACE_SECONDS = 2.0
"""How long after DRAIN_SECONDS the process ends, whatever the event loop does."""

LAST_SECONDS = 2.0
"""For the last lines and for leaving the ledger. Each may hang on the very thing that the event loop hangs on."""

MOST_FRAMES = 15
"""What is further out is the server's."""

ENDED = 70
"""The exit code of a process that was ended by its watchdog and leaves something undone (EX_SOFTWARE of sysexits.h)."""


class Watchdog:
    """Ends this process when the event loop that made it has been blocked for `max_block` seconds (0: never), when it
    was to have ended, and when somebody is impatient.

    It calls `look` every quarter of a second, and `leave` and `flush` before it ends the process; all in its threads.
    """

    is_drained: bool
    """Nothing is left undone when the process ends now."""

    def __init__(
        self,
        max_block: float,
        leave: Callable[[], None],
        flush: Callable[[], None],
        look: Callable[[], None] = lambda: None,
    ) -> None:
        self._max_block = max_block
        self._leave, self._flush, self._look = leave, flush, look
        self._loop = asyncio.get_running_loop()
        self._of_loop = threading.get_ident()
        self.is_drained = self._is_asked = False
        self._asked_at = self._ticked_at = clock.monotonic()
        self.blocked = 0.0
        """For how many seconds the event loop has not answered."""
        self._end_at: float | None = None
        self._impatient: int | None = None
        self._stopping = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="batch-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()

    # These two are called by signal handlers: they take no lock.

    def end_after(self, seconds: float) -> None:
        """Somebody wants the process to end, and grants so many seconds. The first one counts."""
        if self._end_at is None:
            self._end_at = clock.monotonic() + seconds + GRACE_SECONDS

    def end_now(self, number: int) -> None:
        """End the process by this signal, whose handler is the system's by now."""
        self._impatient = number

    def _watch(self) -> None:
        while not self._stopping.wait(TICK_SECONDS):
            self._look()
            self.measure()
            if self._impatient is not None:
                self._end_at_once(self._impatient)
            if self._end_at is not None and clock.monotonic() >= self._end_at:
                self._end_late()
            if 0 < self._max_block <= self.blocked:
                self._end_blocked()

    def _end_at_once(self, number: int) -> None:
        self._last_words(logging.WARNING, "asked again to stop: this process ends at once; its runs are resumed")
        os.kill(os.getpid(), number)
        os._exit(128 + number)

    def _end_late(self) -> None:
        if self.is_drained:
            text = "the service has stopped, but its process stays (an open connection, a hung thread): it is ended now"
            self._last_words(logging.WARNING, text)
            os._exit(0)
        text = f"the service has not stopped {GRACE_SECONDS:g} s after DRAIN_SECONDS: its process is ended now"
        if self.blocked > 2 * ASK_SECONDS:
            text = f"{text}; {self._blockade()}"
        self._last_words(logging.ERROR, text)
        os._exit(ENDED)

    def _end_blocked(self) -> None:
        """Without leaving the ledger in order: a run that does this three times must not be started again."""
        text = f"this process is ended, to be started anew (MAX_LOOP_BLOCK is {self._max_block:g}): {self._blockade()}"
        self._last_words(logging.CRITICAL, text, leaves=False)
        os._exit(ENDED)

    def measure(self) -> None:
        """Ask the event loop, or count on. It is called at each tick.

        A loop that doesn't run is not blocked, and a process that was frozen was not either: it missed its ticks.
        """
        now = clock.monotonic()
        passed, self._ticked_at = now - self._ticked_at, now
        if self._is_asked:
            self.blocked += min(passed, 2 * TICK_SECONDS) if self._loop.is_running() else 0.0
        elif now >= self._asked_at + ASK_SECONDS:
            self._asked_at, self._is_asked = now, True
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # it is closed
                self._is_asked = False

    def _answer(self) -> None:
        self._is_asked, self.blocked = False, 0.0

    def _blockade(self) -> str:
        """What blocks the event loop: which run, in which line, and the whole stack."""
        stack = traceback.extract_stack(sys._current_frames().get(self._of_loop))
        task = asyncio.current_task(self._loop)
        who = f"by {task.get_name()}" if task is not None else "by a callback"
        lines = "".join(traceback.format_list(stack[-MOST_FRAMES:])).rstrip()
        return f"the event loop has been blocked for {self.blocked:.0f} s {who}, in {_place(stack)}\n{lines}"

    def _last_words(self, level: int, text: str, leaves: bool = True) -> None:
        """In threads that are not waited for long: a handler of an application may hold the lock that all wait for."""

        def say() -> None:
            logger.log(level, text)
            self._flush()
            logging.shutdown()

        threads = [threading.Thread(target=call, daemon=True) for call in ([say, self._leave] if leaves else [say])]
        for thread in threads:
            thread.start()
        give_up_at = clock.monotonic() + LAST_SECONDS
        for thread in threads:
            thread.join(max(0.0, give_up_at - clock.monotonic()))


_LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib", "scripts"))
_OURS = f"{Path(__file__).parents[1]}{os.sep}"


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line that is neither ours nor a library's; where there is none, the innermost."""
    theirs = [frame for frame in stack if not frame.filename.startswith((_OURS, "<", *_LIBRARIES))]
    frame = (theirs or list(stack))[-1]
    return f"{frame.filename} line {frame.lineno}"
