from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_system import BaseTask, Missed, Retry
from batch_system.batch.tasks.declaration import Policies
from batch_system.errors import InvalidTask


def policies(**attributes: Any) -> Policies:
    return Policies.of(type("Made", (BaseTask,), attributes))


def refusal(**attributes: Any) -> str:
    with pytest.raises(InvalidTask) as caught:
        policies(**attributes)
    return caught.value.message


def test_a_task_without_policies_has_the_defaults() -> None:
    assert policies() == Policies(
        None, Retry(attempts=1), "skip", Missed("once", timedelta(days=1)), 0
    )


@pytest.mark.parametrize(
    ("given", "seconds"), [(5, 5), (0.5, 0.5), (timedelta(minutes=2), 120), (None, None)]
)
def test_a_timeout_is_seconds_or_a_timedelta(given: Any, seconds: float | None) -> None:
    assert policies(timeout=given).timeout == seconds


@pytest.mark.parametrize(
    ("attribute", "value", "allowed"),
    [
        ("timeout", 0, "seconds above 0"),
        ("timeout", -1, "seconds above 0"),
        ("timeout", "5", "seconds above 0"),
        ("timeout", True, "seconds above 0"),
        ("timeout", float("inf"), "seconds above 0"),
        ("timeout", float("nan"), "seconds above 0"),
        ("timeout", timedelta(0), "seconds above 0"),
        ("retry", 3, "a Retry(…)"),
        ("retry", None, "a Retry(…)"),
        ("missed", "sometimes", "'skip' | 'once' | 'all'"),
        ("missed", None, "a Missed(…) or 'skip' | 'once' | 'all'"),
        ("overlap", "queue", "'skip' | 'wait' | 'allow' | 'replace'"),
        ("overlap", None, "'skip' | 'wait' | 'allow' | 'replace'"),
        ("overlap", ["skip"], "'skip' | 'wait' | 'allow' | 'replace'"),
        ("max_running", 0, "an int from 1 to 1,000, or None"),
        ("max_running", 1_001, "an int from 1 to 1,000, or None"),
        ("max_running", 2.0, "an int from 1 to 1,000, or None"),
        ("max_running", True, "an int from 1 to 1,000, or None"),
        ("max_waiting", 0, "an int from 1 to 1,000"),
        ("max_waiting", None, "an int from 1 to 1,000"),
        ("max_waiting", 2, "1, unless overlap = 'wait'"),
        ("priority", 1001, "an int from -1000 to 1000"),
        ("priority", "high", "an int from -1000 to 1000"),
        ("priority", 1.5, "an int from -1000 to 1000"),
        ("fenced", None, "True or False"),
    ],
)
def test_an_invalid_value_is_refused_with_the_allowed_values(
    attribute: str, value: Any, allowed: str
) -> None:
    message = refusal(**{attribute: value})
    assert attribute in message.lower() and repr(value) in message and allowed in message


def test_max_running_of_one_with_overlap_allow_is_refused() -> None:
    assert policies(max_running=1).overlap == "skip"
    refused = "max_running is 1; allowed: None, or an int from 2, with overlap = 'allow'"
    assert refusal(max_running=1, overlap="allow") == refused
    assert policies(max_running=2, overlap="allow").max_running == 2


def test_max_waiting_is_allowed_with_overlap_wait_only() -> None:
    assert policies(overlap="wait").max_waiting == 1
    assert policies(overlap="wait", max_waiting=5).max_waiting == 5
    assert policies(overlap="skip", max_waiting=1).max_waiting == 1


def test_a_missed_policy_may_be_given_by_its_name() -> None:
    assert policies(missed="all").missed == Missed("all")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attempts": 0}, "Retry(attempts) is 0; allowed: an int from 1"),
        ({"attempts": True}, "Retry(attempts) is True"),
        ({"attempts": 2.0}, "Retry(attempts) is 2.0"),
        ({"wait": -1}, "Retry(wait) is -1; allowed: seconds from 0"),
        ({"wait": "1m"}, "Retry(wait) is '1m'"),
        ({"factor": 0.5}, "Retry(factor) is 0.5; allowed: a number from 1"),
        ({"max_wait": float("inf")}, "Retry(max_wait) is inf"),
        (
            {"max_wait": 1e12},
            "Retry(max_wait) is 1000000000000.0; allowed: seconds from 0, up to 100 years",
        ),
        ({"jitter": 2}, "Retry(jitter) is 2; allowed: a share from 0 to 1"),
        (
            {"on": "ValueError"},
            "Retry(on) is 'ValueError'; allowed: an exception class, or a tuple of exception "
            "classes",
        ),
        ({"on": (int,)}, "Retry(on) is (<class 'int'>,)"),
        ({"on": 5}, "Retry(on) is 5"),
    ],
)
def test_an_invalid_argument_of_retry_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        Retry(**arguments)
    assert caught.value.message.startswith(named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"policy": "never"}, "Missed is 'never'; allowed: 'skip' | 'once' | 'all'"),
        ({"max_age": 3600}, "Missed(max_age) is 3600; allowed: a timedelta above zero"),
        ({"max_age": timedelta(0)}, "Missed(max_age)"),
        ({"max_age": timedelta.max}, "Missed(max_age)"),
        ({"max_count": 0}, "Missed(max_count) is 0; allowed: an int from 1, or None"),
        ({"max_count": True}, "Missed(max_count) is True"),
    ],
)
def test_an_invalid_argument_of_missed_is_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        Missed(**arguments)
    assert caught.value.message.startswith(named)


@pytest.mark.parametrize("on", [OSError, (OSError,), [OSError]])
def test_the_exceptions_to_retry_on_may_be_one_or_several(on: Any) -> None:
    assert isinstance(ConnectionError(), Retry(on=on).on) and not isinstance(
        ValueError(), Retry(on=on).on
    )


def test_the_wait_grows_by_the_factor_up_to_its_limit() -> None:
    retry = Retry(attempts=9, wait=timedelta(seconds=10), factor=3, max_wait=100, jitter=0)
    assert [retry.seconds_before(attempt) for attempt in range(2, 7)] == [10, 30, 90, 100, 100]


def test_jitter_spreads_the_wait_by_its_share() -> None:
    waits = {Retry(wait=100, jitter=0.2).seconds_before(2) for _ in range(200)}
    assert 80 <= min(waits) < 90 and 110 < max(waits) <= 120


@settings(deadline=None)
@given(
    st.integers(2, 10**6),
    st.floats(0, 3e9) | st.integers(0, 10**9),
    st.floats(1, 3e9) | st.integers(1, 10**9),
    st.floats(0, 3e9) | st.integers(0, 10**9),
)
def test_the_wait_before_any_attempt_is_finite(
    attempt: int, wait: float, factor: float, max_wait: float
) -> None:
    seconds = Retry(wait=wait, factor=factor, max_wait=max_wait, jitter=0).seconds_before(attempt)
    assert min(wait, max_wait) <= seconds <= max_wait


def test_policies_fit_into_the_ledgers_json() -> None:
    made = policies(
        timeout=timedelta(minutes=1), retry=Retry(3, on=(OSError,)), missed="all", overlap="allow"
    )
    shown = json.loads(json.dumps(made.as_json()))
    assert (shown["timeout"], shown["overlap"], shown["priority"]) == (60, "allow", 0)
    assert (shown["retry"]["attempts"], shown["retry"]["on"]) == (3, ["OSError"])
    assert shown["missed"] == {"policy": "all", "max_age": 86400, "max_count": None}
