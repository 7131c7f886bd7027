"""The account: whatever happens to a task, each of its slots is a run, a skip or missed; any other
slot is reported.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import delete, insert, update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import clock
from batch_system.batch.account import account as account_module
from batch_system.batch.account.account import Account, AccountedSlot, accounts
from batch_system.batch.account.slots import Kind
from batch_system.batch.cron.cron import Schedule
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.ledger import tables
from batch_system.batch.ledger.tables import missed, new_id, nodes, runs, schedules, tasks
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.declaration import MISSED, Missed
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, know, make_task, refresh, rows, schedule_sync_of

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)

Loaded = dict[str, Task]

on_sqlite = pytest.mark.parametrize("ledger_url", ["sqlite"], indirect=True)
"""For tests of code that is the same on both databases. Tests without this mark run the account's
queries on both.
"""


def minutes(n: float) -> datetime:
    return START + n * MINUTE


@pytest.fixture(autouse=True)
def still_clock() -> Iterator[None]:
    with clock.moved(START):
        yield


def go_to(at: datetime) -> None:
    clock.advance(at - clock.now())


def tick(schedule: str = "* * * * *", **attributes: Any) -> Task:
    return make_task("tick", schedule, **{"overlap": "allow", **attributes})


async def account_all(
    ledger: Database, since: datetime = START, **options: Any
) -> dict[str, Account]:
    async with ledger.reader.connect() as connection:
        return {each.task: each async for each in accounts(connection, since, **options)}


async def account(ledger: Database, since: datetime = START, **options: Any) -> Account:
    """The account of the only task."""
    (found,) = (await account_all(ledger, since, **options)).values()
    return found


def counted(found: Account) -> dict[str, int]:
    return {str(kind): number for kind, number in found.counts.items() if number}


def told(found: Account) -> list[tuple[str, datetime, datetime, int]]:
    return [(str(f.kind), f.first, f.last, f.count) for f in found.findings]


async def change(ledger: Database, statement: Any) -> None:
    """Change rows as a person would by hand."""
    async with ledger.engine.begin() as connection:
        await connection.execute(statement)


async def fire_at(
    ledger: Database, loaded: Loaded, at: datetime, capacity: Capacity | None = None
) -> None:
    go_to(at)
    await fire(ledger, loaded, at, capacity)


async def fire_each_minute(ledger: Database, loaded: Loaded, until: datetime) -> None:
    """Fire at each full minute, as a running service does."""
    while (at := clock.now().replace(second=0) + MINUTE) <= until:
        await fire_at(ledger, loaded, at)
    go_to(until)


async def pause(ledger: Database, loaded: Loaded, name: str = "tick") -> None:
    async with ledger.engine.begin() as connection:
        await pauses.pause(connection, name, "ann", loaded)


async def resume(ledger: Database, loaded: Loaded, name: str = "tick") -> None:
    async with ledger.engine.begin() as connection:
        await pauses.resume(connection, name)


async def set_schedule(
    ledger: Database,
    loaded: Loaded,
    cron: str | None,
    zone: str = "UTC",
    node: str = NODE,
    name: str = "tick",
) -> None:
    wanted = {name: Schedule(cron, zone) if cron else None}
    async with ledger.engine.begin() as connection:
        await task_sync.set_schedules(connection, wanted, loaded, node)


async def remove(ledger: Database, *names: str) -> None:
    async def nobody(_: AsyncConnection) -> set[str]:
        return set()

    async with ledger.engine.begin() as connection:
        await task_sync.remove_gone(connection, names, nobody)


async def register_node(ledger: Database, *names: str, **values: Any) -> None:
    now = clock.now()
    row = {
        "id": new_id(),
        "host": "h",
        "pid": 1,
        "version": "1",
        "draining": False,
        "tasks": list(names),
    }
    await change(ledger, insert(nodes).values({**row, "started_at": now, "seen_at": now, **values}))


# What a service does to slots


async def test_a_fired_slot_is_a_run_and_an_overlapping_one_a_skip(ledger: Database) -> None:
    loaded = await know(ledger, tick(overlap="skip"))
    await fire_at(ledger, loaded, minutes(0.5), Capacity(5, 5))
    await fire_at(ledger, loaded, minutes(1.5), Capacity(5, 5))
    seen: list[AccountedSlot] = []
    found = await account(ledger, see=seen.append)
    first, second = sorted(await rows(ledger), key=lambda run: run["slot"])
    assert [(e.task, e.slot, e.kind, e.run, e.state) for e in seen] == [
        ("tick", minutes(0.5), Kind.RUN, first["id"], "running"),
        ("tick", minutes(1.5), Kind.SKIPPED, second["id"], "skipped"),
    ]
    assert seen[1].reason == second["reason"]
    assert (found.slots, found.is_complete, found.findings) == (2, True, [])


@on_sqlite
@pytest.mark.parametrize(
    ("policy", "run", "missed"), [("all", 10, 0), ("once", 2, 8), ("skip", 1, 9)]
)
async def test_a_downtime_is_complete_under_each_policy(
    ledger: Database, policy: Any, run: int, missed: int
) -> None:
    loaded = await know(ledger, tick(missed=Missed(policy)))
    await fire_at(ledger, loaded, minutes(10))
    found = await account(ledger)
    assert (found.counts[Kind.RUN], found.counts[Kind.MISSED], found.slots) == (run, missed, 10)
    assert found.is_complete and found.findings == []


async def test_a_catch_up_that_is_cut_by_age_and_number_is_complete(ledger: Database) -> None:
    loaded = await know(
        ledger, tick(missed=Missed("all", max_age=timedelta(minutes=30), max_count=5))
    )
    await fire_at(ledger, loaded, minutes(100))
    assert counted(await account(ledger)) == {"run": 6, "missed": 94}


async def test_a_downtime_of_more_slots_than_one_transaction_handles_is_complete(
    ledger: Database,
) -> None:
    loaded = await know(
        ledger, tick("* * * * * *", missed=Missed("all", max_age=timedelta(hours=2)))
    )
    await fire_at(ledger, loaded, START + timedelta(hours=4))
    found = await account(ledger)
    assert counted(found) == {"run": 7200, "missed": 7200}
    assert found.findings == []


async def test_a_missed_slot_is_shown_with_the_reason_of_its_range(ledger: Database) -> None:
    loaded = await know(ledger, tick(missed="skip"))
    await fire_at(ledger, loaded, minutes(3))
    seen: list[AccountedSlot] = []
    await account(ledger, see=seen.append)
    assert [(e.kind, e.reason) for e in seen[:2]] == [(Kind.MISSED, "no service fired it")] * 2


async def test_pausing_and_resuming_twice_is_complete(ledger: Database) -> None:
    loaded = await know(ledger, tick(missed="all"))
    for begin in (0, 20):
        await fire_each_minute(ledger, loaded, minutes(begin + 3))
        await pause(ledger, loaded)
        await fire_at(ledger, loaded, minutes(begin + 7))  # the range grows
        go_to(minutes(begin + 10))
        await resume(ledger, loaded)
        await fire_each_minute(ledger, loaded, minutes(begin + 20))
    assert counted(await account(ledger)) == {"run": 26, "missed": 14}


async def test_pausing_and_resuming_at_the_instant_of_a_slot_is_complete(ledger: Database) -> None:
    loaded = await know(ledger, tick())
    go_to(minutes(2.5))
    await pause(ledger, loaded)
    go_to(minutes(4.5))
    await resume(ledger, loaded)
    await fire_each_minute(ledger, loaded, minutes(6))
    assert [(r["slot"]) for r in await rows(ledger) if not r["catch_up"]] == [
        minutes(n) for n in (2.5, 5.5)
    ]
    found = await account(ledger)
    assert (found.slots, found.is_complete, found.findings) == (6, True, [])


async def test_a_schedule_that_changes_during_a_downtime_is_complete(ledger: Database) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(3))
    go_to(minutes(63))  # down for an hour; the new code has another schedule
    await set_schedule(ledger, loaded, "*/7 * * * *", "Europe/Berlin")
    await fire_each_minute(ledger, loaded, minutes(90))
    found = await account(ledger)
    assert (found.slots, found.counts[Kind.RUN], found.counts[Kind.MISSED]) == (
        63 + 4,
        3 + 2 + 4,
        58,
    )
    assert found.is_complete and found.findings == []


@on_sqlite
@pytest.mark.parametrize(
    ("before", "after", "at_change"),
    [
        ("* * * * *", "*/2 * * * *", 1),
        ("* * * * *", "*/5 * * * *", 1),
        ("*/5 * * * *", "* * * * *", 0),
        ("*/5 * * * *", "*/7 * * * *", 0),
    ],
)
async def test_a_slot_at_the_instant_of_a_change_is_that_of_the_old_schedule(
    ledger: Database, before: str, after: str, at_change: int
) -> None:
    """At 12:04."""
    loaded = await know(ledger, tick(before))
    await fire_each_minute(ledger, loaded, minutes(2.5))
    go_to(minutes(3.5))
    await set_schedule(ledger, loaded, after)
    await fire_each_minute(ledger, loaded, minutes(10))
    seen: list[AccountedSlot] = []
    found = await account(ledger, see=seen.append)
    assert [e.slot for e in seen].count(minutes(3.5)) == at_change
    assert len(await rows(ledger)) == found.slots == len({e.slot for e in seen})
    assert found.is_complete and found.findings == []


async def test_a_task_that_has_no_schedule_for_a_while_has_no_slots_in_it(ledger: Database) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(2))
    await set_schedule(ledger, loaded, None)
    go_to(minutes(30))
    await set_schedule(ledger, loaded, "* * * * *")
    await fire_each_minute(ledger, loaded, minutes(33))
    assert counted(await account(ledger)) == {"run": 5}


async def test_removing_and_restoring_a_file_is_complete(ledger: Database) -> None:
    task = tick()
    loaded = await know(ledger, task)
    await fire_each_minute(ledger, loaded, minutes(3))
    go_to(minutes(8))  # no node has it any more
    await remove(ledger, "tick")
    go_to(minutes(20))
    await know(ledger, task)
    await fire_each_minute(ledger, loaded, minutes(25))
    found = await account(ledger)
    assert counted(found) == {"run": 8, "missed": 5}
    assert found.findings == []


async def test_a_removed_task_keeps_its_account(ledger: Database) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(3))
    await remove(ledger, "tick")
    go_to(minutes(60))
    assert counted(await account(ledger)) == {"run": 3}
    assert await account_all(ledger, minutes(30)) == {}


async def test_a_rolling_deploy_with_two_schedules_is_complete(ledger: Database) -> None:
    """Node B starts with another schedule beside node A, which continues to fire by B's."""
    old = await know(ledger, tick())
    await fire_each_minute(ledger, old, minutes(3))
    node = new_id()
    new = {"tick": replace(old["tick"], schedule=Schedule("*/2 * * * *"))}
    a, b = (schedule_sync_of(ledger, loaded, of) for loaded, of in ((old, NODE), (new, node)))
    await b.open()
    for n in range(4, 9):
        await fire_at(ledger, old if n % 2 else new, minutes(n))
        await refresh(a)
        await refresh(b)
    await a.open()  # it restarts with the old code: its schedule is in force again
    await fire_at(ledger, new, minutes(10))
    found = await account(ledger)
    history = [
        row["cron"]
        for row in sorted(await rows(ledger, schedules), key=lambda row: row["valid_from"])
    ]
    assert history == ["* * * * *", "*/2 * * * *", "* * * * *"]
    assert (found.slots, found.is_complete, found.findings) == (3 + 3 + 2, True, [])


