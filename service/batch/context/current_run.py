"""current_run(): what the code of a task may ask about the run it is in."""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID, uuid5

from pydantic_core import PydanticSerializationError, to_json
from sqlalchemy import inspect
from sqlalchemy.orm import InstanceState

from service import escaping
from service.batch.context.attempt_state import AttemptState
from service.batch.ledger.states import Origin
from service.errors import BatchError, Interrupted


@dataclass(eq=False)
class CurrentRun:
    """The run that this code belongs to.

    `id` is a UUID. `slot` is aware, in the task's zone; a manual run's is the instant asked for, or that of `--slot`.
    `attempt` counts from 1. `origin` says why the run exists.
    """

    id: str
    task: str
    slot: datetime
    attempt: int
    origin: Origin
    _state: AttemptState = field(repr=False)

    @property
    def fence(self) -> int:
        """The number of this holder of the run. It rises each time that a process takes the run up."""
        return self._state.fence

    @property
    def previous_slot(self) -> datetime | None:
        """The slot before `slot`, in the same zone; None for a task without a schedule."""
        schedule = self._state.schedule
        previous = schedule.previous(self.slot) if schedule else None
        return previous.astimezone(self.slot.tzinfo) if previous else None

    @property
    def cancelled(self) -> bool:
        """True once the run is asked to stop: sync code may look here, and return."""
        return self._state.stop_reason is not None

    def checkpoint(self) -> None:
        """A place where the run may stop: raises Interrupted (not an Exception) when it is asked to."""
        if self.cancelled:
            raise Interrupted(self._state.stop_reason)

    async def sleep(self, seconds: float) -> None:
        """Wait so long; raises Interrupted as soon as the run is asked to stop."""
        stopping = self._state.stopping = self._state.stopping or asyncio.Event()
        self.checkpoint()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stopping.wait()
        self.checkpoint()

    def progress(self, done: int | None = None, total: int | None = None, message: str | None = None) -> None:
        """Say how far the run is, in whole items and in a line for people. The ledger gets it at most twice a second.

        `total`: None where it is not known. `message`: stays until the next one; "" takes it away. It may come alone,
        in a loop over chunks too, which count by themselves. Raises ValueError.
        """
        self._state.meter.say(done, total, message, before=self._state.loops.before)

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


_current: ContextVar[CurrentRun | None] = ContextVar("current_run", default=None)


def current_run() -> CurrentRun:
    """The run that this code belongs to. Raises BatchError outside a run."""
    run = _current.get()
    if run is None:
        raise BatchError("current_run() works inside a run only; a task called by hand has none")
    return run


def current_run_if_any() -> CurrentRun | None:
    return _current.get()


def state_of(run: CurrentRun) -> AttemptState:
    """What the service keeps about the attempt, which is no matter of the code inside it."""
    return run._state


def enter(run: CurrentRun) -> None:
    """Make `run` the current one in this context, which is the attempt's own and ends with it."""
    _current.set(run)
