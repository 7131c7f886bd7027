from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from batch_system import clock

AT = datetime(2026, 3, 29, 3, 0, tzinfo=timezone(timedelta(hours=2)))


def test_now_is_aware_and_in_utc() -> None:
    before = datetime.now(UTC)
    assert clock.now().tzinfo is UTC
    assert before <= clock.now() <= datetime.now(UTC)


def test_a_moved_clock_stands_still_and_is_in_utc() -> None:
    with clock.moved(AT):
        assert clock.now() == clock.now() == AT
        assert clock.now().tzinfo is UTC and clock.is_moved()
    assert not clock.is_moved() and clock.now() != AT


def test_a_moved_clock_advances_by_the_given_time() -> None:
    with clock.moved(AT):
        assert clock.advance(timedelta(hours=1)) == clock.now() == AT + timedelta(hours=1)


def test_moves_nest_and_end_with_an_error_too() -> None:
    with clock.moved(AT):
        with pytest.raises(ZeroDivisionError), clock.moved(AT + timedelta(days=1)):
            raise ZeroDivisionError
        assert clock.now() == AT
    assert not clock.is_moved()


def test_only_a_moved_clock_advances() -> None:
    with pytest.raises(RuntimeError, match="inside"):
        clock.advance(timedelta(hours=1))


def test_moving_the_clock_to_a_naive_instant_is_refused() -> None:
    with pytest.raises(ValueError, match="aware"), clock.moved(AT.replace(tzinfo=None)):
        pass


def test_the_clocks_for_durations_are_never_moved() -> None:
    with clock.moved(AT):
        for read in (clock.monotonic, clock.boottime, clock.unix_ns):
            first = read()
            assert read() >= first
        assert abs(clock.unix_ns() / 1e9 - datetime.now(UTC).timestamp()) < 60
