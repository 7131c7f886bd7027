"""`except_on`: what a task declares, what the ledger keeps of it, and that no run is made for dates
that are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import holidays as package
import pytest
from sqlalchemy import delete, text, update

from batch_system import Calendar, Holidays, clock
from batch_system.batch.account.account import accounts
from batch_system.batch.cron import calendar
from batch_system.batch.cron.calendar import parted
from batch_system.batch.cron.cron import schedule
from batch_system.batch.firing import task_sync
from batch_system.batch.ledger import schedules
from batch_system.batch.ledger.calendars import calendars
from batch_system.batch.ledger.missed_ranges import Cause
from batch_system.batch.ledger.people.access_tables import events
from batch_system.batch.ledger.tables import missed
from batch_system.batch.ledger.tables import schedules as schedule_rows
from batch_system.batch.tasks import calendar_files
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import InvalidTask
from batch_system.settings.reading import forget_settings
from tests.batch.ledger_world import NODE, fire, know, make_task, rows, schedule_sync_of

START = datetime(2026, 12, 22, 12, tzinfo=UTC)
DAY = timedelta(days=1)
CHRISTMAS = {date(2026, 12, 24): "Christmas Eve", date(2026, 12, 25): "Christmas Day"}


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CALENDARS_DIR", str(tmp_path))
    forget_settings()
    calendar_files.forget()
    with clock.moved(START):
        yield
    calendar_files.forget()
    forget_settings()


def slots(task: Task, number: int = 4) -> list[str]:
    assert task.schedule is not None
    return [f"{slot:%m-%d}" for slot in task.schedule.following(clock.now(), number)]


def bank(folder: Path, text: str) -> Path:
    file = folder / "bank.toml"
    file.write_text(text)
    return file


BANK = """
weekend = ["FRI", "SAT"]

