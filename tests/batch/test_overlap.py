"""The overlap policies skip, wait, allow and replace, and max_running: slots that are due while
runs are active.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.exc import IntegrityError

from batch_system import Retry, TaskRegistry, clock, current_run
from batch_system.batch.execution.engine import LocalEngine
from batch_system.batch.execution.run_here import ManualRun
from batch_system.batch.ledger import runs, tables, transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.runs import Claimed
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import new_id
from batch_system.batch.queue import claiming, concurrency
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.tasks.declaration import Missed
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from tests.batch.ledger_world import NODE, fire, heart_of, know, make_task, rows, until
from tests.batch.test_runs import new

START = datetime(2026, 3, 10, 12, 0, 30, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
OTHER = new_id()


def minutes(n: float) -> datetime:
    return START + n * MINUTE


@pytest.fixture(autouse=True)
def still_clock() -> object:
    with clock.moved(START):
        yield


async def claim(
    ledger: Database, loaded: dict[str, Task], now: datetime, limit: int = 100, node: str = NODE
) -> list[Claimed]:
    """Claim runs as a node does."""
    async with ledger.engine.begin() as connection:
        heads = await claiming.heads(
            connection, list(loaded), now, limit, concurrency.rules(loaded.values())
        )
        others = {head.id: head.lane for head in heads if head.lane > 1}
        return await transitions.claim(connection, [head.id for head in heads], node, now, others)


async def end(
    ledger: Database, run: str, now: datetime, state: RunState = RunState.SUCCEEDED, **changes: Any
) -> None:
    (row,) = await rows(ledger, id=run)
    outcome = Outcome(
        run, row["fence"], state, state, row["attempt"], NODE, row["task"], now, now, **changes
    )
    async with ledger.engine.begin() as connection:
        assert await transitions.finish(connection, [outcome]) == []


async def by_slot(ledger: Database) -> list[dict[str, Any]]:
    return sorted(await rows(ledger), key=lambda run: run["slot"])


async def states(ledger: Database) -> list[str]:
    return [run["state"] for run in await by_slot(ledger)]


async def running(ledger: Database) -> list[datetime]:
    return [run["slot"] for run in await by_slot(ledger) if run["state"] == "running"]


def of_slot(run: dict[str, Any]) -> str:
    return f"run {run['id']} of slot {run['slot']:%Y-%m-%d %H:%M:%S} UTC"


# wait


async def test_a_slot_waits_for_the_end_of_the_active_run_and_then_runs(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", overlap="wait"))
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    assert await states(ledger) == ["running", "queued"]
    assert await claim(ledger, loaded, minutes(1.7)) == []
    first, second = await by_slot(ledger)
    await end(ledger, first["id"], minutes(1.8))
    (claimed,) = await claim(ledger, loaded, minutes(1.9))
    assert claimed.id == second["id"]


async def test_one_slot_waits_and_the_next_ones_are_skipped(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", overlap="wait"))
    for n in range(4):
        await fire(ledger, loaded, minutes(n + 0.6), Capacity(5, 5))
    _, waiting, *skipped = await by_slot(ledger)
    assert await states(ledger) == ["running", "queued", "skipped", "skipped"]
    assert {run["reason"] for run in skipped} == {
        f"{of_slot(waiting)} was already waiting for its turn"
    }
    assert skipped[0]["finished_at"] == minutes(2.6)


async def test_max_waiting_is_the_number_of_slots_that_may_wait(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", overlap="wait", max_waiting=3))
    for n in range(5):
        await fire(ledger, loaded, minutes(n + 0.6), Capacity(5, 5))
    *_, newest, skipped = await by_slot(ledger)
    assert await states(ledger) == ["running", "queued", "queued", "queued", "skipped"]
    assert skipped["reason"] == f"{of_slot(newest)} (and 2 more) was already waiting for its turn"
    for n in range(3):
        (slot,) = await running(ledger)
        (run,) = await rows(ledger, slot=slot)
        await end(ledger, run["id"], minutes(5))
        (claimed,) = await claim(ledger, loaded, minutes(5))
        assert claimed.slot == minutes(n + 1.5)


async def test_slots_fired_late_in_one_transaction_wait_for_each_other(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", "*/20 * * * * *", overlap="wait"))
    await fire(ledger, loaded, START + timedelta(seconds=50), Capacity(5, 5))
    assert await states(ledger) == ["running", "queued", "skipped"]


async def test_a_slot_waits_for_the_retries_of_the_previous_slot_and_a_manual_run_does_not(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", overlap="wait"))
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    (first,) = await rows(ledger)
    await end(ledger, first["id"], minutes(1), RunState.RETRYING, due_at=minutes(3))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    assert await states(ledger) == ["retrying", "queued"]
    assert await claim(ledger, loaded, minutes(2)) == []
    by_hand = new("tick", due_at=minutes(2), created_at=minutes(2))
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [by_hand])
    assert [run.id for run in await claim(ledger, loaded, minutes(2.1))] == [by_hand.id]
    await end(ledger, by_hand.id, minutes(2.2))
    (again,) = await claim(ledger, loaded, minutes(3))
    assert (again.id, again.attempt) == (first["id"], 2)
    await end(ledger, first["id"], minutes(3.1))
    assert [run.slot for run in await claim(ledger, loaded, minutes(3.2))] == [minutes(1.5)]


async def test_a_waiting_slot_does_not_delay_other_tasks(ledger: Database) -> None:
    loaded = await know(
        ledger, make_task("tick", overlap="wait", priority=100), make_task("other", None)
    )
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new("other", due_at=minutes(1))])
    assert [run.task for run in await claim(ledger, loaded, minutes(2), limit=1)] == ["other"]


async def test_with_several_lanes_a_run_between_two_attempts_keeps_its_place_before_later_slots(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", overlap="wait", max_running=2, max_waiting=2))
    between = {"state": "retrying", "due_at": minutes(9), "attempt": 1}
    at = [minutes(n + 0.5) for n in range(3)]
    slots = [
        new("tick", origin="schedule", slot=slot, rank=Rank.ON_TIME, due_at=slot) for slot in at
    ]
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [replace(slots[0], **between), *slots[1:]])
    assert [run.slot for run in await claim(ledger, loaded, minutes(3))] == [at[1]]
    assert await claim(ledger, loaded, minutes(3)) == []


# max_running


async def test_a_queue_with_lanes_starts_runs_that_a_clock_ahead_has_made(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", max_running=2))
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new("tick", due_at=minutes(60))])
    assert len(await claim(ledger, loaded, minutes(1))) == 1


@pytest.mark.parametrize("overlap", ["skip", "wait", "allow", "replace"])
async def test_max_running_limits_concurrent_runs_with_each_overlap_policy(
    ledger: Database, overlap: str
) -> None:
    loaded = await know(ledger, make_task("tick", overlap=overlap, max_running=2))
    for n in range(5):
        await fire(ledger, loaded, minutes(n + 0.6), Capacity(9, 9))
        await claim(ledger, loaded, minutes(n + 0.7))
    after = {
        "skip": ["skipped", "skipped", "skipped"],
        "wait": ["queued", "skipped", "skipped"],
        "allow": ["queued", "queued", "queued"],
        "replace": ["cancelled", "queued", "queued"],
    }
    assert await states(ledger) == ["running", "running", *after[overlap]]
    assert {run["lane"] for run in await rows(ledger, state="running")} == {1, 2}


async def test_the_reason_names_a_run_when_several_are_in_the_way(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", max_running=2))
    for n in range(3):
        await fire(ledger, loaded, minutes(n + 0.6), Capacity(9, 9))
    first, _, skipped = await by_slot(ledger)
    assert skipped["reason"] == f"{of_slot(first)} (and 1 more) was still running"


async def test_a_run_takes_any_empty_lane_and_its_retry_may_take_another_one(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("many", None, overlap="allow", max_running=3))
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new("many", due_at=START) for _ in range(6)])
    first = await claim(ledger, loaded, minutes(1))
    assert len(first) == 3 and await claim(ledger, loaded, minutes(1)) == []
    lane = {run["id"]: run["lane"] for run in await rows(ledger, state="running")}
    assert sorted(lane.values()) == [1, 2, 3]
    await end(ledger, first[1].id, minutes(1), RunState.RETRYING, due_at=minutes(2))
    (second,) = await claim(ledger, loaded, minutes(1.5))
    (row,) = await rows(ledger, id=second.id)
    assert row["lane"] == lane[first[1].id]
    await end(ledger, first[0].id, minutes(2))
    (again,) = await claim(ledger, loaded, minutes(3), limit=1)
    assert again.id != first[0].id and len(await rows(ledger, state="running")) == 3
    while again.id != first[1].id:
        await end(ledger, again.id, minutes(4))
        (again,) = await claim(ledger, loaded, minutes(4), limit=1)
    (row,) = await rows(ledger, id=again.id)
    assert (again.attempt, row["lane"]) == (2, lane[first[0].id])


async def test_the_database_refuses_a_lane_that_another_node_has_taken(ledger: Database) -> None:
    loaded = await know(ledger, make_task("many", None, max_running=2))
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new("many", due_at=START) for _ in range(3)])
    await claim(ledger, loaded, minutes(1), limit=1)
    left = [run["id"] for run in await rows(ledger, state="queued")]
    with pytest.raises(IntegrityError):
        async with ledger.engine.begin() as connection:
            await transitions.claim(connection, left, OTHER, minutes(1), {left[0]: 2, left[1]: 1})
    assert len(await rows(ledger, state="running")) == 1


async def test_two_nodes_together_never_run_more_than_max_running(
    ledger: Database, ledger_url: str
) -> None:
    loaded = await know(ledger, make_task("many", None, max_running=3))
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new("many", due_at=START) for _ in range(40)])
    other = Database(ledger_url, setting="LEDGER_URL")
    most = 0
    while len(await rows(ledger, state="succeeded")) < 40:
        await asyncio.gather(
            *(
                claim(database, loaded, minutes(1), node=node)
                for database, node in ((ledger, NODE), (other, OTHER))
            ),
            return_exceptions=True,
        )
        held = await rows(ledger, state="running")
        most = max(most, len(held))
        for run in held:
            await end(ledger, run["id"], minutes(1))
    await other.dispose()
    assert most == 3


@pytest.mark.parametrize(("before", "after", "ran"), [(3, 2, 0), (1, 3, 2), (3, None, 0)])
async def test_max_running_may_change_while_runs_are_going_on(
    ledger: Database, before: int, after: int | None, ran: int
) -> None:
    loaded = await know(ledger, make_task("many", None, max_running=before))
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new("many", due_at=START) for _ in range(6)])
    first = await claim(ledger, loaded, minutes(1))
    TaskRegistry.clear()
    loaded = {"many": make_task("many", None, max_running=after)}
    assert len(await claim(ledger, loaded, minutes(2))) == ran
    limit = after or 1
    order = list(first)
    for _ in range(len(order)):
        await end(ledger, order.pop(0).id, minutes(3))
        order += await claim(ledger, loaded, minutes(3))
        assert len(await rows(ledger, state="running")) <= max(limit, len(first) - 1)
    assert len(await rows(ledger, state="running")) == limit


async def test_a_firing_starts_runs_only_in_empty_lanes(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", max_running=2))
    async with ledger.engine.begin() as connection:
        by_hand = [
            new("tick", state="running", node=OTHER, attempt=1, lane=lane) for lane in (1, 2)
        ]
        await runs.insert(connection, by_hand)
    assert (await fire(ledger, loaded, minutes(0.6), Capacity(9, 9))).claimed == []
    await end(ledger, by_hand[0].id, minutes(1))
    assert len((await fire(ledger, loaded, minutes(1.6), Capacity(9, 9))).claimed) == 1


# replace


async def test_replace_requests_the_end_of_the_active_run_and_the_new_slot_waits_for_it(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", overlap="replace"))
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    old, young = await by_slot(ledger)
    assert (old["state"], young["state"]) == ("running", "queued")
    assert old["cancel_reason"] == f"{of_slot(young)} replaced it"
    assert await claim(ledger, loaded, minutes(1.7)) == []
    await end(ledger, old["id"], minutes(1.8), RunState.CANCELLED, reason=old["cancel_reason"])
    assert [run.id for run in await claim(ledger, loaded, minutes(1.9))] == [young["id"]]


async def test_a_queued_run_is_replaced_at_once_by_the_newest_slot(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", overlap="replace"))
    await fire(ledger, loaded, minutes(0.6))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    old, young = await by_slot(ledger)
    assert (old["state"], old["reason"]) == ("cancelled", f"{of_slot(young)} replaced it")
    assert young["state"] == "running"


async def test_a_run_between_two_attempts_is_replaced(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", overlap="replace"))
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    (old,) = await rows(ledger)
    await end(ledger, old["id"], minutes(1), RunState.RETRYING, due_at=minutes(9))
    await fire(ledger, loaded, minutes(1.6), Capacity(5, 5))
    assert await states(ledger) == ["cancelled", "running"]


async def test_of_slots_fired_late_in_one_transaction_the_newest_replaces_the_others(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", "*/10 * * * * *", overlap="replace"))
    fired = await fire(ledger, loaded, START + timedelta(seconds=30), Capacity(5, 5))
    assert await states(ledger) == ["cancelled", "cancelled", "running"]
    first, second, third = await by_slot(ledger)
    assert (first["reason"], second["reason"]) == (
        f"{of_slot(second)} replaced it",
        f"{of_slot(third)} replaced it",
    )
    assert [run.id for run in fired.claimed] == [third["id"]]


async def test_the_oldest_slot_is_replaced_even_if_a_younger_one_has_started(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", overlap="replace", max_running=2))
    await fire(ledger, loaded, minutes(0.6), Capacity(0, 0))
    await fire(ledger, loaded, minutes(1.6), Capacity(1, 1))
    assert await states(ledger) == ["queued", "running"]
    await fire(ledger, loaded, minutes(2.6), Capacity(0, 0))
    old, _, young = await by_slot(ledger)
    assert await states(ledger) == ["cancelled", "running", "queued"]
    assert old["reason"] == f"{of_slot(young)} replaced it"
    assert (await rows(ledger, state="running"))[0]["cancel_reason"] is None


async def test_a_manual_run_is_not_replaced(ledger: Database) -> None:
    loaded = await know(ledger, make_task("tick", overlap="replace"))
    by_hand = new("tick", state="running", node=OTHER, attempt=1)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [by_hand])
    await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    (row,) = await rows(ledger, id=by_hand.id)
    assert (row["state"], row["cancel_reason"]) == ("running", None)


@pytest.mark.parametrize("is_sync", [False, True])
async def test_the_node_of_a_replaced_run_notices_it_within_two_ledger_polls(
    ledger: Database, is_sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It polls once a second. (One poll may be under way, and another may happen while the end is
    written.)
    """
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def run(self: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    def sync(self: Any) -> None:
        loop.call_soon_threadsafe(begun.set)
        while not current_run().cancelled:
            time.sleep(0.01)

    loaded = await know(ledger, make_task("tick", overlap="replace", run=sync if is_sync else run))
    engine = LocalEngine(ledger, loaded, NODE)
    looks, on_changes = [], engine.on_changes
    monkeypatch.setattr(
        engine, "on_changes", lambda changes: looks.append(changes) or on_changes(changes)
    )
    fired = await fire(ledger, loaded, minutes(0.6), Capacity(5, 5))
    engine.launch(fired.claimed)
    engine.start()
    async with heart_of(engine, ledger):
        await begun.wait()
        with clock.moved(minutes(1.6)):
            looks.clear()
            await fire(ledger, loaded, minutes(1.6), Capacity(0, 0), node=OTHER)

            async def is_replaced() -> bool:
                return await states(ledger) == ["cancelled", "running"]

            await until(is_replaced)
        assert len(looks) <= 3
    old, young = await by_slot(ledger)
    assert old["reason"] == f"{of_slot(young)} replaced it"
    assert [attempt["outcome"] for attempt in await rows(ledger, tables.attempts)] == ["cancelled"]
    await engine.drain(0)
    await engine.stop()


# By hand


async def test_a_run_by_hand_takes_an_empty_lane_or_waits_for_one(ledger: Database) -> None:
    loaded = await know(ledger, make_task("many", None, max_running=2))
    held = new("many", state="running", node=OTHER, attempt=1, lane=1)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [held])
    engine = LocalEngine(ledger, loaded, NODE, pools=())
    engine.start()
    row = await ManualRun(ledger, engine, loaded["many"], NODE).execute({}, None, None)
    assert (row["state"], row["lane"]) == ("succeeded", 2)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [new("many", state="running", node=OTHER, attempt=1, lane=2)])
    waiting = asyncio.create_task(
        ManualRun(ledger, engine, loaded["many"], NODE).execute({}, None, None)
    )
    await asyncio.sleep(0.1)
    assert len(await rows(ledger, state="running")) == 2
    await end(ledger, held.id, minutes(1))
    row = await waiting
    assert (row["state"], row["lane"]) == ("succeeded", 1)
    await engine.stop()


