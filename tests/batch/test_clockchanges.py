"""What the clock changes of a zone do to a schedule, in words, and to which of its slots."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from batch_system.batch.cron.cron import schedule
from batch_system.batch.lint.clock_changes import effects

AFTER = datetime(2026, 6, 1, tzinfo=UTC)
UNTIL = AFTER + timedelta(days=366)

CASES = [
    (
        *("30 2 * * *", "Europe/Berlin"),
        "02:30 comes twice on 2026-10-25: fires the first time",
        "02:30 is skipped by the clock change of 2027-03-28: fires at 03:00",
    ),
    (
        *("*/10 2 * * *", "Europe/Berlin"),
        "02:00 to 02:50 (6 times) come twice on 2026-10-25: fire both times",
        "02:00 to 02:50 (6 times) are skipped by the clock change of 2027-03-28: do not fire",
    ),
    (
        *("0,30 2 * * *", "Europe/Berlin"),
        "02:00 and 02:30 come twice on 2026-10-25: fire the first time",
        "02:00 and 02:30 are skipped by the clock change of 2027-03-28: fire once at 03:00",
    ),
    (
        *("30 */2 * * *", "Europe/Berlin"),
        "02:30 comes twice on 2026-10-25: fires both times",
        "02:30 is skipped by the clock change of 2027-03-28: does not fire",
    ),
    (
        "0 0 * * 0",
        "America/Santiago",
        "00:00 is skipped by the clock change of 2026-09-06: fires at 01:00",
    ),
    (
        "15,45 2 * * *",
        "Australia/Lord_Howe",
        "02:15 is skipped by the clock change of 2026-10-04: fires at 02:30",
    ),
    (
        "5 30 2 28 3 *",
        "Europe/Berlin",
        "02:30:05 is skipped by the clock change of 2027-03-28: fires at 03:00",
    ),
    # No effect: the rhythm continues, the time is on another day, or the clock never changes.
    ("0 * * * *", "Europe/Berlin"),
    ("* * * * *", "Australia/Lord_Howe"),
    ("30 2 1 * *", "Europe/Berlin"),
    ("30 3 * * *", "Europe/Berlin"),
    ("30 2 * * *", "Asia/Tokyo"),
    ("30 2 * * *", "UTC"),
]


@pytest.mark.parametrize(("cron", "zone", "words"), [(c, z, list(words)) for c, z, *words in CASES])
def test_a_clock_change_is_described_only_if_it_affects_a_slot(
    cron: str, zone: str, words: list[str]
) -> None:
    assert [effect.words for effect in effects(schedule(cron, zone), AFTER, UNTIL)] == words


@pytest.mark.parametrize(("cron", "zone"), [(c, z) for c, z, *words in CASES if words])
def test_the_slots_that_an_effect_touches_are_as_many_as_its_words_say(
    cron: str, zone: str
) -> None:
    """The schedule's slots within the effect are compared with the numbers in its words."""
    of = schedule(cron, zone)
    for effect in effects(of, AFTER, UNTIL):
        around = of.between(effect.at - timedelta(days=2), effect.at + timedelta(days=8))
        touched = [slot for slot in around if effect.touches(slot)]
        named = (
            int(effect.words.split("(")[1].split(" ")[0])
            if "(" in effect.words
            else effect.words.count(":") - 1
        )
        if "both times" in effect.words:
            assert len(touched) == 2 * max(named, 1)
        elif "the first time" in effect.words:
            assert len(touched) == max(named, 1)
        else:
            assert len(touched) == 1
        if "fires at" in effect.words or "once at" in effect.words:
            assert (
                touched[0].astimezone(of.zone).strftime("%H:%M") == effect.words.rsplit(" ", 1)[1]
            )


def test_a_zone_that_skips_a_whole_day_is_described() -> None:
    of = schedule("0 12 * * *", "Pacific/Apia")
    [effect] = effects(of, datetime(2011, 12, 1, tzinfo=UTC), datetime(2012, 1, 5, tzinfo=UTC))
    assert effect.words == "12:00 is skipped by the clock change of 2011-12-31: fires at 00:00"
    assert effect.touches(datetime(2011, 12, 30, 10, tzinfo=UTC))
