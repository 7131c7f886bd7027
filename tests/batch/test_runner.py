from __future__ import annotations

import asyncio
import functools
import json
import logging
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from datetime import date, datetime
from typing import Any

import pytest
from pydantic import BaseModel, model_serializer

from batch_system import Retry, current_run, failures, get_logger, logs
from batch_system.batch.context.current_run import state_of
from batch_system.batch.execution import attempt
from batch_system.batch.ledger.states import RunState
from tests.batch.attempts import SECONDS, SLOT, Begun, Quick, ending_of, until_in_its_thread

secret: ContextVar[str] = ContextVar("secret", default="nothing")


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(*args, **kwargs)


async def answer(*_: Any) -> str:
    await asyncio.sleep(0)
    return "answered"


async def answer_later(*_: Any) -> Any:
    return answer()


class Caller:
    async def __call__(self, slot: datetime) -> str:
        return f"answered for {slot:%H:%M}"


class Sub(Quick):
    async def run(self) -> str:
        return "answered"


def returning_super(self: Any) -> Any:
    return Sub.run(self)


@pytest.mark.parametrize(
    ("run", "result"),
    [
        (answer, "answered"),
        (plain(answer), "answered"),
        (plain(plain(answer)), "answered"),
        (functools.wraps(answer)(plain(answer)), "answered"),
        (lambda self: answer(), "answered"),
        (returning_super, "answered"),
        (answer_later, "answered"),
        (plain(answer_later), "answered"),
        (Caller(), "answered for 02:00"),
        (staticmethod(answer), "answered"),
        (classmethod(answer), "answered"),
        (functools.partialmethod(answer), "answered"),
        (lambda self: "sync", "sync"),
    ],
)
async def test_the_body_of_run_is_executed_in_every_way_it_may_be_written(
    run: Any, result: Any
) -> None:
    ending = await ending_of(run)
    assert (ending.state, ending.result, ending.error) == (RunState.SUCCEEDED, result, None)


def items() -> Any:
    yield 1


async def async_items() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("run", [lambda self: items(), lambda self: async_items()])
async def test_a_run_that_returns_a_generator_fails(run: Any) -> None:
    ending = await ending_of(run)
    assert ending.state == RunState.FAILED
    assert "a function with a yield in it is not executed by a call" in (ending.reason or "")


def raising(error: BaseException, is_async: bool) -> Any:
    def run(self: Any) -> None:
        raise error

    async def run_async(self: Any) -> None:
        raise error

    return run_async if is_async else run


class Unreadable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


UNSHOWABLE = SyntaxError("no good")
# It can't be formatted with its traceback.
UNSHOWABLE.lineno = Unreadable()  # type: ignore[assignment]


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no good\nat all"), "ValueError: no good"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (StopIteration(1), "RuntimeError: "),
        (GeneratorExit(), "GeneratorExit"),
        (asyncio.CancelledError(), "it was cancelled from inside"),
        (BaseExceptionGroup("two", [SystemExit(), ValueError()]), "BaseExceptionGroup: two"),
        (Unreadable(), "RuntimeError: Unreadable, whose text can't be read"),
        (UNSHOWABLE, "RuntimeError: SyntaxError, whose text can't be read"),
    ],
)
async def test_every_error_of_a_body_fails_only_its_own_run(
    is_async: bool, error: BaseException, reason: str
) -> None:
    ending = await ending_of(raising(error, is_async))
    assert (ending.state, ending.outcome) == (RunState.FAILED, "failed")
    assert (ending.reason or "").startswith(reason) and traceback.format_exception(ending.error)


@pytest.mark.parametrize("is_async", [True, False])
async def test_the_traceback_begins_with_the_authors_code(is_async: bool) -> None:
    ending = await ending_of(raising(ValueError("no good"), is_async))
    assert ending.error is not None
    frames = traceback.extract_tb(ending.error.__traceback__)
    assert [(frame.filename, frame.name) for frame in frames] == [
        (__file__, "run_async" if is_async else "run")
    ]


async def test_an_error_outside_the_authors_code_keeps_its_text() -> None:
    ending = await ending_of(lambda self: items())
    assert ending.error is not None
    assert "".join(traceback.format_exception(ending.error)).startswith(
        "TypeError: run() returned <generator"
    )


async def test_every_attempt_has_a_fresh_instance() -> None:
    seen: list[Any] = []
    for number in (1, 2):
        await ending_of(lambda self: seen.append(self), number=number)
    assert seen[0] is not seen[1]


