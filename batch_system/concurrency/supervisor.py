"""The supervisor: the one list of the background loops of a process. A process ends if one of its
loops can't go on.

A loop may end only because it was stopped. Any other end, and a turn that takes twice as long as
allowed, is a failure: it is logged, shown by `/readyz`, counted in `/metrics`, and ends the process
with the exit code 70, so that a process manager starts it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from batch_system.concurrency.background import Background, Turn
from batch_system.logs import get_logger

logger = get_logger("batch_system.batch")

TOLERANCE, SPARE_SECONDS = 2.0, 5.0
"""A turn that takes this many times its limit, and this much longer, will no longer be ended by its
limit.

The spare seconds are for short limits: on a busy machine, each turn may be late by some seconds.
"""


class Supervised(Protocol):
    """A loop as the supervisor sees it: its name, its current turn, and its stack."""

    @property
    def name(self) -> str: ...

    @property
    def turn(self) -> Turn | None: ...

    def stack(self) -> str: ...


class Supervisor:
    """Starts the background loops of a process, and watches them. Any thread may call the methods.

    Attributes:
      failures: Why this process can't work any more, by the name of the part.
    """

    def __init__(self, count: Callable[[str], None] = lambda _: None) -> None:
        """`count`: called with the name of a part that has failed."""
        self._count = count
        self._loops: list[Supervised] = []
        self._lock = threading.Lock()
        self.failures: dict[str, str] = {}
        self.on_failure: Callable[[], None] = lambda: None
        """Ends the process, after giving its runs time to end. Called once, in the thread of the
        failure.
        """

    def start(self, *loops: Background) -> None:
        """Start these loops, which belong to the running event loop, and watch them from now on."""
        for loop in loops:
            loop.start(self._on_end)
            self._loops.append(loop)

    def watch(self, loop: Supervised) -> None:
        """Watch a loop that has a thread of its own, and calls `fail` when it ends."""
        self._loops.append(loop)

    def look(self, seconds: float) -> None:
        """Add to the age of each current turn the seconds for which the event loop has worked since
        the last look.

        Time in which the event loop was blocked, or its process frozen, does not count.
        """
        for loop in list(self._loops):
            turn = loop.turn
            if turn is None:
                continue
            turn.age += seconds
            if turn.age > max(TOLERANCE * turn.limit, turn.limit + SPARE_SECONDS):
                reason = f"its turn has gone on for {turn.age:.0f} s, and may take {turn.limit:g} s"
                self.fail(loop.name, reason, where=loop.stack())

    def fail(
        self, name: str, reason: str, error: BaseException | None = None, where: str = ""
    ) -> None:
        """This part of the process can't work any more, so the process has to end. Only the first
        failure counts.

        `where`: the stack of the part that does not go on.
        """
        with self._lock:
            if self.failures:
                return
            self.failures[name] = reason
        self._count(name)
        text = (
            f"{name}: {reason}; this process ends with the exit code 70, so that it is started anew"
        )
        logger.critical(f"{text}\n{where}".rstrip(), exc_info=error)
        self.on_failure()

    def _on_end(self, loop: Background, error: BaseException | None) -> None:
        reason = f"it has ended: {type(error).__name__}" if error is not None else "it has ended"
        self.fail(loop.name, reason, error)