[dates]
2026-12-24 = "Christmas Eve"
2026-12-31 = "New Year's Eve"
"""


# What a task declares


@pytest.mark.parametrize(
    ("declared", "name", "expected"),
    [
        (date(2026, 12, 24), "1 date", ["12-23", "12-25", "12-26", "12-27"]),
        ([date(2026, 12, 24), date(2026, 12, 26)], "2 dates", ["12-23", "12-25", "12-27", "12-28"]),
        (CHRISTMAS, "2 dates", ["12-23", "12-26", "12-27", "12-28"]),
        (Holidays("DE"), "holidays of DE", ["12-23", "12-24", "12-27", "12-28"]),
        (
            (Holidays("DE", "BY"), date(2026, 12, 23)),
            "holidays of DE (BY), 1 date",
            ["12-24", "12-27", "12-28", "12-29"],
        ),
        (Calendar("bank"), "calendar bank", ["12-23", "12-25", "12-26", "12-27"]),
        ((), "no date", ["12-23", "12-24", "12-25", "12-26"]),
    ],
)
def test_a_task_leaves_out_dates(
    declared: Any, name: str, expected: list[str], tmp_path: Path
) -> None:
    bank(tmp_path, BANK)
    task = make_task("load", "0 2 * * *", except_on=declared)
    assert slots(task) == expected
    assert task.schedule is not None
    assert task.schedule.words == f"At 02:00 every day, except on {name}"
    assert task.may_change is (name.startswith(("holidays", "calendar")))


def test_business_days_follow_the_weekend_and_the_dates_of_the_calendar(tmp_path: Path) -> None:
    bank(tmp_path, BANK)
    task = make_task("load", "0 18 LB * *", timezone="Asia/Riyadh", except_on=Calendar("bank"))
    assert slots(task, 2) == ["12-30", "01-31"]  # the 31st is in the calendar, the 30th is a Sunday
    assert slots(make_task("plain", "0 18 LB * *"), 2) == ["12-31", "01-29"]
    task = make_task("usa", "0 18 FB * *", except_on=Holidays("US"))
    assert slots(task, 2) == ["01-04", "02-01"]


@pytest.mark.parametrize("country", ["DE", "JP", "US", "GB", "FR", "IN", "BR", "SA", "IL", "AU"])
def test_holidays_are_those_of_the_package_for_five_years(country: str) -> None:
    task = make_task("load", "0 12 * * *", except_on=Holidays(country))
    assert task.schedule is not None and task.schedule.excluded is not None
    assert task.schedule.excluded.until == date(2029, 12, 31)
    found = {
        slot.date()
        for slot in task.schedule.between(
            datetime(2025, 1, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC)
        )
    }
    theirs = package.country_holidays(country, years=range(2025, 2030))
    day = date(2025, 1, 1)
    while day < date(2030, 1, 1):
        assert (day in found) is (day not in theirs), day
        day += DAY


def test_holidays_are_computed_anew_when_two_years_are_left() -> None:
    untils = []
    for year in range(2026, 2033):
        with clock.moved(datetime(year, 6, 1, tzinfo=UTC)):
            task = make_task(f"load{year}", "0 12 * * *", except_on=Holidays("DE"))
        assert task.schedule is not None and task.schedule.excluded is not None
        untils.append(task.schedule.excluded.until)
        assert min(task.schedule.excluded.dates).year < year
    assert [until.year for until in untils if until] == [2029, 2029, 2032, 2032, 2032, 2035, 2035]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (Holidays("XX"), "except_on has the unknown country 'XX'; allowed are codes such as 'DE'"),
        (Holidays("DE", "XX"), "unknown subdivision 'XX' of DE; allowed: BB, BE, BW, BY"),
        ("2026-12-24", "except_on is or has '2026-12-24'; allowed: a date, a list of dates"),
        (datetime(2026, 12, 24), "except_on is or has datetime"),
        ([[date(2026, 12, 24)]], "except_on has [datetime.date(2026, 12, 24)]; allowed"),
        ({"2026-12-24": "Christmas"}, "'2026-12-24': 'Christmas'; allowed in a mapping"),
        ({date(2026, 12, 24): "a\nb"}, "allowed in a mapping: a date and a name"),
        (Calendar("nowhere"), "the calendar nowhere can't be read from"),
    ],
)
def test_what_can_t_be_used_is_refused_in_one_sentence(declared: Any, message: str) -> None:
    with pytest.raises(InvalidTask) as refused:
        make_task("load", "0 2 * * *", except_on=declared)
    assert message in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("wrong", [lambda: Calendar("../etc/passwd"), lambda: Holidays(7)])  # type: ignore[arg-type]
def test_a_name_that_is_none_is_refused_where_it_is_written(wrong: Any) -> None:
    with pytest.raises(InvalidTask, match="allowed"):
        wrong()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[dates]\n2026-12-44 = 'x'", "bank.toml, line 2, has '2026-12-44', which is no date"),
        ("\n[dates]\n2026-12-24 = 7", "bank.toml, line 3, has the name 7 for 2026-12-24"),
        ("weekend = ['Sunday']", "bank.toml, line 1, has weekend = ['Sunday']; allowed: a list"),
        ("weekend = 'SUN'", "bank.toml, line 1, has weekend = 'SUN'"),
        (f"weekend = {[*calendar.WEEKDAYS]}", "allowed: a list of at most six"),
        ("holidays = 1", "bank.toml, line 1, has 'holidays'; allowed: `dates`, and `weekend`"),
        ("dates = 1", "bank.toml, line 1, has `dates` that are neither a table nor a list"),
        ("dates = [1]", "bank.toml, line 1, has 1, which is no date such as 2026-12-24"),
        ("dates = [\n", "bank.toml is not TOML: "),
        ("[dates]\n2026-12-24 = 'x'\n2026-12-24 = 'y'\n", "(at line 3, column 17)"),
        ("x" * 2_000_000, "bank.toml is larger than 1,048,576 bytes"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    bank(tmp_path, text)
    with pytest.raises(InvalidTask) as refused:
        make_task("load", "0 2 * * *", except_on=Calendar("bank"))
    assert message in refused.value.message
    assert "\n" not in refused.value.message
    assert slots(make_task("other", "0 2 * * *"), 1) == ["12-23"]


def test_a_file_may_have_a_list_of_dates(tmp_path: Path) -> None:
    bank(tmp_path, "dates = [2026-12-24, '2026-12-25']")
    task = make_task("load", "0 2 * * *", except_on=Calendar("bank"))
    assert slots(task, 2) == ["12-23", "12-26"]


def test_two_weekends_contradict_each_other(tmp_path: Path) -> None:
    bank(tmp_path, BANK)
    (tmp_path / "shop.toml").write_text("weekend = ['SUN']")
    with pytest.raises(InvalidTask, match="two calendars with different weekends"):
        make_task("load", "0 2 * * *", except_on=(Calendar("bank"), Calendar("shop")))


def test_what_never_fires_is_refused() -> None:
    with pytest.raises(InvalidTask, match=r"never fires: all of its dates are left out, such as"):
        make_task("load", "0 2 25 12 *", except_on=Holidays("DE"))
    make_task("rare", "0 2 29 2 *", except_on=Holidays("DE"))


def test_a_task_without_a_schedule_of_its_own_has_no_dates_of_its_own() -> None:
    make_task("load", "0 2 * * *")
    with pytest.raises(InvalidTask, match="except_on is set, but the class has no schedule"):
        make_task("report", None, after="load", except_on=Holidays("DE"))


# What the ledger keeps


async def test_no_run_is_made_for_a_date_that_is_left_out_and_the_account_is_complete(
    ledger: Database,
) -> None:
    task = make_task("load", "0 */6 * * *", timezone="Asia/Tokyo", except_on=CHRISTMAS)
    loaded = await know(ledger, task, make_task("report", None, after="load"))
    await fire(ledger, loaded, START)
    until = START
    while until < START + 6 * DAY:
        until += timedelta(hours=1)
        with clock.moved(until):
            await fire(ledger, loaded, until)
    for name in loaded:
        found = [row["slot"] for row in await rows(ledger, task=name)]
        assert found == list(task.schedule.between(START, until))  # type: ignore[union-attr]
        local = {each.astimezone(task.zone).date() for each in found}
        assert local == {date(2026, 12, day) for day in (23, 26, 27, 28)}
    with clock.moved(until):
        async with ledger.reader.connect() as connection:
            counted = {each.task: each async for each in accounts(connection, START, until)}
    assert counted["load"].is_complete and counted["load"].slots == len(found)


async def test_missed_slots_are_counted_without_dates_that_are_left_out(ledger: Database) -> None:
    loaded = await know(
        ledger, make_task("load", "*/10 * * * *", missed="skip", except_on=CHRISTMAS)
    )
    with clock.moved(later := START + 5 * DAY):
        await fire(ledger, loaded, later)
    (row,) = await rows(ledger, missed)
    assert (row["count"], row["cause"]) == (3 * 144 - 1, Cause.DOWN)


async def test_a_change_of_the_dates_is_a_change_of_schedule(ledger: Database) -> None:
    task = make_task("load", "0 2 * * *", except_on=CHRISTMAS)
    loaded = await know(ledger, task)
    (first,) = await rows(ledger, schedule_rows)
    assert parted(first["cron"]) == ("0 2 * * *", task.schedule.excluded.id)  # type: ignore[union-attr]
    await know(ledger, task)
    assert len(await rows(ledger, schedule_rows)) == 1
    later = START + 2 * DAY
    with clock.moved(later):
        changed = make_task("other", "0 2 * * *", except_on={date(2026, 12, 25): "Christmas"})
        async with ledger.engine.begin() as connection:
            await task_sync.set_schedules(connection, {"load": changed.schedule}, loaded, NODE)
    spans = await rows(ledger, schedule_rows)
    assert len(spans) == 2 and len({row["cron"] for row in spans}) == 2
    assert sum(row["valid_until"] is None for row in spans) == 1
    assert len(await rows(ledger, calendars)) == 2
    event = (await rows(ledger, events, action="schedule.change"))[-1]
    before, after = event["before"], event["after"]
    assert before["cron"] == after["cron"] == "0 2 * * *"
    assert before["except_on"].startswith("2 dates: 2 dates (")
    assert after["except_on"].startswith("1 date: 1 dates (")
    # The account has the slots of each schedule in its time.
    with clock.moved(until := START + 6 * DAY):
        await fire(ledger, loaded, until)
        async with ledger.reader.connect() as connection:
            counted = [each async for each in accounts(connection, START, until)]
    assert counted[0].is_complete
    assert counted[0].slots == 4  # the 23rd, 26th, 27th, 28th: the change came after 02:00


async def test_another_process_reads_the_dates_from_the_ledger(ledger: Database) -> None:
    task = make_task("load", "0 2 * * *", except_on=CHRISTMAS)
    await know(ledger, task)
    calendar._known.clear()
    schedule.cache_clear()
    async with ledger.reader.connect() as connection:
        opened = await schedules.open_schedules(connection)
        assert opened["load"].is_usable
        assert opened["load"].schedule == task.schedule
        assert opened["load"].schedule.excluded.dates == CHRISTMAS  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", ["gone", "other dates", "no dates"])
async def test_a_schedule_whose_dates_are_damaged_is_not_fired_and_others_are(
    ledger: Database, damage: str
) -> None:
    loaded = await know(
        ledger,
        make_task("load", "0 2 * * *", except_on=CHRISTMAS),
        make_task("other", "0 2 * * *"),
    )
    async with ledger.engine.begin() as connection:
        if damage == "gone":
            await connection.execute(delete(calendars))
        else:
            dates: Any = {"2026-12-26": "x"} if damage == "other dates" else ["x"]
            await connection.execute(update(calendars).values(dates=dates))
    calendar._known.clear()
    schedule.cache_clear()
    with clock.moved(later := START + 5 * DAY):
        await fire(ledger, loaded, later)
        async with ledger.reader.connect() as connection:
            counted = {each.task: each async for each in accounts(connection, START, later)}
    assert {row["task"] for row in await rows(ledger)} == {"other"}
    assert not counted["load"].is_complete and counted["other"].is_complete
    assert "are not known" in counted["load"].findings[0].text


async def test_older_code_can_t_read_such_a_schedule_and_fires_none_of_its_slots(
    ledger: Database,
) -> None:
    """For it, the cron expression has seven fields, which it refuses."""
    await know(ledger, make_task("load", "0 2 * * *", except_on=CHRISTMAS))
    (row,) = await rows(ledger, schedule_rows)
    assert len(row["cron"].split()) == 7
    async with ledger.engine.connect() as connection:
        number = await connection.execute(text("SELECT count(*) FROM batch_calendars"))
        assert number.scalar() == 1


# A changed file


def test_a_changed_file_is_read_at_the_second_look(tmp_path: Path) -> None:
    bank(tmp_path, BANK)
    task = make_task("load", "0 2 * * *", except_on=Calendar("bank"))
    bank(tmp_path, BANK + '2026-12-23 = "Inventory"\n')
    calendar_files.look()
    assert task.read_schedule() == task.schedule
    calendar_files.look()
    changed = task.read_schedule()
    assert changed is not None and changed != task.schedule
    assert changed.next(START) == datetime(2026, 12, 25, 2, tzinfo=UTC)
    bank(tmp_path, "dates = [")
    for _ in range(2):
        calendar_files.look()
    with pytest.raises(InvalidTask, match="is not TOML"):
        task.read_schedule()
    bank(tmp_path, BANK)
    assert task.read_schedule() == task.schedule


def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    bank(tmp_path, BANK)
    task = make_task("load", "0 2 * * *", except_on=Calendar("bank"))
    for number in range(5):
        bank(tmp_path, BANK + "#" * number)
        calendar_files.look()
        assert calendar_files.read(tmp_path, "bank").dates is not None
    assert task.read_schedule() == task.schedule


async def test_a_service_writes_a_changed_file_as_a_new_schedule_and_ignores_a_wrong_one(
    ledger: Database, tmp_path: Path
) -> None:
    bank(tmp_path, BANK)
    loaded = await know(
        ledger,
        make_task("load", "0 2 * * *", except_on=Calendar("bank")),
        make_task("report", None, after="load"),
    )
    sync = schedule_sync_of(ledger, loaded, NODE, lambda name, slot=None: None)
    bank(tmp_path, "dates = [")
    for _ in range(3):
        await sync._refresh()
    assert len(await rows(ledger, schedule_rows)) == 2
    bank(tmp_path, BANK + '2026-12-23 = "Inventory"\n')
    for _ in range(3):
        await sync._refresh()
    for task in loaded:
        spans = await rows(ledger, schedule_rows, task=task)
        assert len(spans) == 2 and len({row["cron"] for row in spans}) == 2
