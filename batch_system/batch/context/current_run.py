"""current_run(): the run that the calling code belongs to, and what that code may do with it."""

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

from batch_system import escaping
from batch_system.batch.context.attempt_state import AttemptState
from batch_system.batch.ledger.states import Origin
from batch_system.errors import BatchError, Interrupted


@dataclass(eq=False)
class CurrentRun:
    """The run that this code belongs to.

    `id` is a UUID. `slot` is aware, in the task's zone; for a manual run it is the slot that was
    given, otherwise the instant of its start. `attempt` counts from 1. `origin` says why the run
    exists.
    """

    id: str
    task: str
    slot: datetime
    attempt: int
    origin: Origin
    _state: AttemptState = field(repr=False)

    @property
    def fence(self) -> int:
        """A number that rises each time a process claims the run."""
        return self._state.fence

    @property
    def previous_slot(self) -> datetime | None:
        """The slot before `slot`, in the same zone; None for a task without a schedule."""
        schedule = self._state.schedule
        previous = schedule.previous(self.slot) if schedule else None
        return previous.astimezone(self.slot.tzinfo) if previous else None

    @property
    def cancelled(self) -> bool:
        """Whether the run is asked to stop. Sync code may check this, and return."""
        return self._state.stop_reason is not None

    def checkpoint(self) -> None:
        """Let the run stop here: raises Interrupted (not a subclass of Exception) if the run is
        asked to stop.
        """
        if self.cancelled:
            raise Interrupted(self._state.stop_reason)

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`. Raises Interrupted as soon as the run is asked to stop."""
        stopping = self._state.stopping = self._state.stopping or asyncio.Event()
        self.checkpoint()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await stopping.wait()
        self.checkpoint()

    def progress(
        self, done: int | None = None, total: int | None = None, message: str | None = None
    ) -> None:
        """Report how many items are done, of how many, and a line for people. It is stored at most
        twice a second.

        `done`, `total`: whole numbers from 0; None if not known. `message`: kept until the next
        one; "" removes it. A message may be given without numbers, for example in a loop over
        chunks, which does the counting. Raises ValueError.
        """
        self._state.meter.report(done, total, message, before=self._state.loops.before)

    def idempotency_key(self, item: object) -> str:
        """A UUID for the work of this run on `item`. It is the same in each attempt of the run,
        whatever the chunks are.

        `item`: a str, an int, another JSON value, a UUID, a date, or a tuple of these; or an object
        of a mapped class, which is identified by its primary key. Raises BatchError.
        """
        state = inspect(item, raiseerr=False)
        if isinstance(state, InstanceState):
            item = (state.mapper.class_.__name__, *state.mapper.primary_key_from_instance(item))
        try:
            return str(uuid5(UUID(self.id), to_json(item).decode()))
        except PydanticSerializationError as error:
            raise BatchError(
                f"idempotency_key() was given {escaping.echoed(item)}: {error}"
            ) from None


_current: ContextVar[CurrentRun | None] = ContextVar("current_run", default=None)


def current_run() -> CurrentRun:
    """The run that this code belongs to. Raises BatchError outside a run."""
    run = _current.get()
    if run is None:
        raise BatchError("current_run() works only inside a run; a task called by hand has none")
    return run


def current_run_if_any() -> CurrentRun | None:
    """The run that this code belongs to; None outside a run."""
    return _current.get()


def state_of(run: CurrentRun) -> AttemptState:
    """The state that the service keeps for the attempt. It is not for the author's code."""
    return run._state


def enter(run: CurrentRun) -> None:
    """Make `run` the current run in this context. Each attempt has a context of its own, which ends
    with it.
    """
    _current.set(run)
