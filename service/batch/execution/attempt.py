"""One attempt: call `run`, watch its time, and say how it ended. Knows no database."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pydantic_core import to_json

from service import clock, escaping, failures
from service.batch.context import current_run
from service.batch.context.attempt_state import AttemptState, always_held
from service.batch.context.current_run import CurrentRun
from service.batch.context.fencing import seal
from service.batch.context.lease import LOST
from service.batch.ledger.runs import Claimed
from service.batch.ledger.states import Origin, RunState
from service.batch.tasks.policies import not_run_again
from service.batch.tasks.registry import Task
from service.batch.tasks.retry_after import seconds_asked
from service.concurrency.thread_pool import ThreadPool
from service.database.session import bind_to_service
from service.database.sync import home_loop
from service.database.writers import session_owner
from service.errors import Interrupted, InvalidParameters, RetryAfter
from service.logs import get_logger, log_lines, run_log

logger = get_logger("service.batch")

LARGEST_RESULT = 1_000_000
LONGEST_BEGINNING = 1_000
LONGEST_DESCRIPTION = 10_000
"""Bytes of a result; characters of one that has more, and of one that is no JSON."""

_TEXTS, _CONTAINERS = (str, bytes), (dict, list, tuple, set, frozenset)

ABANDON_SECONDS = 5.0
"""How long a cancelled attempt may take to end by itself before it is given up."""


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: the run's next state, and why. `wait`: seconds until it is tried again."""

    state: RunState
    outcome: str
    reason: str | None = None
    result: Any = None
    error: BaseException | None = None
    wait: float | None = None


async def call(task: Task, parameters: Mapping[str, Any], threads: ThreadPool) -> Any:
    """Run a fresh instance: on the loop if `run` is a coroutine function, else in a thread.

    What comes back may be awaitable (a coroutine behind a plain decorator): then it is awaited here.
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
        raise TypeError(f"run() returned {result!r}, a body with a yield in it that nobody runs")
    return result


class Attempt:
    """One attempt in this process, from `start` until `on_end` is called: exactly once, whatever happens."""

    def __init__(
        self,
        claimed: Claimed,
        task: Task,
        threads: ThreadPool,
        on_end: Callable[[Attempt, Ending], None],
        take_over: Callable[[AttemptState], Awaitable[None]] | None = None,
        holds_lease: Callable[[], bool] = always_held,
    ) -> None:
        """`take_over` is awaited, inside the run, before the body of an attempt that is not its run's first.

        `holds_lease`: whether this node may work. What the run wants to commit while it may not is refused.
        """
        self.claimed = claimed
        self.task = task
        slot = (claimed.slot or claimed.created_at).astimezone(task.zone)
        origin = Origin(claimed.origin)
        self.state = AttemptState.of(claimed.id, task.name, claimed.attempt, task.schedule)
        self.state.fence, self.state.holds_lease = claimed.fence, holds_lease
        self.state.is_fenced = claimed.fence > 0 and task.policies.fenced
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
        """The present: when it was claimed, and what has passed since. This machine's clock may be wrong."""
        if clock.is_moved():
            return clock.now()
        return self.claimed.attempt_started_at + timedelta(seconds=clock.boottime() - self._launched_at)

    def start(self) -> None:
        # A context of its own: whatever was set around the service's start must not leak into runs.
        self._context = contextvars.Context()
        name = f"run {self.claimed.id} of {self.task.name}"
        self._body = asyncio.get_running_loop().create_task(self._run(), name=name, context=self._context)
        self._body.add_done_callback(self._over)
        if (timeout := self.task.policies.timeout) is not None:
            error = TimeoutError(f"timed out after {timeout:g} s")
            self._later(timeout, self.stop, self._failed(error, "timed out", str(error)))

    def stop(self, ending: Ending) -> None:
        """End it with `ending`: by cancelling, and by giving it up if that does not help."""
        if self._stop is not None or self._ended:
            return
        self._stop = ending
        self.state.ask_to_stop(ending.reason or ending.outcome)
        self._body.cancel()
        self._later(ABANDON_SECONDS, self._abandon)

    def interrupt(self, reason: str) -> None:
        """Stop it because the service stops."""
        self.stop(self._interrupted(reason))

    def cancel(self, reason: str) -> None:
        """Stop it because somebody asked for that; it will not go on."""
        self.stop(Ending(RunState.CANCELLED, "cancelled", reason))

    def pause(self, reason: str) -> None:
        """Have it stop at its next checkpoint, if it may go on from there."""
        if self.task.policies.rerun:
            self.state.ask_to_stop(reason)

    def abandon(self) -> None:
        """Give it up now, if it was asked to stop."""
        if self._stop is not None:
            self._abandon()

    def give_up(self, reason: str) -> None:
        """End it at once, whatever its body does: its run may be another node's by now."""
        self.interrupt(reason)
        if not self._ended and self._stop is not None:
            self._context.run(self._report, self._stop)
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
            result = await call(self.task, parameters, self._threads)
            self.state.loops.raise_owed()
            ending = self._succeeded(result)
        except asyncio.CancelledError as error:
            ending = self._stop or self._failed(error, "failed", "it was cancelled from inside")
        except Interrupted as stopped:
            ending = self._stop or self._interrupted(str(stopped))
        except BaseException as error:  # noqa: BLE001 - the attempt's boundary; SystemExit must not end the service
            ending = self._stop or self._failed(error)
        if self.state.is_lost:  # whatever its body made of the refusal: what it did is not all there
            ending = self._stop or self._interrupted(LOST)
        if not self._ended:
            self._report(ending)
            self._end(ending)

    def _over(self, body: asyncio.Task[None]) -> None:
        """Cancelled before its first step it had no chance to say so itself."""
        if not self._ended:
            error = asyncio.CancelledError() if body.cancelled() else body.exception()
            self._end(self._stop or self._failed(error or RuntimeError("it ended without an ending")))

    def _report(self, ending: Ending) -> None:
        """The last line of the attempt in its own log, unless it went well."""
        again = (
            f"; attempt {self.claimed.attempt + 1} follows in {ending.wait:.1f} s" if ending.wait is not None else ""
        )
        if ending.error is not None:
            self.state.will_retry = ending.wait is not None
            logger.error(f"{self.task.name} failed: {ending.reason}{again}", exc_info=ending.error)
        elif ending.state != RunState.SUCCEEDED:
            logger.warning(f"{self.task.name} was {ending.outcome}: {ending.reason}")

    def _succeeded(self, result: Any) -> Ending:
        if self._stop is not None and self._stop.outcome != "interrupted":
            return self._stop
        return Ending(RunState.SUCCEEDED, "succeeded", result=_as_json(result))

    def _interrupted(self, reason: str) -> Ending:
        """It will be resumed, unless its task may not be run again and its body has begun."""
        if self._has_begun and not self.task.policies.rerun:
            return Ending(RunState.FAILED, "interrupted", not_run_again(reason))
        return Ending(RunState.INTERRUPTED, "interrupted", reason)

    def _failed(self, error: BaseException, outcome: str = "failed", reason: str | None = None) -> Ending:
        retry = self.task.policies.retry
        number = self.claimed.attempt - self.claimed.attempts_before
        is_for_later = isinstance(error, (*retry.on, RetryAfter)) and not isinstance(error, InvalidParameters)
        wait = retry.seconds_before(number + 1, seconds_asked(error))
        error = failures.readable(_below_us(error))
        reason = reason or failures.line_of(error)
        if number >= retry.attempts or not is_for_later:
            return Ending(RunState.FAILED, outcome, reason, error=error)
        return Ending(RunState.RETRYING, outcome, reason, error=error, wait=wait)

    def _abandon(self) -> None:
        if not self._ended and self._stop is not None:
            self._context.run(logger.warning, f"{self.task.name} did not stop when asked to, and was given up")
            self._context.run(self._report, self._stop)
            self._end(self._stop)

    def _end(self, ending: Ending) -> None:
        if self._ended:
            return
        self._ended = True
        for timer in self._timers:
            timer.cancel()
        self.state.loops.close()
        if ending.state != RunState.SUCCEEDED:  # a thread, a coroutine or a part of it may still go on
            seal(self.state)
        self._on_end(self, ending)

    def _later(self, seconds: float, callback: Callable[..., None], *args: Any) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, callback, *args))


