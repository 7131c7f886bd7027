"""When a failed run is retried: the waits of the policy, RetryAfter, and the Retry-After header of
a response.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from batch_system import BatchError, Retry, RetryAfter, clock
from batch_system.batch.execution import attempt
from batch_system.batch.execution.ending import Ending
from batch_system.batch.ledger.states import RunState
from batch_system.batch.tasks.retry_after import seconds_asked
from batch_system.errors import DomainError, InvalidParameters
from tests.batch.attempts import Begun, ending_of

NOW = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
RETRY = Retry(attempts=3, wait=10, jitter=0, max_wait=100)


def answered(status: int, header: str | None = None) -> httpx.HTTPStatusError:
    """The error that raise_for_status() raises for a response with this status and Retry-After
    header.
    """
    request = httpx.Request("GET", "https://prices.example/")
    headers = {} if header is None else {"Retry-After": header.encode("latin-1")}
    response = httpx.Response(status, headers=headers, request=request)
    return httpx.HTTPStatusError(f"{status}", request=request, response=response)


async def failed_with(error: BaseException, retry: Retry = RETRY, number: int = 1) -> Ending:
    async def run(self: Any) -> None:
        raise error

    return await ending_of(run, retry=retry, number=number)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        (" 7 ", 7),
        ("Tue, 10 Mar 2026 12:01:30 GMT", 60),
        ("Tue, 10 Mar 2026 12:01:30 -0000", 60),
        ("Tue, 10 Mar 2026 11:00:00 GMT", 0),
        ("Tuesday, 10-Mar-26 12:01:30 GMT", 60),
    ],
)
async def test_the_wait_that_a_response_asks_for_replaces_that_of_the_policy(
    header: str, seconds: float
) -> None:
    with clock.moved(NOW):
        ending = await failed_with(answered(429, header))
    assert (ending.state, ending.wait) == (RunState.RETRYING, seconds)


@pytest.mark.parametrize(
    "header", [None, "", "soon", "-5", "1.5", "²", "Tue, 99 Mar 2026 12:01:30 GMT", "1e9"]
)
async def test_a_header_that_can_not_be_read_keeps_the_wait_of_the_policy(
    header: str | None,
) -> None:
    assert (await failed_with(answered(503, header))).wait == 10


@pytest.mark.parametrize(
    "error",
    [
        answered(429, "101"),
        answered(429, "9" * 400),
        answered(503, "Tue, 10 Mar 2099 12:01:30 GMT"),
        RetryAfter(101),
        RetryAfter(timedelta(days=9)),
        RetryAfter(float("inf")),
    ],
)
async def test_no_wait_is_longer_than_max_wait(error: BaseException) -> None:
    assert (await failed_with(error)).wait == 100


async def test_jitter_never_exceeds_max_wait() -> None:
    waits = [Retry(wait=100, max_wait=100, jitter=1).seconds_before(2) for _ in range(200)]
    assert max(waits) == 100 and min(waits) < 50


async def test_a_response_only_counts_if_its_error_is_retried() -> None:
    ending = await failed_with(answered(429, "7"), Retry(attempts=3, on=OSError))
    assert (ending.state, ending.wait) == (RunState.FAILED, None)


async def test_a_raised_retry_after_is_retried_even_if_on_does_not_name_it() -> None:
    ending = await failed_with(
        RetryAfter(7, "the report is not ready"), Retry(attempts=3, on=OSError)
    )
    assert (ending.state, ending.outcome, ending.wait) == (RunState.RETRYING, "failed", 7)
    assert ending.reason == "RetryAfter: the report is not ready"


async def test_a_sync_run_may_raise_retry_after() -> None:
    def run(self: Any) -> None:
        raise RetryAfter(timedelta(seconds=7))

    ending = await ending_of(run, retry=RETRY)
    assert (ending.wait, ending.reason) == (7, "RetryAfter: retry after 7 s")


@pytest.mark.parametrize("retry", [Retry(), Retry(attempts=3)])
async def test_an_attempt_that_raised_retry_after_counts(retry: Retry) -> None:
    ending = await failed_with(RetryAfter(7), retry, number=retry.attempts)
    assert (ending.state, ending.wait) == (RunState.FAILED, None)


@pytest.mark.parametrize(("seconds", "wait"), [(0, 0), (-5, 0), (float("nan"), 0), (0.25, 0.25)])
async def test_negative_and_nan_seconds_mean_no_wait(seconds: float, wait: float) -> None:
    assert (await failed_with(RetryAfter(seconds))).wait == wait


def test_retry_after_is_a_batch_error_that_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(RetryAfter(7, "not yet")))
    assert isinstance(error, BatchError) and not isinstance(error, DomainError)
    assert (error.seconds, error.message) == (7, "not yet")


def test_other_errors_ask_for_no_wait() -> None:
    assert seconds_asked(ValueError()) is None
    assert seconds_asked(InvalidParameters("no")) is None
    assert seconds_asked(httpx.ConnectTimeout("no")) is None


def test_reading_an_error_does_not_import_httpx() -> None:
    asked = "from batch_system.batch.tasks.retry_after import *; seconds_asked(OSError())"
    code = f"import sys; {asked}; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("is_sync", [False, True])
async def test_a_run_that_swallows_its_cancellation_and_then_returns_has_timed_out(
    is_sync: bool,
) -> None:
    async def stubborn(self: Any) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "done all the same"

    def sync(self: Any) -> str:
        while not begun.run.cancelled:
            time.sleep(0.005)
        return "done all the same"

    begun = Begun(sync if is_sync else stubborn, timeout=0.05)
    ending = await begun.ending()
    assert (ending.state, ending.outcome, ending.result) == (RunState.FAILED, "timed out", None)


async def test_the_end_of_a_run_that_did_not_stop_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attempt, "ABANDON_SECONDS", 0.05)
    let_go = asyncio.Event()

    async def run(self: Any) -> None:
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        raise ValueError("too late")

    begun = Begun(run, timeout=0.05)
    ending = await begun.ending()
    begun.attempt.abandon()
    let_go.set()
    await asyncio.sleep(0.02)
    assert (ending.state, ending.outcome, len(begun.ended)) == (RunState.FAILED, "timed out", 1)
    told = [record for record in caplog.records if "was given up" in record.getMessage()]
    assert len(told) == 1 and not any(
        "too late" in record.getMessage() for record in caplog.records
    )


async def test_an_http_date_is_read() -> None:
    with clock.moved(NOW):
        header = format_datetime(NOW + timedelta(seconds=42), usegmt=True)
        assert seconds_asked(answered(503, header)) == 42
