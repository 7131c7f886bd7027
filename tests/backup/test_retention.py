"""The decision which backups are deleted, which are kept, and why."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from batch_system.backup.places.retention import Candidate, Decision, Rules, decide

NOW = datetime(2026, 3, 29, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)


def daily(count: int, rows: int = 100, verified: bool = True) -> list[Candidate]:
    """One backup a day at noon, the newest first."""
    return [Candidate(f"b{age:03}", NOW - age * DAY, rows, verified) for age in range(count)]


def why(decision: Decision) -> dict[str, str]:
    return {verdict.name: verdict.why for verdict in decision.verdicts if verdict.stays}


def test_backups_older_than_the_days_are_deleted_the_oldest_first() -> None:
    decision = decide(daily(10), Rules(days=7), NOW)
    assert (
        decision.going == ["b009", "b008"] and decision.doubt is None and decision.too_many is None
    )
    assert why(decision) == {"b000": "the newest", **{f"b00{age}": "daily" for age in range(1, 8)}}
    assert {verdict.why for verdict in decision.verdicts if not verdict.stays} == {
        "older than 7 days"
    }


def test_the_newest_backup_of_each_of_the_last_weeks_and_months_is_kept() -> None:
    """2026-03-29 is a Sunday, the last day of its ISO week; weeks end on the 22nd, the 15th and so
    on.
    """
    decision = decide(daily(120), Rules(days=3, weekly=3, monthly=3), NOW)
    kept = why(decision)
    assert [name for name, reason in kept.items() if reason == "weekly"] == ["b007", "b014"]
    months = [
        NOW - timedelta(days=int(name[1:])) for name, reason in kept.items() if reason == "monthly"
    ]
    assert [f"{at:%m-%d}" for at in months] == ["02-28", "01-31"]
    assert len(decision.going) == 120 - len(kept) and len(kept) == 4 + 2 + 2


def test_weeks_without_a_backup_do_not_count() -> None:
    old = [Candidate(f"old{age}", NOW - age * DAY, 100, True) for age in (99, 100, 101, 200)]
    decision = decide([*daily(1), *old], Rules(days=1, weekly=3), NOW)
    assert why(decision) == {"b000": "the newest", "old99": "daily", "old200": "weekly"}


def test_a_week_is_that_of_the_iso_calendar_at_the_turn_of_the_year() -> None:
    """2025-12-29 to 2026-01-04 are one week, and two months."""
    found = [
        Candidate("new", NOW, 1, True),
        Candidate("feb", datetime(2026, 2, 4, tzinfo=UTC), 1, True),
        Candidate("jan", datetime(2026, 1, 4, tzinfo=UTC), 1, True),
        Candidate("dec", datetime(2025, 12, 29, tzinfo=UTC), 1, True),
        Candidate("before", datetime(2025, 12, 28, tzinfo=UTC), 1, True),
    ]
    assert list(why(decide(found, Rules(days=1, weekly=9), NOW))) == ["new", "feb", "jan", "before"]
    assert list(why(decide(found, Rules(days=1, monthly=9), NOW))) == ["new", "feb", "jan", "dec"]


def test_a_pinned_backup_is_kept_however_old() -> None:
    old = Candidate("old", NOW - 900 * DAY, 5, True, pinned=True)
    assert why(decide([*daily(3), old], Rules(days=7), NOW))["old"] == "pinned"


def test_the_last_verified_backup_is_kept_if_the_newer_ones_are_not_verified() -> None:
    found = daily(40, verified=False)
    found[30] = Candidate("verified", found[30].taken_at, 100, True)
    decision = decide(found, Rules(days=7), NOW)
    assert why(decision)["verified"] == "the last verified one"
    assert len(decision.going) == 40 - 8 - 1


def test_the_newest_backup_is_kept_however_old() -> None:
    old = [Candidate(f"b{age}", NOW - age * DAY, 100) for age in (50, 60, 70)]
    assert decide(old, Rules(days=1), NOW).going == ["b70", "b60"]
    assert decide([], Rules(days=7), NOW) == Decision((), None)


def test_the_last_backups_are_kept_however_old_and_failed_ones_do_not_count() -> None:
    hourly = [
        Candidate(f"b{age:02}", NOW - age * DAY * 3, 1, True, failed=age == 2) for age in range(12)
    ]
    kept = why(decide(hourly, Rules(days=1, last=5), NOW))
    assert (
        list(kept) == ["b00", "b01", "b02", "b03", "b04", "b05"] and kept["b05"] == "of the last 5"
    )


@pytest.mark.parametrize("silence", [1, 8, 400, 9000])
def test_after_days_without_backups_or_a_clock_jump_no_more_is_deleted_than_a_day_later(
    silence: int,
) -> None:
    """If the last backups are old, it is not known whether time has passed or the clock has
    jumped.
    """
    before = [Candidate(f"b{age:03}", NOW - (age + silence) * DAY, 100, True) for age in range(8)]
    assert decide([Candidate("new", NOW, 100, True), *before], Rules(days=7), NOW).going == ["b007"]


def test_with_a_wrong_clock_one_old_backup_is_deleted_for_each_new_one() -> None:
    found = daily(8)
    for days in range(400, 404):
        now = NOW + days * DAY
        found = [Candidate(f"wrong{days}", now, 100, True), *found]
        decision = decide(found, Rules(days=7), now)
        assert len(decision.going) == 1
        found = [one for one in found if one.name not in decision.going]
    back = decide([Candidate("right", NOW + DAY, 100, True), *found], Rules(days=7), NOW + DAY)
    assert back.going == [] and back.in_future == ("wrong403", "wrong402", "wrong401", "wrong400")


def test_the_deletion_of_more_than_half_has_to_be_confirmed() -> None:
    assert decide(daily(16), Rules(days=7), NOW).too_many is None
    assert decide(daily(17), Rules(days=7), NOW).too_many == "9 of 17 would go at once"


def test_an_unreadable_backup_is_kept_and_as_the_newest_prevents_deletion() -> None:
    unread = Candidate("old", NOW - 900 * DAY, unread=True)
    assert why(decide([*daily(3), unread], Rules(days=7), NOW))["old"] == "can't be read"
    decision = decide([Candidate("new", NOW, unread=True), *daily(20)[1:]], Rules(days=7), NOW)
    assert decision.going == [] and decision.doubt == "new can't be read"


@pytest.mark.parametrize(
    ("newest", "told"),
    [
        (Candidate("new", NOW, 100, failed=True), "new has failed its check"),
        (Candidate("new", NOW, 0, True), "new has no rows, and b001 had 100"),
        (
            Candidate("new", NOW, 49, True),
            r"new has 49 rows, and b001 had 100: less than 50% of them (BACKUP_LEAST_SHARE)",
        ),
    ],
)
def test_nothing_is_deleted_if_the_newest_backup_is_in_doubt(newest: Candidate, told: str) -> None:
    decision = decide([newest, *daily(20)[1:]], Rules(days=7), NOW)
    assert decision.going == [] and decision.doubt == told
    assert why(decision)["b019"] == "the newest one is in doubt"


def test_an_empty_newest_backup_prevents_deletion_on_the_second_day_too() -> None:
    found = [
        *(Candidate(f"empty{age}", NOW - age * DAY, 0, True) for age in range(3)),
        *daily(20)[3:],
    ]
    decision = decide(found, Rules(days=7), NOW)
    assert decision.going == [] and decision.doubt == "empty0 has no rows, and b003 had 100"
    always = [Candidate(f"empty{age}", NOW - age * DAY, 0, True) for age in range(10)]
    assert decide(always, Rules(days=7), NOW).going == ["empty9", "empty8"]


def test_a_backup_with_a_name_in_the_future_is_not_taken_for_the_newest() -> None:
    """A wrong clock named it. The newest backup of today is in doubt as much as without it."""
    wrong = Candidate("wrong", NOW + 9000 * DAY, 100, True)
    found = [Candidate("new", NOW, 10, True), *daily(20)[1:]]
    assert "b001 had 100: less than" in (decide([wrong, *found], Rules(days=7), NOW).doubt or "")
    old = [Candidate(f"old{age}", NOW - age * DAY, 100, verified=age == 90) for age in (50, 60, 90)]
    decision = decide([wrong, *old], Rules(days=1, weekly=2), NOW)
    stay = {"old50": "the newest", "old60": "weekly", "old90": "the last verified one"}
    assert why(decision) == {"wrong": "in the future", **stay} and decision.in_future == ("wrong",)


def test_all_backups_are_kept_after_the_clock_was_set_back() -> None:
    decision = decide(daily(20), Rules(days=7), NOW - 9000 * DAY)
    assert decision.going == [] and decision.doubt is None


@pytest.mark.parametrize(("rows", "share"), [(50, 0.5), (1, 0.0), (None, 0.5), (99, 0.99)])
def test_enough_rows_are_no_reason_to_doubt(rows: int | None, share: float) -> None:
    found = [Candidate("new", NOW, rows, True), *daily(20)[1:]]
    assert len(decide(found, Rules(days=7, least_share=share), NOW).going) == 12


def test_the_newest_backup_is_compared_with_the_last_sound_one_whose_rows_are_known() -> None:
    found = daily(20)
    found[0] = Candidate("new", NOW, 10, True)
    found[1] = Candidate("failed", found[1].taken_at, 10, failed=True)
    found[2] = Candidate("not read", found[2].taken_at)
    assert "and b003 had 100" in (decide(found, Rules(days=7), NOW).doubt or "")


def test_of_a_month_whose_backups_have_all_failed_one_is_kept_and_does_not_count() -> None:
    """A check fails in one place. The copy with the same name in the other place may be sound."""
    failed = [
        Candidate(f"feb{day}", datetime(2026, 2, day, tzinfo=UTC), 1, failed=True) for day in (3, 1)
    ]
    sound = [Candidate("jan", NOW - 70 * DAY, 1, True), Candidate("dec", NOW - 100 * DAY, 1, True)]
    found = [*daily(2), *failed, *sound]
    kept = {
        "b000": "the newest",
        "b001": "daily",
        "feb3": "monthly",
        "jan": "monthly",
        "dec": "monthly",
    }
    assert why(decide(found, Rules(days=1, monthly=3), NOW)) == kept
    assert decide(found, Rules(days=1, monthly=1), NOW).going == ["dec", "jan", "feb1", "feb3"]


def test_a_failed_backup_is_not_the_one_kept_for_its_week() -> None:
    found = [
        *daily(2),
        *(Candidate(name, NOW - age * DAY, 1, True) for name, age in (("bad", 30), ("good", 31))),
    ]
    found[2] = Candidate("bad", found[2].taken_at, 1, failed=True)
    assert why(decide(found, Rules(days=1, weekly=9), NOW)) == {
        "b000": "the newest",
        "b001": "daily",
        "good": "weekly",
    }
