"""Numbers, sizes, durations and instants as the pages show them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from batch_system.operations.night.results import Need, NightChange
from batch_system.pages.frame import formatting
from batch_system.pages.frame.render import marked
from batch_system.pages.night.changes_in_words import lines_of

NOW = datetime(2026, 10, 25, 6, 42, tzinfo=UTC)
BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, "–"),
        (-1, "0 ms"),
        (0.0004, "0 ms"),
        (0.43, "430 ms"),
        (0.9996, "1.0 s"),
        (3.24, "3.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (71, "1 min 11 s"),
        (3_599.7, "1 h 00 min"),
        (7_440, "2 h 04 min"),
        (50_220, "13 h 57 min"),
        (86_399, "1 d 0 h"),
        (90_000, "1 d 1 h"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float | None, expected: str) -> None:
    assert formatting.duration(seconds) == expected


@pytest.mark.parametrize(
    ("octets", "expected"),
    [
        (None, "–"),
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.00 kB"),
        (4_820_000_000, "4.82 GB"),
        (99_950_000, "100 MB"),
    ],
)
def test_a_size_has_three_digits(octets: float | None, expected: str) -> None:
    assert formatting.size(octets) == expected


def test_numbers_have_commas_and_a_true_minus() -> None:
    assert formatting.number(412_300) == "412,300"
    assert formatting.number(-5) == "\N{MINUS SIGN}5"
    assert formatting.counted(1, "slot") == "1 slot"
    assert formatting.counted(12, "slot") == "12 slots"


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (NOW, "07:42"),
        (NOW - timedelta(hours=5), "02:42 +01:00"),
        (NOW - timedelta(hours=6), "02:42 +02:00"),
        (NOW - timedelta(hours=9), "Sat 23:42"),
        (NOW - timedelta(days=7), "18 Oct 08:42"),
        (NOW - timedelta(days=400), "20 Sep 2025 08:42"),
    ],
)
def test_another_day_is_named(at: datetime, expected: str) -> None:
    assert formatting.moment(at, BERLIN, NOW) == expected


def test_what_is_far_away_is_absolute() -> None:
    assert formatting.relative(NOW + timedelta(seconds=772), NOW) == "in 12 min 52 s"
    assert formatting.relative(NOW - timedelta(minutes=4), NOW) == "4 min ago"
    assert formatting.relative(NOW - timedelta(days=43), NOW) == "12 Sep"


def test_the_offset_is_that_of_the_instant() -> None:
    assert formatting.offset(NOW, BERLIN) == "+01:00"
    assert formatting.offset(NOW - timedelta(hours=9), BERLIN) == "+02:00"
    assert formatting.offset(NOW, ZoneInfo("America/New_York")) == "\N{MINUS SIGN}04:00"


def test_a_log_line_may_have_any_text_as_its_instant() -> None:
    assert formatting.log_time("2026-10-25T06:31:12.408Z", BERLIN) == "07:31:12.408"
    assert formatting.log_time("at", BERLIN) == "at"


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ({"new": 2, "again": 1, "left": 5, "after": {}}, "backfilled, 3 runs"),
        (
            {
                "new": 1,
                "again": 0,
                "after": {"load": {"new": 1, "again": 1}, "report": {"new": 0, "again": 0}},
            },
            "backfilled, 1 run; after it 2 of load",
        ),
        (
            {"new": 1, "again": 0, "after": {name: {"new": 1, "again": 0} for name in "abcde"}},
            "backfilled, 1 run; after it 1 of a, 1 of b, 1 of c and 2 more",
        ),
        ({"new": "1", "again": None, "after": {}}, "backfilled"),
        ({}, "backfilled"),
        (None, "backfilled"),
    ],
)
def test_a_backfill_says_how_many_runs_it_has_made_also_of_the_tasks_that_come_after(
    after: Any, words: str
) -> None:
    at = datetime(2026, 3, 10, tzinfo=UTC)
    change = NightChange(
        at=at,
        kind="task.backfill",
        actor="ann",
        task="extract",
        before=None,
        after=after,
        note=None,
    )
    (line,) = lines_of([change], [], at)
    assert (line.task, line.words, line.detail) == ("extract", words, "ann")


def test_colours_of_a_terminal_are_left_out_of_what_was_logged() -> None:
    assert str(marked("\x1b[33mslow\x1b[0m, then \\x1b[1;31mred\\x1b[m")) == "slow, then red"
    assert str(marked("\\x1b[33mslow\\x1b[0m", "slow")) == "<mark>slow</mark>"


def test_a_run_that_has_set_items_aside_has_not_failed() -> None:
    need = Need(
        kind="quarantine",
        incident=None,
        task="upcase",
        open=1,
        error="1 item waits",
        failing_since=NOW,
    )
    [line] = lines_of([], [need], NOW)
    assert (line.task, line.words) == ("upcase", "has put items into quarantine")
