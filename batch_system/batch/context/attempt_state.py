"""The state that the service keeps for a running attempt: its fence, its log buffer, its open
transactions, its loops and steps.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from batch_system.batch.context.progress import ProgressMeter
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.ledger.run_logs import LogLine
from batch_system.errors import ChunkError
from batch_system.logs import log_lines

LOOP_NAME = re.compile(r"[^\s]{1,80}")
"""An allowed name of a loop or a step."""
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


class Loop(Protocol):
    """A loop over chunks. `done`: items in committed chunks of all attempts. `total`: all items, if
    known.
    """

    name: str

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int | None: ...


class Loops:
    """The loops and steps of one attempt.

    Attributes:
      before: How many items of these loops earlier attempts have done.
      done_here: How many items this attempt has done, in chunks that were committed.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._unnamed = 0
        self._progress: dict[str, tuple[int, int | None]] = {}
        """The items done and the total of each loop that has not ended, by its name."""
        self._done = self._total = self._without_total = 0
        """Sums over all loops, including ended ones: items done, totals, and loops with an unknown
        total.
        """
        self._unnamed_at: dict[str, int] = {}
        self._rolled_back: dict[str, BaseException] = {}
        self._background: set[asyncio.Task[None]] = set()
        self.before = self.done_here = 0

    def name(self, kind: str, name: str | None) -> str:
        """The `name` for the row of a loop or step in batch_checkpoints. None stands for its number
        in this attempt.

        `kind`: "chunks" or "step". Raises ChunkError if the name is not allowed, or is already
        used.
        """
        if name is None:
            self._unnamed += 1
            name = str(self._unnamed)
        elif not LOOP_NAME.fullmatch(name):
            raise ChunkError(f"name={name!r}; allowed: 1 to 80 characters without spaces")
        key = f"{kind}:{name}"
        if key in self._names:
            raise ChunkError(
                f"the name {name!r} is used twice in this run, so the second would find the "
                "position of the first: "
                "give each its own, such as name=f'orders-{shop.id}'"
            )
        self._names.add(key)
        return key

    def before_chunk(self, loop: Loop) -> None:
        """Call it before a loop returns a chunk. Raises ChunkError if an unnamed loop began in its
        last chunk.
        """
        if self._unnamed_at.get(loop.name, self._unnamed) != self._unnamed:
            raise ChunkError(
                "a loop inside a loop needs a name of its own, made from the current item of the "
                "outer loop, such as name=f'orders-{shop.id}': its number alone could not tell "
                "it from the others"
            )
        self._unnamed_at[loop.name] = self._unnamed
        self._rolled_back.pop(loop.name, None)

    def rolled_back(self, loop: Loop, error: BaseException) -> None:
        """Record that `error` rolled back the last chunk of a loop, which will return it again."""
        self._rolled_back[loop.name] = error

    def committed(self, loop: Loop, number: int, items: list[Any]) -> None:
        """Record that a chunk was committed. It may have been rolled back before, and repeated in
        its `async with`.
        """
        self._rolled_back.pop(loop.name, None)
        self.done_here += len(items)

    def raise_rolled_back(self) -> None:
        """Call it at the end of `run()`: raises the error of a loop that was left after a chunk was
        rolled back.
        """
        for error in self._rolled_back.values():
            raise error

    def advanced(self, loop: Loop) -> tuple[int, int | None]:
        """Record the numbers of a loop. Returns the items done and the total of all loops; None if
        one of them is unknown.
        """
        self._add(self._progress.get(loop.name), -1)
        self._progress[loop.name] = loop.done, loop.total
        self._add(self._progress[loop.name], 1)
        self.before = self._done - self.done_here
        return self._done, self._total if not self._without_total else None

    def _add(self, progress: tuple[int, int | None] | None, sign: int) -> None:
        if progress is not None:
            done, total = progress
            self._done += sign * done
            self._total += sign * (total or 0)
            self._without_total += sign * (total is None)

    def ended(self, loop: Loop) -> None:
        """Forget a loop that returns no more chunks, except for its sums. A run may have thousands
        of loops.
        """
        self._progress.pop(loop.name, None)
        self._unnamed_at.pop(loop.name, None)

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Execute `work` beside the run, until the attempt ends."""
        # Bypasses a task factory of the application.
        task = asyncio.Task(work, loop=asyncio.get_running_loop())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def close(self) -> None:
        """Cancel the work in the background, because the attempt has ended."""
        for task in list(self._background):
            task.cancel()


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