@on_sqlite
@pytest.mark.parametrize("cron", ["30 2 * * *", "*/20 * * * *", "0 */2 * * *", "15,45 1-3 * * *"])
@pytest.mark.parametrize(
    "night", [datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)]
)
async def test_the_nights_of_a_clock_change_are_complete(
    ledger: Database, cron: str, night: datetime
) -> None:
    go_to(night - timedelta(hours=12))
    loaded = await know(ledger, tick(cron, timezone="Europe/Berlin", missed="all"))
    for hours in range(-12, 24, 3):
        await fire_at(ledger, loaded, night + timedelta(hours=hours))
    found = await account(ledger)
    assert len(await rows(ledger)) == found.slots > 0
    assert found.is_complete and found.findings == []


async def test_slots_before_the_pruned_runs_are_left_out(ledger: Database) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(10))
    await change(ledger, delete(runs).where(runs.c.slot < minutes(5.5)))
    assert (await account(ledger)).counts[Kind.GAP] == 5
    await change(ledger, update(tasks).values(accounted_from=minutes(5.5)))
    found = await account(ledger)
    assert (counted(found), found.since) == ({"run": 5}, minutes(5.5))


async def test_only_the_slots_of_the_interval_count_its_ends_included(ledger: Database) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(10))
    assert counted(await account(ledger, minutes(2.5), until=minutes(4.5))) == {"run": 3}
    assert counted(await account(ledger, minutes(2.5) + SECOND, until=minutes(4.5) - SECOND)) == {
        "run": 1
    }
    assert (await account(ledger, until=minutes(99))).until == minutes(10)


