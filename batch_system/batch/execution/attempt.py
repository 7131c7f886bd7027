"""One attempt: executes its body, enforces the timeout, and reports how it ended. It never uses the
database.

The body calls the task's `run`, in this process or in a child. A child imports this module too, and
makes only the body.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import os
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from batch_system import clock, failures, tracing
from batch_system.batch.context import current_run
from batch_system.batch.context.attempt_state import AttemptState, always_held
from batch_system.batch.context.current_run import CurrentRun
from batch_system.batch.context.fencing import seal
from batch_system.batch.context.lease import LOST
from batch_system.batch.context.upstream import Upstream
from batch_system.batch.execution import pings
from batch_system.batch.execution.ending import Ending, log_ending, result_as_json, why_unmet
from batch_system.batch.execution.fingerprint import (
    EMPTY,
    INTERRUPTED,
    QUARANTINE,
    TIMED_OUT,
    fingerprint_of,
)
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Origin, RunState
from batch_system.batch.nodes.harm import LostLease
from batch_system.batch.queue import upstream_results
from batch_system.batch.tasks.declaration import ON_TIME, not_run_again
from batch_system.batch.tasks.partitions import Part, Stage, as_json, stage_of, with_values
from batch_system.batch.tasks.registry import Task
from batch_system.batch.tasks.retry_after import seconds_asked
from batch_system.concurrency.thread_pool import ThreadPool
from batch_system.database.session import bind_to_service
from batch_system.database.sync import home_loop
from batch_system.database.writers import session_owner
from batch_system.errors import Interrupted, InvalidParameters, ProcessDied, RetryAfter
from batch_system.logs import get_logger, run_log
from batch_system.metrics.process import ProcessMetrics

logger = get_logger("batch_system.batch")

ABANDON_SECONDS = 5.0
"""How long a cancelled attempt may take to end by itself before it is given up."""

CHILD_ABANDON_SECONDS = 2 * ABANDON_SECONDS
"""How long a child may take to end after a stop. Its pool kills it after ABANDON_SECONDS, so this
limit is rarely reached.
"""

CHILD_START_SECONDS = 60.0
"""An attempt whose child has not even begun ends this much later than its timeout."""


class Attempt:
    """One attempt in this process. It begins with `start`, and calls `on_end` exactly once."""

    def __init__(
        self,
        claimed: Claimed,
        task: Task,
        threads: ThreadPool,
        on_end: Callable[[Attempt, Ending], None],
        take_over: Callable[[AttemptState], Awaitable[None]] | None = None,
        holds_lease: Callable[[], bool] = always_held,
        metrics: ProcessMetrics | None = None,
        child_pool: ChildPool | None = None,
    ) -> None:
        """`take_over` is awaited inside the run before the body of a fenced attempt, unless the
        fence is the run's first.

        `holds_lease`: whether this node holds its lease; without it, the commits of the run are
        refused. `metrics`: those of the service, if it keeps any. `child_pool`: executes the body
        in a child process; without one, the body executes in this process, by `threads` or on the
        event loop.
        """
        self.claimed = claimed
        self.task = task
        self.body = Body(claimed, task, holds_lease)
        self.state = self.body.state
        self.run = self.body.run
        self._child_pool = child_pool
        self._metrics = metrics
        if metrics is not None:
            self.state.on_refused = metrics.count_refused
        self.lines_taken = 0
        self._started_at = 0.0  # by the boot-time clock
        self._take_over = take_over if self.state.is_fenced and claimed.fence > 1 else None
        self._threads = threads
        self._on_end = on_end
        self._ended = False
        self._timers: list[asyncio.TimerHandle] = []
        self._timeout: asyncio.TimerHandle | None = None

    def ledger_time(self) -> datetime:
        """The current database time (UTC): the instant of the claim plus the boot time since
        then.
        """
        if clock.is_moved():
            return clock.now()
        return self.claimed.attempt_started_at + timedelta(
            seconds=clock.boottime() - self._started_at
        )

    def start(self, is_traced: bool = False) -> None:
        """Start the attempt as a task of the running event loop. `is_traced`: whether this process
        records traces.
        """
        self._started_at = clock.boottime()
        # An empty context: context variables that were set when the service started must not leak
        # into runs.
        self._context = contextvars.Context()
        self._span = None
        if is_traced:
            attributes, caller = _span_attributes(self.claimed), self.claimed.traceparent
            self._span = tracing.begin(self._context, f"run {self.task.name}", attributes, caller)
        name = f"run {self.claimed.id} of {self.task.name}"
        self._work = asyncio.get_running_loop().create_task(
            self._run(), name=name, context=self._context
        )
        # A callback handles the end, so that the bodies of other attempts that are launched now
        # begin first.
        self._work.add_done_callback(self._on_work_done, context=self._context)
        pings.began(self.task, self.claimed)
        if self._take_over is None:
            self._limit(0.0 if self._child_pool is None else CHILD_START_SECONDS)

    def child_begins(self) -> None:
        """Restart the `timeout`, because the child is about to call `run`."""
        if self._timeout is not None and not self._ended:
            self._timeout.cancel()
            self._timers.remove(self._timeout)
            self._limit()

    def _limit(self, allowance: float = 0.0) -> None:
        """Start the `timeout` of the task. Time that the attempt has waited before does not count.

        `allowance`: extra seconds for the attempt's child to begin.
        """
        if (timeout := self.task.policies.timeout) is not None:
            error = TimeoutError(f"timed out after {timeout:g} s")
            failed = self.body.failed(error, "timed out", str(error))
            self._timeout = self._later(timeout + allowance, self.stop, failed)

    def stop(self, ending: Ending) -> None:
        """Cancel the body, so that the attempt ends with `ending`. If the body does not end, the
        attempt is given up.
        """
        if self.body.stop is not None or self._ended:
            return
        self.body.stop = ending
        self.state.ask_to_stop(ending.reason or ending.outcome)
        self._work.cancel()
        self._later(
            ABANDON_SECONDS if self._child_pool is None else CHILD_ABANDON_SECONDS, self._abandon
        )

    def interrupt(self, reason: str) -> None:
        """Stop the attempt because the service stops. The run is resumed later."""
        self.stop(self.body.interrupted(reason))

    def cancel(self, reason: str) -> None:
        """Stop the attempt because its run was cancelled. The run is not resumed."""
        self.stop(Ending(RunState.CANCELLED, "cancelled", reason))

    def pause(self, reason: str) -> None:
        """Ask the run to stop at its next checkpoint. A run that may not be repeated goes on."""
        if self.task.policies.rerun:
            self.state.ask_to_stop(reason)

    def abandon(self) -> None:
        """Give the attempt up now if it was stopped but has not ended. Its child is killed."""
        if self.body.stop is not None:
            self._abandon()

    def give_up(self, reason: str, lost: LostLease | None = None) -> None:
        """End the attempt at once, even if its body has not ended: another node may already hold
        the run.

        The child is killed. `lost`: how the lease was lost, if runs may be the cause.
        """
        self.interrupt(reason)
        if lost is not None and lost.is_by(self._started_at) and self.body.stop is not None:
            is_going_on = self.body.stop.state == RunState.INTERRUPTED
            self.body.stop.harm = lost.cause if is_going_on else None
            self.body.stop.harm_is_proven = lost.is_proven
        self._kill_child()
        if not self._ended and self.body.stop is not None:
            self._context.run(self._log_ending, self.body.stop)
            self._end(self.body.stop)

    async def _run(self) -> Ending:
        self.body.enter()
        return await self.body.ending_of(self._execute)

    async def _execute(self) -> Ending:
        if self._take_over is not None:
            await self._take_over(self.state)
            self._limit(0.0 if self._child_pool is None else CHILD_START_SECONDS)
        if self.body.stage == Stage.WORK and self.claimed.awaited_by is not None:
            self.body.use_slot(await upstream_results.slot_of(self.claimed.awaited_by))
        if self.body.stage == Stage.JOIN and not await upstream_results.are_parts_over(
            self.claimed.id
        ):
            return Ending(RunState.WAITING, "resumed")
        if self._child_pool is None:
            parameters = await self.body.parameters(upstream_results.read)
            self.begins()
            return await self.body.execute(parameters, self._threads, ABANDON_SECONDS)
        ending, stop = await self._child_pool.execute(self), self.body.stop
        has_finished = ending.state in (RunState.SUCCEEDED, RunState.WAITING) and (
            stop is None or stop.outcome == "interrupted"
        )
        return ending if stop is None or has_finished else stop

    def begins(self) -> None:
        """Record that the body begins. The pool of a child calls it when it hands over the run."""
        self.body.has_begun = True
        self._measure_delay()

    def _measure_delay(self) -> None:
        """Measure how long after its slot the body begins. Only first attempts of slots that fired
        on time count.
        """
        claimed = self.claimed
        if (
            self._metrics is None
            or claimed.slot is None
            or claimed.fence > 1
            or claimed.origin != Origin.SCHEDULE
        ):
            return
        if claimed.created_at - claimed.slot < ON_TIME:
            self._metrics.start_delay.add((self.ledger_time() - claimed.slot).total_seconds())

    def _on_work_done(self, work: asyncio.Task[Ending]) -> None:
        """End the attempt, unless it was given up before. Called in the context of the run."""
        if self._ended:
            return
        error = asyncio.CancelledError() if work.cancelled() else work.exception()
        if error is not None:  # it was cancelled before its first step
            self._end(self.body.stop or self.body.failed(error))
            return
        ending = work.result()
        self._log_ending(ending)
        self._end(ending)

    def _log_ending(self, ending: Ending) -> None:
        """Write the last line of the attempt to its log, unless it has succeeded."""
        # Many may succeed at once: log_outcomes writes one line for all of them.
        if ending.state == RunState.SUCCEEDED:
            return
        self.state.will_retry = ending.error is not None and ending.wait is not None
        log_ending(ending, self.claimed, self.ledger_time())

    def _kill_child(self) -> None:
        if self._child_pool is not None and not self._work.done():
            self._child_pool.kill(self)

    def _abandon(self) -> None:
        self._kill_child()
        if not self._ended and self.body.stop is not None:
            self._context.run(
                logger.warning, f"{self.task.name} did not stop when asked to, and was given up"
            )
            self._context.run(self._log_ending, self.body.stop)
            self._end(self.body.stop)

    def _end(self, ending: Ending) -> None:
        if self._ended:
            return
        self._ended = True
        for timer in self._timers:
            timer.cancel()
        self.state.loops.close()
        # The thread or coroutine of an attempt that did not succeed may still be running.
        if ending.state != RunState.SUCCEEDED:
            seal(self.state)
        pings.ended(self.task, self.claimed, ending)
        is_wrong = ending.outcome not in ("succeeded", "interrupted", "cancelled")
        tracing.end(self._span, ending.outcome, ending.reason if is_wrong else None)
        self._on_end(self, ending)

    def _later(
        self, seconds: float, callback: Callable[..., None], *args: Any
    ) -> asyncio.TimerHandle:
        """The callback gets an empty context, because the run's context can't be entered twice."""
        timer = asyncio.get_running_loop().call_later(
            seconds, callback, *args, context=contextvars.Context()
        )
        self._timers.append(timer)
        return timer


def _span_attributes(claimed: Claimed) -> dict[str, str | int]:
    """The attributes of the attempt's span. The slot is in UTC; a manual run may have none."""
    attributes: dict[str, str | int] = {
        "batch.task": claimed.task,
        "batch.run.id": claimed.id,
        "batch.attempt": claimed.attempt,
        "batch.origin": claimed.origin,
    }
    if claimed.slot is not None:
        attributes["batch.slot"] = claimed.slot.astimezone(UTC).isoformat()
    return attributes


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
        return self._succeeded(result, await why_unmet(self.task, result, threads, patience))

    def _succeeded(self, result: Any, unmet: str | None) -> Ending:
        """`unmet`: why the result is not what the task expects, if it is not."""
        if not self._goes_on:
            return self._stopped
        fingerprint = EMPTY if unmet else QUARANTINE if self.state.has_set_aside else None
        return Ending(
            RunState.SUCCEEDED, "succeeded", unmet, result_as_json(result), fingerprint=fingerprint
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


class PooledAttempt(Protocol):
    """The part of an attempt that a pool uses.

    The pool calls `begins` when it hands the run to its child, and `child_begins` once, when the
    child is about to call `run`.
    """

    claimed: Claimed
    task: Task
    state: AttemptState
    body: Body

    def begins(self) -> None: ...

    def child_begins(self) -> None: ...


class ChildPool(Protocol):
    """Executes bodies of attempts, each in a child process of its own. `batch_system/batch/pools`
    implements it.
    """

    @property
    def free(self) -> int:
        """How many more children can start now."""

    async def execute(self, attempt: PooledAttempt) -> Ending:
        """Execute the body of the attempt in a child, and return how it ended.

        Cancelling this call asks the child to stop, and kills it if it does not. Once the child is
        gone, the call returns the ending that the child has reported, or raises CancelledError if
        there is none.
        """

    def kill(self, attempt: PooledAttempt) -> None:
        """Kill the child of the attempt now, if it has one. Returns at once; `execute` waits until
        the child has ended.
        """