async def test_the_retry_of_a_run_by_hand_waits_while_another_run_of_the_task_is_running(
    ledger: Database,
) -> None:
    in_the_way = new("tick", state="running", node=OTHER, attempt=1)

    async def run(self: Any) -> None:
        if current_run().attempt == 1:
            raise ValueError("once")

    loaded = await know(
        ledger, make_task("tick", None, run=run, retry=Retry(attempts=2, wait=0.3, jitter=0))
    )
    engine = LocalEngine(ledger, loaded, NODE, pools=())
    engine.start()
    by_hand = ManualRun(ledger, engine, loaded["tick"], NODE)
    waiting = asyncio.create_task(by_hand.execute({}, None, None))

    async def is_between() -> bool:
        return bool(await rows(ledger, state="retrying"))

    await until(is_between)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [in_the_way])
    with clock.moved(minutes(1)):
        await asyncio.sleep(0.5)
        assert [run["id"] for run in await rows(ledger, state="running")] == [in_the_way.id]
        await end(ledger, in_the_way.id, minutes(1))
        row = await waiting
    assert (row["state"], row["attempt"]) == ("succeeded", 2)
    await engine.stop()


# A long catch-up


@pytest.mark.parametrize("overlap", ["skip", "wait", "replace"])
async def test_a_catch_up_of_ten_thousand_slots_neither_delays_nor_skips_a_slot_on_time(
    ledger: Database, overlap: str
) -> None:
    loaded = await know(
        ledger,
        make_task("tick", missed=Missed("all", max_age=timedelta(days=30)), overlap=overlap),
        make_task("other"),
    )
    days = timedelta(minutes=10_000)
    await fire(ledger, loaded, START + days, Capacity(0, 0))
    caught_up = await rows(ledger, task="tick", catch_up=True)
    assert len(caught_up) == 9_999
    today = START + days - timedelta(seconds=30)
    (claimed,) = [run for run in await claim(ledger, loaded, START + days) if run.task == "tick"]
    assert claimed.slot == today
    await end(ledger, claimed.id, START + days)
    (old,) = [run for run in await claim(ledger, loaded, START + days) if run.task == "tick"]
    assert old.slot == START + timedelta(seconds=30)
    await fire(ledger, loaded, START + days + MINUTE, Capacity(5, 5))
    (row,) = await rows(ledger, task="tick", slot=today + MINUTE)
    assert (row["state"], row["rank"]) == ("queued", Rank.ON_TIME)
    await end(ledger, old.id, START + days + MINUTE)
    (claimed,) = [
        run for run in await claim(ledger, loaded, START + days + MINUTE) if run.task == "tick"
    ]
    assert claimed.slot == today + MINUTE


