"""Named calendars in an author's tests."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest

from batch_system import BaseTask, Calendar, get_settings
from batch_system.config import forget_settings
from batch_system.errors import InvalidTask
from batch_system.testing.calendars import Calendars
from batch_system.testing.kit import Batch

REPORT = """
from batch_system import BaseTask, Calendar

class Report(BaseTask):
    name, schedule, except_on = "report_of_file", "0 2 * * *", Calendar("bank")
    async def run(self): ...
"""


def at_two(month: int, day: int) -> datetime:
    return datetime(2026, month, day, 2, tzinfo=UTC)


def a_task(expression: str = "0 2 * * *") -> type[BaseTask]:
    class Report(BaseTask):
        name, schedule, except_on = "report", expression, Calendar("bank")

        async def run(self) -> None: ...

    return Report


async def test_nothing_fires_on_a_date_of_the_calendar(batch: Batch) -> None:
    batch.calendar("bank", ["2026-01-02", date(2026, 1, 3)])
    batch.add(task := a_task())
    batch.only(task)
    ran = await batch.advance(days=5)
    assert [run.slot for run in ran] == [at_two(1, 1), at_two(1, 4), at_two(1, 5)]
    assert batch.missed() == []


@pytest.mark.rest
async def test_a_calendar_that_is_given_again_is_a_change_of_schedule(batch: Batch) -> None:
    batch.calendar("bank", {"2026-01-02": "The day after New Year"})
    batch.add(task := a_task())
    batch.only(task)
    await batch.advance(days=2)
    batch.calendar("bank", ["2026-01-02", "2026-01-04"])
    await batch.advance(days=3)
    assert [run.slot for run in batch.runs(task)] == [at_two(1, 1), at_two(1, 3), at_two(1, 5)]
    assert batch.missed() == []


@pytest.mark.rest
async def test_the_weekend_decides_which_days_are_business_days(batch: Batch) -> None:
    batch.calendar("bank", ["2026-01-01"], weekend=["FRI", "SAT"])
    batch.add(task := a_task("0 2 FB * *"))
    batch.only(task)
    ran = await batch.advance(days=20)
    assert [run.slot for run in ran] == [at_two(1, 4)]  # Friday and Saturday are the weekend


@pytest.mark.rest
async def test_a_file_of_tasks_that_lacked_its_calendar_can_be_used_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: Batch
) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "report.py").write_text(REPORT)
    monkeypatch.setenv("TASKS_DIR", str(tmp_path / "jobs"))
    forget_settings()
    batch._load()
    assert len(batch._broken) == 1
    batch.calendar("bank", ["2026-01-02"])
    assert batch._broken == []
    batch.only("report_of_file")
    assert [run.slot for run in await batch.advance(days=2)] == [at_two(1, 1)]


@pytest.mark.rest
async def test_the_files_of_the_project_are_found_from_its_root_and_are_never_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, batch: Batch
) -> None:
    folder = tmp_path / "project" / "calendars"
    folder.mkdir(parents=True)
    for name in ("bank", "trade"):
        (folder / f"{name}.toml").write_text('[dates]\n2026-01-02 = "Closed"\n')
    monkeypatch.chdir(tmp_path)
    calendars = Calendars(folder.parent, tmp_path / "own", monkeypatch.setenv)
    assert folder == get_settings().CALENDARS_DIR
    batch.add(task := a_task())
    batch.only(task)
    assert [run.slot for run in await batch.advance(days=2)] == [at_two(1, 1)]
    calendars.give("bank", ["2026-01-03"], None)
    assert await batch.advance(days=1) == []
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == ["bank.toml", "trade.toml"]
    assert "2026-01-02" in (folder / "bank.toml").read_text()


@pytest.mark.rest
@pytest.mark.parametrize(
    ("name", "dates", "weekend", "message"),
    [
        ("../bank", [], None, "Calendar has the name '../bank'; allowed: 1 to 100 of"),
        ("bank", "2026-01-02", None, "the dates '2026-01-02'; allowed: a list of dates such as"),
        ("bank", 7, None, "the dates 7; allowed: a list of dates"),
        ("bank", ["2026-13-01"], None, r"bank.toml, line 2, has '2026-13-01', which is no date"),
        ("bank", {"2026-01-02": "two\nlines"}, None, "allowed: one line of at most 200"),
        ("bank", [], "SAT", "the weekend 'SAT'; allowed: a list of days such as 'SAT'"),
        ("bank", [], ["Saturday"], "allowed: a list of days"),
    ],
)
def test_what_can_t_be_used_is_refused_in_one_sentence(
    batch: Batch, name: str, dates: Any, weekend: Any, message: str
) -> None:
    with pytest.raises(InvalidTask, match=message):
        batch.calendar(name, dates, weekend)
