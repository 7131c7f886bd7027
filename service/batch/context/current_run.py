"""current_run(): what the code of a task may ask about the run it is in."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID, uuid5
from weakref import WeakKeyDictionary, WeakSet

from pydantic_core import PydanticSerializationError, to_json
from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState

from service import escaping
from service.batch.context.loop_positions import Loops
from service.batch.context.progress import Meter
from service.batch.cron.cron import Schedule
from service.batch.ledger.run_logs import LogLine
from service.batch.ledger.states import Origin
from service.errors import BatchError, Interrupted
from service.logs import log_lines

MAX_WAITING_LINES = 10_000
MAX_WAITING_BYTES = 4_000_000
"""What a run has logged, and the ledger has not taken yet."""


def for_ever() -> bool:
    """The lease of who needs none."""
    return True


@dataclass(eq=False)
class CurrentRun:
    """The run that this code belongs to.

    `slot` is aware, in the task's zone; a manual run's is the instant asked for, or that of `--slot`.
    `attempt` counts from 1. `will_retry`: this one has failed, and another follows. `fence` is the number under which
    it may commit; `is_sealed`: it may no more. `holds_lease`: whether its node may work on it right now; `is_lost`: it
    wanted to write when that was over. `transactions`: the connections that it has used, each with its event loop;
    `passed`: the transactions that have executed the fence statement already.
    """

    id: str
    task: str
    slot: datetime
    attempt: int
    origin: Origin
    will_retry: bool = field(default=False, init=False)
    fence: int = field(default=0, init=False)
    is_fenced: bool = field(default=False, init=False)
    is_sealed: bool = field(default=False, init=False)
    is_lost: bool = field(default=False, init=False)
    holds_lease: Callable[[], bool] = field(default_factory=lambda: for_ever, init=False, repr=False)
    transactions: WeakKeyDictionary[Any, asyncio.AbstractEventLoop] = field(
        default_factory=WeakKeyDictionary, init=False, repr=False
    )
    passed: WeakSet[Any] = field(default_factory=WeakSet, init=False, repr=False)
    loops: Loops = field(default_factory=Loops, init=False, repr=False)
    _stopping: asyncio.Event | None = field(default=None, init=False, repr=False)
    _schedule: Schedule | None = None
    meter: Meter = field(default_factory=Meter, init=False, repr=False)
    _stop_reason: str | None = None
    _lines: list[LogLine] = field(default_factory=list)
    _size: int = 0
    _lost_lines: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def previous_slot(self) -> datetime | None:
        """The slot before `slot`, in the same zone; None for a task without a schedule."""
        previous = self._schedule.previous(self.slot) if self._schedule else None
        return previous.astimezone(self.slot.tzinfo) if previous else None

    @property
    def cancelled(self) -> bool:
        """True once the run is asked to stop: sync code may look here, and return."""
        return self._stop_reason is not None

    def checkpoint(self) -> None:
        """A place where the run may stop: raises Interrupted (not an Exception) when it is asked to."""
        if self.cancelled:
            raise Interrupted(self._stop_reason)

    async def sleep(self, seconds: float) -> None:
        """Wait so long; raises Interrupted as soon as the run is asked to stop."""
        self._stopping = self._stopping or asyncio.Event()
        self.checkpoint()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        self.checkpoint()

    def progress(self, done: int | None = None, total: int | None = None, message: str | None = None) -> None:
        """Say how far the run is, in whole items and in a line for people. The ledger gets it at most twice a second.

        `total`: None where it is not known. `message`: stays until the next one; "" takes it away. It may come alone,
        in a loop over chunks too, which count by themselves. Raises ValueError.
        """
        self.meter.say(done, total, message, before=self.loops.before)

    def idempotency_key(self, item: object) -> str:
        """A UUID for what this run does about `item`: the same in each of its attempts, whatever the chunks.

        `item`: a str, an int, another value that JSON has, a UUID, a date, a tuple of such; or an object of a mapped
        class, of which the primary key counts. Raises BatchError.
        """
        state = inspect(item, raiseerr=False)
        if isinstance(state, InstanceState):
            item = (state.mapper.class_.__name__, *state.mapper.primary_key_from_instance(item))
        try:
            return str(uuid5(UUID(self.id), to_json(item).decode()))
        except PydanticSerializationError as error:
            raise BatchError(f"idempotency_key() was given {escaping.echoed(item)}: {error}") from None

    @property
    def log_context(self) -> dict[str, Any]:
        context: dict[str, Any] = {"task": self.task, "run": self.id}
        return {**context, "attempt": self.attempt} if self.attempt > 1 else context

    def keep_line(self, at: str, level: str, logger: str, text: str) -> None:
        line = LogLine(at, level, logger, log_lines.bounded(text, log_lines.LONGEST_LINE))
        with self._lock:
            if len(self._lines) < MAX_WAITING_LINES and self._size < MAX_WAITING_BYTES:
                self._lines.append(line)
                self._size += line.size
            else:
                self._lost_lines += 1

    def take_lines(self) -> list[LogLine]:
        """The lines since the last call. Where the ledger could not keep up, the last one says how many were lost."""
        if not self._lines:
            return []
        with self._lock:
            taken, self._lines, self._size = self._lines, [], 0
            if self._lost_lines:
                taken.append(_dropped(taken[-1].at, self._lost_lines))
                self._lost_lines = 0
        return taken

    def drop_lines(self) -> list[LogLine]:
        """As take_lines, where nobody has room for them: the one line that says how many they were."""
        with self._lock:
            dropped, self._lines, self._size = self._lines, [], 0
            number, self._lost_lines = len(dropped) + self._lost_lines, 0
        return [_dropped(dropped[-1].at, number)] if dropped else []

    def ask_to_stop(self, reason: str) -> None:
        self._stop_reason = self._stop_reason or reason
        if self._stopping is not None:
            self._stopping.set()


def _dropped(at: str, number: int) -> LogLine:
    text = f"{number:,} lines were dropped: they came faster than the ledger takes them"
    return LogLine(at, "warning", "service.batch", text)


_current: ContextVar[CurrentRun | None] = ContextVar("current_run", default=None)


def current_run() -> CurrentRun:
    """The run that this code belongs to. Raises BatchError outside a run."""
    run = _current.get()
    if run is None:
        raise BatchError("current_run() works inside a run only; a task called by hand has none")
    return run


def current_run_if_any() -> CurrentRun | None:
    return _current.get()


def enter(run: CurrentRun) -> None:
    """Make `run` the current one in this context, which is the attempt's own and ends with it."""
    _current.set(run)
