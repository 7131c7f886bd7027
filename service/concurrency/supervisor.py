"""The supervisor: the one list of the background loops of a process. A process with a loop that
can't go on ends.

A loop has one way to end: it was stopped. Any other end, and a turn that goes on for twice as long
as it may, is a failure: it is logged, shown by `/readyz`, counted in `/metrics`, and ends the
process with the exit code 70, so that whatever has started the process starts it anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from service.concurrency.background import Background, Turn
from service.logs import get_logger

logger = get_logger("service.batch")

TOLERANCE, SPARE_SECONDS = 2.0, 5.0
"""A turn that takes this many times as long as it may, and this much longer, is not ended by its
limit any more.

The spare seconds are for short limits: on a machine with much other work each turn may be late by
some seconds.
"""


class Supervised(Protocol):
    """A loop as the supervisor sees it: its name, the turn that is going on, and where that is
    now.
    """

    @property
    def name(self) -> str: ...

    @property
    def turn(self) -> Turn | None: ...

    def stack(self) -> str: ...


class Supervisor:
    """Starts the background loops of a process, and knows what has become of them. Any thread may
    call the methods.

    Attributes:
        failures: Why this process can't do its work any more, by the name of the part.
    """

    def __init__(self, count: Callable[[str], None] = lambda _: None) -> None:
        """`count`: called with the name of a part that has failed."""
        self._count = count
        self._loops: list[Supervised] = []
        self._lock = threading.Lock()
        self.failures: dict[str, str] = {}
        self.on_failure: Callable[[], None] = lambda: None
        """Ends the process, when its runs have been given time to end. Called once, in the thread
        of the failure.
        """

    def start(self, *loops: Background) -> None:
        """Start these loops, which belong to the running event loop, and look at them from now
        on.
        """
        for loop in loops:
            loop.start(self._on_end)
            self._loops.append(loop)

    def watch(self, loop: Supervised) -> None:
        """Look at a loop that has a thread of its own, and calls `fail` when it ends."""
        self._loops.append(loop)

    def look(self, seconds: float) -> None:
        """Let turns that are going on be older by the seconds for which the event loop has worked
        since the last look.

        The time for which the event loop was blocked, or its process frozen, is not a turn's fault.
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
        """This part of the process can't do its work any more: have the process end. Only the first
        failure counts.

        `where`: the stack of what does not go on.
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
