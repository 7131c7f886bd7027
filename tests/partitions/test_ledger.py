"""Partitioned runs in the ledger: lanes, races with a cancel and with a newer holder, overlap,
pauses and pruning.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from batch_system import PartitionedTask, TaskRegistry, clock
from batch_system.batch.firing import pauses, task_sync
from batch_system.batch.ledger import transitions
from batch_system.batch.ledger.attempts import Outcome
from batch_system.batch.ledger.parts import PartsGate, Split, Tally, tallies
from batch_system.batch.ledger.runs import insert_group
from batch_system.batch.ledger.states import Rank, RunState
from batch_system.batch.ledger.tables import attempts, pruned, runs
from batch_system.batch.queue import claiming, enqueue, unserved
from batch_system.batch.queue.cancel import request_cancel
from batch_system.batch.queue.claiming import Capacity
from batch_system.batch.queue.requests import Startable
from batch_system.batch.queue.retry import retry
from batch_system.batch.retention.pruning import Pruner
from batch_system.batch.retention.retention import Keep
from batch_system.batch.tasks.registry import Task
from batch_system.database.engine import Database
from batch_system.errors import WrongState
from tests.batch.ledger_world import NODE, make_task, rows
from tests.batch.test_runs import new
from tests.waiting.conftest import still_clock as still_clock
from tests.waiting.world import START, Waits

SPLIT = Split(PartsGate.PARTS, "sums/parts", [{"n": 1}, {"n": 2}, {"n": 3}])


def sums(**attributes: Any) -> Task:
    async def nothing(self: Any, *_: Any) -> Any: ...

    own = {
        "name": "sums",
        "schedule": "0 1 * * *",
        "parallel": 2,
        "split": nothing,
        "work": nothing,
    }
    cls = type("Sums", (PartitionedTask,), {**own, "work": lambda self, part: None, **attributes})
    TaskRegistry.register(cls)
    return TaskRegistry.get("sums")


class Sums(Waits):
    async def take(self, most: int = 10) -> list[str]:
        """The ids of the runs that a node claims, which has room for so many."""
        async with self.ledger.engine.begin() as connection:
            claimed, _ = await claiming.take(connection, self.tasks, NODE, Capacity(most, most))
        return [run.id for run in claimed]

    async def begin(self) -> str:
        """A run that is running."""
        async with self.ledger.engine.begin() as connection:
            run = await enqueue.enqueue(
                connection, Startable.of(self.tasks["sums"]), None, None, "ann"
            )
        assert await self.take() == [run]
        return run

    async def split(
        self, run: str, split: Split = SPLIT, fence: int | None = None
    ) -> list[Outcome]:
        """The attempt of a run ends with its split. Returns the outcomes that were refused."""
        (row,) = await rows(self.ledger, id=run)
        now = clock.now()
        given = (
            run,
            row["fence"] if fence is None else fence,
            RunState.WAITING,
            "split",
            row["attempt"],
            NODE,
            "sums",
        )
        async with self.ledger.engine.begin() as connection:
            return await transitions.finish(connection, [Outcome(*given, now, now, split=split)])

    async def parts(self, run: str, **equal: Any) -> list[dict[str, Any]]:
        return sorted(
            await rows(self.ledger, awaited_by=run, **equal), key=lambda row: int(row["part"])
        )

    async def end_parts(self, run: str) -> None:
        """A running run is split, and its parts succeed."""
        await self.split(run)
        for part in await self.parts(run):
            await self.start(part["id"])
            await self.finish(part["id"])
        assert await self.look() == 1

    async def started(self) -> list[str]:
        """The ids of the runs that are running."""
        return [row["id"] for row in await rows(self.ledger, state="running")]

    async def row(self, run: str) -> dict[str, Any]:
        (row,) = await rows(self.ledger, id=run)
        return dict(row)


@pytest.fixture
async def world(ledger: Database) -> AsyncIterator[Sums]:
    enqueue.use_service(ledger, lambda: None)
    world = Sums(ledger)
    await world.know(sums())
    yield world
    enqueue.use_no_service()


async def test_the_parts_are_stored_with_the_outcome_and_run_in_their_own_lanes(
    world: Sums,
) -> None:
    run = await world.begin()
    assert await world.split(run) == []
    row = await world.row(run)
    assert (row["state"], row["gate"], row["finished_at"], row["attempt"]) == (
        "waiting",
        "parts",
        None,
        1,
    )
    parts = await world.parts(run)
    assert [(part["params"], part["state"], part["origin"]) for part in parts] == [
        ({"n": n}, "queued", "part") for n in (1, 2, 3)
    ]
    assert [part["id"] for part in parts] == sorted(part["id"] for part in parts)
    assert await world.take() == [part["id"] for part in parts[:2]]
    assert await world.take() == []


async def test_it_keeps_its_lane_so_that_no_second_run_begins(world: Sums) -> None:
    first = await world.begin()
    await world.split(first)
    async with world.ledger.engine.begin() as connection:
        second = await enqueue.enqueue(
            connection, Startable.of(world.tasks["sums"]), None, None, "bob"
        )
    taken = await world.take()
    assert second not in taken
    for part in await world.parts(first):
        if part["state"] == "queued":
            await world.start(part["id"])
        await world.finish(part["id"])
    assert await world.look() == 1
    assert await world.take() == [first]
    row = await world.row(first)
    assert (row["state"], row["attempt"], row["rank"]) == ("running", 1, Rank.JOINING)
    await world.finish(first)
    assert await world.take() == [second]


async def test_it_keeps_its_lane_after_its_parts_until_it_goes_on(world: Sums) -> None:
    run = await world.begin()
    await world.end_parts(run)
    async with world.ledger.engine.begin() as connection:
        await enqueue.enqueue(connection, Startable.of(world.tasks["sums"]), None, None, "bob")
    await world.fire(START + timedelta(minutes=30), room=10)
    assert await world.started() == []  # a slot would begin when it is fired, if the lane were free
    assert await world.take() == [run]


async def test_a_pause_leaves_it_its_lane_after_its_parts(world: Sums) -> None:
    run = await world.begin()
    await world.end_parts(run)
    clock.advance(timedelta(minutes=1))
    async with world.ledger.engine.begin() as connection:
        await pauses.pause(connection, "sums", "ann", world.tasks)
    clock.advance(timedelta(minutes=1))
    async with world.ledger.engine.begin() as connection:
        later = await enqueue.enqueue(
            connection, Startable.of(world.tasks["sums"]), None, None, "bob"
        )
    assert await world.take() == []
    async with world.ledger.engine.begin() as connection:
        await pauses.resume(connection, "sums")
    assert await world.take() == [run]
    await world.finish(run)
    assert await world.take() == [later]


async def test_it_keeps_its_lane_beside_others_and_when_there_are_fewer(world: Sums) -> None:
    await world.know(sums(max_running=2))
    first, second = await world.begin(), await world.begin()
    for run in (first, second):
        await world.end_parts(run)
    async with world.ledger.engine.begin() as connection:
        await enqueue.enqueue(connection, Startable.of(world.tasks["sums"]), None, None, "bob")
    await world.know(sums())
    for run, lane in ((first, 1), (second, 2)):
        assert (await world.take(), await world.take()) == ([run], [])
        assert (await world.row(run))["lane"] == lane
        await world.finish(run)


@pytest.mark.parametrize("max_running", [None, 1])
async def test_a_join_that_is_tried_again_goes_behind_a_run_that_has_its_lane(
    world: Sums, max_running: int | None
) -> None:
    await world.know(sums(max_running=max_running, parallel=1))
    first = await world.begin()
    await world.end_parts(first)
    assert await world.take() == [first]
    await world.finish(first, RunState.RETRYING, due_at=clock.now() + timedelta(seconds=30))
    second = await world.begin()
    clock.advance(timedelta(minutes=1))
    await world.end_parts(second)
    assert await world.take() == [second]
    await world.finish(second)
    assert await world.take() == [first]


async def test_a_cancel_during_the_split_wins(world: Sums) -> None:
    run = await world.begin()
    async with world.ledger.engine.begin() as connection:
        await transitions.cancel(connection, [run], "cancelled by ann", "ann", clock.now())
    assert await world.split(run) == []
    row = await world.row(run)
    assert (row["state"], row["gate"], await world.parts(run)) == ("cancelled", None, [])


async def test_a_split_of_a_lost_attempt_stores_no_parts(world: Sums) -> None:
    run = await world.begin()
    assert len(await world.split(run, fence=0)) == 1
    assert (await world.row(run))["state"] == "running"
    assert await world.parts(run) == []


async def test_a_split_whose_reply_was_lost_is_stored_once(world: Sums) -> None:
    run = await world.begin()
    assert await world.split(run) == await world.split(run) == []
    assert len(await world.parts(run)) == 3


async def test_parts_that_fail_close_the_run_and_a_retry_queues_only_them(world: Sums) -> None:
    run = await world.begin()
    await world.split(run)
    for part in await world.parts(run):
        await world.start(part["id"])
        state = RunState.SUCCEEDED if part["part"] == 2 else RunState.FAILED
        error = {"type": "OSError", "fingerprint": "OSError:x"}
        await world.finish(
            part["id"], state, count=10, total=20, fingerprint="f", error=error, part=part["part"]
        )
    assert {part["fingerprint"] for part in await world.parts(run)} == {None}
    assert await world.look() == 1
    row = await world.row(run)
    assert (row["state"], row["reason"], row["count"], row["total"]) == (
        "failed",
        "2 of 3 parts failed: 1, 3",
        30,
        60,
    )
    assert (row["fingerprint"], row["noticed_at"]) == ("OSError:x", None)
    async with world.ledger.engine.begin() as connection:
        await retry(connection, run, "ann")
    assert await world.take() == [run]
    assert await world.split(run, Split(PartsGate.PARTS, "sums/parts")) == []
    assert [part["state"] for part in await world.parts(run)] == ["queued", "succeeded", "queued"]
    row = await world.row(run)
    assert (row["state"], row["attempt"]) == ("waiting", 2)


@pytest.mark.parametrize("state", [RunState.SUCCEEDED, RunState.FAILED])
async def test_parts_with_totals_that_no_column_holds_together_go_on(
    world: Sums, state: RunState
) -> None:
    """Before, no run that waited was opened any more: each transaction of the opener failed."""
    run = await world.begin()
    await world.split(run)
    for part in await world.parts(run):
        await world.start(part["id"])
        await world.finish(part["id"], state, count=1_000_001, total=sys.maxsize)
    assert await world.look() == 1
    row = await world.row(run)
    assert (row["count"], row["total"]) == (3_000_003, sys.maxsize)
    async with world.ledger.engine.begin() as connection:
        assert (await tallies(connection, [run]))[run] == Tally({state: 3}, 3_000_003, sys.maxsize)


async def test_a_run_is_not_retried_while_a_part_is_active(world: Sums) -> None:
    run = await world.begin()
    await world.split(run)
    await world.start((await world.parts(run))[0]["id"])
    async with world.ledger.engine.begin() as connection:
        await transitions.cancel(connection, [run], "cancelled by ann", "ann", clock.now())
    assert [(part["state"], part["cancel_by"]) for part in await world.parts(run)] == [
        ("running", "ann"),
        ("cancelled", "ann"),
        ("cancelled", "ann"),
    ]
    async with world.ledger.engine.begin() as connection:
        with pytest.raises(WrongState, match=f"the run {run} is waiting: it has not ended"):
            await retry(connection, run, "ann")
        # As it was in older versions.
        await connection.execute(update(runs).where(runs.c.id == run).values(state="cancelled"))
    async with world.ledger.engine.begin() as connection:
        with pytest.raises(WrongState, match=f"parts of the run {run} have not ended yet"):
            await retry(connection, run, "ann")


async def test_parts_that_no_service_runs_fail_with_their_run_and_are_not_noticed_by_themselves(
    world: Sums, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await world.begin()
    await world.split(run)
    async with world.ledger.engine.begin() as connection:
        assert await task_sync.remove_gone(connection, ["sums"], _nobody) == ["sums"]
    monkeypatch.setattr(unserved, "PAUSE_SECONDS", 0)
    clock.advance(unserved.GRACE + timedelta(minutes=1))
    assert await unserved.fail_unserved(world.ledger) == {"sums": 3}
    parts = await world.parts(run)
    assert [(part["state"], part["fingerprint"], part["noticed_at"]) for part in parts] == [
        ("failed", None, clock.now())
    ] * 3
    assert await world.look() == 1
    row = await world.row(run)
    assert (row["state"], row["fingerprint"], row["noticed_at"]) == ("failed", "parts", None)


async def test_parts_of_a_task_that_is_not_partitioned_any_more_fail_with_their_run(
    world: Sums, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unserved, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(unserved, "BATCH", 1)
    run = await world.begin()
    await world.split(run)
    first, second, _ = await world.parts(run)
    assert await world.take() == [first["id"], second["id"]]
    await world.finish(second["id"], RunState.RETRYING, due_at=clock.now())
    TaskRegistry.clear()
    before, world.tasks = world.tasks, {}
    await world.know(make_task("sums", "0 1 * * *"))
    clock.advance(unserved.GRACE_OF_PARTS)
    assert await unserved.fail_left_parts(world.ledger, world.tasks) == {}
    clock.advance(timedelta(minutes=1))
    # A node with the previous code is executing it.
    assert await unserved.fail_left_parts(world.ledger, world.tasks) == {}
    await world.finish(first["id"])
    assert await world.take() == []
    assert await unserved.fail_left_parts(world.ledger, before) == {}
    assert await unserved.fail_left_parts(world.ledger, world.tasks) == {"sums": 2}
    assert [part["reason"] for part in await world.parts(run)] == [
        None,
        *[unserved.REASON_OF_PARTS] * 2,
    ]
    assert await world.look() == 1
    row = await world.row(run)
    assert (row["state"], row["reason"]) == ("failed", "2 of 3 parts failed: 2, 3")
    async with world.ledger.engine.begin() as connection:
        await retry(connection, run, "ann")
    assert await world.take() == [run]


async def _nobody(_: AsyncConnection) -> set[str]:
    """The tasks that some live node has."""
    return set()


async def test_fail_fast_cancels_the_other_parts_once(world: Sums) -> None:
    run = await world.begin()
    await world.split(run, Split(PartsGate.FAIL_FAST, "sums/parts", SPLIT.params))
    first, second, _ = await world.parts(run)
    assert await world.take() == [first["id"], second["id"]]
    assert await world.look() == 0
    await world.finish(second["id"], RunState.FAILED)
    assert await world.look() == 1
    assert await world.look() == 0
    states = [(part["state"], part["cancel_reason"]) for part in await world.parts(run)]
    because = "part 2 did not succeed"
    assert states == [("running", because), ("failed", None), ("cancelled", because)]
    await world.finish(first["id"], RunState.INTERRUPTED, due_at=clock.now())
    assert await world.look() == 1
    assert (await world.row(run))["reason"] == "1 of 3 parts failed: 2; 2 cancelled"


async def test_a_slot_is_skipped_while_the_run_before_it_waits_for_its_parts(world: Sums) -> None:
    at_one = START + timedelta(minutes=30)
    await world.fire(at_one)
    first = (await world.run_of("sums", at_one))["id"]
    await world.start(first)
    await world.split(first)
    await world.fire(at_one + timedelta(days=1))
    second = await world.run_of("sums", at_one + timedelta(days=1))
    assert second["state"] == "skipped"
    assert first in second["reason"]


async def test_a_pause_holds_the_parts_also_of_a_run_that_is_split_after_it(world: Sums) -> None:
    run = await world.begin()
    clock.advance(timedelta(minutes=1))
    async with world.ledger.engine.begin() as connection:
        await pauses.pause(connection, "sums", "ann", world.tasks)
    clock.advance(timedelta(minutes=1))
    await world.split(run)
    assert await world.take() == []


async def test_parts_are_pruned_with_their_run_and_only_then(
    world: Sums, application: Database
) -> None:
    run = await world.begin()
    await world.split(run)
    for part in await world.parts(run):
        await world.start(part["id"])
        await world.finish(part["id"])
    await world.look()
    clock.advance(timedelta(days=100))
    pruner = Pruner(world.ledger, application, Keep(days=30, per_task=1, events_days=30), pause=0)
    await pruner.prune()
    assert len(await world.parts(run)) == 3
    await world.start(run)
    await world.finish(run)
    clock.advance(timedelta(days=100))
    other = await world.begin()
    counts = await pruner.prune()
    assert counts["runs"] == 1
    assert [row["id"] for row in await rows(world.ledger)] == [other]
    assert [await rows(world.ledger, table) for table in (attempts, pruned)] == [[], []]


async def test_a_cancelled_run_keeps_its_lane_until_its_running_parts_are_over(world: Sums) -> None:
    run = await world.begin()
    await world.split(run)
    assert len(await world.take()) == 2
    async with world.ledger.engine.begin() as connection:
        second = await enqueue.enqueue(
            connection, Startable.of(world.tasks["sums"]), None, None, "bob"
        )
        assert await request_cancel(connection, run, "cancelled by ann", "ann") == RunState.WAITING
    for number in (2, 1):
        assert (await world.take(), await world.look()) == ([], 0)
        running = await world.parts(run, state="running")
        assert [part["cancel_reason"] for part in running] == ["cancelled by ann"] * number
        assert (await world.row(run))["state"] == "waiting"
        await world.finish(running[0]["id"])
    assert await world.look() == 1
    row = await world.row(run)
    assert (row["state"], row["reason"], row["cancel_by"]) == (
        "cancelled",
        "cancelled by ann",
        "ann",
    )
    assert row["finished_at"] is not None
    assert await world.take() == [second]


async def test_a_cancelled_run_is_kept_while_one_of_its_parts_is_running(
    world: Sums, application: Database
) -> None:
    run = await world.begin()
    await world.split(run)
    first, *_ = await world.parts(run)
    await world.start(first["id"])
    async with world.ledger.engine.begin() as connection:
        await transitions.cancel(connection, [run], "cancelled by ann", "ann", clock.now())
    clock.advance(timedelta(days=100))
    pruner = Pruner(world.ledger, application, Keep(days=30, per_task=1, events_days=30), pause=0)
    assert (await pruner.prune())["runs"] == 0
    await world.finish(first["id"], RunState.INTERRUPTED, due_at=clock.now())
    assert [part["state"] for part in await world.parts(run)] == ["cancelled"] * 3
    assert await world.look() == 1
    await world.begin()
    clock.advance(timedelta(days=100))
    assert (await pruner.prune())["runs"] == 1
    assert await world.parts(run) == []


async def test_a_part_that_failed_is_queued_again_while_others_go_on(world: Sums) -> None:
    run = await world.begin()
    await world.split(run)
    first, *_ = await world.parts(run)
    await world.start(first["id"])
    await world.finish(first["id"], RunState.FAILED)
    async with world.ledger.engine.begin() as connection:
        await retry(connection, first["id"], "ann")
    assert [part["state"] for part in await world.parts(run)] == ["queued"] * 3


async def test_members_of_its_group_are_not_parts(world: Sums) -> None:
    """A partitioned run may be the follow-up of a group: both are runs that it waits for, one after
    the other.
    """
    run = await world.begin()
    member = new("sums", exclusive=None, state="failed", awaited_by=run, parent=run)
    async with world.ledger.engine.begin() as connection:
        await insert_group(connection, [member])
    await world.split(run, Split(PartsGate.PARTS, "sums/parts", []))
    assert await world.look() == 1
    assert (await world.row(run))["state"] == "queued"