async def test_a_schedule_in_an_unreadable_zone_is_reported_and_not_complete(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(3))
    await change(ledger, update(schedules).values(timezone="US/Gone"))
    go_to(minutes(5))
    await know(ledger, *loaded.values())
    await fire_each_minute(ledger, loaded, minutes(8))
    found = await account(ledger)
    assert counted(found) == {"unreadable": 1, "run": 3}
    (finding,) = found.findings
    assert (finding.first, finding.last) == (START, minutes(5))
    assert "'US/Gone'" in finding.text and not found.is_complete
    await change(ledger, update(tasks).values(accounted_from=minutes(5.5)))
    assert (await account(ledger)).is_complete


async def test_schedules_that_overlap_have_each_slot_once(ledger: Database) -> None:
    """As after a clock that was set back."""
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(3))
    await set_schedule(ledger, loaded, "*/2 * * * *")
    await fire_each_minute(ledger, loaded, minutes(6))
    await change(
        ledger,
        update(schedules).where(schedules.c.cron == "*/2 * * * *").values(valid_from=minutes(0.2)),
    )
    found = await account(ledger)
    assert (counted(found), found.findings) == ({"run": 5}, [])


# What is due


async def test_a_slot_that_comes_due_while_no_service_runs_is_no_gap(ledger: Database) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(2))
    await register_node(ledger, "tick", stopped_at=minutes(2))
    go_to(minutes(10))
    await register_node(ledger, "tick", draining=True)
    await register_node(ledger, "tick", seen_at=minutes(9))
    await register_node(ledger, "another")
    found = await account(ledger)
    assert told(found) == [("due", minutes(2.5), minutes(9.5), 8)]
    assert found.is_complete


