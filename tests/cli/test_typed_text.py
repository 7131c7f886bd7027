"""What a person types: numbers, instants, zones, names, settings. Invalid values are refused, and
long ones are cut.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batch_system.batch.cron.cron import Schedule
from batch_system.config import Settings
from batch_system.errors import InvalidSchedule
from batch_system.escaping import echoed
from tests.commands import Batch, in_this_process, refuses

LONG = 100_000
LONGEST_ERROR = 4_200


@pytest.fixture
def batch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    yield from in_this_process(capsys, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        ("runs", "--since", "9" * 4_301 + "d"),
        ("runs", "--since", "٥h"),
        ("runs", "--since", "2026-11-25\x1b02:00"),
        ("runs", "--since", "2026-11-25　02:00"),
        ("runs", "--since", "２０２６-11-25"),
        ("account", "--since", "9" * 20 + "s"),
        ("account", "--since", "1h", "--until", "9" * 5_000),
        ("run", "any", "--slot", "9" * 5_000),
        ("runs", "--limit", "٥"),
        ("runs", "--limit", "5_0"),
        ("runs", "--limit", "9" * 5_000),
        ("runs", "--limit", "0"),
        ("lint", "-n", "１"),
        ("next", "@daily", "-n", "-1"),
        ("serve", "--port", "٨٠٨٠"),
        ("serve", "--port", "65536"),
        ("cancel", "012345", "--wait", "nan"),
        ("cancel", "012345", "--wait", "inf"),
        ("cancel", "012345", "--wait", "٥"),
        ("cancel", "012345", "--wait", "-1"),
    ],
)
def test_an_odd_number_or_instant_is_refused(batch: Batch, words: tuple[str, ...]) -> None:
    done = batch(*words)
    refuses(done, "allowed", [word for word in words if word.startswith("-") and word != "-1"][-1])
    assert len(done.err) < 500


@pytest.mark.parametrize(
    "zone",
    [
        *(
            "localtime",
            "posixrules",
            "Factory",
            "right/UTC",
            "posix/Europe/Berlin",
            "posix/UTC",
            "",
            "/",
            "../UTC",
        ),
        *(
            "Europe",
            "Europe//Berlin",
            "tzdata.zi",
            "Europe/Berlin\n",
            "ＵＴＣ",
            "UTC\0",
            "x" * LONG,
        ),
    ],
)
def test_a_zone_that_iana_does_not_have_is_refused(batch: Batch, zone: str) -> None:
    with pytest.raises(InvalidSchedule, match="IANA names such as") as caught:
        Schedule("@daily", zone)
    assert len(str(caught.value)) < 300
    refuses(batch("next", "@daily", "--tz", zone), "IANA names such as")


@pytest.mark.parametrize(
    "zone", ["UTC", "Etc/GMT+5", "America/Argentina/Buenos_Aires", "GMT0", "EST5EDT", "Asia/Tokyo"]
)
def test_a_zone_of_iana_is_taken(zone: str) -> None:
    assert Schedule("@daily", zone).timezone == zone


@pytest.mark.parametrize(
    "cron",
    [
        *(
            "٥ * * * *",
            "*/٥ * * * *",
            "٥-٥/٢ * * * *",
            "0　2 * * *",
            "0\x1f2 * * *",
            "０ ２ * * *",
            "0 2 * * ＭＯＮ",
        ),
        *(
            "@wee\u212aly",
            f"{','.join(['1'] * LONG)} * * * *",
            "9" * 5_000 + " * * * *",
            "1 " * LONG,
        ),
    ],
)
def test_a_cron_expression_is_ascii_and_short(cron: str) -> None:
    with pytest.raises(InvalidSchedule, match="the cron expression") as caught:
        Schedule(cron)
    assert len(str(caught.value)) < 600 and "allowed" in str(caught.value)


TEXT = "x" * LONG


@pytest.mark.parametrize(
    "words",
    [
        (TEXT,),
        (f"--{TEXT}",),
        ("show", TEXT),
        ("logs", "a" * LONG),
        ("watch", TEXT),
        ("cancel", TEXT),
        ("retry", "b" * LONG),
        ("pause", TEXT),
        ("run", TEXT),
        ("run", "any", "--param", TEXT),
        ("run", "any", "--param", f"{TEXT}=1"),
        ("run", "any", "--param", f"number={TEXT}"),
        ("run", "any", "--queue", "--param", f"{TEXT}=1"),
        ("runs", "--task", TEXT),
        ("runs", "--state", TEXT),
        ("runs", "--since", TEXT),
        ("runs", "--limit", TEXT),
        ("account", "--since", TEXT),
        ("backfill", "any", "--from", TEXT, "--to", TEXT),
        ("quarantine", TEXT),
        ("lint", TEXT),
        ("new", TEXT),
        ("next", TEXT),
        ("next", "@daily", "--tz", TEXT),
        ("backup", "show", TEXT),
        ("backup", "diff", TEXT),
        ("backup", "verify", f"s3://{TEXT}"),
    ],
    ids=lambda words: " ".join(word[:12] for word in words),
)
def test_what_was_typed_is_not_repeated_whole(batch: Batch, words: tuple[str, ...]) -> None:
    with open("tasks/any.py", "w") as file:
        file.write(
            "from batch_system import BaseTask\n"
            "class AnyTask(BaseTask):\n"
            "    name, schedule = 'any', None\n"
            "    async def run(self, number: int = 0) -> None: ...\n"
        )
    done = batch(*words)
    refuses(done)
    assert len(done.err) < LONGEST_ERROR


@pytest.mark.parametrize("name", Settings.model_fields)
def test_the_value_of_a_setting_is_not_repeated_whole(batch: Batch, name: str) -> None:
    done = batch("tasks", **{name: TEXT})
    assert len(done.err) < LONGEST_ERROR and "Traceback" not in done.err
    if done.code == 2:
        refuses(done)


def test_a_value_in_a_message_has_its_length_where_it_is_cut() -> None:
    assert echoed("short") == "'short'"
    assert echoed(TEXT) == f"'{'x' * 80}'… (100,000 characters)"
    assert echoed(["a\x1b"]) == "['a\\x1b']"
    assert echoed([1] * LONG).endswith("… (300,000 characters)")
