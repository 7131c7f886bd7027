"""The metrics of one service in this process since its start: its parts write them, and `/metrics`
shows them.

They are written where outcomes are handled in groups, so a successful run costs only a few
additions in memory.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import TracebackType
from typing import Any, NamedTuple

from batch_system import clock

BOUNDS = (
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
    900.0,
    1_800.0,
    3_600.0,
    7_200.0,
    21_600.0,
)
"""The upper bounds of the buckets in seconds, from 0.01 seconds to 6 hours. One more bucket has all
longer durations.
"""


class Buckets(NamedTuple):
    """The content of a histogram at one instant. `counts`: of each single bucket. `total`: the sum
    in seconds.
    """

    counts: tuple[int, ...]
    total: float


class Histogram:
    """Durations in seconds. One thread adds them; any other may read them meanwhile."""

    __slots__ = ("_counts", "_total")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Add a duration. A negative one, caused by a clock that was set back, counts as zero."""
        seconds = max(0.0, seconds)
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def buckets(self) -> Buckets:
        """The durations that were added so far."""
        return Buckets(tuple(self._counts), self._total)


MOST_TASKS = 1_000
"""How many tasks have labels of their own."""

OTHER = "other"
"""The label of all further tasks together."""


class TaskLabels:
    """Gives each of the first MOST_TASKS tasks its name as a label, which it keeps while the
    service lives.
    """

    def __init__(self, most: int = MOST_TASKS) -> None:
        self._most = most
        self._named: set[str] = set()

    def admit(self, tasks: Iterable[str]) -> None:
        """Give labels to these tasks, in the order of their names, as long as there are any
        left.
        """
        for task in sorted(set(tasks) - self._named):
            if len(self._named) >= self._most:
                return
            self._named.add(task)

    def of(self, task: str) -> str:
        """The label of a task: its name, or OTHER. A task that was not admitted yet gets a label if
        one is left.
        """
        if task not in self._named and len(self._named) < self._most:
            self._named.add(task)
        return task if task in self._named else OTHER


class Fate(StrEnum):
    """What became of a slot when it was fired."""

    ON_TIME = "on_time"
    CAUGHT_UP = "caught_up"
    SKIPPED = "skipped"
    REPLACED = "replaced"
    MISSED = "missed"


PART = "part"
"""The origin of the parts of partitioned runs."""
_ENDED = {Fate.SKIPPED: "skipped", Fate.REPLACED: "cancelled"}
"""The final states of the runs of slots that do not start."""


class LedgerWork(StrEnum):
    """The kinds of repeated work on the ledger, each one or a few statements in one transaction.

    `fire` turns due slots into runs. `look` checks whether a run may start. `write` writes a group
    of outcomes, log lines and progress, and claims runs. `poll` reads what may concern this node.
    `beat` is a heartbeat with a poll. `gauges` reads the gauges that `/metrics` shows.
    """

    FIRE = "fire"
    LOOK = "look"
    WRITE = "write"
    POLL = "poll"
    BEAT = "beat"
    GAUGES = "gauges"


class _Timed:
    """Adds the duration of its `async with` block to a histogram, even if the block raises."""

    __slots__ = ("_began_at", "_histogram")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram

    async def __aenter__(self) -> None:
        self._began_at = clock.monotonic()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._histogram.add(clock.monotonic() - self._began_at)


