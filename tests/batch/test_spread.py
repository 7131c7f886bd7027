"""`H` in a schedule: what it becomes, who decides it, and where it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from batch_system.batch.cron.cron import schedule
from batch_system.batch.cron.spread import spread
from batch_system.batch.firing import task_sync
from batch_system.batch.ledger import schedules
from batch_system.batch.ledger.tables import schedules as schedule_rows
from batch_system.database.engine import Database
from batch_system.errors import InvalidSchedule, InvalidTask
from batch_system.settings.reading import forget_settings
from tests.batch.ledger_world import NODE, know, make_task, rows


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    forget_settings()
    yield
    forget_settings()


@pytest.mark.parametrize(
    ("cron", "least", "most"),
    [
        ("H 2 * * *", 0, 59),
        ("H(0-29) 2 * * *", 0, 29),
        ("H(10-10) 2 * * *", 10, 10),
        ("0 H(1-4) * * *", 1, 4),
        ("H 0 2 * * *", 0, 59),
    ],
)
def test_it_becomes_one_value_within_its_range(cron: str, least: int, most: int) -> None:
    place = next(i for i, part in enumerate(cron.split()) if part.startswith("H"))
    found = {int(spread(cron, f"task{i}").split()[place]) for i in range(2_000)}
    assert found == {*range(least, most + 1)}


def test_a_step_begins_at_a_value_below_it() -> None:
    assert {spread("H/15 * * * *", f"task{i}").split()[0] for i in range(500)} == {
        f"{start}-59/15" for start in range(15)
    }
    for i in range(200):
        hours = schedule(spread("0 H(1-20)/6 * * *", f"task{i}"))._parsed.hours
        assert {b - a for a, b in zip(sorted(hours), sorted(hours)[1:], strict=False)} == {6}
        assert 1 <= min(hours) <= 6


def test_a_step_that_leaves_one_value_is_that_value() -> None:
    assert {spread("H(0-3)/4 * * * *", f"task{i}").split()[0] for i in range(99)} == {*"0123"}


def test_many_tasks_are_spread_evenly() -> None:
    minutes = Counter(spread("H * * * *", f"task{i}") for i in range(6_000))
    assert len(minutes) == 60
    assert min(minutes.values()) > 60
    assert max(minutes.values()) < 150


def test_the_fields_of_one_expression_don_t_depend_on_each_other() -> None:
    pairs = {tuple(spread("H H(0-9) * * *", f"task{i}").split()[:2]) for i in range(9_000)}
    assert len(pairs) == 600


def test_it_depends_on_the_task_the_setting_and_the_key_and_on_nothing_else() -> None:
    """The values must never change: they are the slots of existing tasks."""
    assert spread("H H * * *", "load") == "50 22 * * *"
    assert spread("H H * * *", "load", "staging") == "18 17 * * *"
    assert spread("H H * * *", "load", "", "acme") == "34 1 * * *"


@pytest.mark.parametrize("cron", ["0 0 * * THU", "@hourly", "*/5 * * * *", "0 0 * MAR *", "H 1"])
def test_an_expression_without_it_stays_as_it_is(cron: str) -> None:
    assert spread(cron, "load") == cron


@pytest.mark.parametrize(
    ("cron", "message"),
    [
        ("H(70-80) * * * *", "wrong minute field 'H(70-80)': allowed are H, H(0-29) and H/15"),
        ("H(5-2) * * * *", "wrong minute field 'H(5-2)'"),
        ("H,30 * * * *", "wrong minute field 'H,30'"),
        ("H/0 * * * *", "wrong minute field 'H/0'"),
        ("H/61 * * * *", "wrong minute field 'H/61'"),
        ("0 H/25 * * *", "wrong hour field 'H/25': allowed are H, H(0-11) and H/6"),
        ("H(0-99999) * * * *", "wrong minute field"),
        ("0 0 H * *", "has 'H' in a field of days or months: H is allowed in the second, the"),
        ("0 0 * H *", "has 'H' in a field of days or months"),
        ("0 0 * * H", "has 'H' in a field of days or months"),
    ],
)
def test_a_wrong_one_is_refused_in_one_sentence(cron: str, message: str) -> None:
    with pytest.raises(InvalidSchedule) as refused:
        spread(cron, "load")
    assert message in refused.value.message
    assert "\n" not in refused.value.message


def test_without_a_task_it_is_no_expression() -> None:
    with pytest.raises(InvalidSchedule, match="wrong minute field 'H'"):
        schedule("H 2 * * *")


def test_a_task_has_the_plain_expression_and_what_was_written() -> None:
    of = make_task("load", "H 2 * * *").schedule
    assert of is not None
    assert (of.cron, of.given) == ("50 2 * * *", "H 2 * * *")
    assert of.written == "H 2 * * *, which became 50 2 * * *"
    assert of == schedule("50 2 * * *")
    assert schedule("50 2 * * *").written == "50 2 * * *"


def test_a_task_with_a_wrong_one_is_refused_by_its_class() -> None:
    with pytest.raises(InvalidTask, match=r"task class Load .*wrong minute field 'H\(70-80\)'"):
        make_task("load", "H(70-80) 2 * * *")


def test_two_deployments_differ_by_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_SPREAD", "staging")
    forget_settings()
    of = make_task("load", "H H * * *").schedule
    assert of is not None
    assert of.cron == "18 17 * * *"


async def test_the_ledger_keeps_both_and_writes_no_new_schedule_for_another_spelling(
    ledger: Database,
) -> None:
    load = make_task("load", "H 2 * * *")
    loaded = await know(ledger, load, make_task("plain", "50 2 * * *"))
    (row,) = await rows(ledger, schedule_rows, task="load")
    assert (row["cron"], row["given"]) == ("50 2 * * *", "H 2 * * *")
    (row,) = await rows(ledger, schedule_rows, task="plain")
    assert (row["cron"], row["given"]) == ("50 2 * * *", None)
    spelled = schedule("50 2 * * *", "UTC", "H 2 * *  *")
    for wanted in (spelled, schedule("50 2 * * *")):
        async with ledger.engine.begin() as connection:
            await task_sync.set_schedules(connection, {"load": wanted}, loaded, NODE)
        (row,) = await rows(ledger, schedule_rows, task="load")
        assert row["given"] == (wanted.given or None)
    async with ledger.reader.connect() as connection:
        opened = await schedules.open_schedule(connection, "load")
    assert opened is not None
    assert opened.schedule == load.schedule


async def test_a_follower_has_what_its_leader_has(ledger: Database) -> None:
    await know(ledger, make_task("load", "H 2 * * *"), make_task("report", None, after="load"))
    (row,) = await rows(ledger, schedule_rows, task="report")
    assert (row["cron"], row["given"]) == ("50 2 * * *", "H 2 * * *")