def _as_json(result: Any) -> Any:
    """A result that JSON can't hold is described: whatever it is, the body has succeeded."""
    if result is None:
        return None
    try:
        if _is_large(result):
            return _beginning(json.dumps(log_lines.plain(result), ensure_ascii=False))
        encoded = to_json(result, inf_nan_mode="strings", fallback=repr)
        return json.loads(encoded) if len(encoded) <= LARGEST_RESULT else _beginning(encoded.decode(errors="replace"))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an author's object may raise anything
        kind, shown = type(result).__name__, escaping.echoed(result, LONGEST_DESCRIPTION)
        return f"a result of type {kind} that can't be kept as JSON ({failures.line_of(error)}): {shown}"


def _is_large(result: Any) -> bool:
    """Whether it is so large that it must not even be encoded, as far as that can be seen without recursion."""
    left, waiting = LARGEST_RESULT, [result]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _TEXTS):
            left -= len(value)
        elif isinstance(value, _CONTAINERS):
            left -= 2 * len(value)
            if left >= 0:
                waiting += value.values() if isinstance(value, dict) else value
        if left < 0:
            return True
    return False


def _beginning(encoded: str) -> str:
    logger.warning(f"the result has more than {LARGEST_RESULT:,} bytes: only its beginning is kept")
    return f"{encoded[:LONGEST_BEGINNING]}…"


_OURS = {function.__code__.co_filename for function in (call, ThreadPool.run)}


def _below_us(error: BaseException) -> BaseException:
    """Our frames at the top of its traceback say nothing to the author."""
    below = error.__traceback__
    while below is not None and below.tb_frame.f_code.co_filename in _OURS:
        below = below.tb_next
    return error.with_traceback(below)
