"""The body of one attempt: calls the task's `run`, in this process or in a child, and says how it
ended.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from batch_system import failures
from batch_system.batch.context import current_run
from batch_system.batch.context.attempt_state import AttemptState, always_held
from batch_system.batch.context.current_run import CurrentRun
from batch_system.batch.context.lease import LOST
from batch_system.batch.context.upstream import Upstream
from batch_system.batch.execution import results
from batch_system.batch.execution.ending import Ending
from batch_system.batch.execution.fingerprint import (
    EMPTY,
    INTERRUPTED,
    QUARANTINE,
    TIMED_OUT,
    fingerprint_of,
)
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.tasks.declaration import not_run_again
from batch_system.batch.tasks.partitions import Part, Stage, as_json, stage_of, with_values
from batch_system.batch.tasks.registry import Task
from batch_system.batch.tasks.retry_after import seconds_asked
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database.session import bind_to_service
from batch_system.database.sync import home_loop
from batch_system.database.writers import session_owner
from batch_system.errors import Interrupted, InvalidParameters, ProcessDied, RetryAfter
from batch_system.logs import run_log


async def call(
    task: Task, parameters: Mapping[str, Any], threads: ThreadPool, patience: float, on_loop: bool
) -> Any:
    """Call `run` of a new instance: on the event loop (`on_loop`), or in a thread.

    An awaitable result (a coroutine function behind a plain decorator) is awaited. `patience`: how
    many seconds a cancelled thread may take to end. Raises TypeError if the result is a generator.
    """
    run = task.cls().run
    if on_loop:
        result = run(**parameters)
    else:
        result = await threads.run(functools.partial(run, **parameters), patience=patience)
    if result is None:
        return None
    while inspect.isawaitable(result):
        result = await result
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(
            f"run() returned {result!r}: a function with a yield in it is not executed by a call"
        )
    return result


class Body:
    """The body of one attempt, with the attempt's state and the run as the author's code sees it.

    Attributes:
      stage: Which method of a partitioned task it calls; None for other tasks.
      stop: The ending that a stop has asked for; None if the body was not stopped.
      has_begun: Whether `run` was called, or is about to be.
    """

    def __init__(
        self, claimed: Claimed, task: Task, holds_lease: Callable[[], bool] = always_held
    ) -> None:
        self.claimed = claimed
        self.task = task
        slot = (claimed.slot or claimed.created_at).astimezone(task.zone)
        self.state = AttemptState.of(claimed.id, task.name, claimed.attempt, task.schedule)
        self.state.fence = claimed.fence
        self.state.holds_lease = holds_lease
        self.stage = stage_of(task.partition, claimed)
        self.state.stage = self.stage or ""
        self.state.part = claimed.part
        self.state.is_fenced = claimed.fence > 0 and task.policies.fenced
        origin = Origin(claimed.origin)
        self.run = CurrentRun(claimed.id, task.name, slot, claimed.attempt, origin, self.state)
        self.stop: Ending | None = None
        self.has_begun = False

    def enter(self) -> None:
        """Make the caller's context that of the run."""
        current_run.enter(self.run)
        run_log.set(self.state.log)
        session_owner.set(self.run)
        home_loop.set(asyncio.get_running_loop())
        bind_to_service()

    async def ending_of(self, work: Callable[[], Awaitable[Ending]]) -> Ending:
        """The ending that `work` returns, or the one that its error stands for. Raises nothing."""
        try:
            ending = await work()
        except asyncio.CancelledError as error:
            ending = self.stop or self.failed(error, "failed", "it was cancelled from inside")
        except Interrupted as stopped:
            ending = self.stop or self.interrupted(str(stopped))
        except ProcessDied as error:  # its message is already meant for people
            ending = self.stop or self.failed(error, reason=error.message)
        except BaseException as error:  # noqa: BLE001
            # This is the boundary of the attempt; SystemExit must not end the service.
            ending = self.stop or self.failed(error)
        if self.state.is_lost:  # a commit was refused; the body may have caught that error
            ending = self.stop or self.interrupted(LOST)
        return ending

    def use_slot(self, slot: datetime | None) -> None:
        """Give a part the slot of its parent."""
        self.claimed.slot = slot
        self.run.slot = (slot or self.claimed.created_at).astimezone(self.task.zone)

    async def parameters(self, read: Callable[[str, bool], Awaitable[Upstream]]) -> dict[str, Any]:
        """The arguments of `run`. `read(id, False)` reads the runs that a run has waited for, and
        `read(id, True)` its parts.

        Raises InvalidParameters.
        """
        if self.stage == Stage.WORK:
            return {"part": Part.stored(self.claimed.part or 0, self.claimed.params)}
        if self.stage == Stage.JOIN:
            joins = self.task.partition is not None and self.task.partition.joins
            return {
                "parts": [with_values(part) async for part in await read(self.claimed.id, True)]
                if joins
                else []
            }
        upstream = (
            await read(self.claimed.id, False) if self.task.parameters.takes_upstream else None
        )
        return self.task.parameters.to_call(self.claimed.params or {}, self.run.slot, upstream)

    async def execute(
        self, parameters: Mapping[str, Any], threads: ThreadPool, patience: float
    ) -> Ending:
        """Call `run` in this process, and return the ending of a success. Raises what `run`
        raises.
        """
        partition = self.task.partition
        on_loop = (
            partition.on_loop[self.stage]
            if partition is not None and self.stage
            else self.task.on_loop
        )
        result = await call(self.task, parameters, threads, patience, on_loop)
        self.state.loops.raise_rolled_back()
        if self.stage == Stage.SPLIT:
            parts = as_json(self.task.name, result)
            return (
                Ending(RunState.WAITING, "split", parts=parts) if self._goes_on else self._stopped
            )
        if self.stage == Stage.WORK:
            return self._succeeded(result, None)
        return self._succeeded(result, await results.unmet(self.task, result, threads, patience))

    def _succeeded(self, result: Any, unmet: str | None) -> Ending:
        """`unmet`: why the result is not what the task expects, if it is not."""
        if not self._goes_on:
            return self._stopped
        fingerprint = EMPTY if unmet else QUARANTINE if self.state.has_set_aside else None
        return Ending(
            RunState.SUCCEEDED, "succeeded", unmet, results.as_json(result), fingerprint=fingerprint
        )

    @property
    def _goes_on(self) -> bool:
        """Whether the body's own ending counts: it was not stopped, or it finished before a
        shutdown took effect.
        """
        return self.stop is None or self.stop.outcome == "interrupted"

    @property
    def _stopped(self) -> Ending:
        assert self.stop is not None
        return self.stop

    def interrupted(self, reason: str) -> Ending:
        """The ending of an interrupt. The run fails if its body has begun and the task may not be
        repeated.
        """
        if self.has_begun and not self.task.policies.rerun:
            return Ending(
                RunState.FAILED, "interrupted", not_run_again(reason), fingerprint=INTERRUPTED
            )
        return Ending(RunState.INTERRUPTED, "interrupted", reason)

    def failed(
        self, error: BaseException, outcome: str = "failed", reason: str | None = None
    ) -> Ending:
        """The ending of a failure. The task's policy decides whether another attempt follows."""
        retry = self.task.policies.retry
        number = self.claimed.attempt - self.claimed.attempts_before
        may_retry = isinstance(error, (*retry.on, RetryAfter)) and not isinstance(
            error, InvalidParameters
        )
        wait = retry.seconds_before(number + 1, seconds_asked(error))
        error = failures.readable(_without_our_frames(error))
        reason = reason or failures.line_of(error)
        if number >= retry.attempts or not may_retry:
            fingerprint = TIMED_OUT if outcome == "timed out" else fingerprint_of(error)
            return Ending(RunState.FAILED, outcome, reason, error=error, fingerprint=fingerprint)
        aside = QUARANTINE if self.state.has_set_aside else None
        return Ending(RunState.RETRYING, outcome, reason, error=error, wait=wait, fingerprint=aside)


_HERE = Path(__file__).parent
_OURS = (
    f"{_HERE}{os.sep}",
    f"{_HERE.with_name('pools')}{os.sep}",
    ThreadPool.run.__code__.co_filename,
)


def _without_our_frames(error: BaseException) -> BaseException:
    """The error, with a traceback that begins in the author's code."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(_OURS):
        frames = frames.tb_next
    return error.with_traceback(frames)