async def test_a_firing_does_not_read_queued_runs_of_a_catch_up(ledger: Database) -> None:
    make_task("tick")
    backlog = [
        new("tick", origin="schedule", slot=minutes(-n), rank=Rank.CATCH_UP, catch_up=True)
        for n in range(50)
    ]
    on_time = new("tick", origin="schedule", slot=minutes(1), rank=Rank.ON_TIME)
    async with ledger.engine.begin() as connection:
        await runs.insert(connection, [*backlog, on_time])
        assert [run.id for run in (await runs.active(connection, ["tick"]))["tick"]] == [on_time.id]


async def test_claiming_tasks_without_limits_takes_two_statements(ledger: Database) -> None:
    loaded = await know(ledger, make_task("plain"), make_task("free", overlap="allow"))
    await fire(ledger, loaded, minutes(0.6))
    statements: list[str] = []

    def keep(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(ledger.engine.sync_engine, "before_cursor_execute", keep)
    assert len(await claim(ledger, loaded, minutes(1))) == 2
    event.remove(ledger.engine.sync_engine, "before_cursor_execute", keep)
    assert len(statements) == 2


async def test_a_run_of_another_lane_takes_the_first_lane_when_there_is_only_one(
    ledger: Database,
) -> None:
    loaded = await know(ledger, make_task("tick", None))
    async with ledger.engine.begin() as connection:
        await runs.insert(
            connection, [new("tick", due_at=START, lane=3), new("tick", due_at=START, lane=2)]
        )
    assert len(await claim(ledger, loaded, minutes(1))) == 1
    (row,) = await rows(ledger, state="running")
    assert row["lane"] == 1
    async with ledger.engine.begin() as connection:
        with pytest.raises(IntegrityError):
            await connection.execute(update(tables.runs).values(state="running", attempt=1, lane=1))