async def test_a_slot_that_a_running_service_has_not_handled_for_a_minute_is_late_and_not_complete(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(2))
    go_to(minutes(10))
    await register_node(ledger, "tick")
    found = await account(ledger)
    assert told(found) == [
        ("late", minutes(2.5), minutes(8.5), 7),
        ("due", minutes(9.5), minutes(9.5), 1),
    ]
    assert not found.is_complete


# What is wrong


async def test_a_slot_whose_row_was_deleted_by_hand_is_found(ledger: Database) -> None:
    loaded = await know(ledger, tick(), make_task("tock"))
    await fire_each_minute(ledger, loaded, minutes(5))
    await change(ledger, delete(runs).where(runs.c.task == "tock", runs.c.slot == minutes(2.5)))
    found = await account_all(ledger)
    assert told(found["tock"]) == [("gap", minutes(2.5), minutes(2.5), 1)]
    assert not found["tock"].is_complete
    assert found["tick"].is_complete and found["tick"].findings == []


async def test_a_manual_run_for_the_instant_of_a_slot_does_not_fill_its_gap(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(2))
    await change(ledger, update(runs).where(runs.c.slot == minutes(0.5)).values(origin="manual"))
    assert told(await account(ledger)) == [("gap", minutes(0.5), minutes(0.5), 1)]


