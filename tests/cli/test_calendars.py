"""`batch calendars`, and what other commands say about the dates that a task leaves out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batch_system import TaskRegistry, clock
from batch_system.batch.tasks import calendar_files
from batch_system.batch.tasks.discovery import load_tasks
from batch_system.database.engine import Database
from tests.batch.ledger_world import fire, know, rows
from tests.commands import Batch, Done, in_this_process, refuses

REPORT = """
from batch_system import BaseTask, Calendar

class Report(BaseTask):
    name, schedule, except_on = "report", "0 2 * * *", Calendar("bank")
    async def run(self): ...
"""
BANK = """
weekend = ["FRI", "SAT"]
[dates]
2026-12-24 = "Christmas Eve"
2026-12-31 = ""
"""


@pytest.fixture
def batch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Batch]:
    (tmp_path / "tasks" / "report.py").write_text(REPORT)
    (tmp_path / "calendars").mkdir()
    (tmp_path / "calendars" / "bank.toml").write_text(BANK)
    calendar_files.forget()
    with clock.moved(datetime(2026, 12, 22, 12, tzinfo=UTC)):
        yield from in_this_process(capsys, monkeypatch)
    calendar_files.forget()


def test_calendars_are_listed_with_the_tasks_that_use_them(batch: Batch, tmp_path: Path) -> None:
    (listed,) = batch("calendars", "list", "--json").json
    assert listed == {
        "name": "bank",
        "file": "calendars/bank.toml",
        "dates": 2,
        "first": "2026-12-24",
        "last": "2026-12-31",
        "next": [
            {"date": "2026-12-24", "name": "Christmas Eve"},
            {"date": "2026-12-31", "name": ""},
        ],
        "weekend": ["FRI", "SAT"],
        "tasks": ["report"],
        "error": None,
    }
    (tmp_path / "calendars" / "wrong.toml").write_text("dates = 7")
    done = batch("calendars", "list")
    assert done.code == 1
    assert "calendars/wrong.toml, line 1, has `dates`" in done.out


def test_a_calendar_is_shown_with_its_dates(batch: Batch) -> None:
    assert batch("calendars", "show", "bank").out.split() == [
        *("date", "name", "2026-12-24", "Christmas", "Eve", "2026-12-31", "-")
    ]
    found = batch("calendars", "show", "bank", "--json").json
    assert found["dates"][0] == {"date": "2026-12-24", "name": "Christmas Eve"}
    refuses(batch("calendars", "show", "nope"), "nope", "it does not exist", "bank")
    refuses(batch("calendars", "show", "../bank"), "NAME", "allowed")


def test_next_lint_and_show_say_what_is_left_out(batch: Batch) -> None:
    left_out = "left out: 2026-12-24 Christmas Eve"
    assert batch("next", "report", "-n", "3").out.splitlines()[-1] == left_out
    assert left_out in batch("lint").out
    assert "2026-12-24 Christmas Eve, 2026-12-31" in batch("show", "report").out
    (linted,) = batch("lint", "--json").json
    assert [each["date"] for each in linted["left_out"]] == ["2026-12-24"]


def test_lint_warns_of_dates_that_are_all_over(batch: Batch) -> None:
    with clock.moved(datetime(2027, 2, 1, tzinfo=UTC)):
        done = batch("lint")
    assert done.code == 1
    assert "except_on has only dates in the past, the last one is 2026-12-31" in done.out


async def test_account_night_and_backfill_say_what_was_left_out(
    batch: Batch, ledger: Database, tmp_path: Path
) -> None:
    load_tasks(tmp_path / "tasks")
    loaded = await know(ledger, *TaskRegistry.tasks().values())
    await fire(ledger, loaded, clock.now())

    url = ledger.url.render_as_string(hide_password=False)

    async def call(*words: str) -> Done:
        return await asyncio.to_thread(batch, *words, LEDGER_URL=url)

    for day in (23, 24, 25):
        with clock.moved(at := datetime(2026, 12, day, 2, tzinfo=UTC)):
            await fire(ledger, loaded, at)
    with clock.moved(datetime(2026, 12, 25, 12, tzinfo=UTC)):
        assert {row["slot"].day for row in await rows(ledger)} == {23, 25}
        account = await call("account", "--since", "72h")
        assert account.code == 0, account.err
        assert "left out report 2026-12-24 Christmas Eve" in account.out.splitlines()
        night = await call("night", "--since", "48h")
        assert "Left out on 2026-12-24 (Christmas Eve): report." in night.out
        interval = ("--from", "2026-12-23T00:00", "--to", "2026-12-25T12:00")
        dry = await call("backfill", "report", *interval, "--dry-run")
        assert "2 slots of report" in dry.out
        assert "  left out: 2026-12-24 Christmas Eve" in dry.out.splitlines()
        assert "2026-12-24 02:00" not in dry.out
        made = await call("backfill", "report", *interval)
        assert made.out.splitlines()[-1] == "  left out: 2026-12-24 Christmas Eve"
