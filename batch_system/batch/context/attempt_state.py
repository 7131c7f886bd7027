"""The state that the service keeps for a running attempt: its fence, its log buffer, its open
transactions.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from batch_system.batch.context.loop_positions import Loops
from batch_system.batch.context.progress import ProgressMeter
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.logs import log_lines

MAX_WAITING_LINES = 10_000
MAX_WAITING_BYTES = 4_000_000
"""How many log lines of an attempt, and how many bytes of them, may wait to be written to the
ledger.
"""


def always_held() -> bool:
    """Lease check for code that runs without a node: the lease is always held."""
    return True


def count_nothing() -> None:
    """Used if there are no metrics."""


def tell_nobody(reason: str) -> None:
    """Used if the run's code is in this process, and sees the request to stop by itself."""


class LogBuffer:
    """The lines that an attempt has logged and that are not in the ledger yet. Any thread may add
    one.

    Attributes:
      log_context: Values by name that the log of the process shows with each line of the attempt.
      dropped: How many lines were dropped so far.
    """

    def __init__(self, log_context: dict[str, Any]) -> None:
        self.log_context = log_context
        self.dropped = 0
        self._lines: list[LogLine] = []
        self._size = 0
        self._lost_lines = 0
        self._lock = threading.Lock()

    def keep_line(self, at: str, level: str, logger: str, text: str) -> None:
        """Add a line, or count it as lost if the buffer is full."""
        line = LogLine(at, level, logger, log_lines.bounded(text, log_lines.LONGEST_LINE))
        with self._lock:
            if len(self._lines) < MAX_WAITING_LINES and self._size < MAX_WAITING_BYTES:
                self._lines.append(line)
                self._size += line.size
            else:
                self._lost_lines += 1
                self.dropped += 1

    @property
    def has_lines(self) -> bool:
        """Whether lines wait. The engine checks this for each attempt in each turn."""
        return bool(self._lines)

    def take_lines(self) -> list[LogLine]:
        """The lines since the last call. If lines were lost, one more line at the end gives their
        number.
        """
        if not self._lines:
            return []
        with self._lock:
            taken = self._lines
            self._lines = []
            self._size = 0
            if self._lost_lines:
                taken.append(_dropped(taken[-1].at, self._lost_lines))
                self._lost_lines = 0
        return taken

    def drop_lines(self) -> list[LogLine]:
        """Empty the buffer, because the write buffer is full. Returns one line with the number of
        dropped lines.
        """
        with self._lock:
            dropped = self._lines
            self._lines = []
            self._size = 0
            number = len(dropped) + self._lost_lines
            self._lost_lines = 0
            self.dropped += len(dropped)
        return [_dropped(dropped[-1].at, number)] if dropped else []


def _dropped(at: str, number: int) -> LogLine:
    text = f"{number:,} lines were dropped: they came faster than the ledger takes them"
    return LogLine(at, "warning", "batch_system.batch", text)


@dataclass(eq=False)
class AttemptState:
    """The state of one attempt of the run with the id `run`.

    Attributes:
      fence: The number under which the attempt may commit to the application database.
      is_fenced: Whether the fence is checked at each commit.
      is_sealed: Whether the attempt has ended or was given up, so that it may not commit any more.
      is_lost: Whether a write was refused because the node did not hold its lease.
      holds_lease: Returns whether the node holds its lease now.
      on_stop: Called with the reason when the attempt is asked to stop.
      on_refused: Called each time a write of the attempt was refused, in any thread.
      will_retry: Whether the attempt has failed and another one follows.
      schedule: The schedule of the task; None for a task without one.
      stage: Which method of a partitioned task the attempt calls; "" for other tasks.
      part: The number of the part that it executes; None for other runs.
      stop_reason: Why the attempt is asked to stop; None while it is not.
      has_set_aside: Whether the attempt has put items into quarantine.
      stopping: An event that is set when the attempt is asked to stop. None until code of the run
          waits for it.
    """

    run: str
    task: str
    log: LogBuffer
    fence: int = 0
    is_fenced: bool = False
    holds_lease: Callable[[], bool] = always_held
    on_refused: Callable[[], None] = count_nothing
    on_stop: Callable[[str], None] = tell_nobody
    schedule: Schedule | None = None
    is_sealed: bool = False
    is_lost: bool = False
    will_retry: bool = False
    has_set_aside: bool = False
    stage: str = ""
    part: int | None = None
    stop_reason: str | None = None
    stopping: asyncio.Event | None = None
    loops: Loops = field(default_factory=Loops)
    meter: ProgressMeter = field(default_factory=ProgressMeter)

    @classmethod
    def of(
        cls, run: str, task: str, attempt: int, schedule: Schedule | None = None
    ) -> AttemptState:
        """The state of an attempt that begins. `attempt` counts from 1."""
        context: dict[str, Any] = {"task": task, "run": run}
        return cls(
            run,
            task,
            LogBuffer({**context, "attempt": attempt} if attempt > 1 else context),
            schedule=schedule,
        )

    # The next two are made when they are first used. Making them for attempts without a transaction
    # would take half of the time and of the objects with which an attempt begins.

    @cached_property
    def transactions(self) -> WeakKeyDictionary[Any, asyncio.AbstractEventLoop]:
        """The connections that the attempt has used, each with the event loop that it belongs
        to.
        """
        return WeakKeyDictionary()

    @cached_property
    def checked(self) -> WeakSet[Any]:
        """The transactions in which the fence was already checked."""
        return WeakSet()

    def ask_to_stop(self, reason: str) -> None:
        """Ask the attempt to stop at its next checkpoint. A later call does not change the
        reason.
        """
        if self.stop_reason is None:
            self.stop_reason = reason
            self.on_stop(reason)
        if self.stopping is not None:
            self.stopping.set()