async def test_a_deleted_missed_range_is_found(ledger: Database) -> None:
    loaded = await know(ledger, tick(missed="skip"))
    await fire_at(ledger, loaded, minutes(10))
    await change(ledger, delete(missed))
    assert told(await account(ledger)) == [("gap", minutes(0.5), minutes(8.5), 9)]


@pytest.mark.parametrize("then", [0, 3])
async def test_a_cursor_moved_on_by_hand_over_slots_is_found(ledger: Database, then: int) -> None:
    """Right away, and after it has fired again."""
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(2))
    go_to(minutes(6))
    await change(ledger, update(schedules).values(fired_until=minutes(6)))
    await fire_each_minute(ledger, loaded, minutes(6 + then))
    found = await account(ledger)
    assert told(found) == [("gap", minutes(2.5), minutes(5.5), 4)]
    assert not found.is_complete


async def test_a_cursor_moved_into_the_future_by_hand_is_found_as_time_goes_by(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick())
    await change(ledger, update(schedules).values(fired_until=minutes(60)))
    await fire_each_minute(ledger, loaded, minutes(3))
    assert told(await account(ledger)) == [("gap", minutes(0.5), minutes(2.5), 3)]


@on_sqlite
@pytest.mark.parametrize("policy", ["once", "all", "skip"])
async def test_a_cursor_moved_back_by_hand_is_harmless(ledger: Database, policy: str) -> None:
    loaded = await know(ledger, tick(missed=policy))
    await fire_each_minute(ledger, loaded, minutes(10))
    await change(ledger, update(schedules).values(fired_until=START))
    assert counted(await account(ledger)) == {"run": 10}
    await fire_each_minute(ledger, loaded, minutes(13))
    found = await account(ledger)
    assert counted(found) == {"run": 13}
    assert found.findings == []


async def test_a_shortened_missed_range_leaves_gaps_and_its_count_is_wrong(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick(missed="skip"))
    await fire_at(ledger, loaded, minutes(10))
    await change(ledger, update(missed).values(last_slot=minutes(6.5)))
    found = await account(ledger)
    assert told(found) == [
        ("gap", minutes(7.5), minutes(8.5), 2),
        ("range", minutes(0.5), minutes(6.5), 1),
    ]
    assert found.findings[-1].text.endswith(" counts 9 slots, but the schedules have 7 there")


async def test_a_missed_range_that_was_stretched_over_slots_it_did_not_count_is_found(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick(missed="skip"))
    await fire_at(ledger, loaded, minutes(10))
    await fire_each_minute(ledger, loaded, minutes(12))
    await change(ledger, delete(runs))
    await change(ledger, update(missed).values(last_slot=minutes(11.5)))
    found = await account(ledger)
    assert (counted(found), found.is_complete) == ({"missed": 12, "range": 1}, False)


async def test_the_count_of_a_range_that_is_partly_outside_the_interval_is_not_checked(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick(missed="skip"))
    await fire_at(ledger, loaded, minutes(10))
    found = await account(ledger, minutes(4.5), until=minutes(6.5))
    assert (counted(found), found.findings) == ({"missed": 3}, [])


async def test_a_scheduled_run_without_a_schedule_is_reported_and_hides_no_gap(
    ledger: Database,
) -> None:
    loaded = await know(ledger, tick())
    await fire_each_minute(ledger, loaded, minutes(3))
    odd = minutes(1.5) + SECOND
    await change(ledger, update(runs).where(runs.c.slot == minutes(1.5)).values(slot=odd))
    found = await account(ledger)
    assert sorted(told(found)) == [("gap", minutes(1.5), minutes(1.5), 1), ("surplus", odd, odd, 1)]
    assert found.slots == 3
    await change(ledger, update(runs).where(runs.c.slot == odd).values(origin="backfill"))
    assert told(await account(ledger)) == [("gap", minutes(1.5), minutes(1.5), 1)]


async def test_all_accounts_are_read_from_one_snapshot(ledger: Database) -> None:
    """A run that is pruned while the account is being read is still in it."""
    loaded = await know(ledger, make_task("first"), make_task("second"))
    await fire_each_minute(ledger, loaded, minutes(3))
    async with ledger.reader.connect() as connection:
        found = accounts(connection, START)
        assert (await anext(found)).task == "first"
        await change(ledger, delete(runs))
        assert (await anext(found)).is_complete
    assert not (await account_all(ledger))["second"].is_complete