async def test_stored_parameters_and_the_slot_reach_run() -> None:
    async def run(self: Any, day: date, slot: datetime, n: int = 3) -> list[Any]:
        return [day, slot, n]

    ending = await ending_of(run, params={"day": "2026-01-02"})
    assert ending.result == ["2026-01-02", "2026-11-25T02:00:00Z", 3]


async def test_parameters_that_no_longer_fit_fail_the_run_without_a_retry() -> None:
    ending = await ending_of(answer, params={"gone": 1}, retry=Retry(attempts=5))
    assert ending.state == RunState.FAILED and "there is no parameter 'gone'" in (
        ending.reason or ""
    )


@pytest.mark.parametrize("result", [object(), float("nan"), {"a": {1}}, b"\xff", "x" * 10, [SLOT]])
async def test_any_result_becomes_json(result: Any) -> None:
    ending = await ending_of(lambda self: result)
    assert ending.state == RunState.SUCCEEDED
    json.dumps(ending.result, allow_nan=False)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def cyclic() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


class Raising:
    """An object whose special methods raise."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def __repr__(self) -> str:
        raise self.error("no")

    __str__ = __iter__ = __len__ = __repr__


class RaisingDict(dict[str, Any]):
    def values(self) -> Any:
        raise ZeroDivisionError


class RaisingModel(BaseModel):
    number: int = 1

    @model_serializer
    def told(self) -> dict[str, Any]:
        raise ZeroDivisionError


def raising_items() -> Iterator[int]:
    yield 1
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "make",
    [
        lambda: nested(100_000),
        cyclic,
        lambda: Raising(ZeroDivisionError),
        lambda: {"a": [Raising(ZeroDivisionError)]},
        lambda: [Raising(RecursionError)],
        lambda: Raising(SystemExit),
        lambda: RaisingDict(a=1),
        RaisingModel,
        lambda: [raising_items()],
        lambda: 10**5_000,
        lambda: {"a": [10**5_000]},
        lambda: {Raising(ZeroDivisionError): 1},
        lambda: "half a pair \ud800",
        lambda: {"\0": "\0"},
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
async def test_a_run_succeeds_even_if_its_result_can_not_be_kept(make: Any, is_async: bool) -> None:
    async def run_async(self: Any) -> Any:
        return make()

    ending = await ending_of(run_async if is_async else lambda self: make())
    assert (ending.state, ending.error) == (RunState.SUCCEEDED, None)
    assert len(json.dumps(ending.result, allow_nan=False)) < 100_000


async def test_a_result_that_is_not_json_is_described() -> None:
    ending = await ending_of(lambda self: [Raising(ZeroDivisionError)])
    told = "a result of type list that can't be kept as JSON (PydanticSerializationError: "
    assert ending.result.startswith(told) and ending.result.endswith(
        "ZeroDivisionError: no): <list without a text>"
    )


@pytest.mark.parametrize(
    "result",
    [
        "x" * 2_000_000,
        ["x" * 1_000] * 2_000,
        [1] * 2_000_000,
        {"a": [["x" * 2_000_000]]},
        b"x" * 2_000_000,
    ],
)
async def test_the_beginning_of_a_result_that_is_too_large_is_kept(result: Any) -> None:
    logs.set_up()
    begun = Begun(lambda self: result)
    ending = await begun.ending()
    assert ending.state == RunState.SUCCEEDED
    assert (
        isinstance(ending.result, str)
        and 100 < len(ending.result) <= 1_001
        and ending.result.endswith("…")
    )
    [line] = begun.attempt.state.log.take_lines()
    assert line.text == "the result has more than 1,000,000 bytes; only its beginning is kept"


async def test_a_result_of_the_allowed_size_stays_whole() -> None:
    ending = await ending_of(lambda self: ["x" * 900_000])
    assert ending.result == ["x" * 900_000]


class RaisingLater(Exception):
    """An error whose text can be read only once."""

    def __init__(self) -> None:
        self.reads = 0

    def __str__(self) -> str:
        self.reads += 1
        if self.reads > 1:
            raise ZeroDivisionError
        return "first"


async def test_an_error_whose_text_can_be_read_only_once_ends_the_run() -> None:
    ending = await ending_of(raising(RaisingLater(), False))
    assert ending.state == RunState.FAILED and (ending.reason or "").startswith("RaisingLater")
    assert ending.error is not None and failures.facts_of(ending.error)["type"] == "RaisingLater"


@pytest.mark.parametrize("is_async", [True, False])
async def test_no_context_of_the_services_start_leaks_into_a_run(is_async: bool) -> None:
    async def run_async(self: Any) -> str:
        return secret.get()

    secret.set("of the starter")
    ending = await ending_of(run_async if is_async else lambda self: secret.get())
    assert ending.result == "nothing"


@pytest.mark.parametrize("is_async", [True, False])
async def test_current_run_works_in_a_coroutine_and_in_a_thread(is_async: bool) -> None:
    async def run_async(self: Any) -> Any:
        return current_run().id

    ending = await ending_of(run_async if is_async else lambda self: current_run().id)
    assert ending.result == "run-1"


async def test_the_ending_of_a_failure_that_is_retried_says_when() -> None:
    retry = Retry(attempts=2, wait=10, jitter=0, on=(OSError,))
    first = await ending_of(raising(ConnectionError("away"), True), retry=retry)
    assert (first.state, first.wait) == (RunState.RETRYING, 10)
    last = await ending_of(raising(ConnectionError("away"), True), number=2, retry=retry)
    other = await ending_of(raising(ValueError("wrong"), True), retry=retry)
    assert [(e.state, e.wait) for e in (last, other)] == [(RunState.FAILED, None)] * 2


async def test_a_run_that_is_too_long_times_out() -> None:
    """A plain function has returned something to await that takes too long. The timeout comes while
    it is awaited.
    """
    is_awaited = asyncio.Event()

    async def run(self: Any) -> None:
        is_awaited.set()
        await asyncio.Event().wait()

    begun = Begun(plain(run), timeout=600)
    await asyncio.wait_for(is_awaited.wait(), SECONDS)
    [timer] = begun.attempt._timers
    timer._run()
    ending = await begun.ending()
    assert (ending.state, ending.outcome, ending.reason) == (
        RunState.FAILED,
        "timed out",
        "timed out after 600 s",
    )
    assert isinstance(ending.error, TimeoutError)


async def test_a_run_that_swallows_its_cancellation_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempt, "ABANDON_SECONDS", 0.1)
    let_go = asyncio.Event()

    async def run(self: Any) -> str:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                get_logger("task").info("not me")
        return "late"

    begun = Begun(run, timeout=0.05)
    assert (await begun.ending()).outcome == "timed out"
    let_go.set()
    await asyncio.sleep(0.05)
    assert len(begun.ended) == 1


async def test_a_hung_thread_times_out_and_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "ABANDON_SECONDS", 0.1)
    hung = threading.Event()

    def run(self: Any) -> None:
        hung.wait()

    begun = Begun(run, timeout=0.05)
    ending = await begun.ending()
    hung.set()
    assert ending.outcome == "timed out" and begun.run.cancelled


async def test_a_sync_run_that_checks_cancelled_ends_before_its_retry_begins() -> None:
    has_begun, stopped = threading.Event(), threading.Event()

    def run(self: Any) -> None:
        has_begun.set()
        while not current_run().cancelled:
            stopped.wait(0.005)
        stopped.set()

    begun = Begun(run, timeout=0.05)
    await until_in_its_thread(has_begun)
    ending = await begun.ending()
    assert ending.outcome == "timed out" and stopped.is_set()


async def test_an_attempt_stopped_before_its_first_step_ends_at_once() -> None:
    begun = Begun(answer)
    begun.attempt.interrupt("the service stopped")
    ending = await asyncio.wait_for(begun.ending(), 1)
    assert (ending.state, ending.reason) == (RunState.INTERRUPTED, "the service stopped")


async def test_a_checkpoint_ends_a_run_that_is_asked_to_stop() -> None:
    def run(self: Any) -> None:
        state_of(current_run()).ask_to_stop("the service stops")
        try:
            current_run().checkpoint()
        except Exception:  # noqa: BLE001 - what an author writes, and what must not catch it
            return

    ending = await ending_of(run)
    assert (ending.state, ending.reason) == (RunState.INTERRUPTED, "the service stops")


async def test_the_lines_of_a_run_are_kept_with_its_failure() -> None:
    logs.set_up()

    def run(self: Any) -> None:
        get_logger("mine").info("working", n=1)
        logging.getLogger("library").warning("careful: %s", "hot")
        raise ValueError("no good")

    begun = Begun(run)
    await begun.ending()
    first, second, last = begun.attempt.state.log.take_lines()
    assert (first.logger, first.level, first.text) == ("mine", "info", "working n=1")
    assert (second.logger, second.level, second.text) == ("library", "warning", "careful: hot")
    assert last.level == "error" and last.text.startswith(
        "quick failed: ValueError: no good\nTraceback"
    )


async def test_a_task_without_a_schedule_has_its_slot_in_its_own_zone() -> None:
    async def run(self: Any) -> str:
        return current_run().slot.isoformat()

    ending = await ending_of(run, timezone="Asia/Tokyo")
    assert ending.result == "2026-11-25T11:00:00+09:00"