class ProcessMetrics:
    """The counts of a service since it started. Unless noted, everything is written on its event
    loop.

    Attributes:
      runs: Runs that have ended here, by task, final state and origin, without parts.
      parts: Parts of partitioned runs that have ended here, by task and final state.
      attempts: Attempts that have ended here, by task and outcome.
      slots: Slots that were fired here, by fate.
      notifications: Tries to send a message, by channel and outcome.
      items: Items in committed chunks, by task, of attempts that have ended.
      dropped_lines: Log lines of ended attempts that were dropped, because they came faster than
          they were written.
      durations: How long attempts took, by outcome, without those of parts.
      part_durations: How long attempts of parts took, by outcome.
      start_delay: From a slot that was fired on time to the first line of its run.
      ledger: How long the work on the ledger took. One thread does each kind of work: the
          heartbeat's or the loop's.
      failed_parts: Parts of the process that can't go on, by name. The process then ends.
      last_tick: When the event loop last got a ledger poll of the heartbeat; database time.
    """

    def __init__(self) -> None:
        self.labels = TaskLabels()
        self.runs: Counter[tuple[str, str, str]] = Counter()
        self.parts: Counter[tuple[str, str]] = Counter()
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.slots: Counter[str] = Counter(dict.fromkeys(Fate, 0))
        self.notifications: Counter[tuple[str, str]] = Counter()
        self.items: Counter[str] = Counter()
        self.dropped_lines = 0
        self.durations: dict[str, Histogram] = {}
        self.part_durations: dict[str, Histogram] = {}
        self.start_delay = Histogram()
        self.ledger = {work: Histogram() for work in LedgerWork}
        self.failed_parts: Counter[str] = Counter()
        self.last_tick: datetime | None = None
        self._refused = 0
        self._lock = threading.Lock()

    def timed(self, work: LedgerWork) -> _Timed:
        """Measure an `async with` block that does this work on the ledger. It includes the wait for
        a connection.
        """
        return _Timed(self.ledger[work])

    def announce(self, channels: Iterable[str]) -> None:
        """Show these channels with zero messages before the first one, because monitors see a rise
        only from a number.
        """
        for channel in channels:
            self.notifications.update(
                {(channel, outcome): 0 for outcome in ("sent", "failed", "given_up")}
            )

    def count_attempt(
        self, task: str, outcome: str, seconds: float, state: str | None, origin: str
    ) -> None:
        """Count an attempt that has ended, and its run if the run has ended with it.

        `outcome`: as in the row of the attempt. `state`: the final state of the run; None if the
        run goes on.
        """
        label = self.labels.of(task)
        self.attempts[label, outcome] += 1
        if state is not None:
            self.count_run(task, state, origin)
        of_kind = self.part_durations if origin == PART else self.durations
        if (durations := of_kind.get(outcome)) is None:
            durations = of_kind[outcome] = Histogram()
        durations.add(seconds)

    def count_run(self, task: str, state: str, origin: str) -> None:
        """Count a run, or a part of one, that has ended. `state`: its final state."""
        label = self.labels.of(task)
        if origin == PART:
            self.parts[label, state] += 1
        else:
            self.runs[label, state, origin] += 1

    def count_slots(self, slots: Mapping[tuple[str, Fate], int]) -> None:
        """Count slots that were fired, by task and fate. Runs that were skipped or replaced count
        as ended.
        """
        for (task, fate), number in slots.items():
            self.slots[fate] += number
            if (state := _ENDED.get(fate)) is not None:
                self.runs[self.labels.of(task), state, "schedule"] += number

    def count_work(self, task: str, items: int, dropped_lines: int) -> None:
        """Count the work of an attempt that has ended: items in committed chunks, and dropped log
        lines.
        """
        if items:
            self.items[self.labels.of(task)] += items
        self.dropped_lines += dropped_lines

    def count_failed(self, part: str) -> None:
        """Count a part of the process that can't go on. Any thread may call it."""
        with self._lock:
            self.failed_parts[part] += 1

    def count_refused(self) -> None:
        """Count a write of a run that was refused, because another node may hold the run. Any
        thread may call it.
        """
        with self._lock:
            self._refused += 1

    @property
    def refused(self) -> int:
        """How many writes of runs were refused."""
        return self._refused


@dataclass(frozen=True)
class ProcessSnapshot:
    """The metrics of this process at one instant, for another thread. The names are those of
    ProcessMetrics.

    `running`: attempts that are running, or whose outcome is not written yet. `leases_lost`: how
    often the node has lost its lease. `loop_lag`: how many seconds the last callback waited on the
    event loop.
    """

    runs: Mapping[tuple[str, str, str], int]
    parts: Mapping[tuple[str, str], int]
    attempts: Mapping[tuple[str, str], int]
    slots: Mapping[str, int]
    notifications: Mapping[tuple[str, str], int]
    items: Mapping[str, int]
    dropped_lines: int
    refused: int
    durations: Mapping[str, Buckets]
    part_durations: Mapping[str, Buckets]
    start_delay: Buckets
    ledger: Mapping[str, Buckets]
    failed_parts: Mapping[str, int]
    last_tick: datetime | None
    running: int
    leases_lost: int
    loop_lag: float

    @classmethod
    def of(
        cls,
        metrics: ProcessMetrics,
        *,
        running_items: Mapping[str, int],
        running_dropped: int,
        running: int,
        leases_lost: int,
        loop_lag: float,
    ) -> ProcessSnapshot:
        """`running_items`, `running_dropped`: items by task, and dropped lines, of attempts that
        have not ended.
        """
        items = Counter(metrics.items)
        for task, number in running_items.items():
            items[metrics.labels.of(task)] += number
        return cls(
            runs=dict(metrics.runs),
            parts=dict(metrics.parts),
            attempts=dict(metrics.attempts),
            slots=dict(metrics.slots),
            notifications=dict(metrics.notifications),
            items=items,
            dropped_lines=metrics.dropped_lines + running_dropped,
            refused=metrics.refused,
            durations=_buckets(metrics.durations),
            part_durations=_buckets(metrics.part_durations),
            start_delay=metrics.start_delay.buckets(),
            ledger=_buckets(metrics.ledger),
            failed_parts=dict(metrics.failed_parts),
            last_tick=metrics.last_tick,
            running=running,
            leases_lost=leases_lost,
            loop_lag=loop_lag,
        )


def _buckets(histograms: Mapping[Any, Histogram]) -> dict[str, Buckets]:
    return {str(label): histogram.buckets() for label, histogram in histograms.items()}