# A range never grows over a slot that ran


async def test_a_missed_range_does_not_grow_across_a_change_of_schedule(ledger: Database) -> None:
    """By the new schedule the slot before 13:00 is 12:00, which was missed; by the old one 12:10
    came after it.
    """
    go_to(minutes(-1))
    loaded = await know(ledger, tick("0,10 * * * *", missed="skip"))
    await fire_at(ledger, loaded, minutes(5))
    await fire_at(ledger, loaded, minutes(10))
    go_to(minutes(20))
    await set_schedule(ledger, loaded, "0 * * * *")
    await fire_at(ledger, loaded, minutes(150))
    found = await account(ledger, minutes(-1))
    assert (counted(found), found.findings) == ({"missed": 3, "run": 1}, [])
    assert [found["count"] for found in await rows(ledger, tables.missed)] == [1, 2]


# Many pages, and any order of events


async def test_pages_of_runs_and_gaps_between_them_fit_together(
    ledger: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account_module, "PAGE", 7)
    loaded = await know(ledger, tick(missed="all"))
    await fire_at(ledger, loaded, minutes(70))
    seen: list[AccountedSlot] = []
    assert counted(await account(ledger, see=seen.append)) == {"run": 70}
    assert [e.slot for e in seen] == [minutes(n + 0.5) for n in range(70)]
    await change(ledger, delete(runs).where(runs.c.slot > minutes(13), runs.c.slot < minutes(15)))
    assert told(await account(ledger)) == [("gap", minutes(13.5), minutes(14.5), 2)]


class Story:
    """What may happen to a task, in random order. The clock never goes back."""

    CRONS = ("* * * * *", "*/5 * * * *", "0,10 * * * *", "*/7 * * * *", "0 * * * *", None)

    def __init__(self, ledger: Database, seed: int) -> None:
        self.ledger = ledger
        self.chance = random.Random(seed)
        policy = Missed(self.chance.choice(MISSED), max_age=timedelta(hours=2))
        self.task = tick(missed=policy, overlap=self.chance.choice(["skip", "allow"]))
        self.loaded = {"tick": self.task}

    async def tell(self, events: int) -> None:
        await know(self.ledger, self.task)
        for _ in range(events):
            # Often exactly to a minute: to the instant of a slot.
            go_to((clock.now() + self.chance.choice([1, 1, 2, 5, 40]) * MINUTE).replace(second=0))
            clock.advance(self.chance.choice([0, 0, 1, 30]) * SECOND)
            happens = self.chance.choice(
                [self.fires, self.fires, self.fires, self.pauses, self.changes, self.goes]
            )
            await happens()

    async def fires(self) -> None:
        await fire(self.ledger, self.loaded, clock.now(), Capacity(self.chance.choice([0, 1]), 0))

    async def pauses(self) -> None:
        await self.chance.choice([pause, resume])(self.ledger, self.loaded)

    async def changes(self) -> None:
        zone = self.chance.choice(["UTC", "Asia/Kathmandu"])
        await set_schedule(self.ledger, self.loaded, self.chance.choice(self.CRONS), zone)

    async def goes(self) -> None:
        await remove(self.ledger, "tick")
        clock.advance(self.chance.choice([0, 600]) * SECOND)
        await know(self.ledger, self.task)


@pytest.mark.rest
@pytest.mark.parametrize(
    ("ledger_url", "seed"),
    [*(("sqlite", seed) for seed in range(8)), ("postgresql", 8)],
    indirect=["ledger_url"],
)
async def test_whatever_happens_to_a_task_its_account_is_complete(
    ledger: Database, seed: int
) -> None:
    await Story(ledger, seed).tell(30)
    found = await account(ledger)
    recorded = len(await rows(ledger)) + sum(
        row["count"] for row in await rows(ledger, tables.missed)
    )
    assert {f.kind for f in found.findings} <= {Kind.DUE}
    assert found.slots == recorded + found.counts[Kind.DUE]
