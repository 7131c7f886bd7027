"""One attempt: it calls `run` of the task, enforces the timeout, and reports how it ended. Knows no database."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from service import clock, failures, tracing
from service.batch.context import current_run
from service.batch.context.attempt_state import AttemptState, always_held
from service.batch.context.current_run import CurrentRun
from service.batch.context.fencing import seal
from service.batch.context.lease import LOST
from service.batch.execution import pings, results
from service.batch.execution.ending import Ending, log_ending
from service.batch.execution.fingerprint import EMPTY, INTERRUPTED, QUARANTINE, TIMED_OUT, fingerprint_of
from service.batch.ledger.runs import Claimed
from service.batch.ledger.states import Origin, RunState
from service.batch.tasks.policies import ON_TIME, not_run_again
from service.batch.tasks.registry import Task
from service.batch.tasks.retry_after import seconds_asked
from service.concurrency.thread_pool import ThreadPool
from service.database.session import bind_to_service
from service.database.sync import home_loop
from service.database.writers import session_owner
from service.errors import Interrupted, InvalidParameters, RetryAfter
from service.logs import get_logger, run_log
from service.metrics.process import ProcessMetrics

logger = get_logger("service.batch")

ABANDON_SECONDS = 5.0
"""How long a cancelled attempt may take to end by itself before it is given up."""


async def call(task: Task, parameters: Mapping[str, Any], threads: ThreadPool) -> Any:
    """Call `run` of a new instance: on the event loop if it is a coroutine function, otherwise in a thread.

    If the result is awaitable (a coroutine function behind a plain decorator), it is awaited. Raises TypeError if the
    result is a generator.
    """
    run = task.cls().run
    if task.on_loop:
        result = await run(**parameters)
    else:
        result = await threads.run(functools.partial(run, **parameters), patience=ABANDON_SECONDS)
    if result is None:
        return None
    while inspect.isawaitable(result):
        result = await result
    if inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(f"run() returned {result!r}: a function with a yield in it is not executed by a call")
    return result


class Attempt:
    """One attempt in this process. It begins with `start`, and ends with exactly one call of `on_end`."""

    def __init__(
        self,
        claimed: Claimed,
        task: Task,
        threads: ThreadPool,
        on_end: Callable[[Attempt, Ending], None],
        take_over: Callable[[AttemptState], Awaitable[None]] | None = None,
        holds_lease: Callable[[], bool] = always_held,
        metrics: ProcessMetrics | None = None,
    ) -> None:
        """`take_over` is awaited inside the run before the body of a fenced attempt, except for the run's first fence.

        `holds_lease`: whether this node holds its lease. While it does not, the commits of the run are refused.
        `metrics`: of the service; None where none are kept.
        """
        self.claimed = claimed
        self.task = task
        slot = (claimed.slot or claimed.created_at).astimezone(task.zone)
        origin = Origin(claimed.origin)
        self.state = AttemptState.of(claimed.id, task.name, claimed.attempt, task.schedule)
        self.state.fence, self.state.holds_lease = claimed.fence, holds_lease
        self.state.is_fenced = claimed.fence > 0 and task.policies.fenced
        self._metrics = metrics
        if metrics is not None:
            self.state.on_refused = metrics.count_refused
        self.run = CurrentRun(claimed.id, task.name, slot, claimed.attempt, origin, self.state)
        self.lines_taken = 0
        self._launched_at = clock.boottime()
        self._take_over = take_over if self.state.is_fenced and claimed.fence > 1 else None
        self._threads = threads
        self._on_end = on_end
        self._stop: Ending | None = None
        self._has_begun = self._ended = False
        self._timers: list[asyncio.TimerHandle] = []

    def ledger_time(self) -> datetime:
        """The present by database time (UTC): the instant of the claim plus the time since, by the boot-time clock."""
        if clock.is_moved():
            return clock.now()
        return self.claimed.attempt_started_at + timedelta(seconds=clock.boottime() - self._launched_at)

    def start(self) -> None:
        """Start the attempt as a task of the running event loop."""
        # An empty context: context variables that were set when the service started must not leak into runs.
        self._context = contextvars.Context()
        self._span = tracing.begin(
            self._context, f"run {self.task.name}", _span_attributes(self.claimed), self.claimed.traceparent
        )
        name = f"run {self.claimed.id} of {self.task.name}"
        self._body = asyncio.get_running_loop().create_task(self._run(), name=name, context=self._context)
        self._body.add_done_callback(self._on_body_done)
        pings.began(self.task, self.claimed)
        if (timeout := self.task.policies.timeout) is not None:
            error = TimeoutError(f"timed out after {timeout:g} s")
            self._later(timeout, self.stop, self._failed(error, "timed out", str(error)))

    def stop(self, ending: Ending) -> None:
        """Cancel the body, so that the attempt ends with `ending`. If the body goes on, the attempt is given up."""
        if self._stop is not None or self._ended:
            return
        self._stop = ending
        self.state.ask_to_stop(ending.reason or ending.outcome)
        self._body.cancel()
        self._later(ABANDON_SECONDS, self._abandon)

    def interrupt(self, reason: str) -> None:
        """Stop the attempt because the service stops. The run is resumed later."""
        self.stop(self._interrupted(reason))

    def cancel(self, reason: str) -> None:
        """Stop the attempt because its run was cancelled. The run is not resumed."""
        self.stop(Ending(RunState.CANCELLED, "cancelled", reason))

    def pause(self, reason: str) -> None:
        """Ask the run to stop at its next checkpoint. A run that may not be repeated goes on."""
        if self.task.policies.rerun:
            self.state.ask_to_stop(reason)

    def abandon(self) -> None:
        """Give the attempt up now if it was stopped and still goes on."""
        if self._stop is not None:
            self._abandon()

    def give_up(self, reason: str) -> None:
        """End the attempt at once, also if its body goes on: another node may hold the run by now."""
        self.interrupt(reason)
        if not self._ended and self._stop is not None:
            self._context.run(self._log_ending, self._stop)
            self._end(self._stop)

    async def _run(self) -> None:
        current_run.enter(self.run)
        run_log.set(self.state.log)
        session_owner.set(self.run)
        home_loop.set(asyncio.get_running_loop())
        bind_to_service()
        try:
            if self._take_over is not None:
                await self._take_over(self.state)
            parameters = self.task.parameters.to_call(self.claimed.params or {}, self.run.slot)
            self._has_begun = True
            self._measure_delay()
            result = await call(self.task, parameters, self._threads)
            self.state.loops.raise_rolled_back()
            ending = self._succeeded(result, await results.unmet(self.task, result, self._threads, ABANDON_SECONDS))
        except asyncio.CancelledError as error:
            ending = self._stop or self._failed(error, "failed", "it was cancelled from inside")
        except Interrupted as stopped:
            ending = self._stop or self._interrupted(str(stopped))
        except BaseException as error:  # noqa: BLE001 - the attempt's boundary; SystemExit must not end the service
            ending = self._stop or self._failed(error)
        if self.state.is_lost:  # a commit was refused; the body may have caught that error
            ending = self._stop or self._interrupted(LOST)
        if not self._ended:
            self._log_ending(ending)
            self._end(ending)

    def _measure_delay(self) -> None:
        """Measure how late the body begins after its slot: only of first attempts at slots that were fired on time."""
        claimed = self.claimed
        if self._metrics is None or claimed.slot is None or claimed.fence > 1 or claimed.origin != Origin.SCHEDULE:
            return
        if claimed.created_at - claimed.slot < ON_TIME:
            self._metrics.start_delay.add((self.ledger_time() - claimed.slot).total_seconds())

    def _on_body_done(self, body: asyncio.Task[None]) -> None:
        """End the attempt if the body has not done so: it was cancelled before its first step."""
        if not self._ended:
            error = asyncio.CancelledError() if body.cancelled() else body.exception()
            self._end(self._stop or self._failed(error or RuntimeError("the attempt ended without an ending")))

    def _log_ending(self, ending: Ending) -> None:
        """Write the last line of the attempt to its log, unless it has succeeded."""
        self.state.will_retry = ending.error is not None and ending.wait is not None
        log_ending(ending, self.claimed, self.ledger_time())

    def _succeeded(self, result: Any, unmet: str | None) -> Ending:
        """`unmet`: why the result is not what the task expects; None if it is."""
        if self._stop is not None and self._stop.outcome != "interrupted":
            return self._stop
        fingerprint = EMPTY if unmet else QUARANTINE if self.state.has_set_aside else None
        return Ending(RunState.SUCCEEDED, "succeeded", unmet, results.as_json(result), fingerprint=fingerprint)

    def _interrupted(self, reason: str) -> Ending:
        """The ending of an interrupt. If the body has begun and the task may not be repeated, its run fails."""
        if self._has_begun and not self.task.policies.rerun:
            return Ending(RunState.FAILED, "interrupted", not_run_again(reason), fingerprint=INTERRUPTED)
        return Ending(RunState.INTERRUPTED, "interrupted", reason)

    def _failed(self, error: BaseException, outcome: str = "failed", reason: str | None = None) -> Ending:
        retry = self.task.policies.retry
        number = self.claimed.attempt - self.claimed.attempts_before
        may_retry = isinstance(error, (*retry.on, RetryAfter)) and not isinstance(error, InvalidParameters)
        wait = retry.seconds_before(number + 1, seconds_asked(error))
        error = failures.readable(_without_our_frames(error))
        reason = reason or failures.line_of(error)
        if number >= retry.attempts or not may_retry:
            fingerprint = TIMED_OUT if outcome == "timed out" else fingerprint_of(error)
            return Ending(RunState.FAILED, outcome, reason, error=error, fingerprint=fingerprint)
        aside = QUARANTINE if self.state.has_set_aside else None
        return Ending(RunState.RETRYING, outcome, reason, error=error, wait=wait, fingerprint=aside)

    def _abandon(self) -> None:
        if not self._ended and self._stop is not None:
            self._context.run(logger.warning, f"{self.task.name} did not stop when asked to, and was given up")
            self._context.run(self._log_ending, self._stop)
            self._end(self._stop)

    def _end(self, ending: Ending) -> None:
        if self._ended:
            return
        self._ended = True
        for timer in self._timers:
            timer.cancel()
        self.state.loops.close()
        if ending.state != RunState.SUCCEEDED:  # a thread or a coroutine of the attempt may still go on
            seal(self.state)
        pings.ended(self.task, ending)
        is_wrong = ending.outcome not in ("succeeded", "interrupted", "cancelled")
        tracing.end(self._span, ending.outcome, ending.reason if is_wrong else None)
        self._on_end(self, ending)

    def _later(self, seconds: float, callback: Callable[..., None], *args: Any) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, callback, *args))


def _span_attributes(claimed: Claimed) -> dict[str, str | int]:
    """What the span of the attempt says about it. The slot is in UTC; manual runs may have none."""
    attributes: dict[str, str | int] = {
        "batch.task": claimed.task,
        "batch.run.id": claimed.id,
        "batch.attempt": claimed.attempt,
        "batch.origin": claimed.origin,
    }
    if claimed.slot is not None:
        attributes["batch.slot"] = claimed.slot.astimezone(UTC).isoformat()
    return attributes


_OURS = {function.__code__.co_filename for function in (call, ThreadPool.run)}


def _without_our_frames(error: BaseException) -> BaseException:
    """The error with a traceback that begins with the author's code."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename in _OURS:
        frames = frames.tb_next
    return error.with_traceback(frames)
